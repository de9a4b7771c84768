#!/usr/bin/env python3
"""Training speed and memory beside PyTorch: the same weights, batches and method, in turn.

    pip install torch transformers safetensors
    cargo build --release -p lora-sb-tune --example step_bench
    scripts/compare_step.py --model DIR --rounds 3

DIR is a Hugging Face directory of a Llama-type model. Row n of the token stream is a formula, so both sides train
on the same tokens: id t of row n is 5 + splitmix64(n * length + t) mod (vocabulary - 5), and step k, sample b takes row
k * batch + b. Every label is trained. The adapter is y = W0 x + B R A x on all seven projections, A and B frozen.
Each side runs in a process of its own; rounds alternate, so that a change of the machine's speed meets both. Printed
is a JSON line per run and the ratio of the medians; ready_s is from the process's start to the first step.
"""
import argparse, json, os, resource, statistics, subprocess, sys, time


def age():
    """Seconds since this process was started."""
    with open("/proc/self/stat") as f:
        start = int(f.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    with open("/proc/uptime") as f:
        return float(f.read().split()[0]) - start


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def row(number, length, vocabulary):
    mask = (1 << 64) - 1
    ids = []
    for t in range(length):
        z = (number * length + t + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        ids.append(5 + ((z ^ (z >> 31)) % (vocabulary - 5)))
    return ids


def peer(a):
    import torch
    import transformers
    from torch import nn
    from torch.nn import functional as F

    class Latent(nn.Module):
        def __init__(self, base, rank, generator):
            super().__init__()
            out, inner = base.weight.shape
            orthonormal = lambda n: torch.linalg.qr(torch.randn(n, rank, generator=generator))[0].to(base.weight.dtype)
            self.base = base
            self.register_buffer("A", orthonormal(inner).T.contiguous())
            self.register_buffer("B", orthonormal(out))
            self.R = nn.Parameter(torch.eye(rank, dtype=base.weight.dtype) * 1e-4)

        def forward(self, x):
            return self.base(x) + F.linear(F.linear(F.linear(x, self.A), self.R), self.B)

    transformers.logging.set_verbosity_error()
    dtype = torch.bfloat16 if a.dtype == "bf16" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype)
    model.config.use_cache = False
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, module in list(model.named_modules()):
        if name.endswith(TARGETS):
            parent, leaf = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), leaf, Latent(module, a.rank, generator))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    times, losses, ready = [], [], age()
    for k in range(a.warmup + a.steps):
        ids = torch.tensor([row(k * a.batch + b, a.length, model.config.vocab_size) for b in range(a.batch)])
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
        losses.append(round(loss.item(), 6))
    report("pytorch " + torch.__version__ + " " + a.dtype, a, times, losses, ready)


def report(name, a, times, losses, ready):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    measured = sorted(times[a.warmup:])
    print(json.dumps(dict(
        side=name, tokens_per_second=round(a.batch * a.length / statistics.median(measured), 1),
        slowest=round(a.batch * a.length / measured[-1], 1), fastest=round(a.batch * a.length / measured[0], 1),
        peak_rss_mb=round(peak, 1), ready_s=round(ready, 2), losses=losses)))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--rank", type=int, default=64)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="PyTorch's type")
    p.add_argument("--binary", default="target/release/examples/step_bench")
    p.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.peer:
        return peer(a)
    shape = [f"--{key}={getattr(a, key)}" for key in ("model", "rank", "batch", "length", "steps", "warmup")]
    commands = [[a.binary] + shape, [sys.executable, os.path.abspath(__file__), "--peer", "--dtype", a.dtype] + shape]
    results = [[], []]
    for _ in range(a.rounds):
        for command, result in zip(commands, results):
            line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]
            print(line, flush=True)
            result.append(json.loads(line))
    median = lambda side, key: statistics.median(run[key] for run in side)
    for key in ("tokens_per_second", "peak_rss_mb", "ready_s"):
        ours, theirs = (median(side, key) for side in results)
        print(f"{key}: {ours:.2f} against {theirs:.2f}, ratio {ours / theirs:.3f}")


if __name__ == "__main__":
    main()
