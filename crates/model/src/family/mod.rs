//! The families of models: tables from a `config.json` to a [`Config`] and to weight names. No mathematics.
//!
//! A new family is a file with a [`Table`], a variant of [`Family`], and a line each in [`Family::ALL`] and
//! [`Family::table`]. `decoder`, `encoder` and `rope` read what families have in common.

mod bert;
mod decoder;
mod encoder;
mod fields;
mod gemma2;
mod gemma3_text;
mod llama;
mod mistral;
mod names;
mod phi3;
mod qwen2;
mod qwen3;
mod roberta;
mod rope;

use lora_sb_kernels::Activation;

pub(crate) use fields::Fields;
pub(crate) use names::Names;

use crate::{Config, Error, Result};

/// A family of models that is built in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// Llama 2, 3, 3.1 and 3.2, and what calls itself so.
    Llama,
    /// Mistral 7B, with or without its sliding window.
    Mistral,
    /// Qwen 2 and 2.5.
    Qwen2,
    /// Qwen 3, dense.
    Qwen3,
    /// Gemma 2.
    Gemma2,
    /// The text models of Gemma 3.
    Gemma3Text,
    /// Phi-3 and Phi-4 with their short context.
    Phi3,
    /// BERT, with a classification head.
    Bert,
    /// RoBERTa, with a classification head.
    Roberta,
}

impl Family {
    /// All of them.
    pub const ALL: [Family; 9] = [
        Family::Llama,
        Family::Mistral,
        Family::Qwen2,
        Family::Qwen3,
        Family::Gemma2,
        Family::Gemma3Text,
        Family::Phi3,
        Family::Bert,
        Family::Roberta,
    ];

    fn table(self) -> &'static Table {
        match self {
            Family::Llama => &llama::TABLE,
            Family::Mistral => &mistral::TABLE,
            Family::Qwen2 => &qwen2::TABLE,
            Family::Qwen3 => &qwen3::TABLE,
            Family::Gemma2 => &gemma2::TABLE,
            Family::Gemma3Text => &gemma3_text::TABLE,
            Family::Phi3 => &phi3::TABLE,
            Family::Bert => &bert::TABLE,
            Family::Roberta => &roberta::TABLE,
        }
    }

    /// `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        self.table().model_type
    }

    /// The entry of `architectures` in a `config.json` that is written.
    pub fn architecture(self) -> &'static str {
        self.table().architecture
    }

    pub(crate) fn names(self) -> &'static Names {
        &self.table().names
    }

    /// Whether a class of transformers is one of this family's: its name with or without a head's.
    fn has_class(self, class: &str) -> bool {
        let architecture = self.architecture();
        let stem = architecture.split_once("For").map_or(architecture, |(stem, _)| stem);
        let heads = ["Model", "ForCausalLM", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification"];
        class.strip_prefix(stem).is_some_and(|head| heads.contains(&head))
    }
}

/// All that distinguishes a family.
pub(crate) struct Table {
    pub(crate) model_type: &'static str,
    pub(crate) architecture: &'static str,
    pub(crate) names: Names,
    pub(crate) read: fn(&Fields) -> Result<Config>,
}

/// Finds the family by `model_type`, or else by `architectures`, and reads the rest by its table.
pub(crate) fn read(fields: &Fields) -> Result<Config> {
    let model_type = fields.text("model_type")?;
    let architectures = fields.texts("architectures")?;
    let family = Family::ALL.into_iter().find(|family| match model_type {
        Some(model_type) => model_type == family.model_type(),
        None => architectures.iter().any(|class| family.has_class(class)),
    });
    let Some(family) = family else {
        let named = model_type.map(|name| format!("model_type \"{name}\""));
        let found = named.unwrap_or_else(|| match architectures.first() {
            Some(name) => format!("\"{name}\""),
            None => "without `model_type` or `architectures`".into(),
        });
        let known = Family::ALL.map(|family| format!("{} ({})", family.model_type(), family.architecture()));
        return Err(Error::UnknownArchitecture {
            file: fields.file().into(),
            found,
            known: known.join(", "),
            hint: model_type.and_then(advice),
        });
    };
    fields.absent("quantization_config", "nothing: only f32, bf16 and f16 weights are read")?;
    let mut config = (family.table().read)(fields)?;
    // Some files name a token of a vocabulary that the model does not have.
    config.pad_token_id = config.pad_token_id.filter(|&id| (id as usize) < config.vocab_size);
    Ok(config)
}

/// What to do about a `model_type` that is not known.
fn advice(model_type: &str) -> Option<String> {
    if model_type == "gemma3" {
        return Some(
            "this model also reads images; with transformers, save its text model by itself: a \
             Gemma3ForCausalLM of its `text_config` with the weights of its `language_model`"
                .into(),
        );
    }
    let known = Family::ALL.into_iter().map(Family::model_type);
    let (distance, near) = known.map(|known| (distance(model_type, known), known)).min()?;
    let close = distance <= 2;
    close
        .then(|| format!("the nearest known family is `{near}`; if the model is one, say so in `model_type`"))
}

/// Levenshtein's: insertions, deletions and replacements of bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Refuses a model whose head computes something else than this program does, by its class's name.
fn refuse_other_heads(fields: &Fields, heads: &[&str]) -> Result<()> {
    for class in fields.texts("architectures")? {
        if heads.iter().any(|head| class.ends_with(head)) {
            let expected = "a model that predicts tokens, or an encoder that classifies sequences";
            return Err(fields.mismatch("architectures", expected));
        }
    }
    Ok(())
}

/// The activation that a key names, as transformers names it.
fn activation(fields: &Fields, key: &str, default: Activation) -> Result<Activation> {
    match fields.text(key)? {
        None => Ok(default),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu" | "gelu_python") => Ok(Activation::Gelu),
        Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_fast" | "gelu_accurate") => {
            Ok(Activation::GeluTanh)
        }
        Some("tanh") => Ok(Activation::Tanh),
        Some(_) => Err(fields.mismatch(key, "\"silu\", \"gelu\", \"gelu_pytorch_tanh\" or \"tanh\"")),
    }
}
