//! An NVIDIA GPU as a device. The operations are in `op/*/cuda.rs`, their kernels in the `.cu` files beside them.
//!
//! All work is asked for on one stream, so that it is done in order and memory that is given back can be taken again
//! without waiting. The program waits only where it reads a result.

pub(crate) mod blas;
pub(crate) mod driver;
#[cfg(feature = "emulator")]
mod emulator;
pub(crate) mod launch;
pub(crate) mod memory;
pub mod module;
mod nvidia;
mod probe;
pub(crate) mod row;
pub(crate) mod sizes;

use std::sync::Arc;

use self::driver::Driver;
pub use self::driver::Gpu;
#[cfg(feature = "emulator")]
pub use self::emulator::ThreadOrder;
use self::launch::DeviceFloats;
use self::memory::{DeviceMemory, Storage};
pub use self::probe::{Candidate, Problem, Products, Report, probe, probe_memory};
use crate::buffer::Buffer;
use crate::cpu::check_count;
use crate::op::attention;
use crate::{DType, Elementwise, Error, Kernels, Memory, Place, Result, SharedBytes, Tensor, Usage};

/// A GPU.
#[derive(Debug)]
pub struct Cuda {
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) memory: Arc<DeviceMemory>,
    /// How attention cuts the last batches.
    pub(crate) attention: attention::cuda::work::Tables,
}

impl Cuda {
    pub(crate) fn with(driver: Arc<dyn Driver>) -> Self {
        Cuda {
            memory: DeviceMemory::new(Arc::clone(&driver)),
            driver,
            attention: attention::cuda::work::Tables::default(),
        }
    }

    /// What stands for a GPU in a program that is built for tests; `None` in others, and where no C++ compiler is found.
    ///
    /// # Errors
    /// Where the kernels do not compile.
    pub fn stand_in() -> Result<Option<Cuda>> {
        #[cfg(feature = "emulator")]
        return Cuda::emulated(ThreadOrder::Forward);
        #[cfg(not(feature = "emulator"))]
        Ok(None)
    }

    /// The GPU itself.
    pub fn gpu(&self) -> &Gpu {
        self.driver.gpu()
    }

    /// Bytes of the GPU's memory that nobody has taken.
    ///
    /// # Errors
    /// Where the driver does not say.
    pub fn free_bytes(&self) -> Result<usize> {
        self.driver.free_bytes().map_err(|failure| driver_error("memory", &failure))
    }

    /// Who computes matrix products: the vendor's library, as `cuBLASLt 12.4.5`, or why it does not and the kernels of this
    /// crate do.
    ///
    /// # Errors
    /// The reason, in words.
    pub fn products(&self) -> Result<String, String> {
        let reason = || self.driver.without_blas().unwrap_or("the driver has none").to_owned();
        self.driver.blas().map(|blas| blas.name()).ok_or_else(reason)
    }

    /// Makes all kernels ready, each module compiled for the GPU where the driver has not kept it; how many there are.
    /// Otherwise a kernel's first launch does that.
    ///
    /// # Errors
    /// Where the driver's compiler refuses one.
    pub fn prepare(&self) -> Result<usize> {
        let kernels = module::all();
        for kernel in kernels.values() {
            self.driver.prepare(kernel).map_err(|failure| driver_error(kernel.name, &failure))?;
        }
        Ok(kernels.len())
    }

    /// Elements of a tensor of any floating type on this device.
    pub(crate) fn floats(&self, op: &'static str, operand: &'static str, x: &Tensor) -> Result<DeviceFloats> {
        let (storage, dtype) = self.of_this_device(op, operand, x)?;
        match dtype {
            DType::U32 => Err(Error::Type { op, operand, found: dtype, expected: "f32, bf16 or f16" }),
            _ => Ok(DeviceFloats { address: storage.address(), dtype }),
        }
    }

    /// Elements of an `f32` or `bf16` tensor that is not a file's.
    pub(crate) fn floats_mut(
        &self,
        op: &'static str,
        operand: &'static str,
        x: &mut Tensor,
    ) -> Result<DeviceFloats> {
        let floats = self.floats(op, operand, x)?;
        match (&x.buffer, floats.dtype) {
            (Buffer::Cuda(DeviceBuffer { origin: Origin::Device, .. }), DType::F32 | DType::Bf16) => {
                Ok(floats)
            }
            (_, found) => {
                Err(Error::Type { op, operand, found, expected: "f32 or bf16 that is not a file's" })
            }
        }
    }

    /// The address of an `f32` tensor's elements.
    pub(crate) fn f32(&self, op: &'static str, operand: &'static str, x: &Tensor) -> Result<u64> {
        match self.floats(op, operand, x)? {
            DeviceFloats { address, dtype: DType::F32 } => Ok(address),
            DeviceFloats { dtype: found, .. } => Err(Error::Type { op, operand, found, expected: "f32" }),
        }
    }

    /// The same of one that is not a file's.
    pub(crate) fn f32_mut(&self, op: &'static str, operand: &'static str, x: &mut Tensor) -> Result<u64> {
        match self.floats_mut(op, operand, x) {
            Ok(DeviceFloats { address, dtype: DType::F32 }) => Ok(address),
            Err(error @ Error::Place { .. }) => Err(error),
            _ => Err(Error::Type { op, operand, found: x.dtype(), expected: "f32 that is not a file's" }),
        }
    }

    /// The address of an index tensor's elements; their values on the host are `Tensor::u32`.
    pub(crate) fn indices(&self, op: &'static str, operand: &'static str, x: &Tensor) -> Result<u64> {
        let (storage, found) = self.of_this_device(op, operand, x)?;
        match found {
            DType::U32 => Ok(storage.address()),
            _ => Err(Error::Type { op, operand, found, expected: "u32" }),
        }
    }

    /// The storage of a tensor on this device, and its type.
    pub(crate) fn of_this_device<'a>(
        &self,
        op: &'static str,
        operand: &'static str,
        x: &'a Tensor,
    ) -> Result<(&'a Storage, DType)> {
        match &x.buffer {
            Buffer::Cuda(buffer) if buffer.storage.of(&self.memory) => Ok((&buffer.storage, buffer.dtype)),
            _ => Err(Error::Place { op, operand, expected: format!("cuda:{}", self.gpu().ordinal) }),
        }
    }

    /// Working space of so many bytes, until it is dropped.
    pub(crate) fn scratch(&self, op: &'static str, bytes: usize) -> Result<Storage> {
        self.memory.take(op, bytes)
    }

    /// Copies values to a place on the device.
    pub(crate) fn upload<T: bytemuck::NoUninit>(
        &self,
        op: &'static str,
        to: &Storage,
        values: &[T],
    ) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        assert!(bytes.len() <= to.bytes(), "{op}: {} bytes into {}", bytes.len(), to.bytes());
        if bytes.is_empty() {
            return Ok(());
        }
        #[expect(unsafe_code, reason = "a copy to the device")]
        // SAFETY: the storage is this device's and holds as many bytes.
        let outcome = unsafe { self.driver.upload(to.address(), bytes) };
        outcome.map_err(|failure| driver_error(op, &failure))
    }

    /// Makes all of a place on the device 0.
    pub(crate) fn clear(&self, op: &'static str, at: &Storage) -> Result<()> {
        if at.bytes() == 0 {
            return Ok(());
        }
        #[expect(unsafe_code, reason = "memory of the device is written")]
        // SAFETY: the storage is as large as it says.
        let outcome = unsafe { self.driver.clear(at.address(), at.bytes()) };
        outcome.map_err(|failure| driver_error(op, &failure))
    }

    /// Reads the first values of a place on the device, and waits for them.
    pub(crate) fn download<T: bytemuck::Pod>(
        &self,
        op: &'static str,
        from: &Storage,
        count: usize,
    ) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); count];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        assert!(bytes.len() <= from.bytes(), "{op}: {} bytes out of {}", bytes.len(), from.bytes());
        if !bytes.is_empty() {
            #[expect(unsafe_code, reason = "a copy from the device")]
            // SAFETY: the storage is this device's and holds as many bytes.
            let outcome = unsafe { self.driver.download(from.address(), bytes) };
            outcome.map_err(|failure| driver_error(op, &failure))?;
        }
        Ok(values)
    }

    fn take(&self, op: &'static str, dtype: DType, shape: &[usize], origin: Origin) -> Result<Tensor> {
        let elements: usize = shape.iter().product();
        let storage = self.memory.take(op, elements * dtype.size())?;
        Ok(Tensor::new(Buffer::Cuda(DeviceBuffer { storage, dtype, elements, origin }), shape))
    }
}

pub(crate) fn driver_error(op: &'static str, failure: &driver::Failure) -> Error {
    Error::Driver { op, message: failure.to_string() }
}

fn indices_of(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|&word| u32::from_le_bytes(word)).collect()
}

/// A tensor's storage on a GPU.
#[derive(Debug)]
pub(crate) struct DeviceBuffer {
    pub(crate) storage: Storage,
    pub(crate) dtype: DType,
    pub(crate) elements: usize,
    pub(crate) origin: Origin,
}

/// What a tensor on a GPU was made from.
#[derive(Debug)]
pub(crate) enum Origin {
    /// The device's own: may be written.
    Device,
    /// A file's elements: read-only, as on every device.
    File,
    /// Indices, whose values are checked on the host.
    Indices(Vec<u32>),
}

impl Kernels for Cuda {
    fn name(&self) -> String {
        let gpu = self.gpu();
        let products = self.driver.blas().map_or("own products".into(), |blas| blas.name());
        format!("cuda:{} ({}, {products})", gpu.ordinal, gpu.name)
    }

    fn prefers(&self) -> DType {
        DType::Bf16
    }

    fn synchronize(&self) -> Result<()> {
        self.driver.synchronize().map_err(|failure| driver_error("synchronize", &failure))
    }
}

impl Memory for Cuda {
    fn empty_of(&self, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        match dtype {
            DType::F32 | DType::Bf16 => self.take("empty", dtype, shape, Origin::Device),
            DType::F16 | DType::U32 => {
                let message = format!("a tensor of {dtype}; activations are f32 or bf16");
                Err(Error::Value { op: "empty", message })
            }
        }
    }

    fn zeros(&self, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.take("zeros", DType::F32, shape, Origin::Device)?;
        if let Buffer::Cuda(buffer) = &tensor.buffer {
            self.clear("zeros", &buffer.storage)?;
        }
        Ok(tensor)
    }

    fn from_f32(&self, values: &[f32], shape: &[usize]) -> Result<Tensor> {
        check_count("from_f32", values.len(), shape)?;
        let mut tensor = self.take("from_f32", DType::F32, shape, Origin::Device)?;
        self.write_f32(&mut tensor, values)?;
        Ok(tensor)
    }

    fn from_u32(&self, values: &[u32], shape: &[usize]) -> Result<Tensor> {
        let op = "from_u32";
        check_count(op, values.len(), shape)?;
        let tensor = self.take(op, DType::U32, shape, Origin::Indices(values.to_vec()))?;
        if let Buffer::Cuda(buffer) = &tensor.buffer {
            self.upload(op, &buffer.storage, values)?;
        }
        Ok(tensor)
    }

    /// The elements are copied to the device from where they lie; the host keeps no copy.
    fn from_bytes(&self, bytes: SharedBytes, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let (op, bytes) = ("from_bytes", bytes.bytes());
        if !bytes.len().is_multiple_of(dtype.size()) {
            let message = format!("{} bytes are no whole number of {dtype} elements", bytes.len());
            return Err(Error::Value { op, message });
        }
        check_count(op, bytes.len() / dtype.size(), shape)?;
        let origin = match dtype {
            DType::U32 => Origin::Indices(indices_of(bytes)),
            _ => Origin::File,
        };
        let tensor = self.take(op, dtype, shape, origin)?;
        if let Buffer::Cuda(buffer) = &tensor.buffer {
            self.upload(op, &buffer.storage, bytes)?;
        }
        Ok(tensor)
    }

    fn to_f32(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        use half::slice::HalfFloatSliceExt;
        let (op, count) = ("to_f32", tensor.len());
        let (storage, dtype) = self.of_this_device(op, "tensor", tensor)?;
        let mut values = vec![0.0; count];
        match dtype {
            DType::F32 => values = self.download(op, storage, count)?,
            DType::Bf16 => self.download::<half::bf16>(op, storage, count)?.convert_to_f32_slice(&mut values),
            DType::F16 => self.download::<half::f16>(op, storage, count)?.convert_to_f32_slice(&mut values),
            DType::U32 => {
                let expected = "f32, bf16 or f16";
                return Err(Error::Type { op, operand: "tensor", found: dtype, expected });
            }
        }
        Ok(values)
    }

    fn write_f32(&self, tensor: &mut Tensor, values: &[f32]) -> Result<()> {
        use half::slice::HalfFloatSliceExt;
        let op = "write_f32";
        check_count(op, values.len(), tensor.shape())?;
        let dtype = self.floats_mut(op, "tensor", tensor)?.dtype;
        let (storage, _) = self.of_this_device(op, "tensor", tensor)?;
        if dtype == DType::F32 {
            return self.upload(op, storage, values);
        }
        let mut rounded = vec![half::bf16::ZERO; values.len()];
        rounded.convert_from_f32_slice(values);
        self.upload(op, storage, &rounded)
    }

    /// Cast on the device: the host sees nothing of it.
    fn to_owned_f32(&self, tensor: &Tensor) -> Result<Tensor> {
        let mut owned = self.empty(tensor.shape())?;
        self.cast(tensor, &mut owned)?;
        Ok(owned)
    }

    fn place(&self) -> Place {
        Place::Cuda
    }

    fn available_bytes(&self) -> Result<Option<usize>> {
        self.free_bytes().map(Some)
    }

    fn usage(&self) -> Usage {
        self.memory.usage()
    }

    fn reset_peak(&self) {
        self.memory.reset_peak();
    }
}
