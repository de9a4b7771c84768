//! The families of models: tables from a `config.json` to a [`Config`] and to weight names. No mathematics.
//!
//! A new family is a file with a [`Table`], a variant of [`Family`] and a line in [`Family::table`].

mod fields;
mod llama;

pub(crate) use fields::Fields;

use crate::{Config, Error, Parameter, Projection, Result, Site};

/// A family of models that is built in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// Llama 2, 3, 3.1 and 3.2, and what calls itself so.
    Llama,
}

impl Family {
    /// All of them.
    pub const ALL: [Family; 1] = [Family::Llama];

    fn table(self) -> &'static Table {
        match self {
            Family::Llama => &llama::TABLE,
        }
    }

    /// `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        self.table().model_type
    }

    /// The entry of `architectures` in `config.json`.
    pub fn architecture(self) -> &'static str {
        self.table().architecture
    }

    pub(crate) fn names(self) -> &'static Names {
        &self.table().names
    }
}

/// All that distinguishes a family.
pub(crate) struct Table {
    pub(crate) model_type: &'static str,
    pub(crate) architecture: &'static str,
    pub(crate) names: Names,
    pub(crate) read: fn(&Fields) -> Result<Config>,
}

/// Names of modules; a parameter is a module's `.weight` or `.bias`.
pub(crate) struct Names {
    pub(crate) embedding: &'static str,
    /// A block is this, a dot, and its number.
    pub(crate) layers: &'static str,
    /// Within the block, as all that follow.
    pub(crate) attention_norm: &'static str,
    pub(crate) feed_forward_norm: &'static str,
    /// In the order of [`Projection::ALL`].
    pub(crate) projections: [&'static str; 7],
    pub(crate) final_norm: &'static str,
    pub(crate) head: &'static str,
    /// Endings of tensors that older programs wrote and nobody reads.
    pub(crate) ignored: &'static [&'static str],
}

impl Names {
    pub(crate) fn module(&self, site: Site) -> String {
        let projection = self.projections[site.projection as usize];
        format!("{}.{}.{projection}", self.layers, site.layer)
    }

    pub(crate) fn parameter(&self, parameter: Parameter) -> String {
        match parameter {
            Parameter::Embedding => format!("{}.weight", self.embedding),
            Parameter::AttentionNorm(layer) => {
                format!("{}.{layer}.{}.weight", self.layers, self.attention_norm)
            }
            Parameter::FeedForwardNorm(layer) => {
                format!("{}.{layer}.{}.weight", self.layers, self.feed_forward_norm)
            }
            Parameter::Weight(site) => format!("{}.weight", self.module(site)),
            Parameter::Bias(site) => format!("{}.bias", self.module(site)),
            Parameter::FinalNorm => format!("{}.weight", self.final_norm),
            Parameter::Head => format!("{}.weight", self.head),
        }
    }
}

// `module` indexes a table by the variant's number.
const _: () = assert!(Projection::Query as usize == 0 && Projection::Down as usize == 6);

/// Finds the family by `model_type`, or else by `architectures`, and reads the rest by its table.
pub(crate) fn read(fields: &Fields) -> Result<Config> {
    let model_type = fields.text("model_type")?;
    let architectures = fields.texts("architectures")?;
    let family = Family::ALL.into_iter().find(|family| match model_type {
        Some(model_type) => model_type == family.model_type(),
        None => architectures.iter().any(|name| *name == family.architecture()),
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
        });
    };
    (family.table().read)(fields)
}
