//! One adapter out of several that share A and B: Fed-SB (Singhal et al., arXiv 2502.15436).
//!
//! With the same frozen A and B, the update `s B R A` is linear in R, so that
//!
//! ```text
//! R = sum of w_i R_i / sum of w_i     gives     s B R A = sum of w_i (s B R_i A) / sum of w_i
//! ```
//!
//! exactly, and r^2 values a module are all that the participants exchange. The average of `B_i` times the average of
//! `A_i` is not that of `B_i A_i`; other methods are refused. A classification head is a plain parameter and is averaged
//! like R, which is the usual federated average and exact in no such sense.
//!
//! Everything is added in f64 and rounded to f32 once. Only files are read: no model is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lora_sb_model::{SaveType, WeightFile};

use super::files::{self, Entry};
use super::native::{self, Manifest, NAMES};
use crate::adapter::Part;
use crate::method::Kind;
use crate::{Error, Result};

/// One of the adapters that are averaged.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    /// A native adapter directory.
    pub dir: PathBuf,
    /// How much it counts, as the number of examples it was trained on.
    pub weight: f64,
}

/// What was averaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Averaged {
    /// The modules whose R is an average.
    pub modules: usize,
    /// The parameters of a classification head that were averaged with them.
    pub head: Vec<String>,
}

/// Writes the weighted average of the members as a native adapter directory, with the settings of the first.
///
/// # Errors
/// No member; a weight that is no positive number; members of another base, method, rank, alpha or targets, or whose A
/// and B are not the same to the bit; `out` being one of the members; files that cannot be read or written.
pub fn average(members: &[Member], out: &Path) -> Result<Averaged> {
    let opened = members.iter().map(Opened::read).collect::<Result<Vec<_>>>()?;
    let Some((first, others)) = opened.split_first() else {
        let (expected, found) = ("at least one".into(), "none".into());
        return Err(Error::Config { name: "adapters".into(), expected, found });
    };
    first.check_method()?;
    for other in others {
        first.check_alike(other)?;
    }
    for member in &opened {
        member.refuse_as_output(out)?;
    }
    let (mut entries, mut modules, mut head): (Vec<Entry<'_>>, usize, Vec<String>) =
        (Vec::new(), 0, Vec::new());
    for name in first.file.names() {
        let Some(view) = first.file.get(&name)? else { continue };
        let (shape, own) = (view.shape, name.clone());
        match part(&name) {
            Some(Part::R) => modules += 1,
            Some(_) => {
                entries.push((name, shape, Box::new(move || first.values(&own))));
                continue;
            }
            None => head.push(name.clone()),
        }
        let opened = &opened;
        entries.push((name, shape, Box::new(move || mean(opened, &own))));
    }
    let Manifest { version, base, adapter, .. } = &first.manifest;
    let metadata = BTreeMap::from([
        ("averaged".to_owned(), members.len().to_string()),
        ("base_fingerprint".to_owned(), base.fingerprint.clone()),
        ("lora_alpha".to_owned(), adapter.lora_alpha.to_string()),
        ("method".to_owned(), adapter.method.to_string()),
        ("rank".to_owned(), adapter.rank.to_string()),
        ("version".to_owned(), version.to_string()),
    ]);
    files::write(out, &NAMES, entries, &metadata, SaveType::F32, &first.manifest)?;
    Ok(Averaged { modules, head })
}

/// A member with its files.
struct Opened<'a> {
    member: &'a Member,
    manifest: Manifest,
    file: WeightFile,
}

impl<'a> Opened<'a> {
    fn read(member: &'a Member) -> Result<Self> {
        if !(member.weight.is_finite() && member.weight > 0.0) {
            return Err(Error::Config {
                name: format!("the weight of {}", member.dir.display()),
                expected: "a positive number".into(),
                found: member.weight.to_string(),
            });
        }
        let manifest = native::manifest(&member.dir)?;
        let file = WeightFile::open(&member.dir.join(NAMES.tensors))?;
        Ok(Opened { member, manifest, file })
    }

    /// The average of products is the product of averages only where all but one factor are the same.
    fn check_method(&self) -> Result<()> {
        let method = self.manifest.adapter.method;
        if method.kind() == Kind::Latent {
            return Ok(());
        }
        Err(Error::Unsupported {
            path: self.member.dir.clone(),
            feature: format!("averaging {method} adapters (they train A and B)"),
            hint: "the average of B times the average of A is not that of B A; train with lora-sb or lora-xs, whose \
                   A and B are frozen"
                .into(),
        })
    }

    /// Checks that the other one has the same settings, and the same tensors but for R and the head.
    fn check_alike(&self, other: &Opened<'_>) -> Result<()> {
        let refuse = |reason: String| {
            let (first, second) = (self.member.dir.clone(), other.member.dir.clone());
            Err(Error::Average { first, second, reason })
        };
        let settings = |opened: &Opened<'_>| {
            let Manifest { base, adapter, label_names, .. } = &opened.manifest;
            [
                ("the base model", base.fingerprint.clone()),
                ("the method", adapter.method.to_string()),
                ("the rank", adapter.rank.to_string()),
                ("lora_alpha", adapter.lora_alpha.to_string()),
                ("the order of the labels", label_names.join(", ")),
            ]
        };
        for ((what, ours), (_, theirs)) in settings(self).into_iter().zip(settings(other)) {
            if ours != theirs {
                return refuse(format!("{what} is {ours} and {theirs}"));
            }
        }
        let names = |opened: &Opened<'_>| opened.file.names().into_iter().collect::<BTreeSet<String>>();
        let (ours, theirs) = (names(self), names(other));
        if let Some(name) = ours.symmetric_difference(&theirs).next() {
            return refuse(format!("only one of them has {name}"));
        }
        for name in &ours {
            let (Some(a), Some(b)) = (self.file.get(name)?, other.file.get(name)?) else { continue };
            if a.shape != b.shape {
                return refuse(format!("{name} has the shapes {:?} and {:?}", a.shape, b.shape));
            }
            let shared = !matches!(part(name), Some(Part::R) | None);
            if shared && (a.dtype != b.dtype || a.bytes.bytes() != b.bytes.bytes()) {
                return refuse(format!("{name} differs"));
            }
        }
        Ok(())
    }

    fn refuse_as_output(&self, out: &Path) -> Result<()> {
        let (Ok(out), Ok(own)) = (out.canonicalize(), self.member.dir.canonicalize()) else { return Ok(()) };
        if out != own {
            return Ok(());
        }
        Err(Error::File {
            path: out,
            message: "is one of the adapters to be averaged".into(),
            hint: Some("write the average to another directory".into()),
        })
    }

    fn values(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.file.get(name)?.map_or_else(Vec::new, |view| view.to_f32()))
    }
}

/// The weighted mean of a tensor.
fn mean(opened: &[Opened<'_>], name: &str) -> Result<Vec<f32>> {
    let (mut sum, mut total) = (Vec::new(), 0.0);
    for member in opened {
        let values = member.values(name)?;
        sum.resize(values.len(), 0.0);
        let weight = member.member.weight;
        sum.iter_mut()
            .zip(values)
            .for_each(|(sum, value): (&mut f64, f32)| *sum += weight * f64::from(value));
        total += weight;
    }
    let mean: Vec<f32> = sum.into_iter().map(|sum| (sum / total) as f32).collect();
    if f64::is_finite(total) && mean.iter().all(|value| value.is_finite()) {
        return Ok(mean);
    }
    Err(Error::NotFinite { what: format!("the average of {name}") })
}

/// The part that a tensor of an adapter is; `None` for a parameter of a head.
fn part(name: &str) -> Option<Part> {
    let last = name.rsplit('.').next().unwrap_or(name);
    [Part::A, Part::B, Part::R].into_iter().find(|part| part.name() == last)
}
