//! Laws of heads and of what comes before the blocks: labels, classes, positions, token types.

mod support;

use lora_sb_model::{Batch, Frozen, Model, Parameter, Recompute, Sequence, Target, Task};
use support::{Texts, families, largest, largest_difference, values, zeros};

const IDS: [u32; 4] = [3, 9, 4, 5];

fn batch(model: &Model, target: Target<'_>, second: Option<usize>) -> Batch {
    let sequence = Sequence { ids: &IDS, second, target, weight: 1.0 };
    Batch::pack(&**model.kernels(), &[sequence]).unwrap()
}

fn encoder(task: Task) -> Model {
    let all = families::all_encoders().into_iter().map(|family| family.model());
    all.into_iter().find(|model| model.config().task == task).unwrap()
}

#[test]
fn a_loss_is_that_of_the_logits() {
    let model = encoder(Task::Classification { labels: 3 });
    let of_class = batch(&model, Target::Class(2), Some(2));
    let logits = values(model.kernels(), &model.logits(&of_class, &Frozen).unwrap());
    assert_eq!(logits.len(), 3, "one row for the sequence");
    let sum: f64 = logits.iter().map(|&z| f64::from(z).exp()).sum();
    let expected = sum.ln() - f64::from(logits[2]);
    let loss = model.loss(&of_class, &Frozen).unwrap();
    assert!((loss - expected).abs() <= 8.0 * f64::from(f32::EPSILON) * expected.max(1.0));

    let model = encoder(Task::Regression);
    let of_value = batch(&model, Target::Value(2.5), None);
    let z = values(model.kernels(), &model.logits(&of_value, &Frozen).unwrap());
    let expected = (f64::from(z[0]) - 2.5).powi(2);
    let loss = model.loss(&of_value, &Frozen).unwrap();
    assert!((loss - expected).abs() <= 8.0 * f64::from(f32::EPSILON) * expected.max(1.0));
}

#[test]
fn targets_that_the_model_does_not_predict() {
    let decoder = families::all_decoders()[0].model();
    let (classes, numbers) = (encoder(Task::Classification { labels: 3 }), encoder(Task::Regression));
    let trained = [true; 4];
    let tokens = Target::Tokens(&trained);
    for (model, target, parts) in [
        (&decoder, Target::Class(0), ["tokens", "classes"]),
        (&decoder, Target::Value(0.5), ["tokens", "numbers"]),
        (&classes, tokens, ["classes", "tokens"]),
        (&classes, Target::Value(0.5), ["classes", "numbers"]),
        (&classes, Target::Class(3), ["class 3", "3 classes"]),
        (&numbers, Target::Class(0), ["numbers", "classes"]),
        (&numbers, Target::Tokens(&[false; 4]), ["numbers", "tokens"]),
    ] {
        let batch = batch(model, target, None);
        let mut gradients = zeros(model);
        let backward = model.loss_and_gradients(&batch, &mut Frozen, &mut gradients, Recompute::None);
        for error in [model.loss(&batch, &Frozen).unwrap_err(), backward.unwrap_err()] {
            let error = error.to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{parts:?} are not in: {error}");
        }
    }
}

#[test]
fn learned_positions_end() {
    for family in families::all_encoders() {
        let mut model = family.model();
        // RoBERTa's table of 64 rows begins behind padding, whose token is 27 here.
        let longest = if model.config().family.model_type() == "roberta" { 64 - 28 } else { 64 };
        let texts = |length| vec![5; length];
        let batch = |model: &Model, ids: &[u32]| {
            let target =
                if model.config().task == Task::Regression { Target::Value(1.0) } else { Target::Class(1) };
            let sequence = Sequence { ids, second: None, target, weight: 1.0 };
            Batch::pack(&**model.kernels(), &[sequence]).unwrap()
        };
        assert!(model.loss(&batch(&model, &texts(longest)), &Frozen).unwrap().is_finite());
        model.prepare(longest).unwrap();
        let loss = model.loss(&batch(&model, &texts(longest + 1)), &Frozen);
        for error in [model.prepare(longest + 1).unwrap_err(), loss.unwrap_err()] {
            assert!(error.to_string().contains(&longest.to_string()), "{error}");
            assert!(error.hint().unwrap().contains(&format!("max_length to {longest}")), "{error}");
        }
    }
}

#[test]
fn a_second_text_is_another_type_of_token() {
    let model = encoder(Task::Classification { labels: 3 });
    let logits = |second| {
        let batch = batch(&model, Target::Class(0), second);
        values(model.kernels(), &model.logits(&batch, &Frozen).unwrap())
    };
    assert_eq!(logits(None), logits(Some(4)), "a second text of no token is none");
    assert!(largest_difference(&logits(None), &logits(Some(2))) > 0.01 * largest(&logits(None)));
    let single = encoder(Task::Regression);
    assert!(single.loss(&batch(&single, Target::Value(0.0), Some(2)), &Frozen).is_err());
}

#[test]
fn padding_learns_nothing_and_unused_rows_neither() {
    for family in families::all_encoders() {
        let model = family.model();
        let mut gradients = zeros(&model);
        let batch = Texts::new().batch(&model);
        model.loss_and_gradients(&batch, &mut Frozen, &mut gradients, Recompute::None).unwrap();
        let rows = |parameter| -> Vec<usize> {
            let gradient = values(model.kernels(), &gradients[&parameter]);
            let rows = gradient.chunks_exact(15).enumerate();
            rows.filter(|(_, row)| largest(row) > 0.0).map(|(index, _)| index).collect()
        };
        assert_eq!(rows(Parameter::Embedding), [0, 1, 2, 3, 4, 5, 9, 17, 22, 28], "{}", family.name);
        // The longest text has 7 tokens.
        let first = if model.config().family.model_type() == "roberta" { 28 } else { 0 };
        assert_eq!(rows(Parameter::PositionEmbedding), (first..first + 7).collect::<Vec<_>>());
        let types = model.config().type_vocab_size;
        assert_eq!(rows(Parameter::TokenTypeEmbedding), (0..types).collect::<Vec<_>>());
    }
}
