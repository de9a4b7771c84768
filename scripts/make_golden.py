#!/usr/bin/env python3
"""Golden numbers: what Hugging Face computes for a tiny Llama with random weights.

    pip install torch transformers peft safetensors numpy
    scripts/make_golden.py --out golden
    scripts/make_golden.py --out OTHER --seed 7 --hidden-size 96 --layers 3 --heads 6 --tied --rope linear
    LORA_SB_GOLDEN=OTHER cargo test -p lora-sb-model -p lora-sb-tune golden

Writes the folder OUT/llama and OUT/manifest.json; golden/README.md tells what each file holds and how to compare.
The same arguments and versions give the same bytes.

Conventions of every function below:

* T tokens, V vocabulary, r rank. A weight W is [out, in]; an adapter is B [out, r], R [r, r], A [r, in].
* f32 is what transformers computes as it stands. f64 is the same model widened, with nothing rounded to f32 inside;
  it is only there to measure the rounding of f32. Both start from the same f32 values.
* A loss is the mean cross-entropy of logits[:, :-1] against labels[:, 1:] over the labels that are not -100.
* A draw that a correct implementation could not be held to (a gradient too near zero to have a sign, two singular
  values too near each other, two tokens too near in a greedy choice) is drawn again; see `best`.
"""
import argparse, copy, hashlib, json, math, shutil
from pathlib import Path

import numpy, peft, safetensors, torch, transformers
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH_SIZES = (3, 3, 3, 2)  # the last one is smaller: a mean over batches is not a mean over samples
STEPS, LEARNING_RATE = 20, 1e-3
LOSS_TOLERANCE, OFF_SHARE = 1e-4, 0.01  # what the tests allow: of a loss, and of a tensor's elements after training
ETA = 1e-3  # the size of LoRA-SB's first update
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 3, 7, 16
IGNORED, PAD, FIRST_ID = -100, 0, 5  # ids below 5 are left to special tokens
WANTED_GAP, WANTED_SIGN_MARGIN, WANTED_CHOICE_MARGIN = 2e-3, 10.0, 2e-3


# Random draws.


def generator(seed, purpose):
    """One stream of random numbers for each purpose, so that drawing one again does not move the others."""
    return torch.Generator().manual_seed(seed * 100 + purpose)


def best(tries, draw, score):
    """The first of `tries` draws whose score reaches 1, or else the one that came nearest to it."""
    chosen, highest = None, 0.0
    for _ in range(tries):
        candidate = draw()
        value = score(candidate)
        if value > highest:
            chosen, highest = candidate, value
        if highest >= 1.0:
            break
    if chosen is None:
        raise SystemExit("no draw is fit to compare with; choose another --seed or smaller sizes")
    return chosen


def relative_gap(values, rank):
    """The smallest (s_i - s_{i+1}) / s_i over the first `rank` singular values, each against the one after it."""
    count = min(rank, len(values) - 1)
    return ((values[:count] - values[1 : count + 1]) / values[:count]).min().item() if count else 1.0


def draw_model(a):
    """A Llama in f32: weights N(0, 1.44 / in), norms around 1, biases around 0, nothing at its usual initial value."""
    scaling = {
        "none": None,
        "linear": {"rope_type": "linear", "factor": 2.5},
        "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 64},
    }[a.rope]
    config = LlamaConfig(
        vocab_size=a.vocab_size, hidden_size=a.hidden_size, intermediate_size=a.intermediate_size,
        num_hidden_layers=a.layers, num_attention_heads=a.heads, num_key_value_heads=a.kv_heads, head_dim=a.head_dim,
        max_position_embeddings=512, rms_norm_eps=a.rms_norm_eps, rope_theta=a.rope_theta, rope_scaling=scaling,
        tie_word_embeddings=a.tied, attention_bias=a.attention_bias, mlp_bias=a.mlp_bias,
        bos_token_id=1, eos_token_id=2)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).float().eval()
    stream = generator(a.seed, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw_parameter(name, parameter.shape, stream, a.rank))
    return model


def draw_parameter(name, shape, stream, rank):
    if len(shape) == 1:
        mean, deviation = (0.0, 0.1) if name.endswith("bias") else (1.0, 0.2)
        return mean + deviation * torch.randn(shape, generator=stream)
    draw = lambda: torch.randn(shape, generator=stream) * 1.2 / math.sqrt(shape[1])
    if not name.removesuffix(".weight").endswith(TARGETS):
        return draw()
    # LoRA-XS takes these apart.
    return best(50, draw, lambda weight: relative_gap(torch.linalg.svdvals(weight.double()), rank) / WANTED_GAP)


def draw_batch(samples, length, vocab_size, stream):
    """Random tokens [samples, length]. The last row is padded on its right by a third of it, the row before by two
    tokens; padding is not trained, nor are the first four tokens of row 0."""
    ids = torch.randint(FIRST_ID, vocab_size, (samples, length), generator=stream)
    mask = torch.ones_like(ids)
    mask[-1, length - length // 3 :] = 0
    if samples > 2:
        mask[-2, length - 2 :] = 0
    ids[mask == 0] = PAD
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[0, :4] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# The f64 side.


class WideNorm(nn.Module):
    """Root mean square normalisation in the type of its input; transformers goes through f32 whatever that is."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)


class WideRotation(nn.Module):
    """cos and sin of position times frequency, [1, T, head_dim] each, of the frequencies that the f32 model has."""

    def __init__(self, rotation):
        super().__init__()
        self.register_buffer("frequencies", rotation.inv_freq.double(), persistent=False)
        self.scale = rotation.attention_scaling

    def forward(self, x, position_ids):
        angles = (position_ids[..., None] * self.frequencies).repeat(1, 1, 2)
        return angles.cos() * self.scale, angles.sin() * self.scale


def wide_softmax(x, *positional, dtype=None, **named):
    """The softmax of PyTorch, but f64 stays f64 though the caller asks for f32."""
    return wide_softmax.original(x, *positional, dtype=None if x.dtype == torch.float64 else dtype, **named)


wide_softmax.original, F.softmax = F.softmax, wide_softmax


def widen(model):
    """A copy of the model that computes in f64 throughout."""
    wide = copy.deepcopy(model).double()
    wide.model.rotary_emb = WideRotation(model.model.rotary_emb)
    for name, module in list(wide.named_modules()):
        if hasattr(module, "variance_epsilon"):
            wide.set_submodule(name, WideNorm(module))
    return wide


# Forward, backward, training.


def forward(model, batch):
    """Logits [rows, T, V] and the loss, in the model's own type."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
    return logits, loss


def gradients(model, batch, parameters):
    """Of the batch's loss, in the order of the dictionary `parameters`."""
    found = torch.autograd.grad(forward(model, batch)[1], list(parameters.values()))
    return dict(zip(parameters, found))


def targets(model):
    """Every adapted linear layer by its path, in the model's order."""
    return {name: module for name, module in model.named_modules() if name.endswith(TARGETS)}


class Adapted(nn.Module):
    """y = W0 x + bias + scale * B (R (A x)); without R it is LoRA's B (A x)."""

    def __init__(self, base, factors, scale):
        super().__init__()
        self.base, self.scale = base, scale
        for name, value in factors.items():
            self.register_parameter(name, nn.Parameter(value.to(base.weight.dtype, copy=True)))

    def forward(self, x):
        inner = F.linear(x, self.A)
        inner = F.linear(inner, self.R) if hasattr(self, "R") else inner
        return self.base(x) + self.scale * F.linear(inner, self.B)


def adapt(model, factors, trained, scale=1.0):
    """A copy of the model with `factors[path] = {"A": .., "B": .., ["R": ..]}`, and its parameters named in `trained`
    as `<factor>.<path>`."""
    model = copy.deepcopy(model).requires_grad_(False)
    parameters = {}
    for path, values in factors.items():
        adapted = Adapted(model.get_submodule(path), values, scale)
        model.set_submodule(path, adapted)
        parameters |= {f"{name}.{path}": getattr(adapted, name) for name in trained}
    return model, parameters


def train(model, parameters, batches):
    """Trains in place, step t on batch t mod 4: plain AdamW without decay, clipping or schedule. The losses before each
    step and one after the last, and the gradients of the first step."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=0.0, foreach=False)
    losses, first = [], None
    for step in range(STEPS + 1):
        optimizer.zero_grad(set_to_none=True)
        loss = forward(model, batches[step % len(batches)])[1]
        losses.append(loss.item())
        if step == STEPS:
            break
        loss.backward()
        first = first or {name: parameter.grad.clone() for name, parameter in parameters.items()}
        optimizer.step()
    return losses, first


def trajectory(model, wide, batches, prepare, compared=()):
    """A run in f32 and in f64. `prepare(model)` gives what is trained: (model, parameters). Returns the tensors of the
    losses, the trained f32 parameters, their first gradients, and a line for meta.json. The tests hold those whose
    names begin with one of `compared` to their ends, nearly all elements to 1e-5."""
    narrow, parameters = prepare(model)
    losses, first = train(narrow, parameters, batches)
    broad, exact = prepare(wide)
    losses_f64, _ = train(broad, exact, batches)
    for name in filter(lambda name: name.startswith(tuple(compared)), parameters):
        off = ((parameters[name] - exact[name]).abs() > 1e-5).double().mean().item()
        if off > OFF_SHARE / 2:
            raise SystemExit(f"rounding alone moves {off:.2%} of {name}: no run to compare with; choose another --seed")
    tensors = {"losses": torch.tensor(losses), "losses_f64": torch.tensor(losses_f64, dtype=torch.float64)}
    apart = max(abs(x - y) for x, y in zip(losses, losses_f64))
    if apart > LOSS_TOLERANCE / 5:
        raise SystemExit(f"rounding alone moves a loss by {apart:.1e}: no run to compare with; choose another --seed")
    line = {"first_loss": losses[0], "last_loss": losses[-1], "max_abs_f32_minus_f64": apart}
    return tensors, {name: value.detach() for name, value in parameters.items()}, first, line


# Files.


def write(path, tensors):
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, path)


def write_model(folder, model):
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def write_expected(folder, model, wide, inputs, batches):
    """Logits, loss and every gradient of `inputs`. Returns how far f32 and f64 are apart: the unit of tolerances."""
    parameters, wide_parameters = dict(model.named_parameters()), dict(wide.named_parameters())
    logits, loss = forward(model, inputs)
    theirs = model(**inputs).loss
    assert abs(theirs.item() - loss.item()) < 1e-6, "transformers has another loss"
    found, exact = gradients(model, inputs, parameters), gradients(wide, inputs, wide_parameters)
    write(folder / "inputs.safetensors", inputs)
    write(folder / "expected.safetensors",
          {"logits": logits, "loss": loss.reshape(1)} | {f"grad.{name}": value for name, value in found.items()})

    real = inputs["attention_mask"] == 1
    apart = {name: ((found[name] - exact[name]).abs().max() / exact[name].abs().max()).item() for name in found}
    worst = max(apart, key=apart.get)
    with torch.no_grad():
        losses = [abs(forward(model, b)[1].item() - forward(wide, b)[1].item()) for b in [inputs, *batches]]
        # One loss may be right to the last bit by luck; none can be told better than to half of that bit.
        last_bit = float(numpy.spacing(numpy.float32(loss.item()))) / 2
        return {
            "logits_max_abs": (logits - forward(wide, inputs)[0])[real].abs().max().item(),
            "loss_abs": max(losses + [last_bit]),
            "grad_max_rel_to_tensor_max": apart[worst],
            "worst_grad": worst,
            "analytically_zero_grads": [],
        }


def gradient_sums(model, batches):
    """G = sum over batches of dL/dW / (samples of the batch), L the batch's mean loss: as the LoRA-SB authors' code
    adds them up. [out, in] by path."""
    weights = {path: module.weight for path, module in targets(model).items()}
    sums = {path: torch.zeros_like(weight) for path, weight in weights.items()}
    for batch in batches:
        for path, gradient in gradients(model, batch, weights).items():
            sums[path] += gradient / len(batch["input_ids"])
    return sums


def draw_training(model, wide, a):
    """Four training batches whose gradient sums have signs beyond doubt and updates with separate singular values."""
    stream = generator(a.seed, 2)
    draw = lambda: [draw_batch(samples, a.length - 4, a.vocab_size, stream) for samples in BATCH_SIZES]

    def score(batches):
        found, exact = gradient_sums(model, batches), gradient_sums(wide, batches)
        margin = min(sign_margin(found[path], exact[path]) for path in found)
        if margin < WANTED_SIGN_MARGIN / 10:
            return margin / WANTED_SIGN_MARGIN
        gap = min(relative_gap(torch.linalg.svdvals(torch.sign(exact[path])), a.rank) for path in exact)
        return min(margin / WANTED_SIGN_MARGIN, gap / WANTED_GAP)

    return best(200, draw, score)


def sign_margin(found, exact):
    """The smallest element of a gradient over the rounding of its elements (root mean square); 0 if a sign flips."""
    if not torch.equal(torch.sign(found).double(), torch.sign(exact)) or not exact.all():
        return 0.0
    return (exact.abs().min() / (found - exact).pow(2).mean().sqrt()).item()


def write_lora_sb(folder, model, wide, batches, a):
    """The update -eta sign(G) = U S V^T, cut to B = U_r, R = diag(S_r), A = V_r^T, and a run that trains R."""
    tensors = {"rank": torch.tensor([a.rank]), "lr_eff": torch.tensor([ETA], dtype=torch.float64)}
    stream, factors, gaps = generator(a.seed, 3), {}, []
    sums, exact = gradient_sums(model, batches), gradient_sums(wide, batches)
    for path, gradient in sums.items():
        u, s, vt = torch.linalg.svd(-ETA * torch.sign(gradient).double(), full_matrices=False)
        u, vt = u[:, : a.rank], vt[: a.rank]
        left = torch.randn(u.shape[0], 3, generator=stream)
        right = torch.randn(vt.shape[1], 3, generator=stream)
        factors[path] = {"A": vt.float(), "B": u.float(), "R": torch.diag(s[: a.rank]).float()}
        gaps.append(relative_gap(s, a.rank))
        parts = factors[path] | {
            "grad_sum": gradient, "sign": torch.sign(gradient).to(torch.int8), "svals": s,
            "bra": (u * s[: a.rank] @ vt).float(),  # free of the signs of singular vectors, as are the two projections
            "probe_left": left, "UUt_probe_left": (u @ (u.T @ left.double())).float(),
            "probe_right": right, "VVt_probe_right": (vt.T @ (vt @ right.double())).float(),
        }
        tensors |= {f"{name}.{path}": value for name, value in parts.items()}
    run, trained, first, line = trajectory(model, wide, batches, lambda model: adapt(model, factors, ["R"]))
    write(folder / "lora_sb.safetensors", tensors | run | run_of_r(trained, first))
    margin = min(sign_margin(sums[path], exact[path]) for path in sums)
    return {"min_rel_gap_within_top_r_plus_1": min(gaps), "min_abs_grad_over_rms_noise": margin, "trajectory": line}


def run_of_r(trained, first):
    """R's first gradient and where it ends, by path."""
    return ({name.replace("R.", "R_grad_step0.", 1): value for name, value in first.items()}
            | {name.replace("R.", "R_final.", 1): value for name, value in trained.items()})


def write_lora_xs(folder, model, wide, batches, a):
    """W0 = P S Q^T, cut to B = P_r, A = S_r Q_r^T; R starts at exactly 0 and is trained."""
    tensors, factors, gaps = {"rank": torch.tensor([a.rank])}, {}, []
    for path, module in targets(model).items():
        p, s, qt = torch.linalg.svd(module.weight.detach().double(), full_matrices=False)
        outer, inner = p[:, : a.rank], s[: a.rank, None] * qt[: a.rank]
        factors[path] = {"A": inner.float(), "B": outer.float(), "R": torch.zeros(a.rank, a.rank)}
        gaps.append(relative_gap(s, a.rank))
        tensors |= {f"A.{path}": inner.float(), f"B.{path}": outer.float(), f"svals.{path}": s,
                    f"ba.{path}": (outer @ inner).float()}
    run, trained, first, line = trajectory(model, wide, batches, lambda model: adapt(model, factors, ["R"]))
    write(folder / "lora_xs.safetensors", tensors | run | run_of_r(trained, first))
    return {"min_rel_gap_within_top_r_plus_1": min(gaps), "trajectory": line}


def write_lora(folder, model, wide, batches, a):
    """A uniform in +-1/sqrt(in), B = 0, both trained; at scale 1, and at scale 2 under names that end in _s2."""
    stream, factors = generator(a.seed, 4), {}
    for path, module in targets(model).items():
        out, inner = module.weight.shape
        uniform = torch.rand(a.rank, inner, generator=stream) * 2 - 1
        factors[path] = {"A": uniform / math.sqrt(inner), "B": torch.zeros(out, a.rank)}
    tensors = {"rank": torch.tensor([a.rank])} | {f"A.{path}": values["A"] for path, values in factors.items()}
    meta = {}
    for scale, suffix in ((1.0, ""), (2.0, "_s2")):
        prepare = lambda model: adapt(model, factors, ["A", "B"], scale)
        run, trained, first, line = trajectory(model, wide, batches, prepare, ("A.", "B."))
        meta[f"trajectory_s{scale:.0f}"] = line
        tensors |= {name.replace("losses", "losses" + suffix): value for name, value in run.items()}
        tensors |= {name.replace("B.", f"B_grad_step0{suffix}.", 1): value
                    for name, value in first.items() if name.startswith("B.")}
        tensors |= {name.replace(".", f"_final{suffix}.", 1): value for name, value in trained.items()}
    write(folder / "lora.safetensors", tensors)
    return meta


def write_full_ft(folder, model, wide, batches):
    """All parameters trained; where four of them end."""

    def prepare(model):
        model = copy.deepcopy(model)
        return model, dict(model.named_parameters())

    last = model.config.num_hidden_layers - 1
    kept = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight",
            f"model.layers.{last}.mlp.down_proj.weight", "model.norm.weight")
    run, trained, _, line = trajectory(model, wide, batches, prepare, kept)
    write(folder / "full_ft.safetensors", run | {f"final.{name}": trained[name] for name in kept})
    return {"trajectory": line}


def write_peft(folder, model, inputs, a):
    """An adapter that PEFT made and saved, lora_alpha not r, B not zero; logits and loss of `inputs` with it."""
    config = peft.LoraConfig(r=a.rank, lora_alpha=a.rank + 5, lora_dropout=0.0, target_modules=sorted(TARGETS),
                             task_type="CAUSAL_LM", base_model_name_or_path="../model")
    stream = generator(a.seed, 5)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    # Entries of (lora_alpha / r) B A are a quarter of W0's, so that rounding stays what the base model's is.
    deviation = {"lora_A": 1.0, "lora_B": 0.3 / (config.lora_alpha / a.rank)}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            for factor in filter(name.__contains__, deviation):
                noise = torch.randn(parameter.shape, generator=stream) / math.sqrt(parameter.shape[1])
                parameter.copy_(deviation[factor] * noise)
        logits, loss = forward(adapted, inputs)
    adapted.peft_config["default"].base_model_name_or_path = "../model"
    adapted.save_pretrained(folder / "peft_adapter")
    (folder / "peft_adapter" / "README.md").unlink(missing_ok=True)
    sort_targets(folder / "peft_adapter" / "adapter_config.json")
    write(folder / "peft_expected.safetensors", {"logits": logits, "loss": loss.reshape(1)})
    return {"peft": peft.__version__, "lora_alpha": config.lora_alpha}


def sort_targets(path):
    """PEFT writes a set in whatever order it happens to have; the same numbers are to give the same bytes."""
    config = json.loads(path.read_text())
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def continue_greedily(model, prompts):
    """Greedy ids [prompts, new] and the logits of each step [prompts, new, V], without a cache. Stops at nothing."""
    ids, steps = prompts, []
    for _ in range(NEW_TOKENS):
        steps.append(model(input_ids=ids).logits[:, -1])
        ids = torch.cat([ids, steps[-1].argmax(-1, keepdim=True)], dim=1)
    return ids[:, prompts.shape[1] :], torch.stack(steps, dim=1)


def choice_margin(logits):
    """How much the chosen token is ahead of the next, at the closest step."""
    top = logits.topk(2, dim=-1).values
    return (top[..., 0] - top[..., 1]).min().item()


def write_generate(folder, model, a):
    """Greedy continuations without padding, the same with transformers' own cache."""
    stream = generator(a.seed, 6)

    def draw():
        prompts = torch.randint(FIRST_ID, a.vocab_size, (PROMPTS, PROMPT_LENGTH), generator=stream)
        return prompts, *continue_greedily(model, prompts)

    prompts, new, logits = best(50, draw, lambda drawn: choice_margin(drawn[2]) / WANTED_CHOICE_MARGIN)
    cached = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW_TOKENS,
                            min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD, eos_token_id=a.vocab_size)
    assert torch.equal(cached[:, PROMPT_LENGTH:], new), "cache and no cache differ"
    write(folder / "generate.safetensors", {"prompt_ids": prompts, "new_ids": new, "logits": logits})
    return {"min_top1_top2_margin": choice_margin(logits)}


def write_manifest(root):
    """The SHA-256 of every file of every family under `root`."""
    files = sorted(path for path in root.glob("*/**/*") if path.is_file())
    sums = {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (root / "manifest.json").write_text(json.dumps(sums, indent=1) + "\n")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="OUT/llama is replaced")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--hidden-size", type=int, default=60)
    p.add_argument("--intermediate-size", type=int, default=107)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--kv-heads", type=int, default=2)
    p.add_argument("--head-dim", type=int, default=18)
    p.add_argument("--vocab-size", type=int, default=199)
    p.add_argument("--rank", type=int, default=7)
    p.add_argument("--length", type=int, default=24, help="tokens of a row of the inputs; training rows have 4 less")
    p.add_argument("--rope", choices=["none", "linear", "llama3"], default="llama3", help="rope scaling")
    p.add_argument("--rope-theta", type=float, default=10000.0)
    p.add_argument("--rms-norm-eps", type=float, default=1e-5)
    p.add_argument("--tied", action="store_true", help="the head is the embedding")
    p.add_argument("--attention-bias", action="store_true")
    p.add_argument("--mlp-bias", action="store_true")
    a = p.parse_args()
    if not 12 <= a.length <= 48:
        p.error(f"--length is {a.length}; the tests take rows of 12 to 48 tokens")
    smallest = min(a.hidden_size, a.intermediate_size, a.kv_heads * a.head_dim)
    if not 1 <= a.rank <= smallest:
        p.error(f"--rank is {a.rank}; the smallest side of an adapted weight is {smallest}")
    return a


def main():
    a = arguments()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(a.seed)
    folder = a.out / "llama"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    model = draw_model(a)
    wide = widen(model)
    inputs = draw_batch(3, a.length, a.vocab_size, generator(a.seed, 1))
    batches = draw_training(model, wide, a)
    write_model(folder / "model", model)
    write(folder / "train_batches.safetensors",
          {f"batch{n}.{name}": value for n, batch in enumerate(batches) for name, value in batch.items()})
    meta = {
        "family": "llama",
        "arguments": {name: value for name, value in vars(a).items() if name != "out"},
        "versions": {package.__name__: package.__version__
                     for package in (torch, transformers, peft, safetensors, numpy)},
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "f32_vs_f64": write_expected(folder, model, wide, inputs, batches),
        "lora_sb": write_lora_sb(folder, model, wide, batches, a),
        "lora_xs": write_lora_xs(folder, model, wide, batches, a),
        "lora": write_lora(folder, model, wide, batches, a),
        "full_ft": write_full_ft(folder, model, wide, batches),
        "peft_adapter": write_peft(folder, model, inputs, a),
        "generate": write_generate(folder, model, a),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    write_manifest(a.out)
    print(json.dumps(meta, indent=1))


if __name__ == "__main__":
    main()
