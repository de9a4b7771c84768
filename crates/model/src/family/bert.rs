//! BERT.
//!
//! Sources: transformers' `BertConfig`, arXiv 1810.04805.

use super::{Family, Fields, Names, Table, encoder};
use crate::{Config, Result};

pub(super) const TABLE: Table = Table {
    model_type: "bert",
    architecture: "BertForSequenceClassification",
    names: Names {
        base: "bert.",
        pooler: "bert.pooler.dense",
        classifier: "classifier",
        // The heads of the pre-training, and a buffer that older programs wrote.
        ignored: &["cls.*", "embeddings.position_ids"],
        ..encoder::NAMES
    },
    read,
};

fn read(fields: &Fields) -> Result<Config> {
    encoder::read(fields, Family::Bert, 0)
}
