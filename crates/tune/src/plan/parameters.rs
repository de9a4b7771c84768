//! How many values are trained, and how many other methods would train.

use lora_sb_model::{Config, Site};

use crate::Method;

/// Trained values of a run beside those of other methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterReport {
    /// Values of the base model.
    pub model: usize,
    /// Values that the run trains.
    pub trained: usize,
    /// Values that LoRA would train at the same rank on the same targets.
    pub lora: usize,
    /// Values that full fine-tuning trains.
    pub full: usize,
}

impl ParameterReport {
    /// Counts from the architecture alone.
    pub fn new(config: &Config, method: Method, rank: usize, sites: &[Site]) -> Self {
        ParameterReport {
            model: config.parameter_count(),
            trained: trained(config, method, rank, sites),
            lora: trained(config, Method::Lora, rank, sites),
            full: config.parameter_count(),
        }
    }
}

pub(super) fn trained(config: &Config, method: Method, rank: usize, sites: &[Site]) -> usize {
    match method {
        Method::Full => config.parameter_count(),
        _ => sites.iter().map(|&site| method.trained_values(rank, config.site_shape(site))).sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The counts of arXiv 2411.19557, table 1 and 2, for Mistral-7B and Llama-3.2 3B.
    #[test]
    fn counts_are_those_of_the_paper() {
        let mistral = r#"{"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
            "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "max_position_embeddings": 32768}"#;
        let llama = r#"{"model_type": "llama", "vocab_size": 128256, "hidden_size": 3072,
            "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
            "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
            "tie_word_embeddings": true}"#;
        let cases = [
            (mistral, [229_376, 917_504, 2_064_384], 83_886_080, 7_241_732_096),
            (llama, [200_704, 802_816, 1_806_336], 48_627_712, 3_212_749_824),
        ];
        for (json, latent, lora, full) in cases {
            let config = Config::from_json(json.as_bytes()).unwrap();
            for (rank, expected) in [32, 64, 96].into_iter().zip(latent) {
                let report = ParameterReport::new(&config, Method::LoraSb, rank, &config.sites());
                assert_eq!((report.trained, report.full, report.model), (expected, full, full));
                assert_eq!(report.lora, lora * rank / 32);
            }
        }
    }
}
