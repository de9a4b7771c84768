//! Adapter directories: tensors, and a manifest that is written last.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use lora_sb_kernels::{Kernels, Tensor};
use lora_sb_model::{Model, SaveType, WeightFile, WeightFileWriter};

use crate::{Error, Result};

/// The names of an adapter directory's two files.
pub(super) struct Names {
    pub(super) tensors: &'static str,
    pub(super) manifest: &'static str,
}

/// A tensor to be written: its name, its shape, and the call that fetches its values when their turn comes.
pub(super) type Entry<'a> = (String, Vec<usize>, Box<dyn FnOnce() -> Result<Vec<f32>> + 'a>);

/// Writes tensors and manifest, creating the directory.
///
/// Both are written beside their places and renamed. The old manifest goes before the new tensors come, so that
/// a directory with a manifest is whole at every moment.
pub(super) fn write(
    dir: &Path,
    names: &Names,
    entries: Vec<Entry<'_>>,
    metadata: &BTreeMap<String, String>,
    dtype: SaveType,
    manifest: &impl serde::Serialize,
) -> Result<()> {
    fs::create_dir_all(dir).map_err(|error| Error::io(dir, "created", error))?;
    let listed: Vec<_> = entries.iter().map(|(name, shape, _)| (name.clone(), shape.clone())).collect();
    let mut writer = WeightFileWriter::create(&dir.join(names.tensors), dtype, metadata, &listed)?;
    for (_, _, fetch) in entries {
        writer.write(&fetch()?)?;
    }
    let path = dir.join(names.manifest);
    if path.exists() {
        fs::remove_file(&path).map_err(|error| Error::io(&path, "replaced", error))?;
    }
    writer.finish()?;
    let mut json = serde_json::to_vec_pretty(manifest).map_err(|error| invalid(&path, error.to_string()))?;
    json.push(b'\n');
    let partial = dir.join(format!("{}.partial", names.manifest));
    let written = File::create(&partial).and_then(|mut file| {
        file.write_all(&json)?;
        file.sync_all()
    });
    written.and_then(|()| fs::rename(&partial, &path)).map_err(|error| Error::io(&path, "written", error))
}

/// All tensors of a file, in the file's types.
pub(super) fn read_tensors(file: &WeightFile, kernels: &dyn Kernels) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for name in file.names() {
        if let Some(view) = file.get(&name)? {
            tensors.insert(name, kernels.from_bytes(view.bytes, view.dtype, &view.shape)?);
        }
    }
    Ok(tensors)
}

/// Reads a directory's manifest.
pub(super) fn read_manifest<T: serde::de::DeserializeOwned>(dir: &Path, name: &str) -> Result<T> {
    let path = dir.join(name);
    let bytes = fs::read(&path).map_err(|error| Error::io(&path, "read", error))?;
    serde_json::from_slice(&bytes).map_err(|error| invalid(&path, format!("line {}: {error}", error.line())))
}

/// Refuses to write over what the base model was read from.
pub(super) fn refuse_base(dir: &Path, model: &Model) -> Result<()> {
    let Some(source) = model.source() else { return Ok(()) };
    // A directory that is not there yet has no canonical path, and is nobody's.
    let (Ok(there), Ok(base)) = (dir.canonicalize(), source.canonicalize()) else { return Ok(()) };
    if there != base {
        return Ok(());
    }
    Err(Error::File {
        path: dir.into(),
        message: "is the base model's own directory".into(),
        hint: Some("write to another directory".into()),
    })
}

fn invalid(path: &Path, message: String) -> Error {
    Error::File { path: path.into(), message, hint: None }
}
