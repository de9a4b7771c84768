//! The layout that a plan chooses: it fits wherever it is accepted, and it is the cheapest that does.

use lora_sb_kernels::{DType, Place};
use lora_sb_model::{Config, Recompute, Storage};
use lora_sb_tune::config::GradientCheckpointing;
use lora_sb_tune::plan::{
    BatchSize, EstimateSize, Fitted, MemoryPlan, MemoryRequest, estimates_gradient, fit,
};
use lora_sb_tune::{AdapterConfig, Bases, Error, InitConfig, Method, Targets};

const LAYERS: usize = 7;

/// Wide and long enough for activations to outweigh the rest; nothing of it is made.
fn architecture() -> Config {
    let json =
        br#"{"model_type": "llama", "vocab_size": 31999, "hidden_size": 384, "intermediate_size": 1021,
        "num_hidden_layers": 7, "num_attention_heads": 6, "num_key_value_heads": 3,
        "max_position_embeddings": 4096, "tie_word_embeddings": false}"#;
    Config::from_json(json).unwrap()
}

fn adapter(method: Method) -> AdapterConfig {
    AdapterConfig {
        method,
        rank: 13,
        lora_alpha: 13.0,
        lora_dropout: 0.0,
        target_modules: Targets::AllLinear,
        init: InitConfig {
            bases: Bases::of(method),
            samples: 3,
            eta: 1e-3,
            max_tokens: 700,
            ..InitConfig::NONE
        },
        modules_to_save: Vec::new(),
        seed: 1,
    }
}

/// Calls `check` with the request of a run by each of some methods, in both types and both memories.
fn for_each_run(check: impl Fn(&str, &MemoryRequest<'_>)) {
    let config = architecture();
    for method in [Method::LoraSb, Method::Lora, Method::Dora, Method::Full] {
        let adapter = adapter(method);
        let sites = adapter.target_modules.resolve(&config).unwrap();
        for (dtype, place) in [DType::F32, DType::Bf16]
            .into_iter()
            .flat_map(|dtype| [(dtype, Place::Cpu), (dtype, Place::Cuda)])
        {
            let batch = BatchSize { tokens: 613, labelled: 211 };
            let request = MemoryRequest {
                config: &config,
                storage: if method == Method::Full { Storage::Trainable } else { Storage::Mapped },
                file_element: 2,
                adapter: &adapter,
                sites: &sites,
                head: &[],
                dtype,
                recompute: Recompute::None,
                loss_chunk: 1,
                place,
                train: BatchSize { tokens: 3701, labelled: 1009 },
                evaluation: BatchSize { tokens: 401, labelled: 400 },
                init: estimates_gradient(&adapter).then_some(EstimateSize { tokens: 1500, batch }),
                ids: &[],
                process: 5 << 20,
            };
            check(&format!("{method} in {dtype}, {place:?}"), &request);
        }
    }
}

fn usual_chunk(request: &MemoryRequest<'_>) -> usize {
    request.place.loss_rows(request.config.vocab_size, request.config.hidden_size)
}

fn blocks(fitted: &Fitted) -> usize {
    fitted.recompute.blocks(LAYERS)
}

#[test]
fn law_an_accepted_plan_is_within_its_limit_and_less_memory_never_costs_less_work() {
    for_each_run(|what, request| {
        let fastest = fit(request, GradientCheckpointing::Auto, None, None).unwrap();
        assert_eq!((fastest.recompute, blocks(&fastest)), (Recompute::None, 0), "{what}");
        assert_eq!(fastest.loss_chunk, usual_chunk(request), "{what}");
        let peak = fastest.memory.peak();
        let at_limit = fit(request, GradientCheckpointing::Auto, None, Some(peak)).unwrap();
        assert_eq!(at_limit, fastest, "{what}: a limit that is met is no limit");

        let (mut last, mut some, mut refused) = (fastest, 0, false);
        for percent in (1..100).rev() {
            let limit = peak / 100 * percent;
            match fit(request, GradientCheckpointing::Auto, None, Some(limit)) {
                Ok(fitted) => {
                    assert!(!refused, "{what}: {percent} % fits, more does not");
                    assert!(fitted.memory.peak() <= limit, "{what} at {percent} %");
                    assert!(blocks(&fitted) >= blocks(&last), "{what} at {percent} %");
                    assert!(fitted.loss_chunk <= last.loss_chunk, "{what} at {percent} %");
                    // What is said is what it takes.
                    let Fitted { recompute, loss_chunk, blocks_at_once, memory } = fitted;
                    let init = InitConfig { blocks_at_once, ..request.adapter.init.clone() };
                    let adapter = &AdapterConfig { init: init.clone(), ..request.adapter.clone() };
                    let laid_out = MemoryRequest { adapter, recompute, loss_chunk, ..*request };
                    assert_eq!(memory, MemoryPlan::new(&laid_out), "{what} at {percent} %");
                    // One at a time always does, and the start of a method that has none takes nothing.
                    let one = InitConfig { blocks_at_once: Some(1), ..init.clone() };
                    let one = &AdapterConfig { init: one, ..request.adapter.clone() };
                    let least = MemoryPlan::new(&MemoryRequest { adapter: one, ..laid_out });
                    assert!(memory.init_peak() <= least.init_peak().max(memory.train_peak()));
                    assert_eq!(blocks_at_once.is_some(), request.init.is_some());
                    some += usize::from((1..LAYERS).contains(&blocks(&fitted)));
                    last = fitted;
                }
                Err(Error::DoesNotFit { plan, limit: told }) => {
                    assert!(told == limit && plan.peak() > limit, "{what} at {percent} %");
                    refused = true;
                }
                Err(error) => panic!("{what}: {error}"),
            }
        }
        assert!(some > 0 && refused, "{what}: {some} limits were met by some blocks, refused: {refused}");
    });
}

/// One block fewer, or one step more of logits, would not have fitted.
#[test]
fn law_no_cheaper_layout_would_have_fitted() {
    for_each_run(|what, request| {
        let peak = fit(request, GradientCheckpointing::Auto, None, None).unwrap().memory.peak();
        for percent in [95, 80, 65, 50, 35] {
            let limit = peak / 100 * percent;
            let Ok(found) = fit(request, GradientCheckpointing::Auto, None, Some(limit)) else { continue };
            let Some(fewer) = blocks(&found).checked_sub(1) else { continue };
            let recompute = if fewer == 0 { Recompute::None } else { Recompute::First(fewer) };
            let loss_chunk = usual_chunk(request);
            let cheaper = MemoryPlan::new(&MemoryRequest { recompute, loss_chunk, ..*request });
            assert!(cheaper.peak() > limit, "{what} at {percent} %");
        }
    });
}

/// So narrow that what the loss takes of a token outweighs what its blocks take.
#[test]
fn the_tokens_of_a_pass_of_the_loss_are_halved_where_nothing_else_helps() {
    let mut narrow = architecture();
    (narrow.hidden_size, narrow.intermediate_size, narrow.head_dim) = (24, 48, 4);
    for_each_run(|what, request| {
        let labelled = 290;
        let train = BatchSize { tokens: 300, labelled };
        let evaluation = BatchSize::default();
        let request = &MemoryRequest { config: &narrow, train, evaluation, init: None, ..*request };
        let all = GradientCheckpointing::Fixed(Recompute::Block);
        let most = fit(request, all, None, None).unwrap();
        let limit = most.memory.peak() - 1;
        let auto = fit(request, GradientCheckpointing::Auto, None, Some(limit)).unwrap();
        let halved = std::iter::successors(Some(most.loss_chunk), |rows| Some(rows / 2));
        let fewer = halved.into_iter().find(|&rows| rows < labelled).unwrap();
        assert_eq!((auto.recompute, auto.loss_chunk), (Recompute::Block, fewer), "{what}");
        assert!(fit(request, all, Some(most.loss_chunk), Some(limit)).is_err(), "{what}");
    });
}

#[test]
fn what_is_given_is_kept_or_refused() {
    for_each_run(|what, request| {
        let auto = fit(request, GradientCheckpointing::Auto, None, None).unwrap();
        let fixed = GradientCheckpointing::Fixed(Recompute::First(3));
        let given = fit(request, fixed, Some(17), Some(auto.memory.peak())).unwrap();
        assert_eq!((given.recompute, given.loss_chunk), (Recompute::First(3), 17), "{what}");

        let all = GradientCheckpointing::Fixed(Recompute::Block);
        let least = fit(request, all, Some(16), None).unwrap().memory.peak();
        let none = GradientCheckpointing::Fixed(Recompute::None);
        match fit(request, none, None, Some(least - 1)) {
            Err(error @ Error::DoesNotFit { .. }) => {
                let (message, hint) = (error.to_string(), error.hint().unwrap());
                assert!(
                    message.starts_with("the run takes ") && message.contains(" more than the "),
                    "{message}"
                );
                for way in ["per_device_train_batch_size", "max_length", "rank", "bf16", "memory_limit"] {
                    assert!(hint.contains(way), "{hint}");
                }
            }
            other => panic!("{what}: {other:?}"),
        }
    });
}
