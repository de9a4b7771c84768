"""Random weights and batches. Each purpose has a stream of its own; a draw that would be no fair test is repeated."""
import math

import torch

FIRST_ID = 5  # ids below are left to special tokens
IGNORED = -100
BATCH_SIZES = (3, 3, 3, 2)  # the last one is smaller: a mean over batches is not a mean over samples
WANTED_GAP = 2e-3


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


def draw_model(family, a):
    """A model in f32: weights N(0, 1.44 / in), norms and biases around their neutral values but never at them."""
    config = family.config(a)
    config._attn_implementation = "eager"
    model = family.model(config).float().eval()
    stream = generator(a.seed, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw_parameter(name, parameter.shape, family, stream, a.rank))
    return model


def draw_parameter(name, shape, family, stream, rank):
    """One tensor; an adapted weight [out, in] has its first singular values well apart."""
    if len(shape) == 1:
        mean, deviation = (0.0, 0.1) if name.endswith("bias") else (family.norm_centre, 0.2)
        return mean + deviation * torch.randn(shape, generator=stream)
    draw = lambda: torch.randn(shape, generator=stream) * 1.2 / math.sqrt(shape[1])
    if not name.removesuffix(".weight").endswith(family.targets):
        return draw()
    # LoRA-XS takes these apart.
    return best(50, draw, lambda weight: relative_gap(torch.linalg.svdvals(weight.double()), rank) / WANTED_GAP)


def draw_batch(family, a, samples, length, stream):
    """`samples` rows of `length` random tokens. The last row lacks a third of them, the row before two."""
    ids = torch.randint(FIRST_ID, a.vocab_size, (samples, length), generator=stream)
    mask = torch.ones_like(ids)
    for row, missing in ((-1, length // 3), (-2, 2 if samples > 2 else 0)):
        mask[row, slice(0, missing) if family.padding == "left" else slice(length - missing, length)] = 0
    label = label_tokens if family.task == "causal" else label_texts
    return label(family, a, ids.masked_fill(mask == 0, family.pad), mask, stream)


def label_tokens(family, a, ids, mask, stream):
    """Every token is its own label but for padding, the first four tokens of row 0, and what follows padding on the
    left: that prediction would be made at a padding token."""
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[0, :4] = IGNORED
    if family.padding == "left":
        labels[:, 1:][mask[:, :-1] == 0] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def label_texts(family, a, ids, mask, stream):
    """A label for each row, whose first token is the one that the head reads. Classes differ from row to row. With
    token types every row but the last is a pair, and type 1 begins with its second text."""
    ids[:, 0] = family.first
    samples = len(ids)
    if family.task == "value":
        labels = 0.4 + 1.5 * torch.randn(samples, generator=stream)
    else:
        labels = (torch.randperm(samples, generator=stream) + torch.randint(9, (1,), generator=stream)) % a.labels
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if family.token_types:
        second = torch.randint(2, ids.shape[1] - 3, (samples, 1), generator=stream)
        second[-1] = ids.shape[1]
        batch["token_type_ids"] = (torch.arange(ids.shape[1]) >= second).long() * mask
    return batch
