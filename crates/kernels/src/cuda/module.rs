//! The kernels as embedded PTX: which file holds which kernel, and what its parameters are.
//!
//! `scripts/make_ptx.py` makes the PTX from the `.cu` file beside each operation, with NVRTC and without a GPU; a test holds
//! the two together by the sources' sum. The driver compiles PTX for its GPU when a file's first kernel is launched, and
//! keeps the result in its own cache for the next process.

use std::collections::BTreeMap;
use std::sync::OnceLock;

/// One `.cu` file.
#[derive(Debug)]
pub struct Module {
    /// The name of its PTX file.
    pub name: &'static str,
    /// Where its source is, from the crate's `src`.
    pub source: &'static str,
    /// The PTX.
    pub ptx: &'static str,
}

macro_rules! modules {
    ($($name:literal: $source:literal,)*) => {
        /// All kernels.
        pub static MODULES: &[Module] = &[
            $(Module { name: $name, source: $source, ptx: include_str!(concat!("../../ptx/", $name, ".ptx")) },)*
        ];
    };
}

modules! {
    "activation": "op/activation/activation.cu",
    "adamw": "op/adamw/adamw.cu",
    "attention_backward_keys": "op/attention/backward_keys.cu",
    "attention_backward_keys_f32": "op/attention/backward_keys_f32.cu",
    "attention_backward_queries": "op/attention/backward_queries.cu",
    "attention_backward_queries_f32": "op/attention/backward_queries_f32.cu",
    "attention_forward": "op/attention/forward.cu",
    "attention_forward_f32": "op/attention/forward_f32.cu",
    "attention_plain": "op/attention/plain.cu",
    "bias": "op/bias/bias.cu",
    "channel": "op/channel/channel.cu",
    "cross_entropy": "op/cross_entropy/cross_entropy.cu",
    "dropout": "op/dropout/dropout.cu",
    "elementwise": "op/elementwise/elementwise.cu",
    "embedding": "op/embedding/embedding.cu",
    "few": "op/linear/few.cu",
    "gated_activation": "op/gated_activation/gated_activation.cu",
    "gemm_bf16": "op/linear/gemm_bf16.cu",
    "gemm_f32": "op/linear/gemm_f32.cu",
    "latent": "op/linear_group/latent.cu",
    "layer_norm": "op/layer_norm/layer_norm.cu",
    "reduce": "op/reduce/reduce.cu",
    "rms_norm": "op/rms_norm/rms_norm.cu",
    "rope": "op/rope/rope.cu",
    "rows": "op/rows/rows.cu",
    "squared_error": "op/squared_error/squared_error.cu",
}

/// A kernel of one of the modules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its name.
    pub name: &'static str,
    /// Its module's place in [`MODULES`].
    pub module: usize,
    /// Its own place in its module.
    pub index: usize,
    /// Bytes of each parameter.
    pub parameters: Vec<usize>,
}

/// The kernel of a name.
pub(crate) fn kernel(name: &str) -> Option<&'static Kernel> {
    all().get(name)
}

/// All kernels by their names.
pub(crate) fn all() -> &'static BTreeMap<&'static str, Kernel> {
    static KERNELS: OnceLock<BTreeMap<&'static str, Kernel>> = OnceLock::new();
    let read = || (0..MODULES.len()).flat_map(kernels);
    KERNELS.get_or_init(|| read().map(|kernel| (kernel.name, kernel)).collect())
}

/// The kernels of a module, by its place in [`MODULES`].
pub fn kernels(module: usize) -> impl Iterator<Item = Kernel> {
    kernels_of(module, MODULES[module].ptx)
}

/// The kernels that a module's PTX declares.
pub(crate) fn kernels_of(module: usize, ptx: &'static str) -> impl Iterator<Item = Kernel> {
    let entries = ptx.split(".entry ").skip(1);
    entries.enumerate().filter_map(move |(index, entry)| {
        let (name, rest) = entry.split_once('(')?;
        let (parameters, _) = rest.split_once(')')?;
        let parameters = parameters.split(',').filter_map(parameter_bytes).collect();
        Some(Kernel { name: name.trim(), module, index, parameters })
    })
}

/// Bytes of a parameter as PTX declares it: `.param .u64 name`, or `.param .align 8 .b8 name[16]`.
fn parameter_bytes(declaration: &str) -> Option<usize> {
    let words: Vec<&str> = declaration.split_whitespace().collect();
    let [.., kind, name] = words[..] else { return None };
    let bits: usize = kind.trim_start_matches(|letter: char| !letter.is_ascii_digit()).parse().ok()?;
    let count = match name.split_once('[') {
        Some((_, count)) => count.trim_end_matches(']').parse().ok()?,
        None => 1,
    };
    Some(bits / 8 * count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_of_an_entry() {
        let ptx = ".visible .entry add(\n\t.param .u64 add_param_0,\n\t.param .align 8 .b8 add_param_1[16],\n\t.param .f32 x\n)\n{\n}\n.entry none()\n{}";
        let found: Vec<Kernel> = kernels_of(3, ptx).collect();
        assert_eq!(found[0], Kernel { name: "add", module: 3, index: 0, parameters: vec![8, 16, 4] });
        assert_eq!(found[1].parameters, Vec::<usize>::new());
    }
}
