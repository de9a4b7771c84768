//! What a classification head is for: reading it from `config.json`, choosing it, writing it back.

use serde_json::{Map, Value, json};

use crate::config::Task;
use crate::family::Fields;
use crate::{Config, Error, Model, Result};

/// transformers' number of labels where a file says none.
const LABELS: usize = 2;

/// The task of an encoder: the number of labels is that of `id2label`, or else `num_labels`.
pub(crate) fn read(fields: &Fields) -> Result<Task> {
    let (key, labels) = match fields.numbered_texts("id2label")? {
        Some(names) => ("id2label", names.len()),
        None => ("num_labels", fields.size("num_labels")?.unwrap_or(LABELS)),
    };
    if labels == 0 {
        return Err(fields.mismatch(key, "at least one label"));
    }
    match fields.text("problem_type")? {
        None if labels == 1 => Ok(Task::Regression),
        Some("regression") if labels == 1 => Ok(Task::Regression),
        Some("regression") => Err(fields.mismatch(key, "one label, as `problem_type` is \"regression\"")),
        Some("single_label_classification") if labels == 1 => {
            Err(fields.mismatch("problem_type", "\"regression\", as there is one label"))
        }
        None | Some("single_label_classification") => Ok(Task::Classification { labels }),
        Some(_) => Err(fields.mismatch("problem_type", "\"single_label_classification\" or \"regression\"")),
    }
}

impl Config {
    /// The same encoder with a head for another task, whose labels are called `LABEL_0` and so on unless
    /// their number stays the same.
    ///
    /// # Errors
    /// Where the model is a decoder, the task is not one of sequences, or there are fewer than 2 classes.
    pub fn with_task(mut self, task: Task) -> Result<Config> {
        let failed = |message: String, hint: &str| Err(Error::Task { message, hint: Some(hint.to_string()) });
        let family = self.family.model_type();
        if self.task == task {
            return Ok(self);
        }
        if self.task == Task::LanguageModel {
            let message = format!("a {family} model predicts tokens and has no classification head");
            return failed(message, "classification heads are for BERT and RoBERTa models");
        }
        let problem = match task {
            Task::LanguageModel => {
                let message = format!("a {family} model does not predict tokens");
                return failed(message, "choose a classification or a regression, or another model");
            }
            Task::Classification { labels } if labels < 2 => {
                let message = format!("a classification needs at least 2 labels, found {labels}");
                return failed(message, "for one number for each sequence choose a regression");
            }
            Task::Classification { .. } => "single_label_classification",
            Task::Regression => "regression",
        };
        let names = self.label_names();
        self.task = task;
        self.json.insert("problem_type".into(), json!(problem));
        self.json.insert("architectures".into(), json!([self.family.architecture()]));
        let names = if names.len() == self.labels() { names } else { default_names(self.labels()) };
        self.with_label_names(&names)
    }

    /// The same encoder with these names of its labels, in the order of the head's rows.
    ///
    /// # Errors
    /// Where there is not one name for each label, or two are the same.
    pub fn with_label_names<S: AsRef<str>>(mut self, names: &[S]) -> Result<Config> {
        let (found, expected) = (names.len(), self.labels());
        if found != expected {
            let message = format!("{found} label names for a head of {expected} labels");
            return Err(Error::Task { message, hint: None });
        }
        let (mut id2label, mut label2id) = (Map::new(), Map::new());
        for (id, name) in names.iter().map(AsRef::as_ref).enumerate() {
            id2label.insert(id.to_string(), json!(name));
            if let Some(first) = label2id.insert(name.into(), json!(id)) {
                let message = format!("labels {first} and {id} are both called \"{name}\"");
                return Err(Error::Task { message, hint: None });
            }
        }
        self.json.insert("num_labels".into(), json!(expected));
        self.json.insert("id2label".into(), Value::Object(id2label));
        self.json.insert("label2id".into(), Value::Object(label2id));
        Ok(self)
    }

    /// The names of the labels, in the order of the head's rows; none for a language model.
    pub fn label_names(&self) -> Vec<String> {
        let named = |id: usize| Some(self.json.get("id2label")?.get(id.to_string())?.as_str()?.to_string());
        let names = default_names(self.labels()).into_iter().enumerate();
        names.map(|(id, default)| named(id).unwrap_or(default)).collect()
    }
}

impl Model {
    /// Gives the labels their names, as [`Config::with_label_names`].
    ///
    /// # Errors
    /// As there.
    pub fn name_labels<S: AsRef<str>>(&mut self, names: &[S]) -> Result<()> {
        self.config = self.config.clone().with_label_names(names)?;
        Ok(())
    }
}

fn default_names(labels: usize) -> Vec<String> {
    (0..labels).map(|id| format!("LABEL_{id}")).collect()
}
