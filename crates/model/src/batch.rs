//! Packed batches: sequences one after another, without padding.

use std::ops::Range;

use lora_sb_kernels::{Kernels, Segments, Tensor};

use crate::{Error, Result};

/// One sequence of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// Where the second text of a pair begins: the tokens from there on are of type 1, all others of type 0.
    pub second: Option<usize>,
    /// What is to be predicted.
    pub target: Target<'a>,
    /// What the loss of each prediction is multiplied by.
    pub weight: f32,
}

impl<'a> Sequence<'a> {
    /// A text for a language model; see [`Target::Tokens`] for `trained`.
    pub fn text(ids: &'a [u32], trained: &'a [bool], weight: f32) -> Self {
        Sequence { ids, second: None, target: Target::Tokens(trained), weight }
    }
}

/// What a model is to predict of a sequence.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// Tokens: where `trained[i]`, the prediction of `ids[i]`, made at position i-1, is in the loss. The first
    /// token is predicted by nothing; `trained[0]` is without effect.
    Tokens(&'a [bool]),
    /// The class of the whole sequence, from its first token.
    Class(u32),
    /// A number for the whole sequence, from its first token.
    Value(f32),
}

/// T tokens of one or more sequences on a device, none of which sees another.
#[derive(Debug)]
pub struct Batch {
    /// `[T]`.
    pub(crate) ids: Tensor,
    /// `[T]`, from 0 in every sequence.
    pub(crate) positions: Tensor,
    pub(crate) segments: Segments,
    /// `[N]`: the tokens from which something is predicted.
    pub(crate) rows: Tensor,
    pub(crate) labels: Labels,
    /// `[N]`.
    pub(crate) weights: Tensor,
    pub(crate) longest: usize,
    /// The ids again, on the host.
    pub(crate) host_ids: Vec<u32>,
    /// Where the second text of a pair begins, a token number of the batch, and where its sequence ends.
    pub(crate) seconds: Vec<Range<usize>>,
}

/// What is to be predicted in each row.
#[derive(Debug)]
pub(crate) enum Labels {
    /// `[N]`: token ids.
    Tokens(Tensor),
    /// `[N]`: class numbers, on the device and on the host.
    Classes(Tensor, Vec<u32>),
    /// `[N]`: numbers.
    Values(Tensor),
}

impl Labels {
    /// What they are, for messages.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Labels::Tokens(_) => "tokens",
            Labels::Classes(..) => "classes",
            Labels::Values(_) => "numbers",
        }
    }
}

impl Batch {
    /// Packs the sequences in their order.
    ///
    /// # Errors
    /// Where there is no sequence, one is empty, its `trained` flags are not one for each token, its second text
    /// begins outside it, or the sequences' targets are of different kinds.
    pub fn pack(kernels: &dyn Kernels, sequences: &[Sequence<'_>]) -> Result<Batch> {
        check(sequences)?;
        let (mut ids, mut positions, mut seconds) = (Vec::new(), Vec::new(), Vec::new());
        let mut wanted = Wanted::default();
        for sequence in sequences {
            let start = ids.len();
            wanted.add(start as u32, sequence);
            ids.extend_from_slice(sequence.ids);
            positions.extend(0..sequence.ids.len() as u32);
            seconds.extend(sequence.second.map(|second| start + second..ids.len()));
        }
        let (t, n) = (ids.len(), wanted.rows.len());
        let labels = match sequences[0].target {
            Target::Tokens(_) => Labels::Tokens(kernels.from_u32(&wanted.ids, &[n])?),
            Target::Class(_) => Labels::Classes(kernels.from_u32(&wanted.ids, &[n])?, wanted.ids),
            Target::Value(_) => Labels::Values(kernels.from_f32(&wanted.values, &[n])?),
        };
        Ok(Batch {
            ids: kernels.from_u32(&ids, &[t])?,
            positions: kernels.from_u32(&positions, &[t])?,
            segments: Segments::packed(sequences.iter().map(|sequence| sequence.ids.len())),
            rows: kernels.from_u32(&wanted.rows, &[n])?,
            labels,
            weights: kernels.from_f32(&wanted.weights, &[n])?,
            longest: sequences.iter().map(|sequence| sequence.ids.len()).max().unwrap_or(0),
            host_ids: ids,
            seconds,
        })
    }

    /// T, all tokens.
    pub fn tokens(&self) -> usize {
        self.host_ids.len()
    }

    /// N, the predictions that are in the loss: labelled tokens, or sequences with a class or value.
    pub fn labelled(&self) -> usize {
        self.rows.len()
    }
}

/// The predictions of a batch on the host, in order.
#[derive(Default)]
struct Wanted {
    rows: Vec<u32>,
    /// Token ids or classes.
    ids: Vec<u32>,
    values: Vec<f32>,
    weights: Vec<f32>,
}

impl Wanted {
    fn add(&mut self, start: u32, sequence: &Sequence<'_>) {
        let before = self.rows.len();
        match sequence.target {
            Target::Tokens(trained) => {
                for i in (1..sequence.ids.len()).filter(|&i| trained[i]) {
                    self.rows.push(start + i as u32 - 1);
                    self.ids.push(sequence.ids[i]);
                }
            }
            Target::Class(class) => {
                self.rows.push(start);
                self.ids.push(class);
            }
            Target::Value(value) => {
                self.rows.push(start);
                self.values.push(value);
            }
        }
        self.weights.resize(self.weights.len() + self.rows.len() - before, sequence.weight);
    }
}

fn check(sequences: &[Sequence<'_>]) -> Result<()> {
    let Some(first) = sequences.first() else {
        return Err(Error::Batch { sequence: 0, message: "missing; a batch needs at least one".into() });
    };
    let kind = std::mem::discriminant(&first.target);
    for (index, sequence) in sequences.iter().enumerate() {
        let failed = |message: String| Err(Error::Batch { sequence: index, message });
        let ids = sequence.ids.len();
        if ids == 0 {
            return failed("it has no tokens".into());
        }
        if let Target::Tokens(trained) = sequence.target
            && ids != trained.len()
        {
            return failed(format!("{ids} token ids, but {} flags of which are trained", trained.len()));
        }
        if let Some(second) = sequence.second.filter(|&second| second > ids) {
            return failed(format!("its second text begins at token {second} of {ids}"));
        }
        if std::mem::discriminant(&sequence.target) != kind {
            return failed("its target is of another kind than that of sequence 0".into());
        }
    }
    Ok(())
}
