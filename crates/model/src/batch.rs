//! Packed batches: sequences one after another, without padding.

use lora_sb_kernels::{Kernels, Segments, Tensor};

use crate::{Error, Result};

/// One sequence of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// `trained[i]`: the prediction of `ids[i]`, made at position i-1, is in the loss. The first token is
    /// predicted by nothing; `trained[0]` is without effect.
    pub trained: &'a [bool],
    /// What the loss of each of its labelled tokens is multiplied by.
    pub weight: f32,
}

/// T tokens of one or more sequences on a device, none of which sees another.
#[derive(Debug)]
pub struct Batch {
    /// `[T]`.
    pub(crate) ids: Tensor,
    /// `[T]`, from 0 in every sequence.
    pub(crate) positions: Tensor,
    pub(crate) segments: Segments,
    /// `[N]`: the tokens whose prediction is in the loss.
    pub(crate) rows: Tensor,
    /// `[N]`: the ids to be predicted there.
    pub(crate) labels: Tensor,
    /// `[N]`.
    pub(crate) weights: Tensor,
    pub(crate) longest: usize,
    /// The ids again, on the host.
    pub(crate) host_ids: Vec<u32>,
}

impl Batch {
    /// Packs the sequences in their order.
    ///
    /// # Errors
    /// Where there is no sequence, one is empty, or `ids` and `trained` differ in length.
    pub fn pack(kernels: &dyn Kernels, sequences: &[Sequence<'_>]) -> Result<Batch> {
        check(sequences)?;
        let (mut ids, mut positions) = (Vec::new(), Vec::new());
        let (mut rows, mut labels, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for sequence in sequences {
            let start = ids.len() as u32;
            for i in (1..sequence.ids.len()).filter(|&i| sequence.trained[i]) {
                rows.push(start + i as u32 - 1);
                labels.push(sequence.ids[i]);
                weights.push(sequence.weight);
            }
            ids.extend_from_slice(sequence.ids);
            positions.extend(0..sequence.ids.len() as u32);
        }
        let (t, n) = (ids.len(), rows.len());
        Ok(Batch {
            ids: kernels.from_u32(&ids, &[t])?,
            positions: kernels.from_u32(&positions, &[t])?,
            segments: Segments::packed(sequences.iter().map(|sequence| sequence.ids.len())),
            rows: kernels.from_u32(&rows, &[n])?,
            labels: kernels.from_u32(&labels, &[n])?,
            weights: kernels.from_f32(&weights, &[n])?,
            longest: sequences.iter().map(|sequence| sequence.ids.len()).max().unwrap_or(0),
            host_ids: ids,
        })
    }

    /// T, all tokens.
    pub fn tokens(&self) -> usize {
        self.host_ids.len()
    }

    /// N, the tokens whose prediction is in the loss.
    pub fn labelled(&self) -> usize {
        self.rows.len()
    }
}

fn check(sequences: &[Sequence<'_>]) -> Result<()> {
    if sequences.is_empty() {
        return Err(Error::Batch { sequence: 0, message: "missing; a batch needs at least one".into() });
    }
    for (index, sequence) in sequences.iter().enumerate() {
        let (ids, trained) = (sequence.ids.len(), sequence.trained.len());
        if ids == 0 {
            return Err(Error::Batch { sequence: index, message: "it has no tokens".into() });
        }
        if ids != trained {
            let message = format!("{ids} token ids, but {trained} flags of which are trained");
            return Err(Error::Batch { sequence: index, message });
        }
    }
    Ok(())
}
