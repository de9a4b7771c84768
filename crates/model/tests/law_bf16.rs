//! Laws of a model that computes in `bf16`: what it holds, that it is the same model, and that its bits depend on
//! nothing but their operands. Against transformers: `golden_families.rs`.

mod support;

use std::path::Path;
use std::sync::Arc;

use lora_sb_kernels::{Cpu, DType, Kernels, Place, SharedBytes};
use lora_sb_model::{
    Batch, Config, Decoder, Error, Frozen, LoadOptions, Model, NoGradients, Parameter, Recompute, SaveType,
    Sequence, Storage, memory, save_model,
};
use serde_json::{Value, json};
use support::device::{fresh_device, on_each_device};
use support::{
    Texts, config, config_json, device, families, host, largest, largest_difference, model, values, zeros,
};

fn save(dir: &Path, model: &Model, dtype: SaveType) {
    save_model(dir, model, dtype, &mut |_, values| Ok(values)).unwrap();
}

fn load(dir: &Path, storage: Storage, dtype: DType) -> Model {
    Model::load_with(dir, device(), storage, LoadOptions { dtype, ..LoadOptions::default() }).unwrap()
}

/// What a rounding to `bf16` can change, relative to the number.
const ROUNDING: f32 = 1.0 / 256.0;

#[test]
fn a_frozen_model_holds_its_matrices_rounded_and_its_tables_and_vectors_as_they_are() {
    for tied in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        for (saved, held) in
            [(SaveType::F32, DType::F32), (SaveType::F16, DType::F16), (SaveType::Bf16, DType::Bf16)]
        {
            let changes = json!({ "tie_word_embeddings": tied, "attention_bias": true });
            save(dir.path(), &model(changes), saved);
            let plain = load(dir.path(), Storage::Mapped, DType::F32);
            let model = load(dir.path(), Storage::Mapped, DType::Bf16);
            assert_eq!((plain.dtype(), model.dtype()), (DType::F32, DType::Bf16));
            for parameter in model.parameters() {
                let table = parameter == Parameter::Embedding && !tied;
                let weight = model.weight(parameter).unwrap();
                let matrix = weight.shape().len() == 2 && !table;
                assert_eq!(weight.dtype(), if matrix { DType::Bf16 } else { held }, "{parameter:?}");
                let expected = values(plain.kernels(), plain.weight(parameter).unwrap());
                let found = values(model.kernels(), weight);
                let tolerance = if matrix { ROUNDING } else { 0.0 };
                for (found, expected) in found.iter().zip(&expected) {
                    assert!((found - expected).abs() <= tolerance * expected.abs(), "{parameter:?}");
                }
            }
            assert_eq!(model.fingerprint().unwrap(), plain.fingerprint().unwrap(), "{saved:?}");
        }
    }
}

#[test]
fn the_bytes_of_rounded_weights_are_foretold() {
    for tied in [false, true] {
        let changes = json!({ "hidden_size": 200, "intermediate_size": 170, "tie_word_embeddings": tied });
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &model(changes), SaveType::F32);
        let model = load(dir.path(), Storage::Mapped, DType::Bf16);
        let (kernels, place) = (model.kernels(), model.kernels().place());
        let rope = 2 * place.bytes(64 * model.config().head_dim / 2);
        let tensors = model.parameters().into_iter().map(|parameter| model.weight(parameter).unwrap());
        let in_file = tensors.filter(|tensor| tensor.dtype() == DType::F32 && place.is_host());
        let mapped: usize = in_file.map(|tensor| tensor.bytes()).sum();
        let weights = memory::weights(model.config(), Storage::Mapped, 4, DType::Bf16, place);
        assert_eq!(weights + rope, kernels.usage().live_bytes + mapped);
    }
}

#[test]
fn weights_come_to_a_device_one_by_one_and_are_what_they_are_on_the_processor() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &model(json!({ "hidden_size": 100, "vocab_size": 301 })), SaveType::F32);
    on_each_device(|| {
        let options = LoadOptions { dtype: DType::Bf16, ..LoadOptions::default() };
        let model = Model::load_with(dir.path(), fresh_device(), Storage::Mapped, options).unwrap();
        let (kernels, config) = (model.kernels(), model.config());
        let of = |of: fn(&Config, Storage, usize, DType, Place) -> usize| {
            of(config, Storage::Mapped, 4, DType::Bf16, kernels.place())
        };
        assert!(kernels.usage().peak_bytes <= of(memory::weights) + of(memory::reading));
        let processor = Arc::new(Cpu::new(1).unwrap());
        let expected = Model::load_with(dir.path(), processor, Storage::Mapped, options).unwrap();
        for parameter in model.parameters() {
            let [found, expected] =
                [&model, &expected].map(|model| values(model.kernels(), model.weight(parameter).unwrap()));
            assert!(found == expected, "{parameter:?}");
        }
        assert_eq!(model.fingerprint().unwrap(), expected.fingerprint().unwrap());
        // One that is trained is read by way of the device, too.
        let trained = load(dir.path(), Storage::Trainable, DType::Bf16);
        let head = |model: &Model| values(model.kernels(), model.weight(Parameter::Head).unwrap());
        let (trained, frozen) = (head(&trained), head(&model));
        assert!(largest_difference(&trained, &frozen) <= ROUNDING * largest(&trained));
    });
}

#[test]
fn a_loaded_model_is_one_that_is_set_to_bf16_later() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &model(json!({})), SaveType::F32);
    let loaded = load(dir.path(), Storage::Mapped, DType::Bf16);
    let bytes = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let length = bytes.len();
    let file = SharedBytes::new(Arc::new(bytes), 0..length).unwrap();
    let json = std::fs::read(dir.path().join("config.json")).unwrap();
    let mut set = Model::from_files(&json, vec![file], device(), Storage::Mapped).unwrap();
    let fingerprint = set.fingerprint().unwrap();
    set.set_dtype(DType::Bf16).unwrap();
    assert_eq!(set.fingerprint().unwrap(), fingerprint);
    let batch = Texts::new().batch(&set);
    let logits = |model: &Model| values(model.kernels(), &model.logits(&batch, &Frozen).unwrap());
    assert_eq!(logits(&loaded), logits(&set));
}

#[test]
fn a_model_that_can_be_trained_keeps_its_weights() {
    let mut model = model(json!({}));
    let before = values(model.kernels(), model.weight(Parameter::Head).unwrap());
    model.set_dtype(DType::Bf16).unwrap();
    assert_eq!(model.weight(Parameter::Head).unwrap().dtype(), DType::F32);
    assert_eq!(values(model.kernels(), model.weight(Parameter::Head).unwrap()), before);
    let batch = Texts::new().batch(&model);
    let bf16 = model.loss(&batch, &Frozen).unwrap();
    model.set_dtype(DType::F32).unwrap();
    assert_ne!(model.loss(&batch, &Frozen).unwrap(), bf16);
}

#[test]
fn a_model_computes_in_f32_or_bf16_and_in_nothing_else() {
    let mut model = model(json!({}));
    for dtype in [DType::F16, DType::U32] {
        let error = model.set_dtype(dtype).unwrap_err();
        assert!(matches!(error, Error::Compute { found } if found == dtype));
        assert_eq!(error.to_string(), format!("dtype: expected f32 or bf16, found {dtype}"));
        assert_eq!(model.dtype(), DType::F32);
    }
}

/// Sizes at which the work of every operation is shared among threads.
fn shared() -> Value {
    json!({ "hidden_size": 96, "intermediate_size": 170, "head_dim": 26, "vocab_size": 401 })
}

#[test]
fn the_bits_do_not_depend_on_the_number_of_threads() {
    let run = |threads| {
        let kernels: Arc<dyn Kernels> = Arc::new(Cpu::new(threads).unwrap());
        let mut model = Model::random(config(shared()), kernels, 3, Storage::Trainable).unwrap();
        model.set_dtype(DType::Bf16).unwrap();
        let texts = Texts::new();
        let sequences: Vec<_> = (0..9).flat_map(|_| texts.sequences_for(&model)).collect();
        let batch = Batch::pack(&**model.kernels(), &sequences).unwrap();
        let mut gradients = zeros(&model);
        let loss = model.loss_and_gradients(&batch, &mut Frozen, &mut gradients, Recompute::None).unwrap();
        (loss, host(&model, &gradients))
    };
    let one = run(1);
    for threads in [2, 5] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

#[test]
fn running_a_block_again_gives_the_same_bits() {
    for family in families::all() {
        let mut model = family.model();
        model.set_dtype(DType::Bf16).unwrap();
        let batch = Texts::new().batch(&model);
        let run = |recompute| {
            let mut gradients = zeros(&model);
            let loss = model.loss_and_gradients(&batch, &mut Frozen, &mut gradients, recompute).unwrap();
            (loss, host(&model, &gradients))
        };
        let kept = run(Recompute::None);
        for recompute in [Recompute::First(1), Recompute::First(2), Recompute::Block] {
            assert!(run(recompute) == kept, "{}: {recompute:?}", family.name);
        }
    }
}

#[test]
fn what_is_predicted_one_token_at_a_time_is_what_is_predicted_at_once() {
    for family in families::all_decoders() {
        let mut model = family.model();
        model.set_dtype(DType::Bf16).unwrap();
        let ids = vec![1, 17, 3, 28, 5, 5, 2];
        let trained = vec![true; ids.len()];
        let sequence = Sequence::text(&ids, &trained, 1.0);
        let batch = Batch::pack(&**model.kernels(), &[sequence]).unwrap();
        let whole = values(model.kernels(), &model.logits(&batch, &Frozen).unwrap());
        let mut decoder = Decoder::new(&model, &Frozen, &[ids[..1].to_vec()], ids.len()).unwrap();
        let v = model.config().vocab_size;
        // Few rows are multiplied in another order, and a sum on the edge between two neighbours in `bf16` may be rounded
        // to the other. At worst all some 20 roundings of a block differ, independently of each other.
        let roundings = (20.0 * model.config().num_hidden_layers as f32 + 2.0).sqrt();
        for (position, row) in whole.chunks_exact(v).enumerate() {
            let logits = decoder.advance(&[(0, &ids[position..=position])]).unwrap();
            let difference = largest_difference(&values(model.kernels(), &logits), row);
            let tolerance = roundings * ROUNDING * largest(&whole);
            assert!(difference <= tolerance, "{}: {position}: {difference:e} of {tolerance:e}", family.name);
        }
    }
}

/// Linux tells how much of the process's memory is pages of files.
#[cfg(target_os = "linux")]
#[test]
fn the_files_pages_are_given_back_when_their_tensors_are_rounded() {
    let mapped = || -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("RssFile:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
    };
    let dir = tempfile::tempdir().unwrap();
    let sizes = json!({ "vocab_size": 40_000, "hidden_size": 210, "tie_word_embeddings": true });
    save(dir.path(), &model(sizes), SaveType::F32);
    let size = std::fs::metadata(dir.path().join("model.safetensors")).unwrap().len() as usize;
    let before = mapped();
    let model = load(dir.path(), Storage::Mapped, DType::Bf16);
    let held = mapped().saturating_sub(before);
    assert!(held < size / 4, "{held} bytes of a file of {size} are held");
    assert!(model.kernels().usage().live_bytes > size / 2);
}

#[test]
fn the_loss_does_not_depend_on_the_rows_of_logits_that_exist_at_a_time() {
    for dtype in [DType::F32, DType::Bf16] {
        let mut model = model(json!({}));
        model.set_dtype(dtype).unwrap();
        let batch = Texts::new().batch(&model);
        let usual = model.loss(&batch, &Frozen).unwrap();
        for rows in [1, 2, 3, 100] {
            model.set_loss_chunk(rows);
            let loss = model.loss(&batch, &Frozen).unwrap();
            assert!((loss - usual).abs() <= 1e-6 * usual, "{dtype}, {rows}: {loss}, {usual}");
            let step = model.loss_and_gradients(&batch, &mut Frozen, &mut NoGradients, Recompute::None);
            assert_eq!(step.unwrap(), loss);
        }
    }
}

#[test]
fn the_description_of_a_model_does_not_say_what_it_computes_in() {
    let json = Value::Object(config_json(json!({ "torch_dtype": "bfloat16" }))).to_string();
    let config = Config::from_json(json.as_bytes()).unwrap();
    assert_eq!(Model::random(config, device(), 1, Storage::Mapped).unwrap().dtype(), DType::F32);
}
