//! Dropout on the CPU.

use super::{Dropout, DropoutMask, check};
use crate::cpu::blocks::{BLOCK, Room, TILE};
use crate::cpu::vector::vectorised;
use crate::{Accum, Cpu, Result, Tensor};

/// Words of the mask at a time, each with two draws.
const WORDS: usize = 128;

impl Dropout for Cpu {
    fn dropout(&self, rate: f32, seed: u64, x: &Tensor, accum: Accum, y: &mut Tensor) -> Result<()> {
        let op = "dropout";
        let mask = check(rate, seed, x, y)?;
        let (x, y) = (x.floats(op, "x")?, y.floats_mut(op, "y")?);
        let blocks = x.chunks(BLOCK).zip(y.chunks(BLOCK)).enumerate();
        self.each(x.len(), blocks, |(block, (x, y))| {
            let [mut x_room, mut y_room] = <[Room; 2]>::default();
            for (tile, (x, y)) in x.chunks(TILE).zip(y.chunks(TILE)).enumerate() {
                let (first, x) = (block * BLOCK + tile * TILE, x_room.read(x));
                y_room.write(accum, y, |y| match accum {
                    Accum::Replace => replace(mask, first, x, y),
                    Accum::Add => add(mask, first, x, y),
                });
            }
        });
        Ok(())
    }
}

vectorised! {
    /// `y = x mask / (1 - rate)` for the elements from the even index `first` on.
    fn replace<L>(mask: DropoutMask, first: usize, x: &[f32], y: &mut [f32]) {
        masked(mask, first, x, y, |y, value| *y = value);
    }
}

vectorised! {
    /// `y += x mask / (1 - rate)` for the elements from the even index `first` on.
    fn add<L>(mask: DropoutMask, first: usize, x: &[f32], y: &mut [f32]) {
        masked(mask, first, x, y, |y, value| *y += value);
    }
}

/// Hands `write` every element with the masked value behind it.
#[inline(always)]
fn masked(mask: DropoutMask, first: usize, x: &[f32], y: &mut [f32], write: impl Fn(&mut f32, f32)) {
    let mut words = [0; WORDS];
    let chunks = x.chunks(2 * WORDS).zip(y.chunks_mut(2 * WORDS)).enumerate();
    for (chunk, (x, y)) in chunks {
        let before = (first / 2 + chunk * WORDS) as u64;
        for (j, word) in words.iter_mut().enumerate() {
            *word = mask.word(before + j as u64).to_le();
        }
        let draws: &[u32] = bytemuck::cast_slice(&words);
        for ((&draw, &x), y) in draws.iter().zip(x).zip(y) {
            write(y, if mask.kept(u32::from_le(draw)) { mask.scale * x } else { 0.0 });
        }
    }
}
