//! Operations on each element alone, and the reduction to one number.

use lora_sb_kernels::op::{adamw, elementwise};
use lora_sb_kernels::{AdamWStep, DType};

use crate::common::{
    DTYPES, Draw, EPS, SOURCES, activation, close, close_in, devices, magnitudes, rounded, type_triples,
    weight, widen,
};

/// Numbers of elements: none, one, around a register, several blocks of work and a rest.
const LENGTHS: [usize; 6] = [0, 1, 17, 1009, 16_384, 50_021];

#[test]
fn casts() {
    for kernels in devices() {
        for length in LENGTHS {
            for (source, to) in SOURCES.into_iter().flat_map(|source| DTYPES.map(|to| (source, to))) {
                let (x, values) =
                    weight(&*kernels, source, &Draw::new(length as u64).normal(length), &[length]);
                let mut y = kernels.empty_of(to, &[length]).unwrap();
                kernels.cast(&x, &mut y).unwrap();
                assert_eq!(
                    kernels.to_f32(&y).unwrap(),
                    rounded(to, &values),
                    "{source:?} to {to} of {length}"
                );
            }
            let (x, values) = activation(&*kernels, DType::Bf16, &Draw::new(1).normal(length), &[length]);
            let mut y = kernels.empty(&[length]).unwrap();
            kernels.cast(&x, &mut y).unwrap();
            assert_eq!(kernels.to_f32(&y).unwrap(), values, "owned bf16 to f32 of {length}");
        }
    }
}

#[test]
fn addition() {
    for kernels in devices() {
        for (length, [x_type, y_type, _]) in
            LENGTHS.into_iter().flat_map(|length| type_triples().step_by(2).map(move |types| (length, types)))
        {
            let mut draw = Draw::new(length as u64);
            let (x_tensor, x) = activation(&*kernels, x_type, &draw.normal(length), &[length]);
            let (mut y_tensor, y) = activation(&*kernels, y_type, &draw.normal(length), &[length]);
            kernels.add(-0.3, &x_tensor, &mut y_tensor).unwrap();
            let (x, mut truth) = (widen(&x), widen(&y));
            let magnitude: Vec<f64> = x.iter().zip(&truth).map(|(x, y)| x.abs() + y.abs()).collect();
            elementwise::naive::add(f64::from(-0.3f32), &x, &mut truth);
            let case = format!("add of {length}, {x_type} to {y_type}");
            close_in(y_type, &case, &kernels.to_f32(&y_tensor).unwrap(), &truth, 2.0 * EPS, &magnitude);
        }
    }
}

#[test]
fn fill_writes_every_element() {
    for kernels in devices() {
        for (length, dtype) in LENGTHS.into_iter().flat_map(|length| DTYPES.map(|dtype| (length, dtype))) {
            let mut x = kernels.empty_of(dtype, &[length]).unwrap();
            kernels.fill(0.1, &mut x).unwrap();
            assert_eq!(
                kernels.to_f32(&x).unwrap(),
                rounded(dtype, &vec![0.1; length]),
                "{dtype} of {length}"
            );
        }
    }
}

#[test]
fn scaled_sign_has_the_bits_of_the_specification() {
    for kernels in devices() {
        for (length, dtype) in LENGTHS.into_iter().flat_map(|length| DTYPES.map(|dtype| (length, dtype))) {
            let mut values = Draw::new(length as u64).normal(length);
            let special = [0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE / 8.0];
            values.iter_mut().zip(special).for_each(|(value, special)| *value = special);
            let (mut x, mut values) = activation(&*kernels, dtype, &values, &[length]);
            kernels.scaled_sign(-0.3, &mut x).unwrap();
            elementwise::naive::scaled_sign(-0.3, &mut values);
            let truth = rounded(dtype, &values);
            assert_eq!(bits(&kernels.to_f32(&x).unwrap()), bits(&truth), "{dtype} of {length}");
        }
    }
}

#[test]
fn scaling() {
    for kernels in devices() {
        for (length, dtype) in LENGTHS.into_iter().flat_map(|length| DTYPES.map(|dtype| (length, dtype))) {
            let (mut x, mut values) =
                activation(&*kernels, dtype, &Draw::new(length as u64).normal(length), &[length]);
            kernels.scale(-0.3, &mut x).unwrap();
            elementwise::naive::scale(-0.3, &mut values);
            let truth = rounded(dtype, &values);
            assert_eq!(bits(&kernels.to_f32(&x).unwrap()), bits(&truth), "{dtype} of {length}");
        }
    }
}

#[test]
fn soft_caps() {
    for kernels in devices() {
        for (length, dtype) in LENGTHS.into_iter().flat_map(|length| DTYPES.map(|dtype| (length, dtype))) {
            for cap in [1e-3f32, 0.7, 30.0, 1e30] {
                let mut values = Draw::new(length as u64).normal(length);
                let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30, 0.625 * cap];
                values.iter_mut().zip(special).for_each(|(value, special)| *value = special);
                let (mut x, values) = activation(&*kernels, dtype, &values, &[length]);
                kernels.soft_cap(cap, &mut x).unwrap();
                let mut truth = widen(&values);
                elementwise::naive::soft_cap(cap, &mut truth);
                let (found, magnitude) = (kernels.to_f32(&x).unwrap(), magnitudes(&truth));
                // 4 roundings of tanh, 2 of x / cap by the reciprocal, 1 of the product.
                let case = format!("cap {cap} of {length}, {dtype}");
                close_in(dtype, &case, &found, &truth, 8.0 * EPS, &magnitude);
                let largest = rounded(dtype, &[cap])[0];
                assert!(found.iter().all(|x| x.abs() <= largest), "{case}: nothing is larger than the cap");
            }
        }
        let mut x = kernels.from_f32(&[f32::NAN], &[1]).unwrap();
        kernels.soft_cap(30.0, &mut x).unwrap();
        assert!(kernels.to_f32(&x).unwrap()[0].is_nan(), "NaN is not capped");
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
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

/// The order of operations is the specification's, whatever a device's.
#[test]
fn adamw_has_the_bits_of_the_specification() {
    for kernels in devices() {
        for length in LENGTHS {
            let mut draw = Draw::new(length as u64);
            let [g, mut p, mut m] = [(); 3].map(|()| draw.normal(length));
            let mut v: Vec<f32> = draw.normal(length).iter().map(|x| x * x).collect();
            let tensor = |values: &[f32]| kernels.from_f32(values, &[length]).unwrap();
            let (g_tensor, mut p_tensor, mut m_tensor, mut v_tensor) =
                (tensor(&g), tensor(&p), tensor(&m), tensor(&v));
            let numbers = AdamWStep {
                learning_rate: 3e-4,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.1,
                gradient_scale: 0.7,
                step: 5,
            };
            kernels.adamw(&numbers, &g_tensor, &mut p_tensor, &mut m_tensor, &mut v_tensor).unwrap();
            adamw::naive::step(&numbers, &g, &mut p, &mut m, &mut v);
            for (what, tensor, truth) in [("p", p_tensor, p), ("m", m_tensor, m), ("v", v_tensor, v)] {
                assert_eq!(bits(&kernels.to_f32(&tensor).unwrap()), bits(&truth), "{what} of {length}");
            }
        }
    }
}

/// Of all tensors at once as of each by itself.
#[test]
fn sums_of_squares() {
    for kernels in devices() {
        assert_eq!(kernels.sums_of_squares(&[]).unwrap(), [], "of no tensor");
        let tensors: Vec<_> = LENGTHS
            .into_iter()
            .chain([0, 4096, 3])
            .flat_map(|length| DTYPES.map(|dtype| (length, dtype)))
            .map(|(length, dtype)| {
                activation(&*kernels, dtype, &Draw::new(length as u64).normal(length), &[length]).0
            })
            .collect();
        let found = kernels.sums_of_squares(&tensors.iter().collect::<Vec<_>>()).unwrap();
        let alone: Vec<f64> = tensors.iter().map(|x| kernels.sum_of_squares(x).unwrap()).collect();
        assert_eq!(found, alone);
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
        let mut rounded = kernels.empty_of(DType::Bf16, &[3]).unwrap();
        kernels.write_f32(&mut rounded, &[1.0, -257.0, 0.5]).unwrap();
        assert_eq!(kernels.sum_of_squares(&rounded).unwrap(), 1.25 + 256.0 * 256.0);
        let overflowing = kernels.from_f32(&[3e38, 3e38], &[2]).unwrap();
        assert!(kernels.sum_of_squares(&overflowing).unwrap().is_finite(), "squares are taken in f64");
    }
}
