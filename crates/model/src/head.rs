//! The final norm, the vocabulary projection and the loss.

use lora_sb_kernels::{Accum, Tensor};

use crate::{Batch, Gradients, InputGradient, Model, Parameter, Result};

/// Bytes of logits that exist at a time. Rows that share a pass over the head's weights make the pass worth
/// its reading, from some hundred rows on; with 32,000 tokens this is 262 rows, with 128,000 still 65.
pub(crate) const LOGITS_CHUNK_BYTES: usize = 32 << 20;

/// Rows of logits that exist at a time.
pub(crate) fn chunk_rows(vocab_size: usize) -> usize {
    (LOGITS_CHUNK_BYTES / 4 / vocab_size).max(1)
}

impl Model {
    /// The loss of the labelled tokens, and the gradient `[T, D]` of what came in, x `[T, D]`.
    ///
    /// Only labelled rows are normalised and projected; all other rows of the gradient are zero.
    ///
    /// # Errors
    /// Where a label is not in the vocabulary.
    pub fn head(
        &self,
        x: Tensor,
        batch: &Batch,
        gradients: &mut dyn Gradients,
        wanted: InputGradient,
    ) -> Result<(f64, Option<Tensor>)> {
        let (n, wanted) = (batch.labelled(), wanted == InputGradient::Wanted);
        if n == 0 {
            return Ok((0.0, if wanted { Some(self.kernels.zeros(x.shape())?) } else { None }));
        }
        let shape = x.shape().to_vec(); // [T, D]
        let mut rows = self.kernels.empty(&[n, shape[1]])?; // [N, D]
        self.kernels.gather_rows(&batch.rows, &x, &mut rows)?;
        drop(x);
        let (y, rstd) = self.norm(Parameter::FinalNorm, &rows)?; // [N, D], [N]

        let mut dy = match wanted || gradients.of(Parameter::FinalNorm).is_some() {
            true => Some(self.kernels.empty(y.shape())?), // [N, D]
            false => None,
        };
        let w = self.weights.required(Parameter::Head)?; // [V, D]
        let tied = self.config.tie_word_embeddings;
        let dw = gradients.of(if tied { Parameter::Embedding } else { Parameter::Head });
        let chunk = chunk_rows(self.config.vocab_size);
        let loss =
            self.kernels.cross_entropy(&y, w, &batch.labels, &batch.weights, chunk, dy.as_mut(), dw)?;
        drop(y);
        let Some(dy) = dy else { return Ok((loss, None)) };

        let mut drows = self.kernels.empty(rows.shape())?; // [N, D]
        self.norm_backward(Parameter::FinalNorm, &rows, &rstd, &dy, Accum::Replace, &mut drows, gradients)?;
        drop((rows, dy));
        if !wanted {
            return Ok((loss, None));
        }
        let mut dx = self.kernels.empty(&shape)?; // [T, D]
        self.kernels.scatter_rows(&batch.rows, &drows, &mut dx)?;
        Ok((loss, Some(dx)))
    }

    /// Logits `[T, V]` of all rows of x `[T, D]`.
    pub(crate) fn project(&self, x: &Tensor) -> Result<Tensor> {
        let (y, _) = self.norm(Parameter::FinalNorm, x)?; // [T, D]
        let mut logits = self.kernels.empty(&[x.shape()[0], self.config.vocab_size])?; // [T, V]
        self.kernels.linear(&y, self.weights.required(Parameter::Head)?, 1.0, Accum::Replace, &mut logits)?;
        Ok(logits)
    }
}
