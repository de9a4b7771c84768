"""The trained runs of a family: LoRA-SB, LoRA-XS, LoRA and full fine-tuning, with the factors they start from."""
import copy
import math

import torch

from .compute import adapt, gradients, targets, trajectory, write
from .draw import BATCH_SIZES, WANTED_GAP, best, draw_batch, generator, relative_gap

ETA = 1e-3  # the size of LoRA-SB's first update
WANTED_SIGN_MARGIN = 10.0


def gradient_sums(model, family, batches):
    """G = sum over batches of dL/dW / (samples of the batch), L the batch's mean loss: as the LoRA-SB authors' code
    adds them up. [out, in] by path."""
    weights = {path: module.weight for path, module in targets(model, family).items()}
    sums = {path: torch.zeros_like(weight) for path, weight in weights.items()}
    for batch in batches:
        for path, gradient in gradients(model, batch, weights).items():
            sums[path] += gradient / len(batch["input_ids"])
    return sums


def draw_training(model, wide, family, a):
    """Four training batches. Where runs are kept, their gradient sums have signs beyond doubt and updates with separate
    singular values."""
    stream = generator(a.seed, 2)
    draw = lambda: [draw_batch(family, a, samples, a.length - 4, stream) for samples in BATCH_SIZES]

    def score(batches):
        found, exact = gradient_sums(model, family, batches), gradient_sums(wide, family, batches)
        margin = min(sign_margin(found[path], exact[path]) for path in found)
        if margin < WANTED_SIGN_MARGIN / 10:
            return margin / WANTED_SIGN_MARGIN
        gap = min(relative_gap(torch.linalg.svdvals(torch.sign(exact[path])), a.rank) for path in exact)
        return min(margin / WANTED_SIGN_MARGIN, gap / WANTED_GAP)

    return best(200, draw, score) if family.kept else draw()


def sign_margin(found, exact):
    """The smallest element of a gradient over the rounding of its elements (root mean square); 0 if a sign flips."""
    if not torch.equal(torch.sign(found).double(), torch.sign(exact)) or not exact.all():
        return 0.0
    return (exact.abs().min() / (found - exact).pow(2).mean().sqrt()).item()


def write_lora_sb(folder, model, wide, family, batches, a):
    """The update -eta sign(G) = U S V^T, cut to B = U_r, R = diag(S_r), A = V_r^T, and a run that trains R; a further
    one that trains the family's head too."""
    tensors = {"rank": torch.tensor([a.rank]), "lr_eff": torch.tensor([ETA], dtype=torch.float64)}
    stream, factors, gaps = generator(a.seed, 3), {}, []
    sums, exact = gradient_sums(model, family, batches), gradient_sums(wide, family, batches)
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
    margin = min(sign_margin(sums[path], exact[path]) for path in sums)
    meta = {"min_rel_gap_within_top_r_plus_1": min(gaps), "min_abs_grad_over_rms_noise": margin, "trajectory": line}
    if family.head:
        prepare = lambda model: adapt(model, factors, ["R"], head=family.head)
        with_head, _, _, meta["trajectory_with_classifier_trained"] = trajectory(model, wide, batches, prepare)
        run |= {name + "_with_classifier_trained": value for name, value in with_head.items()}
    write(folder / "lora_sb.safetensors", tensors | run | run_of_r(trained, first))
    return meta


def run_of_r(trained, first):
    """R's first gradient and where it ends, by path."""
    return ({name.replace("R.", "R_grad_step0.", 1): value for name, value in first.items()}
            | {name.replace("R.", "R_final.", 1): value for name, value in trained.items()})


def write_lora_xs(folder, model, wide, family, batches, a):
    """W0 = P S Q^T, cut to B = P_r, A = S_r Q_r^T; R starts at exactly 0 and is trained."""
    tensors, factors, gaps = {"rank": torch.tensor([a.rank])}, {}, []
    for path, module in targets(model, family).items():
        p, s, qt = torch.linalg.svd(module.weight.detach().double(), full_matrices=False)
        outer, inner = p[:, : a.rank], s[: a.rank, None] * qt[: a.rank]
        factors[path] = {"A": inner.float(), "B": outer.float(), "R": torch.zeros(a.rank, a.rank)}
        gaps.append(relative_gap(s, a.rank))
        tensors |= {f"A.{path}": inner.float(), f"B.{path}": outer.float(), f"svals.{path}": s,
                    f"ba.{path}": (outer @ inner).float()}
    run, trained, first, line = trajectory(model, wide, batches, lambda model: adapt(model, factors, ["R"]))
    write(folder / "lora_xs.safetensors", tensors | run | run_of_r(trained, first))
    return {"min_rel_gap_within_top_r_plus_1": min(gaps), "trajectory": line}


def write_lora(folder, model, wide, family, batches, a):
    """A uniform in +-1/sqrt(in), B = 0, both trained; at scale 1, and at scale 2 under names that end in _s2."""
    stream, factors = generator(a.seed, 4), {}
    for path, module in targets(model, family).items():
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


def write_full_ft(folder, model, wide, family, batches):
    """All parameters trained; where four of them end."""

    def prepare(model):
        model = copy.deepcopy(model)
        return model, dict(model.named_parameters())

    kept = [name.format(last=model.config.num_hidden_layers - 1) for name in family.kept]
    run, trained, _, line = trajectory(model, wide, batches, prepare, kept)
    write(folder / "full_ft.safetensors", run | {f"final.{name}": trained[name] for name in kept})
    return {"trajectory": line}
