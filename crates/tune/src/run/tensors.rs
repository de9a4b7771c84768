//! Tensors of a run in safetensors files, streamed: one tensor at a time is copied off the device.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use lora_sb_kernels::{Kernels, Tensor};
use lora_sb_model::WeightFile;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::Result;

/// Writes f32 tensors as a safetensors file, in their order.
pub(super) fn write(
    out: &mut dyn Write,
    kernels: &dyn Kernels,
    tensors: &[(String, &Tensor)],
) -> io::Result<()> {
    let mut header = Map::new();
    let mut end = 0;
    for (name, tensor) in tensors {
        let start = end;
        end += tensor.len() * size_of::<f32>();
        let info = json!({ "dtype": "F32", "shape": tensor.shape(), "data_offsets": [start, end] });
        header.insert(name.clone(), info);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // The data begin at a multiple of 8, so that a map of the file can be read in place.
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for (_, tensor) in tensors {
        let values = kernels.to_f32(tensor).map_err(io::Error::other)?;
        for piece in values.chunks(1 << 14) {
            let bytes: Vec<u8> = piece.iter().flat_map(|value| value.to_le_bytes()).collect();
            out.write_all(&bytes)?;
        }
    }
    Ok(())
}

/// The tensors of a file by name, on the device.
pub(super) fn read(path: &Path, kernels: &dyn Kernels) -> Result<BTreeMap<String, Tensor>> {
    let file = WeightFile::open(path)?;
    let mut tensors = BTreeMap::new();
    for name in file.names() {
        if let Some(view) = file.get(&name)? {
            tensors.insert(name, kernels.from_f32(&view.to_f32(), &view.shape)?);
        }
    }
    Ok(tensors)
}

/// SHA-256 of all that is written, as it is written.
pub(crate) struct Hashing<'a> {
    hasher: Sha256,
    bytes: u64,
    out: &'a mut dyn Write,
}

impl<'a> Hashing<'a> {
    pub(crate) fn new(out: &'a mut dyn Write) -> Self {
        Hashing { hasher: Sha256::new(), bytes: 0, out }
    }

    /// The number of bytes and their hash in hexadecimal.
    pub(crate) fn finish(self) -> (u64, String) {
        (self.bytes, hexadecimal(&self.hasher.finalize()))
    }
}

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// SHA-256 of bytes, in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
