"""Forward, backward and training: of a model, of one with adapters, in f32 or f64."""
import copy

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from .draw import IGNORED

STEPS, LEARNING_RATE = 20, 1e-3
LOSS_TOLERANCE, OFF_SHARE = 1e-4, 0.01  # what the tests allow: of a loss, and of a tensor's elements after training


def forward(model, batch):
    """Logits ([rows, T, V], or [rows, classes]) and the loss, in the model's own type."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits, batch["labels"]
    if labels.is_floating_point():
        return logits, F.mse_loss(logits[:, 0], labels.to(logits.dtype))
    if labels.dim() == 1:
        return logits, F.cross_entropy(logits, labels)
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def gradients(model, batch, parameters):
    """Of the batch's loss, in the order of the dictionary `parameters`."""
    found = torch.autograd.grad(forward(model, batch)[1], list(parameters.values()))
    return dict(zip(parameters, found))


def targets(model, family):
    """Every adapted linear layer by its path, in the model's order."""
    return {name: module for name, module in model.named_modules() if name.endswith(family.targets)}


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


def adapt(model, factors, trained, scale=1.0, head=None):
    """A copy of the model with `factors[path] = {"A": .., "B": .., ["R": ..]}`, and its parameters named in `trained`
    as `<factor>.<path>`. The parameters of the module `head` are trained too, under their own names."""
    model = copy.deepcopy(model).requires_grad_(False)
    parameters = {}
    for path, values in factors.items():
        adapted = Adapted(model.get_submodule(path), values, scale)
        model.set_submodule(path, adapted)
        parameters |= {f"{name}.{path}": getattr(adapted, name) for name in trained}
    if head:
        module = model.get_submodule(head).requires_grad_(True)
        parameters |= {f"{head}.{name}": parameter for name, parameter in module.named_parameters()}
    return model, parameters


def train(model, parameters, batches, steps=STEPS):
    """Trains in place, step t on batch t mod 4: plain AdamW without decay, clipping or schedule. The losses before each
    step and one after the last, and the gradients of the first step."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=0.0, foreach=False)
    losses, first = [], None
    for step in range(steps + 1):
        optimizer.zero_grad(set_to_none=True)
        loss = forward(model, batches[step % len(batches)])[1]
        losses.append(loss.item())
        if step == steps:
            break
        loss.backward()
        first = first or {name: parameter.grad.clone() for name, parameter in parameters.items()}
        optimizer.step()
    return losses, first


def trajectory(model, wide, batches, prepare, compared=(), steps=STEPS):
    """A run in f32 and in f64. `prepare(model)` gives what is trained: (model, parameters). Returns the tensors of the
    losses, the trained f32 parameters, their first gradients, and a line for meta.json. The tests hold those whose
    names begin with one of `compared` to their ends, nearly all elements to 1e-5."""
    narrow, parameters = prepare(model)
    losses, first = train(narrow, parameters, batches, steps)
    broad, exact = prepare(wide)
    losses_f64, _ = train(broad, exact, batches, steps)
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


def write(path, tensors):
    """A safetensors file."""
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, path)
