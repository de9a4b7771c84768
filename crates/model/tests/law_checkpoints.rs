//! Weight files as they are found: under older names, without a head, with another head, in shards. What is
//! written again has the names and the configuration that transformers writes.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use lora_sb_kernels::DType;
use lora_sb_model::{
    Config, LoadOptions, Mismatched, Model, Parameter, SaveType, Storage, Task, WeightFile, WeightFileWriter,
    save_model, save_model_in_shards,
};
use serde_json::{Value, json};
use support::{config_json, device, values};

/// A file's tensors: shape and elements by name.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A small encoder with a head of three labels.
fn encoder(family: &str) -> Model {
    let class = if family == "bert" { "Bert" } else { "Roberta" };
    let json = json!({
        "model_type": family, "architectures": [format!("{class}ForSequenceClassification")],
        "vocab_size": 23, "hidden_size": 6, "intermediate_size": 7, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 11, "initializer_range": 0.3,
        "id2label": { "0": "no", "1": "yes", "2": "maybe" }, "label2id": { "no": 0, "yes": 1, "maybe": 2 }
    });
    random(&json)
}

fn random(json: &Value) -> Model {
    let config = Config::from_json(json.to_string().as_bytes()).unwrap();
    Model::random(config, device(), 5, Storage::Trainable).unwrap()
}

fn decoder(changes: Value) -> Model {
    random(&Value::Object(config_json(changes)))
}

fn tensors(model: &Model) -> Tensors {
    let named = |parameter| {
        let tensor = model.weight(parameter).unwrap();
        (model.name(parameter), (tensor.shape().to_vec(), values(model.kernels(), tensor)))
    };
    model.parameters().into_iter().map(named).collect()
}

/// Writes a directory of these tensors.
fn write(dir: &Path, config: &Value, tensors: &Tensors, dtype: SaveType) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let shapes: Vec<_> = tensors.iter().map(|(name, (shape, _))| (name.clone(), shape.clone())).collect();
    let path = dir.join("model.safetensors");
    let mut writer = WeightFileWriter::create(&path, dtype, &BTreeMap::new(), &shapes).unwrap();
    tensors.values().for_each(|(_, values)| writer.write(values).unwrap());
    writer.finish().unwrap();
}

/// Loads what [`write`] makes of a model's configuration with `changes`, and of `tensors`.
fn reload(model: &Model, tensors: &Tensors, options: LoadOptions) -> lora_sb_model::Result<Model> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &model.config().to_json(), tensors, SaveType::F32);
    Model::load_with(dir.path(), device(), Storage::Mapped, options)
}

fn for_task(task: Task) -> LoadOptions {
    LoadOptions { task: Some(task), ..LoadOptions::default() }
}

fn is_head(model: &Model, name: &str) -> bool {
    let head = |p: &Parameter| p.of_classification();
    model.parameters().into_iter().filter(head).any(|p| model.name(p) == name)
}

fn save(dir: &Path, model: &Model) {
    save_model(dir, model, SaveType::F32, &mut |_, values| Ok(values)).unwrap();
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn files_without_the_base_or_with_older_names_are_the_same_model() {
    for (family, leftovers) in [
        ("bert", ["embeddings.position_ids", "bert.embeddings.position_ids", "cls.predictions.bias"]),
        ("roberta", ["embeddings.position_ids", "lm_head.layer_norm.weight", "roberta.pooler.dense.bias"]),
    ] {
        let model = encoder(family);
        let all = tensors(&model);
        let older = |name: &str| {
            let name = name.strip_prefix(&format!("{family}.")).unwrap_or(name);
            let name = name.replace("LayerNorm.weight", "LayerNorm.gamma");
            name.replace("LayerNorm.bias", "LayerNorm.beta")
        };
        let mut renamed: Tensors = all.iter().map(|(name, tensor)| (older(name), tensor.clone())).collect();
        assert!(renamed.contains_key("encoder.layer.1.output.LayerNorm.beta"));
        renamed.extend(leftovers.map(|name| (name.into(), (vec![1], vec![0.0]))));
        let loaded = reload(&model, &renamed, LoadOptions::default()).unwrap();
        assert!(loaded.warnings().is_empty(), "{:?}", loaded.warnings());
        assert_eq!(tensors(&loaded), all);
        assert_eq!(loaded.fingerprint().unwrap(), model.fingerprint().unwrap());

        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &loaded);
        let written = WeightFile::open(&dir.path().join("model.safetensors")).unwrap();
        let mut names = written.names();
        names.sort();
        assert_eq!(names, all.into_keys().collect::<Vec<_>>());
    }
    let model = decoder(json!({}));
    let all = tensors(&model);
    let bare = all.iter().map(|(name, tensor)| (name.replace("model.", ""), tensor.clone()));
    let loaded = reload(&model, &bare.collect(), LoadOptions::default()).unwrap();
    assert!(loaded.warnings().is_empty(), "{:?}", loaded.warnings());
    assert_eq!(tensors(&loaded), all);
}

#[test]
fn a_head_that_is_not_there_is_drawn_and_said() {
    for family in ["bert", "roberta"] {
        let model = encoder(family);
        let mut bare = tensors(&model);
        bare.retain(|name, _| !is_head(&model, name));
        assert_eq!(bare.len() + 4, model.parameters().len());
        let options = |seed| LoadOptions {
            task: Some(Task::Classification { labels: 5 }),
            seed,
            ..LoadOptions::default()
        };
        let loaded = reload(&model, &bare, options(3)).unwrap();
        assert_eq!(loaded.warnings().len(), 1);
        for parameter in [Parameter::Pooler, Parameter::ClassifierBias] {
            assert!(loaded.warnings()[0].contains(&format!("`{}`", model.name(parameter))));
        }
        assert!(loaded.warnings()[0].contains("trained"), "{:?}", loaded.warnings());
        let head = |model: &Model, parameter| values(model.kernels(), model.weight(parameter).unwrap());
        let classifier = head(&loaded, Parameter::Classifier);
        assert_eq!(classifier.len(), 5 * 6);
        assert!(classifier.iter().all(|&value| value != 0.0 && value.abs() < 5.0 * 0.3));
        assert_eq!(head(&loaded, Parameter::ClassifierBias), [0.0; 5]);
        assert_eq!(head(&loaded, Parameter::PoolerBias), [0.0; 6]);
        for (seed, same) in [(3, true), (4, false)] {
            let other = reload(&model, &bare, options(seed)).unwrap();
            assert_eq!(head(&other, Parameter::Classifier) == classifier, same);
            assert_eq!(other.fingerprint().unwrap(), loaded.fingerprint().unwrap());
        }
    }
}

#[test]
fn a_pooler_that_is_not_there_is_the_only_one_drawn() {
    let model = encoder("bert");
    let mut without = tensors(&model);
    without.retain(|name, _| !name.contains("pooler"));
    let loaded = reload(&model, &without, LoadOptions::default()).unwrap();
    let [warning] = loaded.warnings() else { panic!("{:?}", loaded.warnings()) };
    assert!(warning.contains("no `bert.pooler.dense.weight`, `bert.pooler.dense.bias`;"), "{warning}");
    let classifier = |model: &Model| values(model.kernels(), model.weight(Parameter::Classifier).unwrap());
    assert_eq!(classifier(&loaded), classifier(&model));
}

#[test]
fn a_head_can_be_trained_where_all_else_is_mapped() {
    let model = encoder("roberta");
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &model.config().to_json(), &tensors(&model), SaveType::Bf16);
    let mut loaded = Model::load(dir.path(), device(), Storage::Mapped).unwrap();
    assert!(loaded.warnings().is_empty());
    for parameter in loaded.parameters() {
        let expected = if parameter.of_classification() { DType::F32 } else { DType::Bf16 };
        assert_eq!(loaded.weight(parameter).unwrap().dtype(), expected, "{parameter:?}");
    }
    let kernels = device();
    let classifier = loaded.weight_mut(Parameter::Classifier).unwrap();
    kernels.scale(0.0, classifier).unwrap();
    assert_eq!(values(&kernels, classifier), [0.0; 18]);
}

#[test]
fn a_head_of_another_number_of_labels_is_refused() {
    let model = encoder("roberta");
    let all = tensors(&model);
    for (task, parts) in [
        (
            Task::Classification { labels: 2 },
            ["classifier.out_proj.weight", "[3, 6]", "2 labels needs [2, 6]"],
        ),
        (Task::Regression, ["classifier.out_proj.weight", "[3, 6]", "one label needs [1, 6]"]),
    ] {
        let error = reload(&model, &all, for_task(task)).unwrap_err();
        for part in parts {
            assert!(error.to_string().contains(part), "`{part}` is not in: {error}");
        }
        assert!(error.hint().unwrap().contains("as many labels"));
    }
    let kept = for_task(Task::Classification { labels: 3 });
    assert_eq!(reload(&model, &all, kept).unwrap().config().label_names(), ["no", "yes", "maybe"]);
    let mut narrow = all.clone();
    narrow.insert("classifier.out_proj.weight".into(), (vec![3, 5], vec![0.0; 15]));
    let error = reload(&model, &narrow, kept).unwrap_err();
    assert!(error.hint().unwrap().contains("config.json"), "another width is another model: {error}");
    let error = decoder(json!({})).config().clone().with_task(Task::Regression).unwrap_err();
    assert!(error.to_string().contains("llama"), "{error}");
}

#[test]
fn a_head_of_another_number_of_labels_is_drawn_where_that_is_asked_for() {
    let weights = |model: &Model, parameter| values(model.kernels(), model.weight(parameter).unwrap());
    for family in ["bert", "roberta"] {
        let model = encoder(family);
        let all = tensors(&model);
        for task in [Task::Classification { labels: 7 }, Task::Regression] {
            let options = LoadOptions { seed: 3, mismatched: Mismatched::Draw, ..for_task(task) };
            let loaded = reload(&model, &all, options).unwrap();
            let labels = loaded.config().labels();
            let [warning] = loaded.warnings() else { panic!("{:?}", loaded.warnings()) };
            let names = [Parameter::Classifier, Parameter::ClassifierBias].map(|p| model.name(p));
            let named = [
                format!("`{}` ([3, 6], not [{labels}, 6])", names[0]),
                format!("`{}` ([3], not [{labels}])", names[1]),
            ];
            assert!(warning.contains(&named.join(", ")) && warning.contains("drawn at random"), "{warning}");
            for parameter in model.parameters().into_iter().filter(|p| !names.contains(&model.name(*p))) {
                assert_eq!(weights(&loaded, parameter), weights(&model, parameter), "{parameter:?}");
            }
            // The same as where the files hold no such layer.
            let mut without = all.clone();
            without.retain(|name, _| !names.contains(name));
            let fresh = reload(&model, &without, LoadOptions { seed: 3, ..for_task(task) }).unwrap();
            assert_eq!(tensors(&loaded), tensors(&fresh));
            assert_eq!(weights(&loaded, Parameter::ClassifierBias), vec![0.0; labels]);
        }
        let draw = LoadOptions { mismatched: Mismatched::Draw, ..LoadOptions::default() };
        let kept = reload(&model, &all, draw).unwrap();
        assert!(kept.warnings().is_empty(), "what fits is kept: {:?}", kept.warnings());
        assert_eq!(tensors(&kept), all);

        // Both reasons in one sentence.
        let mut part = all.clone();
        part.remove(&model.name(Parameter::PoolerBias));
        let options = LoadOptions { mismatched: Mismatched::Draw, ..for_task(Task::Regression) };
        let loaded = reload(&model, &part, options).unwrap();
        let [warning] = loaded.warnings() else { panic!("{:?}", loaded.warnings()) };
        let missing = format!("no `{}`; `", model.name(Parameter::PoolerBias));
        assert!(warning.contains(&missing) && warning.contains("left out"), "{warning}");

        // Another width is another model, and the body is never drawn.
        for name in [model.name(Parameter::Classifier), model.name(Parameter::Pooler)] {
            let mut narrow = all.clone();
            let rows = narrow[&name].0[0];
            narrow.insert(name.clone(), (vec![rows, 5], vec![0.0; rows * 5]));
            let error = reload(&model, &narrow, draw).unwrap_err().to_string();
            assert!(error.contains(&name) && error.contains("the configuration asks for"), "{error}");
        }
        let mut short = all.clone();
        let name = model.name(Parameter::Embedding);
        short.insert(name.clone(), (vec![22, 6], vec![0.0; 22 * 6]));
        assert!(reload(&model, &short, draw).unwrap_err().to_string().contains(&name));
    }
}

#[test]
fn what_was_fine_tuned_for_another_task_is_written_as_such() {
    let json = json!({
        "model_type": "bert", "architectures": ["BertModel"], "auto_map": { "AutoModel": "code.Bert" },
        "vocab_size": 23, "hidden_size": 6, "intermediate_size": 7, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 11, "tie_word_embeddings": true
    });
    let base = Config::from_json(json.to_string().as_bytes()).unwrap();
    let config = base.with_task(Task::Classification { labels: 3 }).unwrap();
    let config = config.with_label_names(&["a", "b", "c"]).unwrap();
    let model = Model::random(config, device(), 5, Storage::Trainable).unwrap();
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &model);
    let written = read_json(&dir.path().join("config.json"));
    assert_eq!(written["architectures"], json!(["BertForSequenceClassification"]));
    assert_eq!(written["id2label"], json!({ "0": "a", "1": "b", "2": "c" }));
    assert_eq!(written["auto_map"], Value::Null);
    let loaded = Model::load(dir.path(), device(), Storage::Mapped).unwrap();
    assert!(loaded.warnings().is_empty(), "{:?}", loaded.warnings());
    assert_eq!(loaded.config().task, Task::Classification { labels: 3 });
    assert_eq!(tensors(&loaded), tensors(&model));
}

#[test]
fn a_tied_models_head_is_its_embedding() {
    let tied = decoder(json!({ "tie_word_embeddings": true }));
    let mut all = tensors(&tied);
    let copy = all["model.embed_tokens.weight"].clone();
    all.insert("lm_head.weight".into(), copy);
    let loaded = reload(&tied, &all, LoadOptions::default()).unwrap();
    assert!(loaded.warnings().is_empty(), "{:?}", loaded.warnings());
    all.get_mut("lm_head.weight").unwrap().1.fill(0.5);
    let loaded = reload(&tied, &all, LoadOptions::default()).unwrap();
    let [warning] = loaded.warnings() else { panic!("{:?}", loaded.warnings()) };
    assert!(
        warning.contains("`lm_head.weight` differs") && warning.contains("tie_word_embeddings"),
        "{warning}"
    );
    assert_eq!(tensors(&loaded), tensors(&tied));
}

#[test]
fn large_models_are_dealt_to_shards() {
    let model = decoder(json!({}));
    let all = tensors(&model);
    let bytes: usize = all.values().map(|(_, values)| 4 * values.len()).sum();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let save = |limit| {
        save_model_in_shards(dir.path(), &model, SaveType::F32, limit, &mut |_, values| Ok(values)).unwrap();
        let loaded = Model::load(dir.path(), device(), Storage::Mapped).unwrap();
        assert!(loaded.warnings().is_empty(), "{:?}", loaded.warnings());
        assert_eq!(tensors(&loaded), all);
        let mut names: Vec<String> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(save(bytes), ["config.json", "model.safetensors"]);

    std::fs::write(path("model-card.md"), "stays").unwrap();
    let limit = 2000;
    let names = save(limit);
    assert!(!names.contains(&"model.safetensors".into()), "it would be read in place of the shards");
    let index = read_json(&path("model.safetensors.index.json"));
    assert_eq!(index["metadata"]["total_size"], bytes);
    let places = index["weight_map"].as_object().unwrap();
    assert_eq!(places.len(), all.len());
    assert!(all.keys().all(|name| places.contains_key(name)));
    let shards: Vec<_> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
    assert!(shards.len() > 2);
    for (number, shard) in shards.iter().enumerate() {
        assert_eq!(**shard, format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len()));
        let held: Vec<_> = places
            .iter()
            .filter(|(_, file)| file.as_str() == Some(shard.as_str()))
            .map(|(name, _)| name)
            .collect();
        let size: usize = held.iter().map(|name| 4 * all[*name].1.len()).sum();
        assert!(size <= limit || held.len() == 1, "{shard}: {size}");
    }
    assert!(save(1).len() > names.len(), "every tensor in a file of its own");
    assert_eq!(save(bytes), ["config.json", "model-card.md", "model.safetensors"]);
}
