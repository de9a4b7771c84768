"""What the real PEFT makes: an adapter of each family with runs, and its methods DoRA, rsLoRA, PiSSA and LoRA-GA.

The names of tensors are those of PEFT's adapter files: a parameter's path without the adapter's own name.
"""
import copy
import json
import math
import tempfile
from pathlib import Path

import peft, torch
from safetensors import safe_open

from .compute import forward, gradients, train, trajectory, write
from .draw import generator, relative_gap
from .expected import apart, noise_of_answers
from .wide import widen

METHOD_STEPS, SAVED_AFTER = 10, 5
FEW = ("q_proj", "v_proj", "down_proj")  # of the methods whose starting factors are kept


def lora_config(family, rank, targets, **more):
    """An adapter whose lora_alpha is not its rank."""
    task = "CAUSAL_LM" if family.task == "causal" else "SEQ_CLS"
    return peft.LoraConfig(r=rank, lora_alpha=rank + 5, lora_dropout=0.0, target_modules=sorted(targets),
                           task_type=task, **more)


@torch.no_grad()
def randomise(adapted, stream):
    """No trained tensor at its initial value. Entries of scale * B A are a quarter of W0's, so that rounding stays what
    the base model's is; magnitudes are off the norms by a sixth, a head is drawn as a model's is."""
    config = adapted.peft_config["default"]
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    for name, parameter in adapted.named_parameters():
        noise = torch.randn(parameter.shape, generator=stream) if parameter.requires_grad else None
        if "lora_A" in name:
            parameter.copy_(noise / math.sqrt(parameter.shape[1]))
        elif "lora_B" in name:
            parameter.copy_(noise / math.sqrt(parameter.shape[1]) * (0.3 / scale))
        elif "magnitude" in name:
            parameter.mul_(1 + noise / 6)
        elif noise is not None:
            parameter.copy_(noise * (1.2 / math.sqrt(parameter.shape[1]) if noise.dim() == 2 else 0.1))


def save(adapted, folder, **more):
    """As PEFT saves it, but for the description, and for the order of a set, which PEFT leaves to chance."""
    adapted.peft_config["default"].base_model_name_or_path = "../model"
    adapted.save_pretrained(folder, **more)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2) + "\n")


def write_peft(folder, model, family, inputs, a):
    """An adapter that PEFT made and saved, lora_alpha not r, B not zero, of a classifier also its head; logits and loss
    of `inputs` with it."""
    config = lora_config(family, a.rank, family.targets)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    randomise(adapted, generator(a.seed, 5))
    with torch.no_grad():
        logits, loss = forward(adapted, inputs)
    save(adapted, folder / "peft_adapter")
    write(folder / "peft_expected.safetensors", {"logits": logits, "loss": loss.reshape(1)})
    return {"peft": peft.__version__, "lora_alpha": config.lora_alpha}


def trained(adapted):
    """The trained parameters by their names in the adapter file."""
    short = lambda name: name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    return {short(name): value for name, value in adapted.named_parameters() if value.requires_grad}


def write_method(folder, adapted, inputs, batches):
    """A random adapter as PEFT saves it; logits, loss and gradients of `inputs`, and a run from there."""
    save(adapted, folder / "adapter")
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(trained(adapted)), "PEFT saves other names"
    wide = widen(adapted)
    with torch.no_grad():
        logits, loss = forward(adapted, inputs)
    found = gradients(adapted, inputs, trained(adapted))
    distances, _ = apart(found, gradients(wide, inputs, trained(wide)))
    run, line = run_of(adapted, batches)
    write(folder / "expected.safetensors", {"logits": logits, "loss": loss.reshape(1)} | run
          | {f"grad.{name}": value for name, value in found.items()})
    noise = noise_of_answers(adapted, wide, inputs, batches)
    return {"f32_vs_f64": noise | {"grad_max_rel_to_tensor_max": max(distances.values())}, "trajectory": line}


def run_of(adapted, batches):
    """The losses of ten steps that train all of the adapter, and a line for meta.json."""

    def prepare(model):
        model = copy.deepcopy(model)
        return model, trained(model)

    tensors, _, _, line = trajectory(adapted, widen(adapted), batches, prepare, steps=METHOD_STEPS)
    return tensors, line


def write_started(folder, model, adapted, inputs, batches, products):
    """A method that starts from factors of its own and moves W0 by them: the factors, a run from there, and the adapter
    after five of its steps, converted by PEFT to a plain one for the unmoved model. With `products` B A of the start
    too, where that is free of the signs of singular vectors."""
    tensors, config = {}, adapted.peft_config["default"]
    for name, value in trained(adapted).items():
        path, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        tensors[f"start.{factor}.{path}"] = value.detach().clone()
    for name in [name for name in tensors if products and name.startswith("start.A.")]:
        outer = tensors[name.replace("start.A.", "start.B.")]
        tensors[name.replace("start.A.", "start.ba.")] = (outer.double() @ tensors[name].double()).float()
    meta = {"start_moves_logits_by": furthest(adapted, model, inputs), "lora_alpha": config.lora_alpha, "r": config.r}
    run, meta["trajectory"] = run_of(adapted, batches)
    with tempfile.TemporaryDirectory() as kept:
        start = Path(kept) / "start"
        # Where PEFT loads the start it would otherwise take W0 apart again, and refuses to.
        config.init_lora_weights = True
        adapted.save_pretrained(start)
        train(adapted, trained(adapted), batches, SAVED_AFTER)
        save(adapted, folder / "adapter", path_initial_model_for_weight_conversion=str(start))
    converted = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder / "adapter").eval()
    meta["conversion_moves_logits_by"] = furthest(adapted, converted, inputs)
    meta["f32_vs_f64"] = noise_of_answers(converted, widen(converted), inputs, batches)
    with torch.no_grad():
        logits, loss = forward(converted, inputs)
    write(folder / "expected.safetensors", tensors | run | {"logits": logits, "loss": loss.reshape(1)})
    return meta


@torch.no_grad()
def furthest(model, other, inputs):
    """How far the logits of two models that are to be the same are apart."""
    distance = (forward(model, inputs)[0] - forward(other, inputs)[0]).abs().max().item()
    assert distance < 1e-4, f"logits are {distance:.1e} apart"
    return distance


def pissa(folder, model, family, inputs, batches, a):
    """The singular value decomposition of W0, exact, in f32."""
    config = lora_config(family, a.rank, FEW, init_lora_weights="pissa")
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    return write_started(folder, model, adapted, inputs, batches, products=True)


def lora_ga(folder, model, family, inputs, batches, a):
    """PEFT estimates the gradient itself, as the mean over batches of dL/dW / samples: a quarter of `grad_sum`. It
    takes the gradient apart by random projections on 4 r directions; the rank is such that these are all there are."""
    base = copy.deepcopy(model)
    modules = [module for name, module in base.named_modules() if name.endswith(FEW)]
    sides = [min(module.weight.shape) for module in modules]
    rank = -(-max(sides) // 4)
    if 2 * rank > min(sides):
        return {"skipped": f"a side of {max(sides)} asks for rank {rank}, one of {min(sides)} has no {2 * rank} values"}
    config = lora_config(family, rank, FEW, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())

    def estimate():
        for batch in batches:
            (forward(base, batch)[1] / len(batch["input_ids"])).backward()

    torch.manual_seed(a.seed)
    peft.preprocess_loraga(base, config, estimate)
    values = [torch.linalg.svdvals(module._peft_loraga_grad.double()) for module in modules]
    meta = {name: getattr(config.lora_ga_config, name) for name in ("direction", "scale", "stable_gamma")}
    meta["min_rel_gap_within_top_2r_plus_1"] = min(relative_gap(of_one, 2 * rank) for of_one in values)
    adapted = peft.get_peft_model(base, config).eval()
    return meta | write_started(folder, model, adapted, inputs, batches, products=False)


def write_methods(folder, model, family, inputs, batches, a):
    """A folder for each method, and meta.json."""
    stream, meta = generator(a.seed, 7), {}
    random = (("dora", family.targets, {"use_dora": True}), ("rslora", FEW, {"use_rslora": True}))
    for method, targets, more in random:
        adapted = peft.get_peft_model(copy.deepcopy(model), lora_config(family, a.rank, targets, **more)).eval()
        randomise(adapted, stream)
        meta[method] = write_method(folder / method, adapted, inputs, batches)
    for method in (pissa, lora_ga):
        meta[method.__name__] = method(folder / method.__name__, model, family, inputs, batches, a)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
