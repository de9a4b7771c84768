//! Shape checks with named axes.

use crate::{Error, Result, Tensor};

/// Checks that `tensor` has exactly the sizes of `axes`, each named after the legend's symbol.
pub(crate) fn expect(
    op: &'static str,
    operand: &'static str,
    tensor: &Tensor,
    axes: &[(&'static str, usize)],
) -> Result<()> {
    if tensor.shape().iter().copied().eq(axes.iter().map(|axis| axis.1)) {
        return Ok(());
    }
    let named: Vec<String> = axes.iter().map(|(name, size)| format!("{name}={size}")).collect();
    Err(Error::Shape {
        op,
        operand,
        found: tensor.shape().to_vec(),
        expected: format!("[{}]", named.join(", ")),
    })
}

/// Checks that `tensor` has two axes and returns them.
pub(crate) fn matrix(op: &'static str, operand: &'static str, tensor: &Tensor) -> Result<(usize, usize)> {
    match *tensor.shape() {
        [rows, columns] => Ok((rows, columns)),
        _ => Err(Error::Shape { op, operand, found: tensor.shape().to_vec(), expected: "two axes".into() }),
    }
}
