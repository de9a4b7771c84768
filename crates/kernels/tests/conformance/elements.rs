//! Operations on each element alone, and the reduction to one number.

use lora_sb_kernels::op::{adamw, elementwise, gated_activation};
use lora_sb_kernels::{Activation, AdamWStep};

use crate::common::{Draw, EPS, close, devices, magnitudes, widen};

/// Numbers of elements: none, one, around a register, several blocks of work and a rest.
const LENGTHS: [usize; 6] = [0, 1, 17, 1009, 16_384, 50_021];

#[test]
fn addition() {
    for kernels in devices() {
        for length in LENGTHS {
            let mut draw = Draw::new(length as u64);
            let (x, y) = (draw.normal(length), draw.normal(length));
            let mut truth = widen(&y);
            elementwise::naive::add(f64::from(-0.3f32), &widen(&x), &mut truth);
            let magnitude: Vec<f64> = x.iter().zip(&y).map(|(x, y)| f64::from(x.abs() + y.abs())).collect();
            let x = kernels.from_f32(&x, &[length]).unwrap();
            let mut y = kernels.from_f32(&y, &[length]).unwrap();
            kernels.add(-0.3, &x, &mut y).unwrap();
            close(&format!("add of {length}"), &kernels.to_f32(&y).unwrap(), &truth, 2.0 * EPS, &magnitude);
        }
    }
}

#[test]
fn fill_writes_every_element() {
    for kernels in devices() {
        for length in LENGTHS {
            let mut x = kernels.empty(&[length]).unwrap();
            kernels.fill(0.1, &mut x).unwrap();
            assert!(kernels.to_f32(&x).unwrap().iter().all(|&x| x == 0.1), "{length}");
        }
    }
}

#[test]
fn scaled_sign_has_the_bits_of_the_specification() {
    for kernels in devices() {
        for length in LENGTHS {
            let mut values = Draw::new(length as u64).normal(length);
            let special = [0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE / 8.0];
            values.iter_mut().zip(special).for_each(|(value, special)| *value = special);
            let mut x = kernels.from_f32(&values, &[length]).unwrap();
            kernels.scaled_sign(-0.3, &mut x).unwrap();
            elementwise::naive::scaled_sign(-0.3, &mut values);
            assert_eq!(bits(&kernels.to_f32(&x).unwrap()), bits(&values), "{length}");
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn silu_and_its_gradient() {
    for kernels in devices() {
        for shape in [[0, 5], [1, 1], [1, 17], [3, 1009], [31, 1601]] {
            let length = shape[0] * shape[1];
            let mut draw = Draw::new(length as u64);
            let [mut gate, up, dh] = [draw.normal(length), draw.normal(length), draw.normal(length)];
            // Where exp(-gate) overflows, where it vanishes, and where 1 + exp(-gate) rounds to 1.
            let special = [0.0, -0.0, 200.0, -200.0, 87.0, -88.0, -89.0, 17.0, -17.0];
            gate.iter_mut().zip(special).for_each(|(gate, special)| *gate = special);
            let tensor = |values: &[f32]| kernels.from_f32(values, &shape).unwrap();
            let (mut gate_tensor, mut up_tensor, dh_tensor) = (tensor(&gate), tensor(&up), tensor(&dh));
            let (gate, up, dh) = (widen(&gate), widen(&up), widen(&dh));

            let mut truth = vec![f64::NAN; length];
            gated_activation::naive::forward(Activation::Silu, &gate, &up, &mut truth);
            let mut h = kernels.empty(&shape).unwrap();
            kernels.gated_activation(Activation::Silu, &gate_tensor, &up_tensor, &mut h).unwrap();
            // exp is off by 4 roundings, the sigmoid by 6, with two products behind it. Where exp overflows,
            // the sigmoid is 0 and not the subnormal number that it should be.
            let flushed = f64::from(f32::MIN_POSITIVE) / EPS;
            let found = kernels.to_f32(&h).unwrap();
            let size: Vec<f64> =
                (0..length).map(|i| truth[i].abs() + flushed * (gate[i] * up[i]).abs()).collect();
            close(&format!("silu of {shape:?}"), &found, &truth, 8.0 * EPS, &size);

            let (mut dgate, mut dup) = (gate.clone(), up.clone());
            gated_activation::naive::backward(Activation::Silu, &mut dgate, &mut dup, &dh);
            kernels
                .gated_activation_backward(Activation::Silu, &mut gate_tensor, &mut up_tensor, &dh_tensor)
                .unwrap();
            let found = kernels.to_f32(&up_tensor).unwrap();
            let size: Vec<f64> =
                (0..length).map(|i| dup[i].abs() + flushed * (gate[i] * dh[i]).abs()).collect();
            close(&format!("dup of {shape:?}"), &found, &dup, 8.0 * EPS, &size);
            // s (1 + z (1 - s)): each of the two terms, before one cancels the other. 1 - s has an absolute
            // error of EPS where s is near 1.
            let terms = (0..length).map(|i| {
                let s = 1.0 / (1.0 + (-gate[i]).exp());
                (dh[i] * up[i]).abs() * (s + flushed) * (1.0 + gate[i].abs())
            });
            let found = kernels.to_f32(&gate_tensor).unwrap();
            close(&format!("dgate of {shape:?}"), &found, &dgate, 12.0 * EPS, &terms.collect::<Vec<_>>());
        }
    }
}

#[test]
fn adamw_steps() {
    for kernels in devices() {
        for length in LENGTHS {
            let mut draw = Draw::new(length as u64);
            let (g, p) = (draw.normal(length), draw.normal(length));
            let (mut p_true, mut m_true, mut v_true) = (widen(&p), vec![0.0; length], vec![0.0; length]);
            let g_tensor = kernels.from_f32(&g, &[length]).unwrap();
            let mut p_tensor = kernels.from_f32(&p, &[length]).unwrap();
            let mut m_tensor = kernels.zeros(&[length]).unwrap();
            let mut v_tensor = kernels.zeros(&[length]).unwrap();
            let mut moved = vec![0.0; length];
            for (step, learning_rate) in [(1, 1e-3), (2, 5e-4), (3, 2e-3)] {
                let numbers = AdamWStep {
                    learning_rate,
                    beta1: 0.9,
                    beta2: 0.999,
                    epsilon: 1e-8,
                    weight_decay: 0.1,
                    gradient_scale: 0.7,
                    step,
                };
                let before = p_true.clone();
                adamw::naive::step(&numbers, &widen(&g), &mut p_true, &mut m_true, &mut v_true);
                moved.iter_mut().zip(before.iter().zip(&p_true)).for_each(|(m, (b, a))| *m += (a - b).abs());
                kernels.adamw(&numbers, &g_tensor, &mut p_tensor, &mut m_tensor, &mut v_tensor).unwrap();
            }
            // 1 - beta2 = 0.001 is rounded to f32 like the other factors: three steps of a few roundings.
            let check = |what, tensor, truth: &[f64], magnitude: &[f64]| {
                let found = kernels.to_f32(tensor).unwrap();
                close(&format!("{what} of {length}"), &found, truth, 24.0 * EPS, magnitude);
            };
            check("m", &m_tensor, &m_true, &magnitudes(&m_true));
            check("v", &v_tensor, &v_true, &magnitudes(&v_true));
            let scale: Vec<f64> = p_true.iter().zip(&moved).map(|(p, moved)| p.abs() + moved).collect();
            check("p", &p_tensor, &p_true, &scale);
        }
    }
}

#[test]
fn sum_of_squares() {
    for kernels in devices() {
        for length in LENGTHS {
            let mut values = Draw::new(length as u64).normal(length);
            let found = |values: &[f32]| {
                kernels.sum_of_squares(&kernels.from_f32(values, &[length]).unwrap()).unwrap()
            };
            let truth: f64 = widen(&values).iter().map(|x| x * x).sum();
            let allowed = f64::EPSILON * length as f64 * truth;
            assert!((found(&values) - truth).abs() <= allowed, "{length}: {} of {truth}", found(&values));
            for special in [f32::NAN, f32::INFINITY] {
                if let Some(last) = values.last_mut() {
                    *last = special;
                    assert_eq!(found(&values).is_nan(), special.is_nan(), "{length}");
                    assert!(!found(&values).is_finite(), "{length}: {special} is not lost");
                }
            }
        }
        let overflowing = kernels.from_f32(&[3e38, 3e38], &[2]).unwrap();
        assert!(kernels.sum_of_squares(&overflowing).unwrap().is_finite(), "squares are taken in f64");
    }
}
