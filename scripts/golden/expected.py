"""A family's own numbers: logits, loss, gradients, greedy text, and a check that its peculiarities show in them."""
from argparse import Namespace

import numpy, torch

from .compute import forward, gradients, write
from .draw import FIRST_ID, best, generator

PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 3, 7, 16
WANTED_CHOICE_MARGIN = 2e-3
SHOWN = 50  # a change shows when it moves a logit by so many times the rounding; the tests allow ten times


def write_model(folder, model):
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def counted(batch, logits):
    """The logits that count: where there is no padding, or all of a text's."""
    return logits[batch["attention_mask"] == 1] if logits.dim() == 3 else logits


def apart(found, exact):
    """How far f32 gradients are from f64 ones, each relative to its tensor's largest element; an analytically zero one
    to the largest of all. Returns the distances and the names of the zero ones."""
    largest = {name: value.abs().max().item() for name, value in exact.items()}
    zero = [name for name, value in largest.items() if value < 1e-12 * max(largest.values())]
    scales = largest | {name: max(largest.values()) for name in zero}
    return {name: ((found[name] - exact[name]).abs().max() / scales[name]).item() for name in found}, zero


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

    distances, zero = apart(found, exact)
    worst = max(distances, key=distances.get)
    return noise_of_answers(model, wide, inputs, batches) | {
        "grad_max_rel_to_tensor_max": distances[worst],
        "worst_grad": worst,
        "analytically_zero_grads": zero,
    }


@torch.no_grad()
def noise_of_answers(model, wide, inputs, batches):
    """How far f32 and f64 are apart in the logits of `inputs` and in the losses of all batches."""
    (logits, loss), (exact, _) = forward(model, inputs), forward(wide, inputs)
    losses = [abs(forward(model, b)[1].item() - forward(wide, b)[1].item()) for b in [inputs, *batches]]
    # One loss may be right to the last bit by luck; none can be told better than to half of that bit.
    last_bit = float(numpy.spacing(numpy.float32(loss.item()))) / 2
    return {"logits_max_abs": counted(inputs, logits - exact).abs().max().item(), "loss_abs": max(losses + [last_bit])}


@torch.no_grad()
def sensitivity(family, a, model, inputs, noise):
    """How far each change moves a logit. Refuses a model in which one hardly shows."""
    logits, moved = forward(model, inputs)[0], {}
    for name, change in family.changes(a).items():
        config = family.config(Namespace(**vars(a) | change.options))
        config._attn_implementation = "eager"
        changed = family.model(config).float().eval()
        changed.load_state_dict(model.state_dict())
        filled = [p for path, p in changed.named_parameters() if change.fill and path.endswith(change.fill[0])]
        for parameter in filled:
            parameter.fill_(change.fill[1])
        found = forward(changed, inputs | change.inputs(inputs))[0]
        moved[name] = counted(inputs, found - logits).abs().max().item()
        if moved[name] < SHOWN * noise:
            raise SystemExit(f"{name}: moves no logit by more than {moved[name]:.1e}; choose other options")
    return moved


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


def write_generate(folder, model, family, a):
    """Greedy continuations without padding, the same with transformers' own cache."""
    stream = generator(a.seed, 6)

    def draw():
        prompts = torch.randint(FIRST_ID, a.vocab_size, (PROMPTS, PROMPT_LENGTH), generator=stream)
        return prompts, *continue_greedily(model, prompts)

    prompts, new, logits = best(50, draw, lambda drawn: choice_margin(drawn[2]) / WANTED_CHOICE_MARGIN)
    cached = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW_TOKENS,
                            min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=family.pad,
                            eos_token_id=a.vocab_size)
    assert torch.equal(cached[:, PROMPT_LENGTH:], new), "cache and no cache differ"
    write(folder / "generate.safetensors", {"prompt_ids": prompts, "new_ids": new, "logits": logits})
    return {"min_top1_top2_margin": choice_margin(logits)}
