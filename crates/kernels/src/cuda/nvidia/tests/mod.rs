//! The bindings against libraries on host memory: what is asked of the driver, and what its failures read like.

mod driver;
mod fake;
#[cfg(feature = "emulator")]
mod operations;
mod products;
mod refusals;
