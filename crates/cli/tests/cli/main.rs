//! The `lora-sb` command as a user meets it: the real binary, tiny models, real files.

mod bad_input;
mod common;
mod end_to_end;
#[cfg(unix)]
mod interruption;
mod output;
mod recipes;
