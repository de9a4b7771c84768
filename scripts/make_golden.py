#!/usr/bin/env python3
"""Golden numbers: what Hugging Face computes for tiny models with random weights.

    pip install torch transformers peft safetensors numpy
    scripts/make_golden.py --out golden
    scripts/make_golden.py --out OTHER --families llama --seed 7 --hidden-size 96 --layers 3 --heads 6 --tied
    scripts/make_golden.py --out OTHER --families gemma2 gemma3_text --sliding-window 9 --layer-types ssf
    LORA_SB_GOLDEN=OTHER cargo test -p lora-sb-model -p lora-sb-tune golden

Writes a folder OUT/<family> for each family and OUT/manifest.json; golden/README.md tells what each file holds and how
to compare. A family takes the options given and its own defaults (golden/families.py) for the rest; one that none of
the families chosen has is an error. The same arguments and versions give the same bytes.
"""
import argparse
import hashlib
import json
import shutil
from pathlib import Path

import numpy, peft, safetensors, torch, transformers

from golden.compute import targets, write
from golden.draw import draw_batch, draw_model, generator
from golden.expected import sensitivity, write_expected, write_generate, write_model
from golden.families import FAMILIES, options
from golden.peft_methods import write_methods, write_peft
from golden.runs import draw_training, write_full_ft, write_lora, write_lora_sb, write_lora_xs
from golden.wide import widen

NUMBERS = {
    "seed": (int, None),
    "hidden_size": (int, None),
    "intermediate_size": (int, None),
    "layers": (int, None),
    "heads": (int, None),
    "kv_heads": (int, None),
    "head_dim": (int, None),
    "vocab_size": (int, None),
    "rank": (int, None),
    "length": (int, "tokens of a row of the inputs; training rows have 4 less"),
    "labels": (int, "classes of a classifier"),
    "rope_theta": (float, None),
    "rope_local_theta": (float, "of layers with a window"),
    "partial_rotary_factor": (float, "the part of a head that is turned"),
    "rms_norm_eps": (float, None),
    "layer_norm_eps": (float, None),
    "sliding_window": (int, None),
    "layer_types": (str, "letters repeated over the layers: s with a window, f without, as in sf"),
    "query_pre_attn_scalar": (int, "scores are divided by its root"),
    "attention_soft_cap": (float, None),
    "final_soft_cap": (float, None),
    "activation": (str, None),
}
SWITCHES = {"tied": "the head is the embedding", "attention_bias": None, "mlp_bias": None}


def arguments():
    """The output folder, the families, and the options given."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="OUT/<family> is replaced")
    p.add_argument("--families", nargs="+", default=["all"], choices=["all", *FAMILIES], metavar="FAMILY",
                   help="all, or some of " + ", ".join(FAMILIES))
    p.add_argument("--rope", choices=["none", "linear", "llama3"], help="rope scaling")
    users = lambda name: ", ".join(family for family in FAMILIES if name in FAMILIES[family].defaults)
    explain = lambda name, what: "; ".join(filter(None, [what, "of " + users(name)]))
    for name, (kind, what) in NUMBERS.items():
        p.add_argument("--" + name.replace("_", "-"), type=kind, help=explain(name, what))
    for name, what in SWITCHES.items():
        p.add_argument("--" + name.replace("_", "-"), action=argparse.BooleanOptionalAction, help=explain(name, what))
    given = {name: value for name, value in vars(p.parse_args()).items() if value is not None}
    out, families = given.pop("out"), given.pop("families")
    families = list(FAMILIES) if "all" in families else families
    for name in given:
        if not any(name in FAMILIES[family].defaults for family in families):
            p.error(f"no family chosen has --{name.replace('_', '-')}")
    if not 12 <= given.get("length", 24) <= 48:
        p.error(f"--length is {given['length']}; the tests take rows of 12 to 48 tokens")
    return out, families, given


def check(model, family, a):
    smallest = min(min(module.weight.shape) for module in targets(model, family).values())
    if not 1 <= a.rank <= smallest:
        raise SystemExit(f"--rank is {a.rank}; the smallest side of an adapted weight is {smallest}")
    if getattr(a, "sliding_window", 1) >= a.length:
        raise SystemExit(f"--sliding-window is {a.sliding_window}; rows of {a.length} tokens do not fill it")


def write_family(folder, name, a):
    """Everything of one family. Returns what meta.json holds."""
    family = FAMILIES[name]
    torch.manual_seed(a.seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    model = draw_model(family, a)
    check(model, family, a)
    wide = widen(model)
    inputs = draw_batch(family, a, 3, a.length, generator(a.seed, 1))
    batches = draw_training(model, wide, family, a)
    write_model(folder / "model", model)
    meta = {
        "family": name,
        "arguments": vars(a),
        "versions": {package.__name__: package.__version__
                     for package in (torch, transformers, peft, safetensors, numpy)},
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "f32_vs_f64": write_expected(folder, model, wide, inputs, batches),
    }
    if changes := sensitivity(family, a, model, inputs, meta["f32_vs_f64"]["logits_max_abs"]):
        meta["largest_change_of_a_logit"] = changes
    if family.kept:
        write(folder / "train_batches.safetensors",
              {f"batch{n}.{name}": value for n, batch in enumerate(batches) for name, value in batch.items()})
        meta |= {
            "lora_sb": write_lora_sb(folder, model, wide, family, batches, a),
            "lora_xs": write_lora_xs(folder, model, wide, family, batches, a),
            "lora": write_lora(folder, model, wide, family, batches, a),
            "full_ft": write_full_ft(folder, model, wide, family, batches),
            "peft_adapter": write_peft(folder, model, family, inputs, a),
        }
    if family.generates:
        meta["generate"] = write_generate(folder, model, family, a)
    if family.methods:
        write_methods(folder / "peft_methods", model, family, inputs, batches, a)
    return meta


def write_manifest(root):
    """The SHA-256 of every file of every family under `root`."""
    files = sorted(path for path in root.glob("*/**/*") if path.is_file())
    sums = {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (root / "manifest.json").write_text(json.dumps(sums, indent=1) + "\n")


def main():
    out, families, given = arguments()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name in families:
        print(f"{name} ...", flush=True)
        meta = write_family(out / name, name, options(FAMILIES[name], given))
        (out / name / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        print(json.dumps(meta, indent=1))
    write_manifest(out)


if __name__ == "__main__":
    main()
