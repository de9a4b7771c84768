#!/usr/bin/env python3
"""Loads what `lora-sb` exports with the real PEFT and transformers and compares the logits.

    pip install torch transformers peft safetensors
    cargo run --release -p lora-sb-tune --example export_check -- --model=DIR --out=OUT
    scripts/check_export.py --model DIR --out OUT

For each method: the adapter's tensor names are exactly those PEFT would save itself, base + adapter gives our logits,
and the merged directory, loaded without PEFT, gives them too. Exit status 1 where the largest difference is above
--tolerance or a name differs.
"""
import argparse, os, sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import peft
import torch
import transformers
from safetensors.torch import load_file


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    a = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with open(os.path.join(a.out, "ids.txt")) as f:
        ids = torch.tensor([[int(i) for i in row.split(",")] for row in f.read().split(";")])
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
    failed = False
    for method in sorted(d for d in os.listdir(a.out) if os.path.isdir(os.path.join(a.out, d))):
        folder = lambda name: os.path.join(a.out, method, name)
        ours = load_file(folder("logits.safetensors"))["logits"]
        adapted = peft.PeftModel.from_pretrained(load(a.model), folder("peft")).eval()
        names = set(load_file(folder("peft/adapter_model.safetensors")))
        same_names = names == set(peft.get_peft_model_state_dict(adapted))
        with torch.no_grad():
            base = load(a.model)(input_ids=ids, use_cache=False).logits
            with_adapter = adapted(input_ids=ids, use_cache=False).logits
            merged = load(folder("merged"))(input_ids=ids, use_cache=False).logits
        largest = lambda x: float((x - ours).abs().max())
        print(f"{method}: moved {largest(base):.3f}; PEFT differs by {largest(with_adapter):.2e}, "
              f"merged by {largest(merged):.2e}; names {'agree' if same_names else 'DIFFER'}")
        failed |= not same_names or max(largest(with_adapter), largest(merged)) > a.tolerance
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
