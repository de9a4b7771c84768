//! What leaves the program: the native adapter directory, PEFT directories, and merged models.

mod files;
pub mod merge;
pub mod native;
pub mod peft;
