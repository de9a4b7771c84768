//! Whether a result replaces what stands in the output or is added to it.

/// How an operation writes its output.
///
/// A gradient that is overwritten where it should have been added to is the commonest silent error of a
/// hand-written backward pass; as an argument it has to be decided at every call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accum {
    /// `out = result`; what the output held before is never read.
    Replace,
    /// `out += result`.
    Add,
}
