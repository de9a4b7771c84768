//! Laws of the rows that are read: the last block computes no others behind its attention, and nobody can tell.

mod support;

use lora_sb_kernels::DType;
use lora_sb_model::{
    Batch, Frozen, InputGradient, Model, NoGradients, Parameter, Projection, Recompute, Sequence,
};
use serde_json::json;
use support::{Texts, families, host, largest, largest_difference, model, values, zeros};

/// Three blocks with a fourth behind them that adds nothing: all rows of the third are computed.
fn with_a_block_that_adds_nothing(family: &families::Small, model: &Model) -> Model {
    let mut longer = family.with(json!({ "num_hidden_layers": 4 }));
    let kernels = model.kernels();
    for parameter in longer.parameters() {
        let own = match model.weight(parameter) {
            Some(weight) => kernels.to_f32(weight).unwrap(),
            None => {
                let adds = [Projection::Output, Projection::Down].map(|projection| projection.of(3));
                let of_those = adds.map(Parameter::Weight).contains(&parameter)
                    || adds.map(Parameter::Bias).contains(&parameter);
                if !of_those {
                    continue;
                }
                vec![0.0; longer.weight(parameter).unwrap().len()]
            }
        };
        kernels.write_f32(longer.weight_mut(parameter).unwrap(), &own).unwrap();
    }
    longer
}

#[test]
fn the_gradients_are_those_of_all_rows() {
    for family in families::all_decoders() {
        for dtype in [DType::F32, DType::Bf16] {
            let mut model = family.model();
            let mut longer = with_a_block_that_adds_nothing(&family, &model);
            model.set_dtype(dtype).unwrap();
            longer.set_dtype(dtype).unwrap();
            let batch = Texts::new().batch(&model);
            let run = |model: &Model| {
                let mut gradients = zeros(model);
                let loss =
                    model.loss_and_gradients(&batch, &mut Frozen, &mut gradients, Recompute::None).unwrap();
                (loss, host(model, &gradients))
            };
            let ((loss, few), (expected, all)) = (run(&model), run(&longer));
            // Sums over tokens leave out zeros and are cut into other pieces; in bf16 a sum on an edge may then be rounded
            // to its other neighbour.
            let tolerance = match dtype {
                DType::Bf16 => 2.0 / 256.0,
                _ => 64.0 * f32::EPSILON,
            };
            let name = format!("{}, {dtype}", family.name);
            assert!((loss - expected).abs() <= f64::from(tolerance) * expected, "{name}: {loss}, {expected}");
            for (parameter, few) in few {
                let all = &all[&parameter];
                let difference = largest_difference(&few, all);
                assert!(difference <= tolerance * largest(all), "{name}: {parameter:?}: {difference:e}");
            }
        }
    }
}

#[test]
fn the_loss_is_that_of_all_rows() {
    for family in families::all_decoders() {
        let model = family.model();
        let ids = [1, 17, 3, 28, 5, 5, 2];
        let trained = [false, true, false, false, true, true, false];
        let batch = Batch::pack(&**model.kernels(), &[Sequence::text(&ids, &trained, 0.25)]).unwrap();
        let logits = values(model.kernels(), &model.logits(&batch, &Frozen).unwrap());
        let rows: Vec<&[f32]> = logits.chunks_exact(model.config().vocab_size).collect();
        let mut expected = 0.0;
        for i in (1..ids.len()).filter(|&i| trained[i]) {
            let row = rows[i - 1];
            let sum: f64 = row.iter().map(|&z| f64::from(z).exp()).sum();
            expected += 0.25 * (sum.ln() - f64::from(row[ids[i] as usize]));
        }
        let loss = model.loss(&batch, &Frozen).unwrap();
        assert!((loss - expected).abs() <= 1e-5 * expected, "{}: {loss}, {expected}", family.name);
    }
}

#[test]
fn the_last_block_makes_the_rows_that_are_read() {
    for family in families::all() {
        let model = family.model();
        let batch = Texts::new().batch(&model);
        let width = model.config().hidden_size;
        let mut x = model.embed(&batch).unwrap();
        for layer in 0..3 {
            assert_eq!(x.shape(), [batch.tokens(), width]);
            (x, _) = model.block_forward(layer, x, &batch, &Frozen).unwrap();
        }
        assert_eq!(x.shape(), [batch.labelled(), width]);
        let (_, dx) = model.head(x, &batch, &mut NoGradients, InputGradient::Wanted).unwrap();
        assert_eq!(dx.unwrap().shape(), [batch.labelled(), width]);
    }
}

#[test]
fn a_block_of_which_no_row_is_read_makes_none() {
    let model = model(json!({}));
    let sequence = Sequence::text(&[3, 4, 5], &[true, false, false], 1.0);
    let batch = Batch::pack(&**model.kernels(), &[sequence]).unwrap();
    let x = model.embed(&batch).unwrap();
    let (y, saved) = model.block_forward(2, x, &batch, &Frozen).unwrap();
    assert_eq!(y.shape(), [0, 13]);
    let (loss, dy) = model.head(y, &batch, &mut NoGradients, InputGradient::Wanted).unwrap();
    assert_eq!(loss, 0.0);
    let wanted = InputGradient::Wanted;
    let dx =
        model.block_backward(2, saved, &batch, dy.unwrap(), &mut Frozen, &mut NoGradients, wanted).unwrap();
    assert_eq!(values(model.kernels(), &dx.unwrap()), [0.0; 3 * 13]);
}
