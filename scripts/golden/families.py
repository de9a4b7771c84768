"""The families: how each is configured from its options, and what of it the fixtures have to show."""
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Callable

import torch
import transformers

DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ENCODER = ("query", "value", "attention.output.dense", "output.dense")  # as the LoRA-SB authors choose them


@dataclass(frozen=True)
class Change:
    """Something an implementation might get wrong: other options, a weight set to a constant, or other inputs."""

    options: dict = field(default_factory=dict)
    fill: tuple = ()  # (ending of the parameters' names, value)
    inputs: Callable = lambda inputs: {}


@dataclass(frozen=True)
class Family:
    """`defaults` are its options as meta.json lists them; each of `changes(options)` must show in the logits."""

    model: type
    config: Callable
    defaults: dict
    changes: Callable = lambda a: {}
    task: str = "causal"  # or "classes", "value"
    targets: tuple = DECODER
    padding: str = "right"
    pad: int = 0
    first: int = 0  # the token that a text to be classified begins with
    token_types: bool = False
    norm_centre: float = 1.0
    generates: bool = False
    kept: tuple = ()  # parameters kept of a full fine-tuning run; {last} is the last layer. Without them: no runs
    head: str | None = None  # the module trained beside an adapter, in a further run
    methods: bool = False  # PEFT's methods, too


def decoder(a, **more):
    """The arguments that all decoders' configurations share."""
    return dict(
        vocab_size=a.vocab_size, hidden_size=a.hidden_size, intermediate_size=a.intermediate_size,
        num_hidden_layers=a.layers, num_attention_heads=a.heads, num_key_value_heads=a.kv_heads,
        max_position_embeddings=512, rms_norm_eps=a.rms_norm_eps, rope_theta=a.rope_theta, tie_word_embeddings=a.tied,
        bos_token_id=1, eos_token_id=2) | more


def llama(a):
    scaling = {
        "none": None,
        "linear": {"rope_type": "linear", "factor": 2.5},
        "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 64},
    }[a.rope]
    return transformers.LlamaConfig(**decoder(
        a, head_dim=a.head_dim, rope_scaling=scaling, attention_bias=a.attention_bias, mlp_bias=a.mlp_bias))


def mistral(a):
    return transformers.MistralConfig(**decoder(a, head_dim=a.head_dim, sliding_window=a.sliding_window))


def qwen2(a):
    return transformers.Qwen2Config(**decoder(a))


def qwen3(a):
    return transformers.Qwen3Config(**decoder(a, head_dim=a.head_dim, attention_bias=a.attention_bias))


def gemma(a, **more):
    """What Gemma 2 and 3 share; the letters of `layer_types` are repeated over the layers."""
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    types = [kinds[a.layer_types[layer % len(a.layer_types)]] for layer in range(a.layers)]
    return decoder(a, head_dim=a.head_dim, sliding_window=a.sliding_window, layer_types=types, pad_token_id=0,
                   query_pre_attn_scalar=a.query_pre_attn_scalar, hidden_activation=a.activation, **more)


def gemma2(a):
    return transformers.Gemma2Config(**gemma(a, attn_logit_softcapping=a.attention_soft_cap,
                                             final_logit_softcapping=a.final_soft_cap))


def gemma3_text(a):
    return transformers.Gemma3TextConfig(**gemma(a, rope_local_base_freq=a.rope_local_theta))


def phi3(a):
    return transformers.Phi3Config(**decoder(a, partial_rotary_factor=a.partial_rotary_factor, pad_token_id=0,
                                             original_max_position_embeddings=512))


def encoder(a, **more):
    return dict(
        vocab_size=a.vocab_size, hidden_size=a.hidden_size, intermediate_size=a.intermediate_size,
        num_hidden_layers=a.layers, num_attention_heads=a.heads, layer_norm_eps=a.layer_norm_eps,
        hidden_act=a.activation, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0,
        max_position_embeddings=a.length + 9) | more


def bert(a):
    return transformers.BertConfig(**encoder(a, num_labels=a.labels, type_vocab_size=2, pad_token_id=0))


def roberta(a, **more):
    return transformers.RobertaConfig(**encoder(a, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
                                                **more))


def sizes(seed, hidden, intermediate, heads, kv_heads, head_dim, vocabulary):
    """The options of every decoder; a size that is None is not the family's to choose."""
    some = dict(seed=seed, hidden_size=hidden, intermediate_size=intermediate, layers=2, heads=heads, kv_heads=kv_heads,
                head_dim=head_dim, vocab_size=vocabulary, rank=5, length=24)
    return {name: value for name, value in some.items() if value is not None}


def encoder_sizes(seed, hidden, intermediate, heads, vocabulary, **more):
    return dict(seed=seed, hidden_size=hidden, intermediate_size=intermediate, layers=2, heads=heads,
                vocab_size=vocabulary, rank=5, length=24, activation="gelu", layer_norm_eps=1e-4) | more


def rotation_and_epsilon(a):
    return {"twice the theta": Change({"rope_theta": 2 * a.rope_theta}),
            "ten times the epsilon": Change({"rms_norm_eps": 10 * a.rms_norm_eps})}


def no_mask(inputs):
    return {"attention_mask": torch.ones_like(inputs["attention_mask"])}


def mistral_changes(a):
    return rotation_and_epsilon(a) | {
        "no window": Change({"sliding_window": None}),
        "a window wider by one": Change({"sliding_window": a.sliding_window + 1}),
        "padding seen": Change(inputs=no_mask)}


def qwen2_changes(a):
    return rotation_and_epsilon(a) | {"no bias": Change(fill=("proj.bias", 0.0))}


def head_norms(value):
    return {f"no {name}": Change(fill=(f"{name}.weight", value)) for name in ("q_norm", "k_norm")}


def gemma_changes(a):
    return rotation_and_epsilon(a) | {
        "a window wider by one": Change({"sliding_window": a.sliding_window + 1}),
        "scores over the root of head_dim": Change({"query_pre_attn_scalar": a.head_dim}),
        "exact GELU": Change({"activation": "gelu"}),
        "layer types exchanged": Change({"layer_types": a.layer_types.translate(str.maketrans("sf", "fs"))})}


def gemma2_changes(a):
    return gemma_changes(a) | {"no cap of scores": Change({"attention_soft_cap": None}),
                               "no cap of logits": Change({"final_soft_cap": None})}


def gemma3_changes(a):
    return gemma_changes(a) | head_norms(0.0) | {
        "twice the local theta": Change({"rope_local_theta": 2 * a.rope_local_theta}),
        "thetas exchanged": Change({"rope_local_theta": a.rope_theta, "rope_theta": a.rope_local_theta})}


def phi3_changes(a):
    whole = {} if a.partial_rotary_factor == 1 else {"heads turned whole": Change({"partial_rotary_factor": 1.0})}
    return rotation_and_epsilon(a) | whole | {"padding seen": Change(inputs=no_mask)}


def encoder_changes(a):
    return {"ten times the epsilon": Change({"layer_norm_eps": 10 * a.layer_norm_eps}),
            "GELU by tanh": Change({"activation": "gelu_pytorch_tanh"}),
            "padding seen": Change(inputs=no_mask),
            "no query bias": Change(fill=("query.bias", 0.0))}


def bert_changes(a):
    return encoder_changes(a) | {
        "one token type": Change(inputs=lambda inputs: {"token_type_ids": 0 * inputs["token_type_ids"]}),
        "no bias of the pooler": Change(fill=("pooler.dense.bias", 0.0))}


def roberta_changes(a):
    from_zero = lambda inputs: {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None]}
    return encoder_changes(a) | {"positions from zero": Change(inputs=from_zero)}


DECODER_KEPT = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight",
                "model.layers.{last}.mlp.down_proj.weight", "model.norm.weight")
ROBERTA_KEPT = ("roberta.embeddings.position_embeddings.weight", "roberta.embeddings.LayerNorm.weight",
                "roberta.encoder.layer.0.attention.self.query.weight", "classifier.out_proj.weight")
ROBERTA = dict(model=transformers.RobertaForSequenceClassification, changes=roberta_changes, targets=ENCODER, pad=1)

FAMILIES = {
    "llama": Family(
        transformers.LlamaForCausalLM, llama,
        sizes(1, 60, 107, 4, 2, 18, 199) | dict(rank=7, rope="llama3", rope_theta=10000.0, rms_norm_eps=1e-5,
                                                tied=False, attention_bias=False, mlp_bias=False),
        generates=True, kept=DECODER_KEPT, methods=True),
    "mistral": Family(
        transformers.MistralForCausalLM, mistral,
        sizes(2, 40, 53, 4, 1, 8, 83) | dict(rope_theta=10000.0, rms_norm_eps=1e-4, tied=False, sliding_window=5),
        mistral_changes, padding="left", generates=True),
    "qwen2": Family(
        transformers.Qwen2ForCausalLM, qwen2,
        sizes(3, 36, 61, 3, 1, None, 97) | dict(rope_theta=500000.0, rms_norm_eps=1e-4, tied=True),
        qwen2_changes),
    "qwen3": Family(
        transformers.Qwen3ForCausalLM, qwen3,
        sizes(4, 40, 47, 4, 2, 12, 83) | dict(rope_theta=300000.0, rms_norm_eps=1e-4, tied=False,
                                              attention_bias=False),
        lambda a: rotation_and_epsilon(a) | head_norms(1.0)),
    "gemma2": Family(
        transformers.Gemma2ForCausalLM, gemma2,
        sizes(5, 36, 53, 4, 2, 12, 97) | dict(
            rope_theta=10000.0, rms_norm_eps=1e-4, tied=True, sliding_window=5, layer_types="sf",
            query_pre_attn_scalar=23, attention_soft_cap=1.7, final_soft_cap=2.3, activation="gelu_pytorch_tanh"),
        gemma2_changes, norm_centre=0.0, generates=True, kept=DECODER_KEPT),
    "gemma3_text": Family(
        transformers.Gemma3ForCausalLM, gemma3_text,
        sizes(6, 36, 53, 3, 1, 14, 89) | dict(
            rope_theta=200000.0, rope_local_theta=3000.0, rms_norm_eps=1e-4, tied=True, sliding_window=6,
            layer_types="sf", query_pre_attn_scalar=27, activation="gelu_pytorch_tanh"),
        gemma3_changes, norm_centre=0.0, generates=True),
    "phi3": Family(
        transformers.Phi3ForCausalLM, phi3,
        sizes(7, 42, 53, 3, 1, None, 83) | dict(rope_theta=10000.0, partial_rotary_factor=0.75, rms_norm_eps=1e-4,
                                                tied=False),
        phi3_changes, targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), padding="left"),
    "bert_cls": Family(
        transformers.BertForSequenceClassification, bert, encoder_sizes(8, 36, 59, 3, 83, labels=2),
        bert_changes, task="classes", targets=ENCODER, first=2, token_types=True),
    "roberta_cls": Family(
        config=lambda a: roberta(a, num_labels=a.labels), defaults=encoder_sizes(9, 36, 53, 4, 71, labels=3),
        task="classes", kept=ROBERTA_KEPT, head="classifier", **ROBERTA),
    "roberta_reg": Family(
        config=lambda a: roberta(a, num_labels=1, problem_type="regression"),
        defaults=encoder_sizes(10, 35, 59, 5, 67), task="value", **ROBERTA),
}


def options(family, given):
    """The family's options: those given, else its own."""
    return Namespace(**{name: given.get(name, value) for name, value in family.defaults.items()})
