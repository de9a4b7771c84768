//! Reading keys of a `config.json`; a key that is `null` is an absent one.

use serde_json::{Map, Value};

use crate::{Error, Result};

/// The keys of one object of the file.
#[derive(Clone)]
pub(crate) struct Fields {
    file: String,
    /// The object's own path, with its last dot; empty at the top.
    prefix: String,
    map: Map<String, Value>,
}

impl Fields {
    pub(crate) fn parse(json: &[u8], file: &str) -> Result<Fields> {
        let value: Value = serde_json::from_slice(json).map_err(|error| Error::Json {
            file: file.into(),
            line: error.line(),
            message: error.to_string(),
        })?;
        match value {
            Value::Object(map) => Ok(Fields { file: file.into(), prefix: String::new(), map }),
            other => {
                let message = format!("expected an object, found {other}");
                Err(Error::Json { file: file.into(), line: 1, message })
            }
        }
    }

    pub(crate) fn file(&self) -> &str {
        &self.file
    }

    /// The whole object.
    pub(crate) fn object(&self) -> &Map<String, Value> {
        &self.map
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// The error of a key that holds something else than `expected`.
    pub(crate) fn mismatch(&self, key: &str, expected: &str) -> Error {
        let found = self.get(key).map_or_else(|| "nothing".into(), Value::to_string);
        Error::Config {
            file: self.file.clone(),
            key: format!("{}{key}", self.prefix),
            expected: expected.into(),
            found,
        }
    }

    /// Refuses a key whose meaning is not computed.
    pub(crate) fn absent(&self, key: &str, expected: &str) -> Result<()> {
        if self.get(key).is_some() { Err(self.mismatch(key, expected)) } else { Ok(()) }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.mismatch(key, expected)),
        }
    }

    /// A value by `read`, or `default` where the key is absent: a key that is there as `null` means none.
    pub(crate) fn or_default<T>(
        &self,
        key: &str,
        default: Option<T>,
        read: impl Fn(&Fields, &str) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        if self.map.contains_key(key) { read(self, key) } else { Ok(default) }
    }

    /// An object within this one.
    pub(crate) fn inner(&self, key: &str) -> Result<Option<Fields>> {
        let map = self.typed(key, "an object", Value::as_object)?;
        Ok(map.map(|map| Fields {
            file: self.file.clone(),
            prefix: format!("{}{key}.", self.prefix),
            map: map.clone(),
        }))
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a text", Value::as_str)
    }

    pub(crate) fn texts(&self, key: &str) -> Result<Vec<&str>> {
        let read = |value| <Value>::as_array(value)?.iter().map(Value::as_str).collect();
        Ok(self.typed(key, "a list of texts", read)?.unwrap_or_default())
    }

    pub(crate) fn size(&self, key: &str) -> Result<Option<usize>> {
        // 2^31 is beyond any model and keeps products of sizes inside 64 bits.
        let read = |value: &Value| value.as_u64().filter(|&size| size < 1 << 31).map(|size| size as usize);
        self.typed(key, "a whole number", read)
    }

    pub(crate) fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.mismatch(key, "a whole number"))
    }

    pub(crate) fn positive(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a positive number", |value| value.as_f64().filter(|&number| number > 0.0))
    }

    pub(crate) fn required_positive(&self, key: &str) -> Result<f64> {
        self.positive(key)?.ok_or_else(|| self.mismatch(key, "a positive number"))
    }

    pub(crate) fn truth(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// The keys of one object that stand for labels: `"0"` to `"n-1"`, in this order, with their texts.
    pub(crate) fn numbered_texts(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.typed(key, "an object with the keys \"0\", \"1\" and so on and a text for each", |value| {
            let map = value.as_object()?;
            let text = |i: usize| map.get(&i.to_string())?.as_str().map(String::from);
            (0..map.len()).map(text).collect()
        })
    }

    /// A token id: `default` where the key is absent, none where the file says null or a negative number.
    pub(crate) fn token(&self, key: &str, default: Option<u32>) -> Option<u32> {
        match self.map.get(key) {
            None => default,
            Some(value) => token(value),
        }
    }

    /// One token id or a list of them; `default` where the key is absent.
    pub(crate) fn tokens(&self, key: &str, default: Option<u32>) -> Vec<u32> {
        match self.map.get(key) {
            Some(Value::Array(ids)) => ids.iter().filter_map(token).collect(),
            _ => self.token(key, default).into_iter().collect(),
        }
    }
}

fn token(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}
