//! What an encoder's head is for: read, chosen, written.

mod support;

use lora_sb_model::{Config, Task};
use serde_json::json;
use support::published::{changed, published};

#[test]
fn tasks_are_read() {
    let three = json!({ "0": "no", "1": "yes", "2": "maybe" });
    for (changes, task) in [
        (json!({ "id2label": three }), Task::Classification { labels: 3 }),
        (json!({ "num_labels": 4 }), Task::Classification { labels: 4 }),
        (json!({ "num_labels": 1 }), Task::Regression),
        (json!({ "id2label": { "0": "score" } }), Task::Regression),
        (json!({ "id2label": { "0": "score" }, "problem_type": "regression" }), Task::Regression),
        (
            json!({ "id2label": three, "problem_type": "single_label_classification" }),
            Task::Classification { labels: 3 },
        ),
    ] {
        assert_eq!(changed("roberta-large", &changes).unwrap().task, task, "{changes}");
    }
    let names = changed("roberta-large", &json!({ "id2label": three })).unwrap().label_names();
    assert_eq!(names, ["no", "yes", "maybe"]);
    assert_eq!(published("roberta-large").label_names(), ["LABEL_0", "LABEL_1"]);
    assert!(published("qwen3-0.6b").label_names().is_empty());
}

#[test]
fn tasks_are_chosen_and_written() {
    let base = published("bert-base-uncased");
    let config = base.clone().with_task(Task::Classification { labels: 3 }).unwrap();
    assert_eq!(config.labels(), 3);
    let json = config.to_json();
    assert_eq!(json["architectures"], json!(["BertForSequenceClassification"]));
    assert_eq!(json["problem_type"], "single_label_classification");
    assert_eq!(json["id2label"], json!({ "0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2" }));
    assert_eq!(json["label2id"], json!({ "LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2 }));
    assert_eq!(json["gradient_checkpointing"], false);

    let named = config.with_label_names(&["no", "yes", "maybe"]).unwrap();
    assert_eq!(named.to_json()["id2label"]["2"], "maybe");
    assert_eq!(named.to_json()["label2id"]["yes"], 1);
    let again = Config::from_json(named.to_json().to_string().as_bytes()).unwrap();
    assert_eq!((again.task, again.label_names()), (named.task, named.label_names()));
    let regression = named.clone().with_task(Task::Regression).unwrap();
    assert_eq!(regression.to_json()["problem_type"], "regression");
    assert_eq!(regression.label_names(), ["LABEL_0"]);
    let again = Config::from_json(regression.to_json().to_string().as_bytes()).unwrap();
    assert_eq!((again.task, again.labels()), (Task::Regression, 1));
    let kept = named.clone().with_task(named.task).unwrap();
    assert_eq!(kept.label_names(), ["no", "yes", "maybe"]);
}

#[test]
fn tasks_that_a_model_has_no_head_for() {
    let refused = |config: Config, task: Task| {
        let error = config.with_task(task).unwrap_err();
        format!("{error}; {}", error.hint().unwrap())
    };
    let bert = || published("bert-base-uncased");
    let message = refused(published("gemma-2-9b"), Task::Regression);
    assert!(
        message.contains("gemma2") && message.contains("no classification head") && message.contains("BERT"),
        "{message}"
    );
    let message = refused(bert(), Task::LanguageModel);
    assert!(message.contains("bert") && message.contains("predict tokens"), "{message}");
    let message = refused(bert(), Task::Classification { labels: 1 });
    assert!(message.contains("at least 2") && message.contains("found 1"), "{message}");
    let names = |names: &[&str]| bert().with_label_names(names).unwrap_err().to_string();
    assert!(names(&["a"]).contains("1 label names for a head of 2"));
    assert!(names(&["a", "a"]).contains("labels 0 and 1 are both called \"a\""));
}
