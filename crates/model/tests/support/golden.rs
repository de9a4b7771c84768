//! A folder of `golden/`: a tiny model and the numbers that Hugging Face transformers has for it.

use std::path::PathBuf;
use std::sync::Arc;

use lora_sb_kernels::Kernels;
use lora_sb_model::{Batch, Model, Sequence, Storage, Target, WeightFile};
use safetensors::SafeTensors;
use serde_json::Value;

use super::device::{device, golden_root, on_each_device};
use super::padded::Padded;

/// Both sides round as f32 does, each in its own order: the fixtures' own f32-against-f64 noise, ten times.
const NOISE: f64 = 10.0;

pub(crate) struct Golden {
    folder: PathBuf,
}

impl Golden {
    /// Runs a check on a family's folder, on each device; a missing folder is said and skipped.
    pub(crate) fn with(family: &str, check: fn(&Golden)) {
        let folder = golden_root().join(family);
        if folder.is_dir() {
            let golden = Golden { folder };
            on_each_device(|| check(&golden));
        } else {
            eprintln!("SKIPPED: no golden folder {}", folder.display());
        }
    }

    /// The model on a device that treats the padding of `inputs` as transformers does.
    pub(crate) fn model(&self, storage: Storage, inputs: &Inputs) -> Model {
        let pads: Vec<_> = inputs.rows.iter().map(|row| (row.ids.len(), row.pads)).collect();
        let kernels: Arc<dyn Kernels> = match pads.iter().any(|&(_, pads)| pads > 0) {
            true => {
                let size = |key| self.config()[key].as_u64();
                let pad = size("pad_token_id").zip(size("max_position_embeddings"));
                Arc::new(Padded::new(
                    device(),
                    vec![pads],
                    pad.map(|(pad, rows)| (pad as u32, rows as usize)),
                ))
            }
            false => device(),
        };
        let model = Model::load(&self.folder.join("model"), kernels, storage).unwrap();
        assert!(model.warnings().is_empty(), "{:?}", model.warnings());
        model
    }

    /// The same for texts without padding.
    pub(crate) fn plain_model(&self, storage: Storage) -> Model {
        self.model(storage, &Inputs { rows: vec![], labels: Labels::Values(vec![]) })
    }

    pub(crate) fn has(&self, file: &str) -> bool {
        let there = self.folder.join(file).exists();
        if !there {
            eprintln!("SKIPPED: no {file} in {}", self.folder.display());
        }
        there
    }

    fn json(&self, file: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.folder.join(file)).unwrap()).unwrap()
    }

    fn config(&self) -> Value {
        self.json("model/config.json")
    }

    pub(crate) fn meta(&self) -> Value {
        self.json("meta.json")
    }

    /// The difference of transformers' f32 from its f64.
    pub(crate) fn noise(&self, quantity: &str) -> f64 {
        self.meta()["f32_vs_f64"][quantity].as_f64().unwrap()
    }

    pub(crate) fn tolerance(&self, quantity: &str) -> f64 {
        NOISE * self.noise(quantity)
    }

    fn weight_file(&self, file: &str) -> WeightFile {
        WeightFile::open(&self.folder.join(file)).unwrap()
    }

    pub(crate) fn names(&self, file: &str) -> Vec<String> {
        self.weight_file(file).names()
    }

    pub(crate) fn floats(&self, file: &str, name: &str) -> Vec<f32> {
        self.weight_file(file).get(name).unwrap().unwrap_or_else(|| panic!("no {name}")).to_f32()
    }

    /// A matrix of i64 by rows; a vector is one column. None where there is no such tensor.
    pub(crate) fn integers(&self, file: &str, name: &str) -> Option<Vec<Vec<i64>>> {
        let bytes = std::fs::read(self.folder.join(file)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let view = file.tensor(name).ok()?;
        let values: Vec<i64> =
            view.data().chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap())).collect();
        let columns = view.shape().get(1).copied().unwrap_or(1);
        Some(values.chunks_exact(columns).map(<[i64]>::to_vec).collect())
    }

    pub(crate) fn inputs(&self) -> Inputs {
        let file = "inputs.safetensors";
        let integers = |name| self.integers(file, name).unwrap_or_else(|| panic!("no {name}"));
        let (ids, masks) = (integers("input_ids"), integers("attention_mask"));
        let types = self.integers(file, "token_type_ids");
        let labels = self.labels(file, masks[0].len());
        let mut inputs = Inputs { rows: Vec::new(), labels };
        for (index, mask) in masks.iter().enumerate() {
            let first = mask.iter().position(|&seen| seen == 1).unwrap();
            let end = mask.iter().rposition(|&seen| seen == 1).unwrap() + 1;
            assert!(mask[first..end].iter().all(|&seen| seen == 1), "padding stands at an end");
            // transformers predicts from a padding token where it is the one before the first labelled token, and
            // where the head reads the first token of a row.
            let predicts = match &inputs.labels {
                Labels::Tokens(labels) => labels[index][first] != -100,
                Labels::Classes(_) | Labels::Values(_) => true,
            };
            let pads = if predicts { first } else { 0 };
            let kept = first - pads..end;
            let types = types.as_ref().map(|types| &types[index][kept.clone()]);
            inputs.rows.push(Row {
                ids: ids[index][kept.clone()].iter().map(|&id| id as u32).collect(),
                pads,
                second: types.and_then(|types| types.iter().position(|&token_type| token_type == 1)),
                places: kept.map(|i| index * mask.len() + i).collect(),
                columns: first - pads..end,
            });
        }
        inputs
    }

    fn labels(&self, file: &str, columns: usize) -> Labels {
        let bytes = std::fs::read(self.folder.join(file)).unwrap();
        let labels = SafeTensors::deserialize(&bytes).unwrap();
        if labels.tensor("labels").unwrap().dtype() == safetensors::Dtype::F32 {
            return Labels::Values(self.floats(file, "labels"));
        }
        let rows = self.integers(file, "labels").unwrap();
        match rows[0].len() == columns {
            true => Labels::Tokens(rows),
            false => Labels::Classes(rows.into_iter().map(|row| row[0] as u32).collect()),
        }
    }
}

/// The fixture's rows without the padding that nothing is predicted from.
pub(crate) struct Inputs {
    rows: Vec<Row>,
    labels: Labels,
}

struct Row {
    ids: Vec<u32>,
    /// So many of the ids are padding, at the front.
    pads: usize,
    second: Option<usize>,
    /// Where each id stands in the padded matrix, flattened.
    places: Vec<usize>,
    /// The same within its row.
    columns: std::ops::Range<usize>,
}

enum Labels {
    /// Of the whole padded matrix, with -100 where there is none.
    Tokens(Vec<Vec<i64>>),
    Classes(Vec<u32>),
    Values(Vec<f32>),
}

impl Inputs {
    /// Packed, with the mean over all labelled tokens or rows as its loss.
    pub(crate) fn batch(&self, model: &Model) -> Batch {
        let trained: Vec<Vec<bool>> = match &self.labels {
            Labels::Tokens(labels) => {
                let rows = self.rows.iter().zip(labels);
                rows.map(|(row, labels)| labels[row.columns.clone()].iter().map(|&l| l != -100).collect())
                    .collect()
            }
            _ => vec![vec![]; self.rows.len()],
        };
        let labelled = match &self.labels {
            Labels::Tokens(_) => trained.iter().map(|row| row[1..].iter().filter(|&&t| t).count()).sum(),
            _ => self.rows.len(),
        };
        let sequences = self.rows.iter().enumerate().map(|(index, row)| {
            let target = match &self.labels {
                Labels::Tokens(_) => Target::Tokens(&trained[index]),
                Labels::Classes(classes) => Target::Class(classes[index]),
                Labels::Values(values) => Target::Value(values[index]),
            };
            Sequence { ids: &row.ids, second: row.second, target, weight: 1.0 / labelled as f32 }
        });
        Batch::pack(&**model.kernels(), &sequences.collect::<Vec<_>>()).unwrap()
    }

    /// The rows of the logits that can be compared: their number in the model's and in transformers' flattened
    /// ones. A token's logits, or a row's where a head classifies it.
    pub(crate) fn compared(&self) -> Vec<(usize, usize)> {
        if !matches!(self.labels, Labels::Tokens(_)) {
            return (0..self.rows.len()).map(|row| (row, row)).collect();
        }
        let mut packed = 0;
        let mut pairs = Vec::new();
        for row in &self.rows {
            let real = (row.pads..row.ids.len()).map(|i| (packed + i, row.places[i]));
            pairs.extend(real);
            packed += row.ids.len();
        }
        pairs
    }
}
