//! The token embedding.

use lora_sb_kernels::Tensor;

use crate::{Batch, Gradients, Model, Parameter, Result};

impl Model {
    /// The residual stream before the first block, `[T, D]`.
    ///
    /// # Errors
    /// Where an id is not in the vocabulary or a sequence is longer than the model is prepared for.
    pub fn embed(&self, batch: &Batch) -> Result<Tensor> {
        self.check_positions(batch.longest)?;
        self.lookup(&batch.ids)
    }

    /// `x[t] = table[ids[t]]`; ids `[T]`, x `[T, D]`.
    pub(crate) fn lookup(&self, ids: &Tensor) -> Result<Tensor> {
        let mut x = self.kernels.empty(&[ids.len(), self.config.hidden_size])?; // [T, D]
        self.kernels.embedding(ids, self.weights.required(Parameter::Embedding)?, &mut x)?;
        Ok(x)
    }

    /// `dtable[ids[t]] += dx[t]`, except for the token of padding; dx `[T, D]`.
    pub(crate) fn embed_backward(
        &self,
        batch: &Batch,
        dx: Tensor,
        gradients: &mut dyn Gradients,
    ) -> Result<()> {
        let Some(dtable) = gradients.of(Parameter::Embedding) else { return Ok(()) };
        let pad = self.config.pad_token_id;
        if !batch.host_ids.iter().any(|&id| Some(id) == pad) {
            return Ok(self.kernels.embedding_gradient(&batch.ids, &dx, dtable)?);
        }
        let kept = batch.host_ids.iter().enumerate().filter(|&(_, &id)| Some(id) != pad);
        let (rows, ids): (Vec<u32>, Vec<u32>) = kept.map(|(row, &id)| (row as u32, id)).unzip();
        let n = rows.len();
        let mut few = self.kernels.empty(&[n, self.config.hidden_size])?; // [N, D]
        self.kernels.gather_rows(&self.kernels.from_u32(&rows, &[n])?, &dx, &mut few)?;
        Ok(self.kernels.embedding_gradient(&self.kernels.from_u32(&ids, &[n])?, &few, dtable)?)
    }
}
