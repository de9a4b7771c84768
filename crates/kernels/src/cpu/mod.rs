//! The processor as a device: a team of threads and recycled memory. The operations are in `op/*/cpu.rs`.

pub(crate) mod blocks;
pub(crate) mod gemm;
pub(crate) mod team;
pub(crate) mod vector;

use std::sync::Arc;

use self::team::Team;
use crate::buffer::{Buffer, Floats, Recycler, words};
use crate::{DType, Error, Kernels, Memory, Place, Result, SharedBytes, Tensor, Usage};

/// More threads than any processor has. A system that has no room for a thread's stack may end the whole process instead
/// of refusing to start it.
const MOST_THREADS: usize = 1024;

/// A processor with a fixed number of threads.
///
/// Results do not depend on the number of threads: work is cut by the problem's size alone, and no sum is
/// split between threads.
#[derive(Debug)]
pub struct Cpu {
    pub(crate) team: Team,
    pub(crate) recycler: Arc<Recycler>,
}

impl Cpu {
    /// A device that works with `threads` threads, the caller's among them.
    ///
    /// # Errors
    /// Where `threads` is 0 or more than 1024, or the system refuses to start them.
    pub fn new(threads: usize) -> Result<Self> {
        let failed = |message| Error::Device { device: "cpu", message };
        if threads == 0 {
            return Err(failed("0 threads; at least 1 is needed".into()));
        }
        if threads > MOST_THREADS {
            return Err(failed(format!("{threads} threads; at most {MOST_THREADS} are started")));
        }
        let team = Team::new(threads)
            .map_err(|error| failed(format!("{threads} threads could not be started: {error}")))?;
        Ok(Cpu { team, recycler: Arc::default() })
    }

    /// The number of threads.
    pub fn threads(&self) -> usize {
        self.team.threads()
    }
}

impl Kernels for Cpu {
    fn name(&self) -> String {
        format!("cpu ({} threads)", self.threads())
    }

    fn prefers(&self) -> DType {
        if gemm::has_bf16_dot_products() { DType::Bf16 } else { DType::F32 }
    }
}

impl Memory for Cpu {
    fn empty_of(&self, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let elements = shape.iter().product();
        let storage = || self.recycler.take(words(dtype, elements));
        let buffer = match dtype {
            DType::F32 => Buffer::F32(storage()),
            DType::Bf16 => Buffer::Bf16(storage(), elements),
            DType::F16 | DType::U32 => {
                let message = format!("a tensor of {dtype}; activations are f32 or bf16");
                return Err(Error::Value { op: "empty", message });
            }
        };
        Ok(Tensor::new(buffer, shape))
    }

    fn zeros(&self, shape: &[usize]) -> Result<Tensor> {
        let mut tensor = self.empty(shape)?;
        tensor.f32_mut("zeros", "x")?.fill(0.0);
        Ok(tensor)
    }

    fn from_f32(&self, values: &[f32], shape: &[usize]) -> Result<Tensor> {
        check_count("from_f32", values.len(), shape)?;
        let mut tensor = self.empty(shape)?;
        self.write_f32(&mut tensor, values)?;
        Ok(tensor)
    }

    fn from_u32(&self, values: &[u32], shape: &[usize]) -> Result<Tensor> {
        check_count("from_u32", values.len(), shape)?;
        Ok(Tensor::new(Buffer::U32(values.to_vec()), shape))
    }

    fn from_bytes(&self, bytes: SharedBytes, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let length = bytes.bytes().len();
        if !length.is_multiple_of(dtype.size()) {
            let message = format!("{length} bytes are no whole number of {dtype} elements");
            return Err(Error::Value { op: "from_bytes", message });
        }
        check_count("from_bytes", length / dtype.size(), shape)?;
        if bytes.bytes().as_ptr().align_offset(dtype.size()) == 0 {
            return Ok(Tensor::new(Buffer::Shared(bytes, dtype), shape));
        }
        aligned_copy(&bytes, dtype).map(|buffer| Tensor::new(buffer, shape))
    }

    fn to_f32(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        let floats = tensor.floats("to_f32", "tensor")?;
        if let Floats::F32(values) = floats {
            return Ok(values.to_vec());
        }
        let mut out = vec![0.0; tensor.len()];
        floats.widen(0, &mut out);
        Ok(out)
    }

    fn write_f32(&self, tensor: &mut Tensor, values: &[f32]) -> Result<()> {
        check_count("write_f32", values.len(), tensor.shape())?;
        tensor.floats_mut("write_f32", "tensor")?.replace(|out| out.copy_from_slice(values));
        Ok(())
    }

    fn place(&self) -> Place {
        Place::Cpu
    }

    fn usage(&self) -> Usage {
        self.recycler.usage()
    }

    fn reset_peak(&self) {
        self.recycler.reset_peak();
    }
}

pub(crate) fn check_count(op: &'static str, found: usize, shape: &[usize]) -> Result<()> {
    if found == shape.iter().product::<usize>() {
        return Ok(());
    }
    let expected = format!("{found} elements, the number of values given");
    Err(Error::Shape { op, operand: "shape", found: shape.to_vec(), expected })
}

/// An aligned copy of a file's elements: safetensors headers written by others need not be padded.
fn aligned_copy(bytes: &SharedBytes, dtype: DType) -> Result<Buffer> {
    let mut words = vec![0u32; bytes.bytes().len().div_ceil(4)];
    bytemuck::cast_slice_mut::<u32, u8>(&mut words)[..bytes.bytes().len()].copy_from_slice(bytes.bytes());
    let owner: Arc<dyn AsRef<[u8]> + Send + Sync> = Arc::new(Words(words));
    Ok(Buffer::Shared(SharedBytes::new(owner, 0..bytes.bytes().len())?, dtype))
}

struct Words(Vec<u32>);

impl AsRef<[u8]> for Words {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}
