#!/usr/bin/env python3
"""Training beside PyTorch: the same weights, examples and method, in turn, each run in a process of its own.

    pip install torch transformers peft safetensors
    cargo build --release
    scripts/compare_step.py --model DIR --length 256                              # steps of one length
    scripts/compare_step.py --model DIR --data train.jsonl --batch 32 --length 128  # real lengths, padded by PyTorch
    scripts/compare_step.py --sweep --model CONFIG                                # growth of our own cost
    cargo build --release -p lora-sb-tune --example init_bench
    scripts/compare_step.py --init --model DIR --length 256                       # LoRA-SB's initialisation

DIR is a Hugging Face directory of a decoder, or of an encoder with a classification head. `lora-sb bench` writes what
each step trains on and PyTorch (`pytorch_side.py`) reads it, so both see the same examples; both count tokens without
padding. Rounds alternate between all settings of both sides, so that a change of the machine's speed meets all of them.
Printed is a JSON line a run, and at the end the medians with the ratios to each setting of PyTorch in Markdown.

The sweep takes a config.json, gives it random weights, and varies one thing at a time: length, rank, layers, vocabulary,
threads.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MIB = 1 << 20


def arguments():
    words = lambda text: text.split(",")  # noqa: E731
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--method", choices=["lora-sb", "lora-xs", "lora", "full"], default="lora-sb")
    p.add_argument("--rank", type=int, default=64)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=256, help="tokens of each example; with --data of the longest")
    p.add_argument("--data", nargs="+", help="train on these files, in batches of uneven lengths")
    p.add_argument("--tokenizer", help="directory of the tokenizer for --data [default: the model's]")
    p.add_argument("--pad", choices=["longest", "max_length"], default="longest", help="how PyTorch pads --data")
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--ours", type=words, default=["f32", "bf16"], help="our types, parted by commas")
    p.add_argument("--theirs", type=words, default=["f32", "bf16", "autocast"], help="PyTorch's types")
    p.add_argument("--gradient-checkpointing", action="store_true", help="on our side")
    p.add_argument("--attention", help="PyTorch's attn_implementation")
    p.add_argument("--sweep", action="store_true")
    p.add_argument("--axes", type=words, default=["length", "rank", "layers", "vocabulary", "threads"], help="of --sweep")
    p.add_argument("--init", action="store_true")
    p.add_argument("--ranks", default="32,64,96", help="of --init")
    p.add_argument("--samples", type=int, default=50, help="of --init")
    p.add_argument("--gradients", choices=["all", "targets"], default="all", help="that PyTorch takes for --init")
    p.add_argument("--program", default="target/release/lora-sb")
    p.add_argument("--init-program", default="target/release/examples/init_bench")
    p.add_argument("--python", default=sys.executable, help="that has torch and transformers")
    return p.parse_args()


def run(command, side=None):
    """The last line of a command, printed."""
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{ended.stdout}{ended.stderr}")
    result = json.loads(ended.stdout.strip().splitlines()[-1])
    if side:
        result = {"side": side, **result}
    brief = {key: value for key, value in result.items() if key not in ("ops", "ops_by_weight")}
    print(json.dumps(brief), flush=True)
    return result


def bench(a, dtype, *more, model=None, length=None, batch=None, rank=None, threads=None):
    """One run of our side."""
    command = [
        a.program, "bench", "--model", model or a.model, "--method", a.method, "--rank", rank or a.rank,
        "--per-device-train-batch-size", batch or a.batch, "--max-length", length or a.length, "--dtype", dtype,
        "--steps", a.steps, "--warmup", a.warmup, "--threads", threads or a.threads, "--json", *more,
    ]  # fmt: skip
    return run(command, f"lora-sb {dtype}")


def torch_side(a, what, dtype, batches, *more):
    command = [a.python, HERE / "pytorch_side.py", what, "--model", a.model, "--batches", batches, "--dtype", dtype]
    return run([*command, "--threads", a.threads, *more])


def middle(runs, key):
    return statistics.median(run[key] for run in runs)


def compare_steps(a, folder):
    batches = folder / "batches.jsonl"
    data = ["--data", *a.data] if a.data else []
    data += ["--tokenizer", a.tokenizer] if a.tokenizer else []
    ours = [*data, "--write-batches", batches] + (["--gradient-checkpointing"] if a.gradient_checkpointing else [])
    theirs = ["--method", a.method, "--rank", a.rank, "--warmup", a.warmup]
    theirs += ["--attention", a.attention] if a.attention else []
    theirs += ["--pad-to", a.length] if a.data and a.pad == "max_length" else []
    found = {}
    for _ in range(a.rounds):
        for dtype in a.ours:
            found.setdefault(f"lora-sb {dtype}", []).append(bench(a, dtype, *ours))
        for dtype in a.theirs:
            found.setdefault(f"PyTorch {dtype}", []).append(torch_side(a, "step", dtype, batches, *theirs))
    # Steps of unequal sizes are told by all of them together.
    table(found, "tokens_per_second_overall" if a.data else "tokens_per_second")


def table(found, speed):
    peers = {name: runs for name, runs in found.items() if name.startswith("PyTorch")}
    best = max(middle(runs, speed) for runs in peers.values()) if peers else None
    headings = ["", "tokens/s (all runs)", "others' share of the CPU", "peak MiB", "start s", "GFLOP/s", "share of the product"]
    headings += [f"x {name}" for name in peers] + ["x best", "memory x " + " / ".join(peers)]
    print("\n| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
    for name, runs in found.items():
        rate, peak = middle(runs, speed), middle(runs, "peak_rss_bytes")
        each = ", ".join(f"{run[speed]:.0f}" for run in runs)
        others = f"{100 * middle(runs, 'taken_by_others'):.0f} %"
        row = [name, f"{rate:.1f} ({each})", others, f"{peak / MIB:.0f}", f"{middle(runs, 'ready_s'):.1f}"]
        ours = "gflops" in runs[0]
        row += [f"{middle(runs, 'gflops'):.0f}", f"{100 * middle(runs, 'share'):.1f} %"] if ours else ["", ""]
        row += [f"{rate / middle(peer, speed):.2f}" for peer in peers.values()]
        row += [f"{rate / best:.2f}" if best else ""]
        row += [" / ".join(f"{peak / middle(peer, 'peak_rss_bytes'):.2f}" for peer in peers.values())]
        print("| " + " | ".join(row) + " |")


def compare_init(a, folder):
    batches = folder / "samples.jsonl"
    batches.write_text("".join(json.dumps(line) + "\n" for line in samples(a)))
    found = {}
    for _ in range(a.rounds):
        for dtype in a.ours:
            typed = [] if dtype == "f32" else [f"--dtype={dtype}"]
            found.setdefault(f"lora-sb {dtype}", []).append(own_init(a, dtype, typed))
        for dtype in a.theirs:
            more = ["--ranks", a.ranks, "--gradients", a.gradients]
            found.setdefault(f"PyTorch {dtype}", []).append(torch_side(a, "init", dtype, batches, *more))
    peers = [name for name in found if name.startswith("PyTorch")]
    headings = ["", "rank", "gradient s", "factorisation s", "sum s", "peak MiB"]
    headings += [f"time x {name}" for name in peers] + [f"memory x {name}" for name in peers]
    print("\n| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
    total = lambda name, rank: statistics.median(r["gradient_s"] + r["factorise_s"][rank] for r in found[name])  # noqa: E731
    for rank in a.ranks.split(","):
        for name, runs in found.items():
            factorise, peak = statistics.median(r["factorise_s"][rank] for r in runs), middle(runs, "peak_rss_bytes")
            row = [name, rank, f"{middle(runs, 'gradient_s'):.2f}", f"{factorise:.2f}", f"{total(name, rank):.2f}"]
            row += [f"{peak / MIB:.0f}"] + [f"{total(peer, rank) / total(name, rank):.2f}" for peer in peers]
            row += [f"{peak / middle(found[peer], 'peak_rss_bytes'):.2f}" for peer in peers]
            print("| " + " | ".join(row) + " |")


def samples(a):
    """What `init_bench` estimates on: id t of row n is 5 + splitmix64(2^48 + n * length + t) mod (vocabulary - 5)."""
    mask = (1 << 64) - 1
    vocabulary = json.loads((Path(a.model) / "config.json").read_text())["vocab_size"]

    def id_at(x):
        z = (x + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return 5 + (z ^ (z >> 31)) % (vocabulary - 5)

    for n in range(a.samples):
        ids = [id_at((1 << 48) + n * a.length + t) for t in range(a.length)]
        yield {"step": 0, "ids": ids, "trained": [1] * a.length, "second": None}


def own_init(a, dtype, typed):
    command = [
        a.init_program, f"--model={a.model}", f"--samples={a.samples}", f"--length={a.length}", f"--ranks={a.ranks}",
        f"--threads={a.threads}", *typed,
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}\n{ended.stdout}{ended.stderr}")
    result = {"side": f"lora-sb {dtype}"}
    for line in ended.stdout.splitlines():
        if line.startswith("{"):
            result |= json.loads(line)
    result["peak_rss_bytes"] = result["peak_rss_mb"] * MIB
    print(json.dumps(result), flush=True)
    return result


def sweep(a, folder):
    base = Path(a.model)
    base = json.loads((base / "config.json" if base.is_dir() else base).read_text())

    def at(axis, value, dtype):
        changed = dict(base)
        options = {}
        if axis == "length":
            changed["max_position_embeddings"] = max(value, base["max_position_embeddings"])
            options = dict(length=value, batch=1)
        elif axis == "layers":
            changed["num_hidden_layers"] = value
        elif axis == "vocabulary":
            changed["vocab_size"] = value
        else:
            options = {axis: value}
        config = folder / "config.json"
        config.write_text(json.dumps(changed))
        return bench(a, dtype, model=config, **options)

    layers = base["num_hidden_layers"]
    axes = {
        "length": [128, 256, 512, 1024, 2048, 4096, 8192],
        "rank": [8, 16, 32, 64, 128, 256],
        "layers": [max(1, layers // 4), max(1, layers // 2), layers, 2 * layers],
        "vocabulary": [8192, 32768, 65536, 131072, 262144],
        "threads": [1, 2],
    }
    headings = ["varied", "value", "type", "tokens/s (all runs)", "MFLOP a token", "GFLOP/s", "share", "peak MiB"]
    rows = []
    for axis in a.axes:
        for value in axes[axis]:
            for dtype in a.ours:
                runs = [at(axis, value, dtype) for _ in range(a.rounds)]
                rate = middle(runs, "tokens_per_second")
                each = ", ".join(f"{run['tokens_per_second']:.0f}" for run in runs)
                per_token = middle(runs, "necessary_flop_per_step") / statistics.median(runs[0]["step_tokens"])
                rows.append([
                    axis, str(value), dtype, f"{rate:.1f} ({each})", f"{per_token / 1e6:.0f}",
                    f"{middle(runs, 'gflops'):.0f}", f"{100 * middle(runs, 'share'):.1f} %",
                    f"{middle(runs, 'peak_rss_bytes') / MIB:.0f}",
                ])  # fmt: skip
    print("\n| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def main():
    a = arguments()
    with tempfile.TemporaryDirectory() as folder:
        mode = sweep if a.sweep else compare_init if a.init else compare_steps
        mode(a, Path(folder))


if __name__ == "__main__":
    main()
