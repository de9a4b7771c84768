//! The `lora-sb` command as a user meets it: the real binary, tiny models, real files.

mod bad_input;
mod common;
mod end_to_end;
#[cfg(unix)]
mod interruption;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod memory;
mod output;
mod recipes;
