//! Shapes by name: the published models of arXiv 2411.19557 and smaller ones, each as its `config.json`.

use lora_sb_model::Config;

use crate::failure::{Failure, Result};

/// Names and configurations. `llama-60m`, `llama-160m` and `minilm-l6` are shapes of those sizes, the others the
/// published files.
const ALL: [(&str, &str); 8] = [
    ("llama-60m", include_str!("presets/llama-60m.json")),
    ("llama-160m", include_str!("presets/llama-160m.json")),
    ("llama-3.2-1b", include_str!("presets/llama-3.2-1b.json")),
    ("llama-3.2-3b", include_str!("presets/llama-3.2-3b.json")),
    ("mistral-7b", include_str!("presets/mistral-7b.json")),
    ("gemma-2-9b", include_str!("presets/gemma-2-9b.json")),
    ("roberta-large", include_str!("presets/roberta-large.json")),
    ("minilm-l6", include_str!("presets/minilm-l6.json")),
];

/// The architecture of a preset.
pub(super) fn config(name: &str) -> Result<Config> {
    match ALL.iter().find(|(known, _)| *known == name) {
        Some((_, json)) => Ok(Config::from_json(json.as_bytes())?),
        None => Err(Failure::usage(format!("--model {name}: neither a directory nor a preset"))
            .hint(format!("the presets are {}", ALL.map(|(known, _)| known).join(", ")))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As transformers counts them; those of the paper's models stand in its tables as well.
    #[test]
    fn presets_have_their_true_sizes() {
        let counts = [
            ("llama-60m", 31_990_272),
            ("llama-160m", 124_668_672),
            ("llama-3.2-1b", 1_235_814_400),
            ("llama-3.2-3b", 3_212_749_824),
            ("mistral-7b", 7_241_732_096),
            ("gemma-2-9b", 9_241_705_984),
            // As in the paper, 355,359,744, and the head's last layer of 2 x 1024 + 2.
            ("roberta-large", 355_361_794),
            ("minilm-l6", 22_713_986),
        ];
        for (name, count) in counts {
            assert_eq!(config(name).unwrap().parameter_count(), count, "{name}");
        }
        assert_eq!(counts.map(|(name, _)| name), ALL.map(|(name, _)| name));
    }
}
