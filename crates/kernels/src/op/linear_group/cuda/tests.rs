//! The group against its layers one after another, at a rank below and one beyond the fused kernel's.

use super::super::{GroupLayer, LatentBackward, LatentPart, LinearGroup, composed};
use crate::cuda::ThreadOrder;
use crate::{Accum, Cuda, DType, Generator, Memory, Stream, Tensor};

const T: usize = 37;
const K: usize = 16;
const N: usize = 24;

fn draw(gpu: &Cuda, case: u64, dtype: DType, shape: [usize; 2]) -> Tensor {
    let mut values = vec![0.0; shape[0] * shape[1]];
    Generator::new(5, Stream::Weights, case).normal(0.25, &mut values);
    let mut tensor = gpu.empty_of(dtype, &shape).unwrap();
    gpu.write_f32(&mut tensor, &values).unwrap();
    tensor
}

fn layer([weight, a, r, b]: &[Tensor; 4]) -> GroupLayer<'_> {
    GroupLayer { weight, bias: None, latent: Some(LatentPart { a, r, b, scale: 0.5 }) }
}

/// Which way a group is computed.
#[derive(Clone, Copy)]
enum By {
    Group,
    Layers,
}

/// ys, us, dRs and dx of two layers of rank `r`.
fn outcome(gpu: &Cuda, dtype: DType, r: usize, by: By) -> Vec<Vec<f32>> {
    let f32s = |case, shape| draw(gpu, case, DType::F32, shape);
    let held: Vec<[Tensor; 4]> = (0..2)
        .map(|i| [f32s(i, [N, K]), f32s(i + 2, [r, K]), f32s(i + 4, [r, r]), f32s(i + 6, [N, r])])
        .collect();
    let layers: Vec<GroupLayer<'_>> = held.iter().map(layer).collect();
    let x = draw(gpu, 20, dtype, [T, K]);
    let mut ys: Vec<Tensor> = (0..2).map(|_| gpu.empty(&[T, N]).unwrap()).collect();
    let mut out: Vec<&mut Tensor> = ys.iter_mut().collect();
    let us = match by {
        By::Group => gpu.linear_group(&x, &layers, Accum::Replace, &mut out),
        By::Layers => composed::forward(gpu, &x, &layers, Accum::Replace, &mut out),
    };
    let us: Vec<Tensor> = us.unwrap().into_iter().map(Option::unwrap).collect();
    let dys: Vec<Tensor> = (0..2).map(|i| draw(gpu, 30 + i, dtype, [T, N])).collect();
    let mut gradients: Vec<Tensor> = (0..2).map(|_| gpu.zeros(&[r, r]).unwrap()).collect();
    let mut dx = gpu.empty(&[T, K]).unwrap();
    let pairs = us.iter().zip(&mut gradients);
    let mut latents: Vec<_> = pairs.map(|(u, gradient)| Some(LatentBackward { u, gradient })).collect();
    let (dys, wanted) = (dys.iter().collect::<Vec<_>>(), Some((&mut dx, Accum::Replace)));
    match by {
        By::Group => gpu.linear_group_backward(&dys, &layers, &mut latents, wanted),
        By::Layers => composed::backward(gpu, &dys, &layers, &mut latents, wanted),
    }
    .unwrap();
    let all = ys.iter().chain(&us).chain(&gradients).chain([&dx]);
    all.map(|tensor| gpu.to_f32(tensor).unwrap()).collect()
}

#[test]
fn a_group_is_its_layers_whatever_the_rank() {
    let Some(gpu) = Cuda::emulated(ThreadOrder::Forward).unwrap() else { return };
    let backward = Cuda::emulated(ThreadOrder::Backward).unwrap().unwrap();
    for (dtype, r) in [(DType::F32, 300), (DType::Bf16, 300), (DType::F32, 65), (DType::Bf16, 72)] {
        let (found, truth) = (outcome(&gpu, dtype, r, By::Group), outcome(&gpu, dtype, r, By::Layers));
        for (which, (found, truth)) in found.iter().zip(&truth).enumerate() {
            let size = truth.iter().fold(0.0f32, |size, x| size.max(x.abs()));
            // h and w may be rounded to the other neighbour in bf16.
            let allowed = size * if dtype == DType::F32 { 1e-5 } else { 4e-3 };
            for (found, truth) in found.iter().zip(truth) {
                assert!((found - truth).abs() <= allowed, "{dtype} r={r}, result {which}: {found}, {truth}");
            }
        }
        assert!(
            found == outcome(&backward, dtype, r, By::Group),
            "{dtype} r={r} depends on the order of threads"
        );
    }
}
