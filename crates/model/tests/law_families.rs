//! Every family: what its published configurations say, in the spelling of transformers 4 and of 5, and what
//! is refused.

mod support;

use lora_sb_kernels::{Activation, Mask, RmsGain, RopeScaling};
use lora_sb_model::{
    Config, FeedForward, Norm, NormKind, NormPlacement, Parameter, Positions, Projection, Rotation, Task,
};
use serde_json::json;
use support::published::{changed, published};

/// Each published configuration, with the number of elements and of tensors that transformers 5.23 gives its
/// model: `AutoModelForCausalLM`, or `AutoModelForSequenceClassification` of 2 labels.
const PUBLISHED: [(&str, usize, usize); 9] = [
    ("llama-3.2-3b", 3_212_749_824, 254),
    ("mistral-7b-v0.1", 7_241_732_096, 291),
    ("qwen2.5-0.5b", 494_032_768, 290),
    ("qwen3-0.6b", 596_049_920, 310),
    ("gemma-2-9b", 9_241_705_984, 464),
    ("gemma-3-1b-it", 999_885_952, 340),
    ("phi-3-mini-4k-instruct", 3_821_079_552, 195),
    ("bert-base-uncased", 109_483_778, 201),
    ("roberta-large", 355_361_794, 393),
];

/// All that was read, without the file itself.
fn meaning(config: &Config) -> String {
    format!("{config:?}").split(", json: ").next().unwrap().into()
}

fn masks(config: &Config) -> Vec<Mask> {
    config.blocks.iter().map(|block| block.mask).collect()
}

fn rotations(config: &Config) -> (usize, Vec<Rotation>) {
    match &config.positions {
        Positions::Rotary { rotary_size, rotations } => (*rotary_size, rotations.clone()),
        Positions::Learned { .. } => panic!("positions are learned"),
    }
}

#[test]
fn published_models_have_their_published_counts() {
    for (name, elements, tensors) in PUBLISHED {
        let config = published(name);
        assert_eq!((config.parameter_count(), config.parameters().len()), (elements, tensors), "{name}");
    }
    let roberta = published("roberta-large");
    assert_eq!(roberta.parameter_shape(Parameter::Classifier), [2, 1024]);
    assert_eq!(roberta.parameter_shape(Parameter::ClassifierBias), [2]);
    assert_eq!(roberta.parameter_count() - 2 * 1024 - 2, 355_359_744);
}

#[test]
fn sums_of_sides_are_those_of_the_papers_tables() {
    for (name, sum) in [("mistral-7b-v0.1", 81_920), ("gemma-2-9b", 80_384), ("llama-3.2-3b", 54_272)] {
        let config = published(name);
        let shapes = config.sites().into_iter().filter(|site| site.layer == 1);
        assert_eq!(
            shapes.map(|site| config.site_shape(site)).map(|(n, k)| n + k).sum::<usize>(),
            sum,
            "{name}"
        );
    }
    let roberta = published("roberta-large");
    let targets = [Projection::Query, Projection::Value, Projection::Output, Projection::Down];
    let shapes = targets.map(|target| roberta.site_shape(target.of(0)));
    assert_eq!(shapes, [(1024, 1024), (1024, 1024), (1024, 1024), (1024, 4096)]);
}

#[test]
fn older_and_newer_spellings_are_one_configuration() {
    for (name, ..) in PUBLISHED {
        let (older, newer) = (published(name), published(&format!("transformers_5/{name}")));
        assert_eq!(meaning(&older), meaning(&newer), "{name}");
    }
}

#[test]
fn an_architecture_alone_is_enough() {
    for (name, ..) in PUBLISHED {
        let config = changed(name, &json!({ "model_type": "absent" })).unwrap();
        assert_eq!(config.family, published(name).family);
    }
}

#[test]
fn llama_and_mistral() {
    let llama = published("llama-3.2-3b");
    let scaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_context: 8192.0,
    };
    assert_eq!(rotations(&llama), (128, vec![Rotation { theta: 500_000.0, scaling }]));
    assert_eq!((llama.norm, llama.norm_placement), (NormKind::Rms(RmsGain::Weight), NormPlacement::Before));
    assert_eq!(llama.feed_forward, FeedForward::Gated(Activation::Silu));
    assert!(llama.tie_word_embeddings && llama.biased.is_empty());
    let with_biases = changed("llama-3.2-3b", &json!({ "mlp_bias": true })).unwrap();
    assert_eq!(with_biases.biased, [Projection::Gate, Projection::Up, Projection::Down]);

    let mistral = |changes| changed("mistral-7b-v0.1", &changes).unwrap();
    assert_eq!(masks(&mistral(json!({}))), vec![Mask::Sliding { window: 4096 }; 32]);
    assert_eq!(
        masks(&mistral(json!({ "sliding_window": "absent" }))),
        vec![Mask::Sliding { window: 4096 }; 32]
    );
    assert_eq!(masks(&mistral(json!({ "sliding_window": null }))), vec![Mask::Causal; 32]);
    assert_eq!(mistral(json!({ "num_key_value_heads": "absent" })).num_key_value_heads, 8);
    assert_eq!(mistral(json!({ "num_key_value_heads": null })).num_key_value_heads, 32);
    assert!(!mistral(json!({})).tie_word_embeddings);
}

#[test]
fn qwen() {
    let qwen2 = |changes| changed("qwen2.5-0.5b", &changes).unwrap();
    let plain = qwen2(json!({}));
    assert_eq!(plain.biased, [Projection::Query, Projection::Key, Projection::Value]);
    assert_eq!((plain.head_dim, plain.query_key_norm), (64, false));
    assert_eq!(masks(&plain), vec![Mask::Causal; 24]);
    let slides = json!({ "use_sliding_window": true, "sliding_window": 9, "max_window_layers": 22 });
    let mut expected = vec![Mask::Causal; 22];
    expected.extend([Mask::Sliding { window: 9 }; 2]);
    assert_eq!(masks(&qwen2(slides)), expected);
    let named = json!({ "use_sliding_window": true, "sliding_window": 9, "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] });
    assert_eq!(masks(&qwen2(named)), [Mask::Sliding { window: 9 }, Mask::Causal]);

    let qwen3 = published("qwen3-0.6b");
    assert!(qwen3.query_key_norm && qwen3.biased.is_empty());
    assert_eq!(qwen3.site_shape(Projection::Output.of(0)), (1024, 2048));
    assert_eq!(qwen3.parameter_shape(Parameter::Gain(Norm::Key(3))), [128]);
    assert_eq!(qwen3.name(Parameter::Gain(Norm::Key(3))), "model.layers.3.self_attn.k_norm.weight");
    let biased = changed("qwen3-0.6b", &json!({ "attention_bias": true, "head_dim": "absent" })).unwrap();
    assert_eq!((biased.biased.len(), biased.head_dim), (4, 128));
}

#[test]
fn gemma() {
    let gemma2 = published("gemma-2-9b");
    assert_eq!(
        masks(&gemma2)[..3],
        [Mask::Sliding { window: 4096 }, Mask::Causal, Mask::Sliding { window: 4096 }]
    );
    assert_eq!(
        (gemma2.norm, gemma2.norm_placement),
        (NormKind::Rms(RmsGain::OnePlusWeight), NormPlacement::Around)
    );
    assert_eq!((gemma2.attention_soft_cap, gemma2.logit_soft_cap), (Some(50.0), Some(30.0)));
    assert_eq!((gemma2.attention_scale, gemma2.embedding_scale), (1.0 / 16.0, 3584f64.sqrt()));
    assert_eq!(gemma2.feed_forward, FeedForward::Gated(Activation::GeluTanh));
    assert!(gemma2.tie_word_embeddings, "the default, as the file does not say");
    assert_eq!(gemma2.pad_token_id, Some(0));
    let changes = json!({ "attn_logit_softcapping": null, "final_logit_softcapping": "absent",
        "query_pre_attn_scalar": 144, "tie_word_embeddings": false, "pad_token_id": null });
    let other = changed("gemma-2-9b", &changes).unwrap();
    assert_eq!((other.attention_soft_cap, other.logit_soft_cap), (None, Some(30.0)));
    assert_eq!((other.attention_scale, other.tie_word_embeddings), (1.0 / 12.0, false));
    assert_eq!(other.pad_token_id, None);
    let names = [Norm::AttentionOutput(1), Norm::FeedForward(1), Norm::FeedForwardOutput(1)]
        .map(|norm| gemma2.name(Parameter::Gain(norm)));
    for (name, part) in names.iter().zip(["post_attention", "pre_feedforward", "post_feedforward"]) {
        assert_eq!(*name, format!("model.layers.1.{part}_layernorm.weight"));
    }
}

#[test]
fn gemma3() {
    let gemma3 = |changes| changed("gemma-3-1b-it", &changes).unwrap();
    let plain = gemma3(json!({}));
    let [global, local] = [1e6, 1e4].map(|theta| Rotation { theta, scaling: RopeScaling::Default });
    assert_eq!(rotations(&plain), (256, vec![global, local.clone()]));
    for (layer, block) in plain.blocks.iter().enumerate() {
        let full = layer % 6 == 5;
        assert_eq!(block.mask, if full { Mask::Causal } else { Mask::Sliding { window: 512 } });
        assert_eq!(block.rotation, usize::from(!full));
    }
    assert!(plain.query_key_norm && plain.attention_soft_cap.is_none() && plain.logit_soft_cap.is_none());
    assert_eq!(plain.eos_token_ids, [1, 106]);
    assert_eq!(gemma3(json!({ "sliding_window_pattern": 2 })).blocks[1].rotation, 0);

    // A scaling is of the blocks that see all, and of those alone.
    let linear = RopeScaling::Linear { factor: 8.0 };
    let scaled = vec![Rotation { theta: 1e6, scaling: linear }, local];
    let older = json!({ "rope_scaling": { "rope_type": "linear", "factor": 8.0 } });
    assert_eq!(rotations(&gemma3(older)).1, scaled);
    let newer = json!({ "rope_theta": "absent", "rope_parameters": {
        "full_attention": { "rope_type": "linear", "factor": 8.0 }, "sliding_attention": null } });
    assert_eq!(rotations(&gemma3(newer)).1, scaled);
}

#[test]
fn phi3() {
    let phi3 = published("phi-3-mini-4k-instruct");
    let sites: Vec<_> =
        phi3.sites()[..4].iter().map(|&site| (phi3.module(site), phi3.site_shape(site))).collect();
    let named = |name: &str| format!("model.layers.0.{name}");
    assert_eq!(
        sites,
        [
            (named("self_attn.qkv_proj"), (9216, 3072)),
            (named("self_attn.o_proj"), (3072, 3072)),
            (named("mlp.gate_up_proj"), (16_384, 3072)),
            (named("mlp.down_proj"), (3072, 8192)),
        ]
    );
    assert_eq!(masks(&phi3)[31], Mask::Sliding { window: 2047 });
    assert_eq!((phi3.head_dim, rotations(&phi3).0), (96, 96));
    let partial = changed("phi-3-mini-4k-instruct", &json!({ "partial_rotary_factor": 0.75 })).unwrap();
    assert_eq!(rotations(&partial).0, 72);
    let newer = json!({ "rope_parameters": { "partial_rotary_factor": 0.5, "rope_theta": 7.0 } });
    let newer = rotations(&changed("phi-3-mini-4k-instruct", &newer).unwrap());
    assert_eq!((newer.0, newer.1[0].theta), (48, 7.0));
}

#[test]
fn bert_and_roberta() {
    let (bert, roberta) = (published("bert-base-uncased"), published("roberta-large"));
    for config in [&bert, &roberta] {
        assert_eq!((config.norm, config.norm_placement), (NormKind::Layer, NormPlacement::Behind));
        assert_eq!(config.feed_forward, FeedForward::Plain(Activation::Gelu));
        assert_eq!(config.blocks[0].mask, Mask::Full);
        assert_eq!(config.task, Task::Classification { labels: 2 });
        assert_eq!(config.biased, config.projections);
    }
    assert_eq!(bert.positions, Positions::Learned { offset: 0 });
    assert_eq!(roberta.positions, Positions::Learned { offset: 2 });
    assert_eq!((bert.norm_eps, roberta.norm_eps), (1e-12, 1e-5));
    assert_eq!((bert.type_vocab_size, roberta.type_vocab_size), (2, 1));
    assert_eq!((bert.pad_token_id, roberta.pad_token_id), (Some(0), Some(1)));
    let heads = [Parameter::Pooler, Parameter::ClassifierBias];
    assert_eq!(heads.map(|p| bert.name(p)), ["bert.pooler.dense.weight", "classifier.bias"]);
    assert_eq!(heads.map(|p| roberta.name(p)), ["classifier.dense.weight", "classifier.out_proj.bias"]);
    assert_eq!(
        roberta.name(Parameter::Shift(Norm::FeedForward(23))),
        "roberta.encoder.layer.23.output.LayerNorm.bias"
    );
    assert_eq!(
        bert.name(Parameter::Gain(Norm::Attention(0))),
        "bert.encoder.layer.0.attention.output.LayerNorm.weight"
    );
    let new = changed("bert-base-uncased", &json!({ "hidden_act": "gelu_new" })).unwrap();
    assert_eq!(new.feed_forward, FeedForward::Plain(Activation::GeluTanh));
}

#[test]
fn configurations_that_are_not_computed() {
    for (name, changes, parts) in [
        ("mistral-7b-v0.1", json!({ "sliding_window": 0 }), ["`sliding_window`", "positive", "0"]),
        ("mistral-7b-v0.1", json!({ "hidden_act": "relu" }), ["`hidden_act`", "\"silu\"", "relu"]),
        ("mistral-7b-v0.1", json!({ "partial_rotary_factor": 0.5 }), ["`partial_rotary_factor`", "1", "0.5"]),
        (
            "llama-3.2-3b",
            json!({ "architectures": ["LlamaForSequenceClassification"] }),
            ["`architectures`", "predicts tokens", "LlamaForSequenceClassification"],
        ),
        (
            "qwen2.5-0.5b",
            json!({ "layer_types": ["full_attention"] }),
            ["`layer_types`", "num_hidden_layers = 24", "full_attention"],
        ),
        (
            "qwen2.5-0.5b",
            json!({ "layer_types": ["full_attention", "linear_attention"], "num_hidden_layers": 2 }),
            ["`layer_types`", "sliding_attention", "linear_attention"],
        ),
        (
            "qwen3-0.6b",
            json!({ "layer_types": ["sliding_attention"], "num_hidden_layers": 1 }),
            ["`use_sliding_window`", "true", "false"],
        ),
        (
            "qwen3-0.6b",
            json!({ "use_sliding_window": true, "layer_types": ["sliding_attention"], "num_hidden_layers": 1 }),
            ["`sliding_window`", "some layers slide", "nothing"],
        ),
        (
            "qwen3-0.6b",
            json!({ "rope_parameters": { "full_attention": { "rope_theta": 1.0 } } }),
            ["`rope_parameters.full_attention`", "one rotation", "rope_theta"],
        ),
        (
            "gemma-2-9b",
            json!({ "attn_logit_softcapping": 0.0 }),
            ["`attn_logit_softcapping`", "positive", "0.0"],
        ),
        (
            "gemma-2-9b",
            json!({ "sliding_window": null }),
            ["`sliding_window`", "some layers slide", "nothing"],
        ),
        (
            "gemma-3-1b-it",
            json!({ "use_bidirectional_attention": true }),
            ["`use_bidirectional_attention`", "false", "true"],
        ),
        (
            "gemma-3-1b-it",
            json!({ "sliding_window_pattern": 0 }),
            ["`sliding_window_pattern`", "positive", "0"],
        ),
        (
            "gemma-3-1b-it",
            json!({ "rope_parameters": { "rope_theta": 1e6, "rope_type": "default" } }),
            ["`rope_parameters.rope_t", "layer types", "found"],
        ),
        (
            "phi-3-mini-4k-instruct",
            json!({ "rope_scaling": { "type": "longrope", "short_factor": [1.0] } }),
            ["`rope_scaling.type`", "\"linear\"", "longrope"],
        ),
        (
            "phi-3-mini-4k-instruct",
            json!({ "partial_rotary_factor": 0.56 }),
            ["`partial_rotary_factor`", "head_dim = 96", "0.56"],
        ),
        (
            "phi-3-mini-4k-instruct",
            json!({ "quantization_config": { "bits": 4 } }),
            ["`quantization_config`", "bf16", "bits"],
        ),
        (
            "bert-base-uncased",
            json!({ "position_embedding_type": "relative_key" }),
            ["`position_embedding_type`", "\"absolute\"", "relative_key"],
        ),
        ("bert-base-uncased", json!({ "hidden_act": "relu" }), ["`hidden_act`", "\"gelu\"", "relu"]),
        ("bert-base-uncased", json!({ "is_decoder": true }), ["`is_decoder`", "encoders", "true"]),
        ("bert-base-uncased", json!({ "type_vocab_size": 0 }), ["`type_vocab_size`", "positive", "0"]),
        ("bert-base-uncased", json!({ "num_attention_heads": 7 }), ["`num_attention_heads`", "768", "7"]),
        (
            "bert-base-uncased",
            json!({ "architectures": ["BertForTokenClassification"] }),
            ["`architectures`", "classifies sequences", "BertForTokenClassification"],
        ),
        (
            "bert-base-uncased",
            json!({ "problem_type": "multi_label_classification" }),
            ["`problem_type`", "\"single_label_classification\"", "multi_label"],
        ),
        (
            "bert-base-uncased",
            json!({ "problem_type": "regression", "num_labels": 2 }),
            ["`num_labels`", "one label", "2"],
        ),
        (
            "bert-base-uncased",
            json!({ "problem_type": "single_label_classification", "num_labels": 1 }),
            ["`problem_type`", "one label", "single"],
        ),
        ("bert-base-uncased", json!({ "num_labels": 0 }), ["`num_labels`", "at least one", "0"]),
        ("bert-base-uncased", json!({ "id2label": {} }), ["`id2label`", "at least one", "{}"]),
        (
            "bert-base-uncased",
            json!({ "id2label": { "0": "no", "2": "yes" } }),
            ["`id2label`", "\"1\"", "\"2\":\"yes\""],
        ),
        ("roberta-large", json!({ "pad_token_id": null }), ["`pad_token_id`", "a token", "nothing"]),
        (
            "roberta-large",
            json!({ "max_position_embeddings": 2 }),
            ["`max_position_embeddings`", "pad_token_id + 1 = 2", "2"],
        ),
    ] {
        let message = changed(name, &changes).unwrap_err().to_string();
        for part in parts {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
    }
}

#[test]
fn families_that_are_not_known() {
    let error = |model_type: &str| changed("llama-3.2-3b", &json!({ "model_type": model_type })).unwrap_err();
    for (model_type, hint) in [("qwen2.5", "`qwen2`"), ("lama", "`llama`"), ("gemma3", "Gemma3ForCausalLM")] {
        assert!(error(model_type).hint().unwrap().contains(hint), "{model_type}");
    }
    assert!(error("mamba").hint().is_none());
    let message = error("mamba").to_string();
    for (name, ..) in PUBLISHED {
        let family = published(name).family;
        assert!(
            message.contains(family.model_type()) && message.contains(family.architecture()),
            "{message}"
        );
    }
}

#[test]
fn padding_tokens_outside_the_vocabulary_are_none() {
    let small = json!({ "vocab_size": 160 });
    assert_eq!(changed("phi-3-mini-4k-instruct", &small).unwrap().pad_token_id, None);
    assert_eq!(changed("phi-3-mini-4k-instruct", &json!({})).unwrap().pad_token_id, Some(32_000));
    assert_eq!(changed("llama-3.2-3b", &json!({ "pad_token_id": -1 })).unwrap().pad_token_id, None);
}
