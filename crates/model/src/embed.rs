//! What comes before the first block: embedded tokens, with learned positions, token types and a norm where the
//! model has them.

use lora_sb_kernels::{Accum, DType, Tensor};

use crate::config::Positions;
use crate::{Batch, Gradients, Model, Norm, Parameter, Result};

impl Model {
    /// The residual stream before the first block, `[T, D]`.
    ///
    /// # Errors
    /// Where an id is not in the vocabulary, a sequence is longer than the model is prepared for, or one has a
    /// second text and the model knows a single token type.
    pub fn embed(&self, batch: &Batch) -> Result<Tensor> {
        self.check_positions(batch.longest)?;
        let x = self.embedded(batch)?; // [T, D]
        match self.weights.get(Parameter::Gain(Norm::Embedding)) {
            Some(_) => Ok(self.norm(Norm::Embedding, &x, DType::F32)?.0),
            None => Ok(x),
        }
    }

    /// `x[t] = scale * table[ids[t]]`; ids `[T]`, x `[T, D]`.
    pub(crate) fn lookup(&self, ids: &Tensor) -> Result<Tensor> {
        let mut x = self.kernels.empty(&[ids.len(), self.config.hidden_size])?; // [T, D]
        self.kernels.embedding(ids, self.weights.required(Parameter::Embedding)?, &mut x)?;
        if self.config.embedding_scale != 1.0 {
            self.kernels.scale(self.config.embedding_scale as f32, &mut x)?;
        }
        Ok(x)
    }

    /// `x[t] = scale * table[ids[t]] + positions[offset + t] + types[type(t)]`, `[T, D]`.
    fn embedded(&self, batch: &Batch) -> Result<Tensor> {
        let mut x = self.lookup(&batch.ids)?; // [T, D]
        for (parameter, rows) in self.added_rows(batch)? {
            let mut part = self.kernels.empty(x.shape())?; // [T, D]
            self.kernels.embedding(&rows, self.weights.required(parameter)?, &mut part)?;
            self.kernels.add(1.0, &part, &mut x)?;
        }
        Ok(x)
    }

    /// The tables whose rows are added to the tokens', and each token's row `[T]` of them.
    fn added_rows(&self, batch: &Batch) -> Result<Vec<(Parameter, Tensor)>> {
        let mut tables = Vec::new();
        if let Positions::Learned { offset } = self.config.positions {
            let lengths = batch.segments.iter().map(|(tokens, _)| tokens.len());
            let rows: Vec<u32> =
                lengths.flat_map(|length| (offset..offset + length).map(|i| i as u32)).collect();
            tables.push((Parameter::PositionEmbedding, self.kernels.from_u32(&rows, &[rows.len()])?));
        }
        if self.config.type_vocab_size > 0 {
            let mut types = vec![0; batch.tokens()];
            batch.seconds.iter().for_each(|second| types[second.clone()].fill(1));
            tables.push((Parameter::TokenTypeEmbedding, self.kernels.from_u32(&types, &[types.len()])?));
        }
        Ok(tables)
    }

    /// Whether [`Model::embed_backward`] has anything to do.
    pub(crate) fn embedding_is_trained(&self, gradients: &mut dyn Gradients) -> bool {
        let own = [
            Parameter::Embedding,
            Parameter::PositionEmbedding,
            Parameter::TokenTypeEmbedding,
            Parameter::Gain(Norm::Embedding),
            Parameter::Shift(Norm::Embedding),
        ];
        own.into_iter().any(|parameter| gradients.of(parameter).is_some())
    }

    /// The gradients of all that [`Model::embed`] reads, from that of its result, dx `[T, D]`: through the norm,
    /// then `dtable[row(t)] += dx[t]` for every table.
    pub(crate) fn embed_backward(
        &self,
        batch: &Batch,
        mut dx: Tensor,
        gradients: &mut dyn Gradients,
    ) -> Result<()> {
        if self.weights.get(Parameter::Gain(Norm::Embedding)).is_some() {
            let x = self.embedded(batch)?; // [T, D], once more
            let (y, saved) = self.norm(Norm::Embedding, &x, DType::F32)?;
            let mut d_embedded = y; // [T, D], overwritten
            let accum = Accum::Replace;
            self.norm_backward(Norm::Embedding, &x, &saved, &dx, accum, &mut d_embedded, gradients)?;
            dx = d_embedded;
        }
        for (parameter, rows) in self.added_rows(batch)? {
            if let Some(dtable) = gradients.of(parameter) {
                self.kernels.embedding_gradient(&rows, &dx, dtable)?;
            }
        }
        let Some(dtable) = gradients.of(Parameter::Embedding) else { return Ok(()) };
        if self.config.embedding_scale != 1.0 {
            self.kernels.scale(self.config.embedding_scale as f32, &mut dx)?;
        }
        self.lookup_backward(batch, &dx, dtable)
    }

    /// `dtable[ids[t]] += dx[t]`, except for the token of padding; dx `[T, D]`.
    fn lookup_backward(&self, batch: &Batch, dx: &Tensor, dtable: &mut Tensor) -> Result<()> {
        let pad = self.config.pad_token_id;
        if !batch.host_ids.iter().any(|&id| Some(id) == pad) {
            return Ok(self.kernels.embedding_gradient(&batch.ids, dx, dtable)?);
        }
        let kept = batch.host_ids.iter().enumerate().filter(|&(_, &id)| Some(id) != pad);
        let (rows, ids): (Vec<u32>, Vec<u32>) = kept.map(|(row, &id)| (row as u32, id)).unzip();
        let n = rows.len();
        let mut few = self.kernels.empty(&[n, self.config.hidden_size])?; // [N, D]
        self.kernels.gather_rows(&self.kernels.from_u32(&rows, &[n])?, dx, &mut few)?;
        Ok(self.kernels.embedding_gradient(&self.kernels.from_u32(&ids, &[n])?, &few, dtable)?)
    }
}
