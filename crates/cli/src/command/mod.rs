//! One file a command.

pub(crate) mod average;
pub(crate) mod bench;
pub(crate) mod doctor;
pub(crate) mod export;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod merge;
pub(crate) mod plan;
pub(crate) mod predict;
pub(crate) mod table;
pub(crate) mod train;
pub(crate) mod verify;
