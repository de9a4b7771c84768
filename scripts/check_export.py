#!/usr/bin/env python3
"""Compares `lora-sb` with the real PEFT and transformers in both directions: what either of them writes, the other loads.

    pip install torch transformers peft safetensors
    scripts/check_export.py save --model DIR --out OUT
    cargo run --release -p lora-sb-tune --example export_check -- --model=DIR --out=OUT
    scripts/check_export.py compare --model DIR --out OUT

`save` writes adapters by PEFT of LoRA, rsLoRA and DoRA with a scale that is not 1: of a language model also PiSSA,
converted to plain LoRA; of a sequence classifier with a trained head. `compare` then loads, for each method of `lora-sb`, its
export and its merged directory: the adapter's tensor names are exactly those that PEFT would save itself, base + adapter
gives our logits, and the merged directory, loaded without PEFT, gives them too. For each of PEFT's adapters it compares
the logits that we gave after importing it. Differences are those of logits; exit status 1 where one is above --tolerance
times the largest logit, or where a name differs.
"""
import argparse, os, sys, tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import peft
import torch
import transformers
from safetensors.torch import load_file

OPTIONS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
           "pissa": {"init_lora_weights": "pissa"}}
DECODER = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"]
ENCODER = ["query", "key", "value", "output.dense", "intermediate.dense"]


def classifies(path):
    architecture = (transformers.AutoConfig.from_pretrained(path).architectures or [""])[0]
    return "SequenceClassification" in architecture


def load(path):
    auto = transformers.AutoModelForSequenceClassification if classifies(path) else transformers.AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def shaken(parameter, stream):
    with torch.no_grad():
        parameter += 0.05 * torch.randn(parameter.shape, generator=stream) * max(parameter.abs().mean().item(), 0.1)


def save(a):
    classifier = classifies(a.model)
    for name, options in OPTIONS.items():
        if classifier and name == "pissa":
            continue  # PEFT's conversion leaves the head out of what it saves
        torch.manual_seed(a.seed)
        base = load(a.model)
        wanted = ENCODER if classifier else DECODER
        have = [module for module, _ in base.named_modules()]
        targets = [target for target in wanted if any(module.endswith("." + target) for module in have)]
        config = peft.LoraConfig(r=a.rank, lora_alpha=a.rank + 5, target_modules=targets,
                                 task_type="SEQ_CLS" if classifier else "CAUSAL_LM", **options)
        model = peft.get_peft_model(base, config)
        with tempfile.TemporaryDirectory() as start:
            if name == "pissa":
                # What the conversion subtracts: the adapter before training, as one that changes no weights.
                model.peft_config["default"].init_lora_weights = True
                model.save_pretrained(os.path.join(start, "start"))
                model.peft_config["default"].init_lora_weights = "pissa"
            stream = torch.Generator().manual_seed(a.seed)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    shaken(parameter, stream)
            folder = os.path.join(a.out, "theirs", name)
            converted = {"path_initial_model_for_weight_conversion": os.path.join(start, "start")} if name == "pissa" else {}
            model.save_pretrained(os.path.join(folder, "peft"), **converted)
        print(f"saved {folder}")


def largest(x, y):
    return float((x - y).abs().max())


def compare(a):
    with open(os.path.join(a.out, "ids.txt")) as f:
        ids = torch.tensor([[int(i) for i in row.split(",")] for row in f.read().split(";")])
    base, failed = logits(load(a.model), ids), False
    print(f"largest logit of the base {float(base.abs().max()):.3f}")
    for method in sorted(os.listdir(os.path.join(a.out, "ours"))):
        folder = lambda name: os.path.join(a.out, "ours", method, name)
        ours = load_file(folder("logits.safetensors"))["logits"]
        adapted = peft.PeftModel.from_pretrained(load(a.model), folder("peft")).eval()
        written, wanted = load_file(folder("peft/adapter_model.safetensors")), peft.get_peft_model_state_dict(adapted)
        same = {name: tuple(t.shape) for name, t in written.items()} == {name: tuple(t.shape) for name, t in wanted.items()}
        by_adapter = largest(logits(adapted, ids), ours)
        merged = largest(logits(load(folder("merged")), ids), ours)
        print(f"ours {method}: largest {float(ours.abs().max()):.3f}, moved {largest(base, ours):.3f}; PEFT differs by {by_adapter:.2e}, merged by {merged:.2e}; "
              f"names and shapes {'agree' if same else 'DIFFER'}")
        failed |= not same or not max(by_adapter, merged) <= a.tolerance * float(ours.abs().max())
    theirs = os.path.join(a.out, "theirs")
    for name in sorted(os.listdir(theirs)) if os.path.isdir(theirs) else []:
        folder = os.path.join(theirs, name)
        expected = logits(peft.PeftModel.from_pretrained(load(a.model), os.path.join(folder, "peft")).eval(), ids)
        difference = largest(load_file(os.path.join(folder, "our_logits.safetensors"))["logits"], expected)
        print(f"theirs {name}: largest {float(expected.abs().max()):.3f}, moved {largest(base, expected):.3f}; we differ by {difference:.2e}")
        failed |= not difference <= a.tolerance * float(expected.abs().max())
    sys.exit(1 if failed else 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["save", "compare"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--tolerance", type=float, default=5e-6, help="84 units of f32 rounding")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters that PEFT saves")
    parser.add_argument("--seed", type=int, default=1)
    a = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
    save(a) if a.action == "save" else compare(a)


if __name__ == "__main__":
    main()
