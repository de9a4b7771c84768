//! Bad settings and bad data are errors that name what is wrong.

mod common;

use std::collections::BTreeMap;

use common::*;
use lora_sb_model::Parameter;
use lora_sb_tune::{AdapterConfig, Bases, Convention, Error, InitConfig, Method, Targets, Tuned};

fn adapt(config: &AdapterConfig) -> Error {
    Tuned::adapt(tiny_model(2), config, &tiny_examples(6), &mut |_| ()).unwrap_err()
}

#[test]
fn law_a_rank_above_a_side_names_the_module() {
    for method in [Method::LoraSb, Method::LoraXs, Method::Lora] {
        // k_proj is 6 x 18: the first module that is too small.
        let error = adapt(&AdapterConfig { rank: 7, ..config(method) });
        let Error::RankTooLarge { rank: 7, module, out: 6, input: 18 } = &error else { panic!("{error}") };
        assert_eq!(module, "model.layers.0.self_attn.k_proj");
        assert!(error.hint().unwrap().contains("at most 6"));
        let large =
            AdapterConfig { rank: 18, target_modules: Targets::parse("q_proj,up_proj"), ..config(method) };
        assert!(Tuned::adapt(tiny_model(2), &large, &tiny_examples(6), &mut |_| ()).is_ok(), "{method}");
    }
}

#[test]
fn law_settings_out_of_range_are_named() {
    let sb = config(Method::LoraSb);
    let init = |change: InitConfig| AdapterConfig { init: change, ..sb.clone() };
    for (config, name) in [
        (AdapterConfig { rank: 0, ..sb.clone() }, "rank"),
        (AdapterConfig { lora_alpha: 0.0, ..sb.clone() }, "lora_alpha"),
        (AdapterConfig { lora_alpha: f64::NAN, ..sb.clone() }, "lora_alpha"),
        (init(InitConfig { eta: 0.0, ..sb.init.clone() }), "eta"),
        (init(InitConfig { eta: f64::INFINITY, ..sb.init.clone() }), "eta"),
        (
            init(InitConfig { convention: Convention::Reference { batch_size: 0 }, ..sb.init.clone() }),
            "batch size",
        ),
        (init(InitConfig { bases: Bases::Sb, ..InitConfig::NONE }), "eta"),
    ] {
        let error = adapt(&config);
        assert!(matches!(error, Error::Config { .. }) && error.to_string().contains(name), "{name}: {error}");
    }
    // The others do not read it.
    let lora = AdapterConfig { init: InitConfig::NONE, ..config(Method::Lora) };
    assert!(Tuned::adapt(tiny_model(2), &lora, &[], &mut |_| ()).is_ok());
}

#[test]
fn law_nothing_to_learn_from_is_an_error() {
    let unlabelled = [example(&[1, 2, 3], &[false; 3]), example(&[4], &[true])];
    for examples in [&unlabelled[..], &[]] {
        let error = Tuned::adapt(tiny_model(2), &config(Method::LoraSb), examples, &mut |_| ()).unwrap_err();
        let Error::NoLabelledSample { samples } = error else { panic!("{error}") };
        assert_eq!(samples, examples.len());
        assert!(error.hint().is_some());
    }
}

#[test]
fn law_a_gradient_that_is_not_finite_names_its_module() {
    let mut model = tiny_model(2);
    let kernels = model.kernels().clone();
    let site = model.sites()[9];
    kernels.fill(f32::NAN, model.weight_mut(Parameter::Weight(site)).unwrap()).unwrap();
    let error = Tuned::adapt(model, &config(Method::LoraSb), &tiny_examples(6), &mut |_| ()).unwrap_err();
    assert!(matches!(error, Error::NotFinite { .. }), "{error}");
    assert!(error.to_string().contains("model.layers.1."), "{error}");
}

#[test]
fn law_a_weight_that_is_not_finite_is_named_where_it_is_factorised() {
    for method in [Method::LoraXs, Method::Pissa] {
        let mut model = tiny_model(2);
        let kernels = model.kernels().clone();
        let site = model.sites()[9];
        kernels.fill(f32::NAN, model.weight_mut(Parameter::Weight(site)).unwrap()).unwrap();
        let module = model.module(site);
        let error = Tuned::adapt(model, &config(method), &tiny_examples(6), &mut |_| ()).unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }) && error.to_string().contains(&module), "{error}");
    }
}

#[test]
fn law_a_token_outside_the_vocabulary_is_an_error() {
    let examples = [example(&[1, 29, 3], &[false, true, true])];
    let result = Tuned::adapt(tiny_model(2), &config(Method::LoraSb), &examples, &mut |_| ());
    assert!(result.unwrap_err().to_string().contains("29"));
}

#[test]
fn law_an_unknown_target_stops_every_way_in() {
    let wrong = AdapterConfig { target_modules: Targets::parse("qproj"), ..config(Method::LoraSb) };
    assert!(matches!(adapt(&wrong), Error::UnknownTarget { .. }));
    let restored = Tuned::restore(tiny_model(2), &wrong, BTreeMap::new());
    assert!(matches!(restored, Err(Error::UnknownTarget { .. })));
}

#[test]
fn law_restoring_is_strict() {
    for method in [Method::LoraSb, Method::Full] {
        let error = Tuned::restore(tiny_model(2), &config(method), BTreeMap::new()).unwrap_err();
        assert!(matches!(&error, Error::Tensor { found, .. } if found.contains("no such")), "{error}");
    }
}

#[test]
fn law_methods_are_read_as_they_are_written() {
    for method in Method::ALL {
        assert_eq!(method.name().parse::<Method>().unwrap(), method);
        assert_eq!(serde_json::to_string(&method).unwrap(), format!("{:?}", method.name()));
    }
    assert_eq!("lora_sb".parse::<Method>().unwrap(), Method::LoraSb);
    assert_eq!("LoRA-XS".parse::<Method>().unwrap(), Method::LoraXs);
    let unknown = "adalora".parse::<Method>().unwrap_err().to_string();
    assert!(unknown.contains("lora-sb, lora-xs, lora,") && unknown.contains("full"), "{unknown}");
}
