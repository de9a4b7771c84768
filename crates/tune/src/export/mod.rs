//! What leaves the program, and what comes in from others.
//!
//! | module | reads and writes |
//! |---|---|
//! | [`native`] | the native adapter directory, which keeps every bit |
//! | [`peft`] | PEFT directories: what other programs load; and those that they, or the authors of LoRA-SB, wrote |
//! | [`merge`] | merged models: ordinary Hugging Face directories |
//! | [`average`] | one native adapter out of several that share A and B (Fed-SB) |
//! | [`verify`] | whether a written directory gives the logits of the adapter that it was made from |

pub mod average;
mod files;
pub mod merge;
pub mod native;
pub mod peft;
mod reference;
pub mod verify;
