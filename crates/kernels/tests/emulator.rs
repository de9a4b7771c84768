//! What the emulator is trusted for.

mod common;

use common::{Draw, gpu};
use lora_sb_kernels::{DType, Elementwise, Memory};

#[test]
fn cast() {
    let Some(gpu) = gpu() else { return };
    for count in [1, 3, 4, 5, 1023, 4099] {
        let values = Draw::new(1).normal(count);
        let x = gpu.from_f32(&values, &[count]).unwrap();
        let mut y = gpu.empty_of(DType::Bf16, &[count]).unwrap();
        gpu.cast(&x, &mut y).unwrap();
        assert_eq!(gpu.to_f32(&y).unwrap(), common::rounded(DType::Bf16, &values));
    }
}
