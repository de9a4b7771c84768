//! The classification head of an encoder, which reads each sequence's first token h:
//! `p = tanh(h Pooler^T + b)`, `z = p Classifier^T + c`.
//!
//! Source: Devlin et al., "BERT", arXiv 1810.04805, section 4.1, whose pooler is a layer of its own in transformers.

use lora_sb_kernels::{Accum, Activation, Tensor};

use crate::batch::Labels;
use crate::{Gradients, Model, Parameter, Result};

/// A linear layer of the head: its weight and bias.
type Dense = (Parameter, Parameter);

const POOLER: Dense = (Parameter::Pooler, Parameter::PoolerBias);
const CLASSIFIER: Dense = (Parameter::Classifier, Parameter::ClassifierBias);

impl Model {
    /// z `[N, C]` of the sequences' first tokens, rows `[N, D]`.
    pub(crate) fn classified(&self, rows: &Tensor) -> Result<Tensor> {
        let pooled = self.pooled(&self.dense(POOLER, rows)?)?; // [N, D]
        self.dense(CLASSIFIER, &pooled)
    }

    /// The loss of rows `[N, D]`, and their gradient `[N, D]` where it is wanted; weights `[N]`.
    ///
    /// Cross-entropy over classes; the squared error of a number.
    pub(crate) fn classification_head(
        &self,
        rows: Tensor,
        labels: &Labels,
        weights: &Tensor,
        gradients: &mut dyn Gradients,
        wanted: bool,
    ) -> Result<(f64, Option<Tensor>)> {
        let mut hidden = self.dense(POOLER, &rows)?; // [N, D]
        let pooled = self.pooled(&hidden)?; // [N, D]
        let mut z = self.dense(CLASSIFIER, &pooled)?; // [N, C]
        let loss = match labels {
            Labels::Values(values) => {
                z = z.reshape(&[rows.shape()[0]])?; // [N]
                let loss = self.kernels.squared_error(&mut z, values, weights)?;
                z = z.reshape(&[rows.shape()[0], 1])?; // [N, 1]
                loss
            }
            Labels::Classes(classes, _) | Labels::Tokens(classes) => {
                self.kernels.cross_entropy_of_logits(&mut z, classes, weights)?
            }
        };
        let dz = z; // overwritten by its gradient
        let below = wanted || [POOLER.0, POOLER.1].into_iter().any(|p| gradients.of(p).is_some());
        let Some(dpooled) = self.dense_backward(CLASSIFIER, &pooled, &dz, below, gradients)? else {
            return Ok((loss, None));
        };
        drop(pooled);
        self.kernels.activation_backward(Activation::Tanh, &mut hidden, &dpooled)?;
        let dhidden = hidden; // overwritten by its gradient
        Ok((loss, self.dense_backward(POOLER, &rows, &dhidden, wanted, gradients)?))
    }

    /// `tanh(x)`; `[N, D]`.
    fn pooled(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = self.kernels.empty(x.shape())?; // [N, D]
        self.kernels.activation(Activation::Tanh, x, &mut y)?;
        Ok(y)
    }

    /// `y = x W^T + b`; x `[N, D]`, y `[N, D]` or `[N, C]`.
    fn dense(&self, (weight, bias): Dense, x: &Tensor) -> Result<Tensor> {
        let w = self.weights.required(weight)?;
        let mut y = self.kernels.empty(&[x.shape()[0], w.shape()[0]])?;
        self.kernels.linear(x, w, 1.0, Accum::Replace, &mut y)?;
        self.kernels.bias(self.weights.required(bias)?, &mut y)?;
        Ok(y)
    }

    /// `dW += dy^T x`, `db += sum over n of dy`, and `dx = dy W` where it is wanted; as [`Model::dense`].
    fn dense_backward(
        &self,
        (weight, bias): Dense,
        x: &Tensor,
        dy: &Tensor,
        wanted: bool,
        gradients: &mut dyn Gradients,
    ) -> Result<Option<Tensor>> {
        if let Some(dw) = gradients.of(weight) {
            self.kernels.linear_weight_gradient(dy, x, 1.0, Accum::Add, dw)?;
        }
        if let Some(db) = gradients.of(bias) {
            self.kernels.bias_gradient(dy, db)?;
        }
        if !wanted {
            return Ok(None);
        }
        let mut dx = self.kernels.empty(x.shape())?; // [N, D]
        self.kernels.linear_input_gradient(
            dy,
            self.weights.required(weight)?,
            1.0,
            Accum::Replace,
            &mut dx,
        )?;
        Ok(Some(dx))
    }
}
