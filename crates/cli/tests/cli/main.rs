//! The `lora-sb` command as a user meets it: the real binary, tiny models, real files.

mod bad_input;
mod bench;
mod common;
mod device;
mod doctor;
mod encoder;
mod end_to_end;
mod generation;
#[cfg(unix)]
mod interruption;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod memory;
mod methods;
mod output;
mod recipes;
mod table;
