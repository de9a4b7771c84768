//! From the last block to the loss: the final norm, the vocabulary projection, and which head a batch is for.
//!
//! An encoder's head is in `classifier.rs`.

use lora_sb_kernels::{Accum, Tensor};

use crate::batch::Labels;
use crate::config::{NormPlacement, Task};
use crate::norm::NormSaved;
use crate::{Batch, Error, Gradients, InputGradient, Model, Norm, Parameter, Result};

impl Model {
    /// The loss of the labelled tokens or sequences from the last block's output x `[N, D]`, and its gradient
    /// `[N, D]`.
    ///
    /// # Errors
    /// Where the targets are not what the model predicts, or a label is not one of its own.
    pub fn head(
        &self,
        x: Tensor,
        batch: &Batch,
        gradients: &mut dyn Gradients,
        wanted: InputGradient,
    ) -> Result<(f64, Option<Tensor>)> {
        self.check_targets(batch)?;
        let wanted = wanted == InputGradient::Wanted;
        if batch.labelled() == 0 {
            return Ok((0.0, if wanted { Some(self.kernels.zeros(x.shape())?) } else { None }));
        }
        match &batch.labels {
            Labels::Tokens(labels) => self.language_head(x, labels, &batch.weights, gradients, wanted),
            labels => self.classification_head(x, labels, &batch.weights, gradients, wanted),
        }
    }

    /// Checks that the batch's targets are what the model predicts.
    pub(crate) fn check_targets(&self, batch: &Batch) -> Result<()> {
        let expected = match (self.config.task, &batch.labels) {
            (Task::LanguageModel, Labels::Tokens(_)) | (Task::Regression, Labels::Values(_)) => return Ok(()),
            (Task::Classification { labels }, Labels::Classes(_, classes)) => {
                let Some(sequence) = classes.iter().position(|&class| class as usize >= labels) else {
                    return Ok(());
                };
                let message =
                    format!("class {}; the model has {labels} classes, from 0 on", classes[sequence]);
                return Err(Error::Batch { sequence, message });
            }
            (Task::LanguageModel, _) => "tokens",
            (Task::Classification { .. }, _) => "classes",
            (Task::Regression, _) => "numbers",
        };
        Err(Error::Target { expected, found: batch.labels.kind() })
    }

    /// The loss of rows `[N, D]` with labels `[N]` and weights `[N]`, and the rows' gradient `[N, D]`.
    fn language_head(
        &self,
        rows: Tensor,
        labels: &Tensor,
        weights: &Tensor,
        gradients: &mut dyn Gradients,
        wanted: bool,
    ) -> Result<(f64, Option<Tensor>)> {
        let (y, norm) = self.final_norm(rows)?; // [N, D]
        let through_norm = norm.is_some() && self.norm_is_trained(Norm::Final, gradients);
        let mut dy = match wanted || through_norm {
            true => Some(self.operand(y.shape())?), // [N, D]
            false => None,
        };
        let w = self.weights.required(Parameter::Head)?; // [V, D]
        let tied = self.config.tie_word_embeddings;
        let dw = gradients.of(if tied { Parameter::Embedding } else { Parameter::Head });
        let (cap, chunk) = (self.logit_soft_cap(), self.loss_chunk);
        let loss = self.kernels.cross_entropy(&y, w, labels, weights, cap, chunk, dy.as_mut(), dw)?;
        drop(y);
        let Some(dy) = dy else { return Ok((loss, None)) };
        let Some((rows, saved)) = norm else { return Ok((loss, Some(dy))) };
        let mut drows = self.kernels.empty(rows.shape())?; // [N, D]
        self.norm_backward(Norm::Final, &rows, &saved, &dy, Accum::Replace, &mut drows, gradients)?;
        Ok((loss, wanted.then_some(drows)))
    }

    /// The logits of rows `[N, D]` of the residual stream: `[N, V]`, or `[N, C]` of a classification head.
    pub(crate) fn project(&self, rows: Tensor) -> Result<Tensor> {
        if self.config.task != Task::LanguageModel {
            return self.classified(&rows);
        }
        let (y, _) = self.final_norm(rows)?; // [N, D]
        let mut logits = self.kernels.empty(&[y.shape()[0], self.config.vocab_size])?; // [N, V]
        self.kernels.linear(&y, self.weights.required(Parameter::Head)?, 1.0, Accum::Replace, &mut logits)?;
        if let Some(cap) = self.logit_soft_cap() {
            self.kernels.soft_cap(cap, &mut logits)?;
        }
        Ok(logits)
    }

    /// rows `[N, D]` behind the final norm, and what its backward reads; the rows themselves where the blocks' norms
    /// stand behind, so that the last block has normed them.
    fn final_norm(&self, rows: Tensor) -> Result<(Tensor, Option<(Tensor, NormSaved)>)> {
        if self.config.norm_placement == NormPlacement::Behind {
            return Ok((rows, None));
        }
        let (y, saved) = self.norm(Norm::Final, &rows, self.dtype)?; // [N, D]
        Ok((y, Some((rows, saved))))
    }

    fn logit_soft_cap(&self) -> Option<f32> {
        self.config.logit_soft_cap.map(|cap| cap as f32)
    }
}
