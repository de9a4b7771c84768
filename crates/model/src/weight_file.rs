//! Safetensors files: read in place through a memory map, written one tensor at a time.
//!
//! Format: <https://github.com/huggingface/safetensors>; 8 bytes of header length, a JSON header, the data.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use lora_sb_kernels::{DType, SharedBytes};
use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use crate::{Error, Result, SaveType};

/// Bytes of the header's length at a file's start.
const LENGTH_BYTES: usize = 8;

/// An open safetensors file.
#[derive(Debug)]
pub struct WeightFile {
    name: String,
    whole: Arc<Whole>,
    /// Where the data begin.
    data: usize,
    header: Metadata,
}

/// The owner that every tensor's bytes share.
#[derive(Debug)]
enum Whole {
    Mapped(Mmap),
    Shared(SharedBytes),
}

impl AsRef<[u8]> for Whole {
    fn as_ref(&self) -> &[u8] {
        match self {
            Whole::Mapped(map) => map,
            Whole::Shared(shared) => shared.bytes(),
        }
    }
}

/// One tensor of a file; nothing is read before its bytes are.
#[derive(Clone, Debug)]
pub struct WeightView {
    /// Its element type.
    pub dtype: DType,
    /// The size of every axis.
    pub shape: Vec<usize>,
    /// Its little-endian elements within the file.
    pub bytes: SharedBytes,
}

impl WeightFile {
    /// Maps a file into memory and checks its header.
    ///
    /// # Errors
    /// Where the file is missing, unreadable, truncated or not in the format.
    pub fn open(path: &Path) -> Result<WeightFile> {
        let file = File::open(path).map_err(|error| Error::io(path, error))?;
        #[expect(unsafe_code, reason = "a memory map is shared with whoever may write the file")]
        // SAFETY: undefined only where another program changes the file under the map. Whole files are
        // replaced by renaming, here as in the tools that write models, which leaves the mapped one as it is.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::io(path, error))?;
        WeightFile::of(Whole::Mapped(map), path.display().to_string())
    }

    /// A whole file in memory; `name` stands for it in messages.
    ///
    /// # Errors
    /// Where the bytes are truncated or not in the format.
    pub fn from_bytes(bytes: SharedBytes, name: String) -> Result<WeightFile> {
        WeightFile::of(Whole::Shared(bytes), name)
    }

    fn of(whole: Whole, name: String) -> Result<WeightFile> {
        match SafeTensors::read_metadata(whole.as_ref()) {
            Ok((length, header)) => {
                Ok(WeightFile { name, whole: Arc::new(whole), data: LENGTH_BYTES + length, header })
            }
            Err(error) => {
                let message = damage(whole.as_ref()).unwrap_or_else(|| error.to_string());
                Err(Error::WeightFile { file: name, message })
            }
        }
    }

    /// The file's name for messages.
    pub fn file(&self) -> &str {
        &self.name
    }

    /// The names of all tensors, in the order of their data.
    pub fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    /// The header's free texts (`__metadata__`).
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.header.metadata().iter().flatten().map(|(key, text)| (key.clone(), text.clone())).collect()
    }

    /// A tensor, or `None` where the file has none of that name.
    ///
    /// # Errors
    /// Where its element type is none of F32, BF16 and F16.
    pub fn get(&self, name: &str) -> Result<Option<WeightView>> {
        let Some(info) = self.header.info(name) else { return Ok(None) };
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::Bf16,
            Dtype::F16 => DType::F16,
            other => {
                let found = other.to_string();
                return Err(Error::TensorType { file: self.name.clone(), tensor: name.into(), found });
            }
        };
        let (start, end) = info.data_offsets;
        let whole: Arc<dyn AsRef<[u8]> + Send + Sync> = Arc::<Whole>::clone(&self.whole);
        let bytes = SharedBytes::new(whole, self.data + start..self.data + end)?;
        Ok(Some(WeightView { dtype, shape: info.shape.clone(), bytes }))
    }
}

#[cfg(unix)]
impl WeightFile {
    /// Gives the pages of a mapped tensor back to the system; who reads it again reads them from the file.
    pub(crate) fn release(&self, name: &str) {
        let (Whole::Mapped(map), Some(info)) = (&*self.whole, self.header.info(name)) else { return };
        let (start, end) = info.data_offsets;
        #[expect(unsafe_code, reason = "pages of a memory map are dropped")]
        // SAFETY: dropping pages changes what a map holds only where it was written to; this one is read-only and
        // backed by its file.
        let dropped =
            unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, self.data + start, end - start) };
        // It is advice: where the system takes none, the pages stay until it needs them.
        drop(dropped);
    }
}

#[cfg(not(unix))]
impl WeightFile {
    /// Pages stay until the system needs them.
    pub(crate) fn release(&self, _: &str) {}
}

impl WeightView {
    /// The elements, widened.
    pub fn to_f32(&self) -> Vec<f32> {
        let bytes = self.bytes.bytes();
        match self.dtype {
            DType::Bf16 => {
                bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            DType::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        }
    }
}

/// The numbers behind a truncated file, where that is what is wrong.
fn damage(bytes: &[u8]) -> Option<String> {
    let found = bytes.len();
    let Some(length) = bytes.first_chunk::<LENGTH_BYTES>() else {
        return Some(format!(
            "truncated: {found} bytes, expected at least the {LENGTH_BYTES} of the header's length"
        ));
    };
    let data = u64::from_le_bytes(*length).checked_add(LENGTH_BYTES as u64)?;
    let Some(header) = bytes.get(LENGTH_BYTES..usize::try_from(data).ok()?) else {
        return Some(format!(
            "truncated, or no safetensors file: {found} bytes, expected a header that ends at {data}"
        ));
    };
    let header: Metadata = serde_json::from_slice(header).ok()?;
    let expected = data + header.data_len() as u64;
    (expected != found as u64).then(|| format!("truncated: {found} bytes, expected {expected} by its header"))
}

/// Writes a safetensors file beside its place, tensor by tensor, and renames it when it is whole.
#[derive(Debug)]
pub struct WeightFileWriter {
    path: PathBuf,
    partial: PathBuf,
    file: BufWriter<File>,
    dtype: SaveType,
    /// The tensors still to be written, the next one last.
    expected: Vec<(String, usize)>,
}

impl WeightFileWriter {
    /// Begins a file of the given tensors, all of one element type, in the given order.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn create(
        path: &Path,
        dtype: SaveType,
        metadata: &BTreeMap<String, String>,
        tensors: &[(String, Vec<usize>)],
    ) -> Result<WeightFileWriter> {
        let mut header = Map::new();
        if !metadata.is_empty() {
            header.insert("__metadata__".into(), json!(metadata));
        }
        let mut end = 0;
        let mut expected = Vec::new();
        for (name, shape) in tensors {
            let (start, elements) = (end, shape.iter().product::<usize>());
            end += elements * dtype.size();
            let info =
                json!({ "dtype": dtype.safetensors_name(), "shape": shape, "data_offsets": [start, end] });
            header.insert(name.clone(), info);
            expected.push((name.clone(), elements));
        }
        expected.reverse();
        let mut header = Value::Object(header).to_string().into_bytes();
        // The data begin at a multiple of 8 so that a map of the file can be read in place.
        header.resize(header.len().next_multiple_of(8), b' ');
        let partial = partial(path);
        let file = File::create(&partial).map_err(|error| Error::io(&partial, error))?;
        let mut writer =
            WeightFileWriter { path: path.into(), partial, file: BufWriter::new(file), dtype, expected };
        writer.put(&(header.len() as u64).to_le_bytes())?;
        writer.put(&header)?;
        Ok(writer)
    }

    /// Writes the next tensor's elements, rounded to the nearest.
    ///
    /// # Errors
    /// Where the number of elements is not the announced one, a finite value overflows the element type, or
    /// the file cannot be written.
    pub fn write(&mut self, values: &[f32]) -> Result<()> {
        let (name, elements) = self.expected.pop().unwrap_or_default();
        if values.len() != elements {
            let message = format!("tensor `{name}`: {} elements written, {elements} announced", values.len());
            return Err(Error::WeightFile { file: self.path.display().to_string(), message });
        }
        let dtype = self.dtype;
        let narrowed = |value: f32| match dtype {
            SaveType::F32 => value,
            SaveType::Bf16 => bf16::from_f32(value).to_f32(),
            SaveType::F16 => f16::from_f32(value).to_f32(),
        };
        if let Some(&value) = values.iter().find(|value| value.is_finite() && !narrowed(**value).is_finite())
        {
            return Err(Error::Overflow { tensor: name, value, dtype: dtype.name() });
        }
        // Rounded a piece at a time: a second copy of a large embedding is not needed.
        for piece in values.chunks(1 << 16) {
            let bytes: Vec<u8> = match dtype {
                SaveType::F32 => piece.iter().flat_map(|value| value.to_le_bytes()).collect(),
                SaveType::Bf16 => {
                    piece.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect()
                }
                SaveType::F16 => piece.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
            };
            self.put(&bytes)?;
        }
        Ok(())
    }

    /// Makes the file visible under its name; all of it is on the disk by then.
    ///
    /// # Errors
    /// Where a tensor is missing or the file cannot be written.
    pub fn finish(mut self) -> Result<()> {
        if let Some((name, _)) = self.expected.last() {
            let message = format!("tensor `{name}` was announced and not written");
            return Err(Error::WeightFile { file: self.path.display().to_string(), message });
        }
        let written = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        written.map_err(|error| Error::io(&self.partial, error))?;
        std::fs::rename(&self.partial, &self.path).map_err(|error| Error::io(&self.path, error))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| Error::io(&self.partial, error))
    }
}

/// The sibling that is written before it is renamed.
pub(crate) fn partial(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    path.with_file_name(name)
}
