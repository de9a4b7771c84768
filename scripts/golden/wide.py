"""The f64 side: transformers rounds norms, softmax and rotations to f32 whatever the model's type; this does not."""
import copy

import torch
from torch import nn
from torch.nn import functional as F


class WideNorm(nn.Module):
    """Root mean square normalisation in the type of its input, with the gain `offset + weight` (Gemma: 1 + weight)."""

    def __init__(self, norm):
        super().__init__()
        gemma = not hasattr(norm, "variance_epsilon")
        self.weight, self.offset = norm.weight, 1.0 if gemma else 0.0
        self.epsilon = norm.eps if gemma else norm.variance_epsilon

    def forward(self, x):
        return (self.offset + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)


class WideRotation(nn.Module):
    """cos and sin of position times frequency, [1, T, rotated size] each, of the frequencies that the f32 model has:
    one set, or as in Gemma 3 one for each type of layer."""

    def __init__(self, rotation):
        super().__init__()
        self.scales = {}
        for kind in getattr(rotation, "layer_types", [""]):
            prefix = kind and kind + "_"
            self.register_buffer(prefix + "frequencies", getattr(rotation, prefix + "inv_freq"), persistent=False)
            self.scales[prefix] = getattr(rotation, prefix + "attention_scaling")

    def forward(self, x, position_ids, layer_type=""):
        prefix = layer_type and layer_type + "_"
        angles = (position_ids[..., None] * getattr(self, prefix + "frequencies")).repeat(1, 1, 2)
        return angles.cos() * self.scales[prefix], angles.sin() * self.scales[prefix]


def wide_softmax(x, *positional, dtype=None, **named):
    """The softmax of PyTorch, but f64 stays f64 though the caller asks for f32."""
    return wide_softmax.original(x, *positional, dtype=None if x.dtype == torch.float64 else dtype, **named)


wide_softmax.original, F.softmax = F.softmax, wide_softmax


def widen(model):
    """A copy of the model, or of PEFT's wrapping of it, that computes in f64 throughout."""
    wide = copy.deepcopy(model).double()
    for name, module in list(wide.named_modules()):
        for ending, replacement in (("RMSNorm", WideNorm), ("RotaryEmbedding", WideRotation)):
            if type(module).__name__.endswith(ending):
                wide.set_submodule(name, replacement(module))
    return wide
