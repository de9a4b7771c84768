//! The model as a whole: reading it, its losses, gradients and logits.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_sb_kernels::{DType, Kernels, RopeTable, SharedBytes, Tensor};

use crate::config::{Positions, Rotation, Task};
use crate::load::{self, LoadOptions, Shelf};
use crate::memory::Footprint;
use crate::weights::{Storage, Weights};
use crate::{
    Batch, BlockSaved, Config, Error, Gradients, InputGradient, LinearHook, NoGradients, Parameter,
    Recompute, Result, Site,
};

/// Positions that a fresh model is prepared for; 2 MB at heads of 128 elements. More by [`Model::prepare`].
const FIRST_POSITIONS: usize = 2048;

/// A transformer on a device.
#[derive(Debug)]
pub struct Model {
    pub(crate) config: Config,
    pub(crate) kernels: Arc<dyn Kernels>,
    pub(crate) weights: Weights,
    /// One for each of the configuration's rotations; none where positions are learned.
    pub(crate) ropes: Vec<RopeTable>,
    /// The directory it was read from, whose tokenizer files are copied when it is saved.
    pub(crate) source: Option<PathBuf>,
    /// What products of activations are computed in.
    pub(crate) dtype: DType,
    /// Rows of logits that exist at a time in the loss.
    pub(crate) loss_chunk: usize,
    /// Of the weights as they were read, where they have been rounded since.
    pub(crate) fingerprint: Option<String>,
    warnings: Vec<String>,
}

impl Model {
    /// Reads a directory in Hugging Face's layout: `config.json` with `model.safetensors` or its shards.
    ///
    /// # Errors
    /// Where a file or tensor is missing, damaged, or not what the configuration says.
    pub fn load(dir: &Path, kernels: Arc<dyn Kernels>, storage: Storage) -> Result<Model> {
        Model::load_with(dir, kernels, storage, LoadOptions::default())
    }

    /// The same for a task of one's own choice, with the seed of a classification head that is new and what becomes
    /// of one that does not fit.
    ///
    /// # Errors
    /// As [`Model::load`]; where the model has no head for the task, or one with another number of labels that is
    /// not to be drawn anew ([`Mismatched`](crate::Mismatched)).
    pub fn load_with(
        dir: &Path,
        kernels: Arc<dyn Kernels>,
        storage: Storage,
        options: LoadOptions,
    ) -> Result<Model> {
        check_dtype(options.dtype)?;
        let config = options.applied_to(load::config(dir)?)?;
        let read = Shelf::open(dir)?.read(&config, &*kernels, storage, options)?;
        let mut model = Model::new(config, kernels, read.weights, Some(dir.to_path_buf()), read.warnings)?;
        (model.dtype, model.fingerprint) = (options.dtype, read.fingerprint);
        Ok(model)
    }

    /// The same from a `config.json` and whole safetensors files in memory.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn from_files(
        config_json: &[u8],
        weights: Vec<SharedBytes>,
        kernels: Arc<dyn Kernels>,
        storage: Storage,
    ) -> Result<Model> {
        let config = Config::from_json(config_json)?;
        let read = load::in_memory(weights)?.read(&config, &*kernels, storage, LoadOptions::default())?;
        Model::new(config, kernels, read.weights, None, read.warnings)
    }

    /// A model of random weights from N(0, `initializer_range`^2), gains 1, biases 0: ready to be trained from the
    /// beginning, or frozen as `bf16`, where only speed and memory matter.
    ///
    /// # Errors
    /// Where the device has no memory for it.
    pub fn random(config: Config, kernels: Arc<dyn Kernels>, seed: u64, storage: Storage) -> Result<Model> {
        let weights = Weights::random(&config, &*kernels, seed, storage)?;
        Model::new(config, kernels, weights, None, Vec::new())
    }

    fn new(
        config: Config,
        kernels: Arc<dyn Kernels>,
        weights: Weights,
        source: Option<PathBuf>,
        warnings: Vec<String>,
    ) -> Result<Model> {
        let positions = config.max_position_embeddings.min(FIRST_POSITIONS);
        let ropes = rope_tables(&config, &*kernels, positions)?;
        let loss_chunk = kernels.place().loss_rows(config.vocab_size, config.hidden_size);
        let (dtype, fingerprint) = (DType::F32, None);
        Ok(Model { config, kernels, weights, ropes, source, dtype, loss_chunk, fingerprint, warnings })
    }

    /// The architecture.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The device.
    pub fn kernels(&self) -> &Arc<dyn Kernels> {
        &self.kernels
    }

    /// What activations are held and multiplied in: `f32`, or `bf16` with `f32` sums. The residual stream, norms'
    /// statistics and everything that is trained are `f32` in any case.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Computes in `f32` or `bf16` from now on.
    ///
    /// A frozen model that computes in `bf16` holds its matrices rounded to it, and keeps them so; its
    /// [fingerprint](Model::fingerprint) stays that of what was read. One that can be trained keeps them in `f32`, and
    /// they are rounded as they are read. A directory is better loaded with [`LoadOptions::dtype`], which rounds each
    /// tensor as it comes and gives back what it was read into.
    ///
    /// # Errors
    /// Where the type is another one, or the device has no memory for the rounded matrices.
    pub fn set_dtype(&mut self, dtype: DType) -> Result<()> {
        check_dtype(dtype)?;
        let to_be_rounded = match dtype {
            DType::Bf16 => self.weights.to_be_rounded(&self.config),
            _ => Vec::new(),
        };
        if !to_be_rounded.is_empty() {
            self.fingerprint = Some(self.fingerprint()?);
        }
        for parameter in to_be_rounded {
            self.weights.round(&*self.kernels, parameter)?;
        }
        self.dtype = dtype;
        Ok(())
    }

    /// Computes the loss of so many tokens together, at least 1. A model begins with as many as are best on its device
    /// ([`Place::loss_rows`](lora_sb_kernels::Place::loss_rows)).
    pub fn set_loss_chunk(&mut self, rows: usize) {
        self.loss_chunk = rows.max(1);
    }

    /// What the memory of a pass depends on, whatever its batch.
    pub fn footprint(&self) -> Footprint<'_> {
        let (storage, place) = (self.weights.storage(), self.kernels.place());
        Footprint { config: &self.config, dtype: self.dtype, loss_chunk: self.loss_chunk, storage, place }
    }

    /// The directory that it was read from.
    pub fn source(&self) -> Option<&Path> {
        self.source.as_deref()
    }

    /// What was found in the files and not used, a sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Every linear layer of the blocks, in the order of the forward pass.
    pub fn sites(&self) -> Vec<Site> {
        self.config.sites()
    }

    /// Every tensor, in the order of the forward pass.
    pub fn parameters(&self) -> Vec<Parameter> {
        self.config.parameters()
    }

    /// A tensor; the head of a tied model is its embedding.
    pub fn weight(&self, parameter: Parameter) -> Option<&Tensor> {
        self.weights.get(parameter)
    }

    /// A tensor to be changed; only those of [`Storage::Trainable`] can be written.
    pub fn weight_mut(&mut self, parameter: Parameter) -> Option<&mut Tensor> {
        self.weights.get_mut(parameter)
    }

    /// A tensor's name in the weight files.
    pub fn name(&self, parameter: Parameter) -> String {
        self.config.name(parameter)
    }

    /// A linear layer's name, as `model.layers.0.self_attn.q_proj`.
    pub fn module(&self, site: Site) -> String {
        self.config.module(site)
    }

    /// The (out N, in K) sizes of a linear layer.
    pub fn shape(&self, site: Site) -> (usize, usize) {
        self.config.site_shape(site)
    }

    /// Makes sequences of up to `longest` tokens possible. A model begins with 2048 positions, or with
    /// `max_position_embeddings` if that is less.
    ///
    /// # Errors
    /// Where the device has no memory for the rotation table, or the model learned its positions and they are fewer.
    pub fn prepare(&mut self, longest: usize) -> Result<()> {
        self.check_learned(longest)?;
        if self.ropes.first().is_some_and(|rope| longest > rope.positions()) {
            self.ropes = rope_tables(&self.config, &*self.kernels, longest)?;
        }
        Ok(())
    }

    /// Checks that learned positions, where the model has them, reach `longest`.
    fn check_learned(&self, longest: usize) -> Result<()> {
        let Positions::Learned { offset } = self.config.positions else { return Ok(()) };
        let learned = self.config.max_position_embeddings - offset;
        if longest <= learned { Ok(()) } else { Err(Error::LearnedPositions { needed: longest, learned }) }
    }

    /// Checks that the learned positions or the rotation table reach `longest`.
    pub(crate) fn check_positions(&self, longest: usize) -> Result<()> {
        self.check_learned(longest)?;
        let prepared = self.ropes.first().map_or(longest, RopeTable::positions);
        if longest <= prepared { Ok(()) } else { Err(Error::Positions { needed: longest, prepared }) }
    }

    /// The sum of the labelled tokens' losses, each times its sequence's weight.
    ///
    /// # Errors
    /// Where an id is not in the vocabulary, a sequence is longer than the model is prepared for, or the targets are
    /// not what the model predicts.
    pub fn loss(&self, batch: &Batch, hook: &dyn LinearHook) -> Result<f64> {
        self.check_targets(batch)?;
        if batch.labelled() == 0 {
            return Ok(0.0);
        }
        let x = self.hidden(batch, Some(&batch.rows), hook)?; // [N, D]
        let (loss, _) = self.head(x, batch, &mut NoGradients, InputGradient::Unwanted)?;
        Ok(loss)
    }

    /// The logits of every token, `[T, V]`; of every sequence, `[sequences, C]`, where the model has a
    /// classification head.
    ///
    /// # Errors
    /// As [`Model::loss`].
    pub fn logits(&self, batch: &Batch, hook: &dyn LinearHook) -> Result<Tensor> {
        if self.config.task == Task::LanguageModel {
            return self.project(self.hidden(batch, None, hook)?);
        }
        let first: Vec<u32> = batch.segments.iter().map(|(tokens, _)| tokens.start as u32).collect();
        let first = self.kernels.from_u32(&first, &[first.len()])?;
        self.project(self.hidden(batch, Some(&first), hook)?)
    }

    /// The residual stream behind the last block, in the rows `[R]` that are read: `[R, D]`.
    fn hidden(&self, batch: &Batch, rows: Option<&Tensor>, hook: &dyn LinearHook) -> Result<Tensor> {
        let mut x = self.embed(batch)?;
        for layer in 0..self.config.num_hidden_layers {
            let rows = rows.and_then(|rows| self.read_behind(layer, rows));
            (x, _) = self.block_of_batch(layer, x, batch, rows, hook)?;
        }
        Ok(x)
    }

    /// The loss, and its gradients added to the hook's and to those of `gradients`.
    ///
    /// A batch without labelled tokens has the loss 0 and adds nothing.
    ///
    /// # Errors
    /// As [`Model::loss`].
    pub fn loss_and_gradients(
        &self,
        batch: &Batch,
        hook: &mut dyn LinearHook,
        gradients: &mut dyn Gradients,
        recompute: Recompute,
    ) -> Result<f64> {
        self.check_targets(batch)?;
        if batch.labelled() == 0 {
            return Ok(0.0);
        }
        let mut x = self.embed(batch)?;
        let again = recompute.blocks(self.config.num_hidden_layers);
        let mut kept = Vec::with_capacity(self.config.num_hidden_layers);
        for layer in 0..self.config.num_hidden_layers {
            let (y, mut saved) = self.block_forward(layer, x, batch, hook)?;
            kept.push(match layer < again {
                true => Kept::Input(saved.into_input()),
                false => {
                    if !self.block_reads_input(layer, hook, gradients) {
                        saved.forget_input();
                    }
                    Kept::All(saved)
                }
            });
            x = y;
        }
        let (loss, mut dx) = self.head(x, batch, gradients, InputGradient::Wanted)?;
        for (layer, kept) in kept.into_iter().enumerate().rev() {
            let Some(dy) = dx.take() else { break };
            let saved = match kept {
                Kept::All(saved) => saved,
                Kept::Input(x) => self.block_forward(layer, x, batch, hook)?.1,
            };
            let before = layer > 0 || self.embedding_is_trained(gradients);
            let wanted = if before { InputGradient::Wanted } else { InputGradient::Unwanted };
            dx = self.block_backward(layer, saved, batch, dy, hook, gradients, wanted)?;
        }
        if let Some(dx) = dx {
            self.embed_backward(batch, dx, gradients)?;
        }
        Ok(loss)
    }
}

fn check_dtype(dtype: DType) -> Result<()> {
    match dtype {
        DType::F32 | DType::Bf16 => Ok(()),
        DType::F16 | DType::U32 => Err(Error::Compute { found: dtype }),
    }
}

/// What stands between a block's forward and backward.
enum Kept {
    All(BlockSaved),
    /// `[T, D]`.
    Input(Tensor),
}

fn rope_tables(config: &Config, kernels: &dyn Kernels, positions: usize) -> Result<Vec<RopeTable>> {
    let Positions::Rotary { rotary_size, rotations } = &config.positions else { return Ok(Vec::new()) };
    let table = |Rotation { theta, scaling }: &Rotation| {
        Ok(RopeTable::new(kernels, *theta, scaling, config.head_dim, *rotary_size, positions)?)
    };
    rotations.iter().map(table).collect()
}
