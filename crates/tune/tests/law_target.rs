//! Which modules a list of targets names.

mod common;

use common::*;
use lora_sb_model::{Projection, Site};
use lora_sb_tune::{Error, Targets};

fn resolve(text: &str) -> Result<Vec<Site>, Error> {
    Targets::parse(text).resolve(tiny_model(2).config())
}

#[test]
fn law_all_linear_takes_every_site() {
    assert_eq!(resolve("all-linear").unwrap(), tiny_model(2).sites());
}

#[test]
fn law_names_match_whole_or_after_a_dot() {
    let both = [Projection::Query.of(0), Projection::Query.of(1)];
    assert_eq!(resolve("q_proj").unwrap(), both);
    assert_eq!(resolve("self_attn.q_proj").unwrap(), both);
    assert_eq!(resolve("model.layers.1.self_attn.q_proj").unwrap(), both[1..]);
    assert_eq!(resolve("layers.1.self_attn.q_proj").unwrap(), both[1..]);
    // In the order of the forward pass, each once.
    let expected =
        [Projection::Query.of(0), Projection::Down.of(0), Projection::Query.of(1), Projection::Down.of(1)];
    assert_eq!(resolve("down_proj, q_proj,mlp.down_proj").unwrap(), expected);
}

#[test]
fn law_an_unknown_target_is_an_error_that_names_the_near_ones() {
    for (name, near) in [
        ("qproj", "q_proj"),
        ("Q_PROJ", "q_proj"),
        ("gate_porj", "gate_proj"),
        ("mlp.dwn_proj", "mlp.down_proj"),
        ("self_atn.v_proj", "self_attn.v_proj"),
    ] {
        let error = resolve(&format!("o_proj,{name}")).unwrap_err();
        let Error::UnknownTarget { name: found, near: nearest, .. } = &error else { panic!("{error}") };
        assert_eq!((found.as_str(), nearest[0].as_str()), (name, near));
        assert!(error.hint().unwrap().contains(near));
    }
    // The end of a name is not the name.
    for name in ["proj", "1.q_proj", "model.layers.2.mlp.up_proj", "embed_tokens", ".q_proj"] {
        let error = resolve(name).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert!(error.hint().unwrap().contains("up_proj"));
    }
}

#[test]
fn law_a_part_of_a_fused_layer_is_answered_by_that_layer() {
    let phi = lora_sb_model::Config::from_json(
        br#"{"model_type": "phi3", "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12,
             "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}"#,
    )
    .unwrap();
    for (name, fused) in
        [("q_proj", "qkv_proj"), ("self_attn.v_proj", "qkv_proj"), ("up_proj", "gate_up_proj")]
    {
        let error = Targets::parse(name).resolve(&phi).unwrap_err();
        let Error::UnknownTarget { near, .. } = &error else { panic!("{error}") };
        assert_eq!(near, &[fused]);
    }
}

#[test]
fn law_no_target_is_an_error() {
    for text in ["", " , "] {
        assert!(matches!(resolve(text), Err(Error::Config { .. })));
    }
}

#[test]
fn law_targets_are_written_as_peft_writes_them() {
    for (targets, json) in [
        (Targets::AllLinear, r#""all-linear""#),
        (Targets::Names(vec!["q_proj".into(), "v_proj".into()]), r#"["q_proj","v_proj"]"#),
    ] {
        assert_eq!(serde_json::to_string(&targets).unwrap(), json);
        assert_eq!(serde_json::from_str::<Targets>(json).unwrap(), targets);
        assert_eq!(Targets::parse(&targets.to_string()), targets);
    }
    assert!(serde_json::from_str::<Targets>(r#""all""#).is_err());
}
