//! The losses of values at hand: a classifier's logits, a regression's predictions.

use lora_sb_kernels::op::{cross_entropy, squared_error};
use lora_sb_kernels::{DType, LossGradients};

use crate::common::{DTYPES, Draw, EPS, activation, close, devices, magnitudes, sum_error, widen};

#[test]
fn cross_entropy_of_logits() {
    for kernels in devices() {
        for ((n, c), spread) in [(0, 3), (1, 1), (1, 2), (5, 17), (67, 3), (131, 257)]
            .into_iter()
            .flat_map(|shape| [(shape, 1.0), (shape, 300.0)])
        {
            let mut draw = Draw::new((n * 1000 + c) as u64);
            let logits: Vec<f32> = draw.normal(n * c).iter().map(|z| z * spread).collect();
            let (labels, weights) = (draw.indices(n, c), draw.normal(n));
            let mut z = kernels.from_f32(&logits, &[n, c]).unwrap();
            let loss = kernels
                .cross_entropy_of_logits(
                    &mut z,
                    &kernels.from_u32(&labels, &[n]).unwrap(),
                    &kernels.from_f32(&weights, &[n]).unwrap(),
                )
                .unwrap();
            let (mut truth, weights) = (widen(&logits), widen(&weights));
            let largest = truth.iter().fold(0.0f64, |largest, z| largest.max(z.abs()));
            let true_loss = cross_entropy::naive::loss_and_gradient(&mut truth, &labels, &weights, c);
            // The difference to the largest logit is rounded once, then exp and the sum.
            let error = 2.0 * EPS * largest + sum_error(c);
            let total: f64 = weights.iter().map(|weight| weight.abs()).sum();
            let case = format!("N={n} C={c} spread {spread}");
            assert!((loss - true_loss).abs() <= 2.0 * total * error, "{case}: {loss}, truth {true_loss}");
            // weight (softmax - [v = label]), the two terms before one cancels the other.
            let mut sizes = magnitudes(&truth);
            for (i, &label) in labels.iter().enumerate() {
                sizes[i * c + label as usize] += 2.0 * weights[i].abs();
            }
            close(&case, &kernels.to_f32(&z).unwrap(), &truth, 2.0 * error, &sizes);
        }
    }
}

#[test]
fn the_loss_takes_no_more_memory_than_it_is_counted_with() {
    let wanted = [LossGradients::None, LossGradients::Input, LossGradients::InputAndWeight];
    for (kernels, dtype) in devices().iter().flat_map(|kernels| DTYPES.map(|dtype| (kernels, dtype))) {
        for (gradients, chunk_rows) in wanted.into_iter().flat_map(|wanted| [(wanted, 3), (wanted, 100)]) {
            let (n, v, d) = (11, 259, 40);
            let (x, _) = activation(&**kernels, dtype, &Draw::new(1).normal(n * d), &[n, d]);
            let w = kernels.from_f32(&Draw::new(2).normal(v * d), &[v, d]).unwrap();
            let labels = kernels.from_u32(&Draw::new(3).indices(n, v), &[n]).unwrap();
            let weights = kernels.from_f32(&[0.1; 11], &[n]).unwrap();
            let (mut dx, mut dw) =
                (kernels.empty_of(dtype, &[n, d]).unwrap(), kernels.zeros(&[v, d]).unwrap());
            let dx = (gradients != LossGradients::None).then_some(&mut dx);
            let dw = (gradients == LossGradients::InputAndWeight).then_some(&mut dw);
            kernels.reset_peak();
            let before = kernels.usage().live_bytes;
            kernels.cross_entropy(&x, &w, &labels, &weights, None, chunk_rows, dx, dw).unwrap();
            let types = (dtype, DType::F32);
            let counted = kernels.place().loss_scratch_bytes(types, (n, v, d), chunk_rows, gradients);
            let taken = kernels.usage().peak_bytes - before;
            let case = format!("{}, x {dtype}, {gradients:?}, {chunk_rows} rows", kernels.name());
            assert!(taken <= counted, "{case}: {taken} bytes taken, {counted} counted");
        }
    }
}

#[test]
fn squared_errors() {
    for kernels in devices() {
        for n in [0, 1, 17, 1009] {
            let mut draw = Draw::new(n as u64);
            let [z, targets, weights] = [(); 3].map(|()| draw.normal(n));
            let tensor = |values: &[f32]| kernels.from_f32(values, &[n]).unwrap();
            let mut dz = tensor(&z);
            let loss = kernels.squared_error(&mut dz, &tensor(&targets), &tensor(&weights)).unwrap();
            let (mut truth, targets, weights) = (widen(&z), widen(&targets), widen(&weights));
            let true_loss = squared_error::naive::loss_and_gradient(&mut truth, &targets, &weights);
            let terms: f64 = truth.iter().zip(&weights).map(|(dz, w)| dz * dz / (4.0 * w.abs())).sum();
            assert!((loss - true_loss).abs() <= 3.0 * EPS * terms, "{n}: {loss}, truth {true_loss}");
            close(
                &format!("dz of {n}"),
                &kernels.to_f32(&dz).unwrap(),
                &truth,
                3.0 * EPS,
                &magnitudes(&truth),
            );
        }
        let one = |value: f32| kernels.from_f32(&[value], &[1]).unwrap();
        assert!(kernels.squared_error(&mut one(f32::NAN), &one(1.0), &one(1.0)).unwrap().is_nan());
        assert_eq!(kernels.squared_error(&mut one(3.0), &one(1.0), &one(0.5)).unwrap(), 2.0);
    }
}
