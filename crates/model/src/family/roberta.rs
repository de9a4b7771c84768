//! RoBERTa: a BERT whose positions begin behind the padding token's number, with a head of its own.
//!
//! Sources: transformers' `RobertaConfig`, arXiv 1907.11692.

use super::{Family, Fields, Names, Table, encoder};
use crate::config::Positions;
use crate::{Config, Result};

pub(super) const TABLE: Table = Table {
    model_type: "roberta",
    architecture: "RobertaForSequenceClassification",
    names: Names {
        base: "roberta.",
        pooler: "classifier.dense",
        classifier: "classifier.out_proj",
        // The head of the pre-training, a buffer, and a pooler that no classifier reads.
        ignored: &["lm_head.*", "embeddings.position_ids", "pooler.*"],
        ..encoder::NAMES
    },
    read,
};

fn read(fields: &Fields) -> Result<Config> {
    let mut config = encoder::read(fields, Family::Roberta, 1)?;
    let Some(pad) = config.pad_token_id else {
        return Err(fields.mismatch("pad_token_id", "a token: positions are counted from behind its number"));
    };
    let offset = pad as usize + 1;
    if offset >= config.max_position_embeddings {
        let expected = format!("more than pad_token_id + 1 = {offset}, the first position");
        return Err(fields.mismatch("max_position_embeddings", &expected));
    }
    config.positions = Positions::Learned { offset };
    config.bos_token_id = fields.token("bos_token_id", Some(0));
    config.eos_token_ids = fields.tokens("eos_token_id", Some(2));
    Ok(config)
}
