//! What a family's tensors are called in files.

use crate::{Norm, Parameter, Projection, Site};

/// Names of modules; a parameter is a module's `.weight` or `.bias`.
///
/// What a family does not have is left empty, as in [`Names::NONE`].
pub(crate) struct Names {
    /// Before all names but those of the heads, with its dot; files of a model without a head leave it out.
    pub(crate) base: &'static str,
    pub(crate) embedding: &'static str,
    /// A block is this, a dot, and its number.
    pub(crate) layers: &'static str,
    pub(crate) position_embedding: &'static str,
    pub(crate) token_type_embedding: &'static str,
    pub(crate) embedding_norm: &'static str,
    /// Within the block, as all norms and projections but the first and the last norm.
    pub(crate) attention_norm: &'static str,
    pub(crate) attention_output_norm: &'static str,
    pub(crate) query_norm: &'static str,
    pub(crate) key_norm: &'static str,
    pub(crate) feed_forward_norm: &'static str,
    pub(crate) feed_forward_output_norm: &'static str,
    /// In the order of [`Projection::ALL`]; empty where the family has no such layer.
    pub(crate) projections: [&'static str; 9],
    pub(crate) final_norm: &'static str,
    /// In full, as the next two.
    pub(crate) head: &'static str,
    pub(crate) pooler: &'static str,
    pub(crate) classifier: &'static str,
    /// Tensors of files that nobody reads, without the base; a star stands for any beginning or end.
    pub(crate) ignored: &'static [&'static str],
}

// `module` indexes a table by the variant's number.
const _: () = assert!(Projection::Query as usize == 0 && Projection::Down as usize == 8);

impl Names {
    /// Nothing; a table names what there is and takes the rest from here.
    pub(crate) const NONE: Names = Names {
        base: "",
        embedding: "",
        position_embedding: "",
        token_type_embedding: "",
        embedding_norm: "",
        layers: "",
        attention_norm: "",
        attention_output_norm: "",
        query_norm: "",
        key_norm: "",
        feed_forward_norm: "",
        feed_forward_output_norm: "",
        projections: [""; 9],
        final_norm: "",
        head: "",
        pooler: "",
        classifier: "",
        ignored: &[],
    };

    pub(crate) fn module(&self, site: Site) -> String {
        let projection = self.projections[site.projection as usize];
        format!("{}{}.{}.{projection}", self.base, self.layers, site.layer)
    }

    fn norm(&self, norm: Norm) -> String {
        let base = self.base;
        let within = |layer: usize, name: &str| format!("{base}{}.{layer}.{name}", self.layers);
        match norm {
            Norm::Embedding => format!("{base}{}", self.embedding_norm),
            Norm::Attention(layer) => within(layer, self.attention_norm),
            Norm::AttentionOutput(layer) => within(layer, self.attention_output_norm),
            Norm::Query(layer) => within(layer, self.query_norm),
            Norm::Key(layer) => within(layer, self.key_norm),
            Norm::FeedForward(layer) => within(layer, self.feed_forward_norm),
            Norm::FeedForwardOutput(layer) => within(layer, self.feed_forward_output_norm),
            Norm::Final => format!("{base}{}", self.final_norm),
        }
    }

    pub(crate) fn parameter(&self, parameter: Parameter) -> String {
        let base = self.base;
        match parameter {
            Parameter::Embedding => format!("{base}{}.weight", self.embedding),
            Parameter::PositionEmbedding => format!("{base}{}.weight", self.position_embedding),
            Parameter::TokenTypeEmbedding => format!("{base}{}.weight", self.token_type_embedding),
            Parameter::Gain(norm) => format!("{}.weight", self.norm(norm)),
            Parameter::Shift(norm) => format!("{}.bias", self.norm(norm)),
            Parameter::Weight(site) => format!("{}.weight", self.module(site)),
            Parameter::Bias(site) => format!("{}.bias", self.module(site)),
            Parameter::Head => format!("{}.weight", self.head),
            Parameter::Pooler => format!("{}.weight", self.pooler),
            Parameter::PoolerBias => format!("{}.bias", self.pooler),
            Parameter::Classifier => format!("{}.weight", self.classifier),
            Parameter::ClassifierBias => format!("{}.bias", self.classifier),
        }
    }

    /// All names that a parameter has in files, the one that is written first.
    ///
    /// Files of a bare model leave the base out, and the first releases of BERT call a layer norm's tensors
    /// `gamma` and `beta`.
    pub(crate) fn spellings(&self, parameter: Parameter) -> Vec<String> {
        let name = self.parameter(parameter);
        let older = match parameter {
            Parameter::Gain(_) => name.strip_suffix("weight").map(|module| format!("{module}gamma")),
            Parameter::Shift(_) => name.strip_suffix("bias").map(|module| format!("{module}beta")),
            _ => None,
        };
        let mut spellings = vec![name];
        spellings.extend(older);
        let bare: Vec<String> =
            spellings.iter().filter_map(|name| name.strip_prefix(self.base)).map(String::from).collect();
        if !self.base.is_empty() {
            spellings.extend(bare);
        }
        spellings
    }

    /// Whether a tensor of a file is one that nobody reads, and no cause for a warning.
    pub(crate) fn ignores(&self, name: &str) -> bool {
        let name = name.strip_prefix(self.base).unwrap_or(name);
        self.ignored.iter().any(|pattern| match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
            (Some(ending), _) => name.ends_with(ending),
            (None, Some(beginning)) => name.starts_with(beginning),
            (None, None) => name == *pattern,
        })
    }
}
