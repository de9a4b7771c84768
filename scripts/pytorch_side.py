#!/usr/bin/env python3
"""The PyTorch side of `compare_step.py` and `check-device`, which start it: one measurement in a process of its own, one JSON line.

`step` trains on batches that `lora-sb bench --write-batches` wrote, a JSON line an example, padded as PyTorch needs it;
tokens are counted without the padding. `init` takes LoRA-SB's start the way its authors' code does: the gradient of the
whole model over the samples (with `--gradients targets` only of what is adapted), then `torch.svd_lowrank(q=r, niter=10)`
of each target's sign matrix.

Types: f32; bf16 (all weights); autocast (f32 weights, products in bf16). The optimizer is the fused AdamW. With
`--random-weights` the model may be a config.json alone: speed and memory do not depend on the values.
"""
import argparse
import contextlib
import itertools
import json
import os
import resource
import statistics
import time


def age():
    """Seconds since this process was started."""
    with open("/proc/self/stat") as file:
        start = int(file.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    with open("/proc/uptime") as file:
        return float(file.read().split()[0]) - start


def processor_time():
    """Ticks of this process, of all programs, and of the machine, as `lora-sb bench` counts them."""
    with open("/proc/stat") as file:
        user, nice, system, idle, waiting, interrupts, soft, stolen = map(int, file.readline().split()[1:9])
    busy = user + nice + system + interrupts + soft + stolen
    own = os.times()
    ticks = os.sysconf("SC_CLK_TCK")
    return (own.user + own.system) * ticks, busy, busy + idle + waiting


os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENCODER = ["query", "value", "attention.output.dense", "output.dense"]


class Latent(nn.Module):
    """y = W0 x + B R A x, of which R is trained."""

    def __init__(self, base, rank, generator):
        super().__init__()
        out, inner = base.weight.shape
        dtype = base.weight.dtype
        device = base.weight.device
        orthonormal = lambda n: torch.linalg.qr(torch.randn(n, rank, generator=generator))[0].to(device, dtype)  # noqa: E731
        self.base = base
        self.register_buffer("A", orthonormal(inner).T.contiguous())
        self.register_buffer("B", orthonormal(out))
        self.R = nn.Parameter(torch.eye(rank, dtype=dtype, device=device) * 1e-4)

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(F.linear(x, self.A), self.R), self.B)


def load(a, labels):
    transformers.logging.set_verbosity_error()
    dtype = torch.bfloat16 if a.dtype == "bf16" else torch.float32
    config = transformers.AutoConfig.from_pretrained(a.model)
    # Our side has no dropout inside the model, so that both compute the same.
    for name, value in vars(config).items():
        if "dropout" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    attention = dict(attn_implementation=a.attention) if a.attention else {}
    options = dict(config=config, dtype=dtype, **attention)
    if a.random_weights:
        if labels is not None:
            raise SystemExit("--random-weights is for decoders")
        with torch.device(a.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)
    elif labels is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(a.model, **options)
    else:
        config.num_labels = labels
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            a.model, ignore_mismatched_sizes=True, **options
        )
    model.config.use_cache = False
    return model.to(a.device).train()


def targets(model, labels):
    names = DECODER if labels is None else ENCODER
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if any(name.endswith("." + end) for end in names)]


def adapt(model, a, labels):
    if a.method == "full":
        return model
    if a.method == "lora":
        import peft

        task = "CAUSAL_LM" if labels is None else "SEQ_CLS"
        names = DECODER if labels is None else ENCODER
        return peft.get_peft_model(model, peft.LoraConfig(r=a.rank, lora_alpha=a.rank, target_modules=names, task_type=task))
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name in targets(model, labels):
        parent, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(parent), leaf, Latent(model.get_submodule(name), a.rank, generator))
    if labels is not None:
        model.classifier.requires_grad_(True)
    return model


def padded(examples, model, width):
    """One batch of tensors: what no token fills is masked out, and is no label."""
    width = max([len(example["ids"]) for example in examples] + [width])
    pad = model.config.pad_token_id or 0
    fill = lambda values, other: values + [other] * (width - len(values))  # noqa: E731
    batch = dict(
        input_ids=torch.tensor([fill(e["ids"], pad) for e in examples]),
        attention_mask=torch.tensor([fill([1] * len(e["ids"]), 0) for e in examples]),
    )
    if "label" in examples[0]:
        batch["labels"] = torch.tensor([e["label"] for e in examples])
        if getattr(model.config, "type_vocab_size", 0) > 1:
            kinds = [[int(e["second"] is not None and t >= e["second"]) for t in range(len(e["ids"]))] for e in examples]
            batch["token_type_ids"] = torch.tensor([fill(k, 0) for k in kinds])
    else:
        labels = [[i if t else -100 for i, t in zip(e["ids"], e["trained"])] for e in examples]
        batch["labels"] = torch.tensor([fill(row, -100) for row in labels])
    if all(len(example["ids"]) == width for example in examples):
        # Nothing is padded: without a mask attention takes its fastest way.
        del batch["attention_mask"]
    return {name: values.to(model.device) for name, values in batch.items()}


def step(a):
    lines = [json.loads(line) for line in open(a.batches)]
    steps = [list(group) for _, group in itertools.groupby(lines, key=lambda line: line["step"])]
    labels = None
    if "label" in lines[0]:
        labels = 1 + max(1, max(line["label"] for line in lines))
    model = adapt(load(a, labels), a, labels)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    amp = torch.autocast(a.device, dtype=torch.bfloat16) if a.dtype == "autocast" else contextlib.nullcontext()
    seconds, tokens, losses, ready = [], [], [], age()
    for number, examples in enumerate(steps):
        if number == a.warmup:
            began = processor_time()
        start = time.perf_counter()
        batch = padded(examples, model, a.pad_to)
        with amp:
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss.item(), 6))
        if number >= a.warmup:
            seconds.append(time.perf_counter() - start)
            tokens.append(sum(len(example["ids"]) for example in examples))
    own, busy, every = (now - then for now, then in zip(processor_time(), began))
    rates = sorted(t / s for t, s in zip(tokens, seconds))
    return dict(
        tokens_per_second=statistics.median(rates), slowest=rates[0], fastest=rates[-1],
        tokens_per_second_overall=sum(tokens) / sum(seconds), ready_s=ready, losses=losses,
        attention=model.config._attn_implementation, taken_by_others=max(0, busy - own) / max(1, every),
    )  # fmt: skip


def wait(a):
    """Until the device has done what it was asked for."""
    if a.device == "cuda":
        torch.cuda.synchronize()


def init(a):
    """Seconds of the gradient, and of the factorisation at each rank."""
    lines = [json.loads(line) for line in open(a.batches)]
    model = load(a, None)
    amp = torch.autocast(a.device, dtype=torch.bfloat16) if a.dtype == "autocast" else contextlib.nullcontext()
    if a.gradients == "targets":
        model.requires_grad_(False)
        for name in targets(model, None):
            model.get_submodule(name).weight.requires_grad_(True)
    start = time.perf_counter()
    for first in range(0, len(lines), a.init_batch):
        examples = lines[first : first + a.init_batch]
        with amp:
            loss = model(**padded(examples, model, 0)).loss
        (loss / len(examples)).backward()
    wait(a)
    gradient = time.perf_counter() - start
    factorise = {}
    for rank in a.ranks:
        start = time.perf_counter()
        for name in targets(model, None):
            update = -1e-5 * torch.sign(model.get_submodule(name).weight.grad.float())
            torch.svd_lowrank(update, q=rank, niter=10)
        wait(a)
        factorise[str(rank)] = time.perf_counter() - start
    return dict(gradient_s=gradient, factorise_s=factorise)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["step", "init"])
    p.add_argument("--model", required=True)
    p.add_argument("--batches", required=True, help="JSON lines of `lora-sb bench --write-batches`")
    p.add_argument("--dtype", choices=["f32", "bf16", "autocast"], default="f32")
    p.add_argument("--method", choices=["lora-sb", "lora-xs", "lora", "full"], default="lora-sb")
    p.add_argument("--rank", type=int, default=64)
    p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--threads", type=int)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--random-weights", action="store_true", help="instead of those of --model")
    p.add_argument("--attention", help="attn_implementation [default: transformers' own choice]")
    p.add_argument("--pad-to", type=int, default=0, help="pad to so many tokens [default: to the batch's longest]")
    p.add_argument("--init-batch", type=int, default=3)
    p.add_argument("--gradients", choices=["all", "targets"], default="all")
    p.add_argument("--ranks", type=lambda text: [int(word) for word in text.split(",")], default=[64])
    a = p.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    result = step(a) if a.what == "step" else init(a)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    versions = f"pytorch {torch.__version__}, transformers {transformers.__version__}"
    memory = dict(peak_rss_bytes=peak)
    if a.device == "cuda":
        memory |= dict(peak_device_bytes=torch.cuda.max_memory_allocated(), device=torch.cuda.get_device_name())
    print(json.dumps(dict(side=f"{versions}, {a.dtype}", **result, **memory)))


if __name__ == "__main__":
    main()
