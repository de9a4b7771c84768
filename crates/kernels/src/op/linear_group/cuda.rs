//! On a GPU.

use super::*;
use crate::Cuda;

impl LinearGroup for Cuda {}
