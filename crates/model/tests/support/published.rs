//! Configurations as their models' makers publish them.

use lora_sb_model::Config;
use serde_json::{Map, Value};

use super::device::root;

fn json_of(name: &str) -> Map<String, Value> {
    let path = root().join(format!("crates/model/tests/configs/{name}.json"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn read(json: &Map<String, Value>) -> lora_sb_model::Result<Config> {
    Config::from_json(Value::Object(json.clone()).to_string().as_bytes())
}

pub(crate) fn published(name: &str) -> Config {
    read(&json_of(name)).unwrap()
}

/// A published configuration with `changes` laid over it; `"absent"` takes a key out.
pub(crate) fn changed(name: &str, changes: &Value) -> lora_sb_model::Result<Config> {
    let mut json = json_of(name);
    for (key, value) in changes.as_object().unwrap() {
        if value == "absent" {
            json.remove(key);
        } else {
            json.insert(key.clone(), value.clone());
        }
    }
    read(&json)
}
