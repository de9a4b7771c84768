//! How the authors of LoRA-XS and LoRA-SB store an adapter: a PEFT directory with a third tensor at each module.
//!
//! Their R is a linear layer without bias, put beside `lora_A` and `lora_B` under the attribute
//! `default_lora_latent_mapping`, and `y = W0 x + (alpha / r) B R A x`. PEFT takes the adapter's name, `default`, out
//! of a tensor's name when it saves; up to 0.17 that reached into the attribute:
//!
//! | PEFT | name of R |
//! |---|---|
//! | up to 0.17 | `base_model.model.<module>_lora_latent_mapping.weight` |
//! | from 0.18 | `base_model.model.<module>.default_lora_latent_mapping.weight` |
//!
//! PEFT itself passes over R and computes something else without a word, so that a directory which has lost it is
//! refused here wherever that can be known.

use std::path::Path;

/// The module whose R a tensor is; `name` is that of the file without PEFT's prefix.
pub(super) fn module_of_r(name: &str) -> Option<&str> {
    let name = name.strip_suffix(".weight")?;
    name.strip_suffix(".default_lora_latent_mapping").or_else(|| name.strip_suffix("_lora_latent_mapping"))
}

/// Whether the directory is one of theirs, which hold R in any case: the settings of their SVD stand beside it.
pub(super) fn expects_r(dir: &Path) -> bool {
    let settings = "reconstr_config.json";
    dir.join(settings).exists() || dir.parent().is_some_and(|parent| parent.join(settings).exists())
}
