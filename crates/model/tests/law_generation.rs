//! Laws of generation on a small random model.

mod support;

use lora_sb_kernels::{DType, Generator, Stream};
use lora_sb_model::{
    Batch, Decoder, Frozen, Generation, Model, Next, Norm, Parameter, Sampling, Sequence, generate,
};
use serde_json::json;
use support::{families, largest, largest_difference, model, values};

fn prompts() -> Vec<Vec<u32>> {
    vec![vec![1, 17, 3, 28, 5], vec![4], vec![1, 22, 0, 9, 2, 2, 8]]
}

fn run(model: &Model, prompts: &[Vec<u32>], options: &Generation, seed: u64) -> Vec<Vec<u32>> {
    let mut generators = generators(prompts, seed);
    generate(model, &Frozen, prompts, options, &mut generators, &mut |_, _| Next::Continue).unwrap()
}

fn generators(prompts: &[Vec<u32>], seed: u64) -> Vec<Generator> {
    (0..prompts.len() as u64).map(|index| Generator::new(seed, Stream::Sampling, index)).collect()
}

fn greedy(max_new_tokens: usize) -> Generation {
    Generation { max_new_tokens, sampling: Sampling::Greedy, stop: vec![] }
}

fn random(temperature: f64, top_k: Option<usize>, top_p: Option<f64>) -> Generation {
    Generation { max_new_tokens: 11, sampling: Sampling::Random { temperature, top_k, top_p }, stop: vec![] }
}

/// Logits of the last token, computed from the beginning.
fn last_logits(model: &Model, ids: &[u32]) -> Vec<f32> {
    let trained = vec![false; ids.len()];
    let sequence = Sequence::text(ids, &trained, 1.0);
    let batch = Batch::pack(&**model.kernels(), &[sequence]).unwrap();
    let logits = values(model.kernels(), &model.logits(&batch, &Frozen).unwrap());
    logits[logits.len() - model.config().vocab_size..].to_vec()
}

#[test]
fn with_a_cache_is_without() {
    for family in families::all_decoders() {
        let model = family.model();
        let prompts = prompts();
        let mut texts = prompts.clone();
        let mut decoder = Decoder::new(&model, &Frozen, &prompts, 12).unwrap();
        let mut new = prompts.clone();
        // Sequences leave at different times, and bring one token or several: fewer than a window and more.
        for step in 0..5 {
            let active: Vec<usize> = (0..3).filter(|index| index + step < 5).collect();
            let pieces: Vec<(usize, &[u32])> = active.iter().map(|&index| (index, &new[index][..])).collect();
            let logits = values(model.kernels(), &decoder.advance(&pieces).unwrap());
            for (&index, logits) in active.iter().zip(logits.chunks_exact(29)) {
                let expected = last_logits(&model, &texts[index]);
                // The same sums, cut differently.
                let tolerance = 64.0 * f32::EPSILON * largest(&expected);
                let difference = largest_difference(logits, &expected);
                assert!(difference <= tolerance, "{}: step {step}, sequence {index}", family.name);
                let count = [1, 2, 1, 5][(step + index) % 4];
                new[index] = (0..count).map(|i| (7 * step as u32 + 3 * index as u32 + i) % 29).collect();
                let more = new[index].clone();
                texts[index].extend(more);
            }
        }
    }
}

#[test]
fn a_cache_takes_the_bytes_that_are_planned() {
    for family in families::all_decoders() {
        let mut model = family.model();
        for dtype in [DType::F32, DType::Bf16] {
            model.set_dtype(dtype).unwrap();
            let before = model.kernels().usage().live_bytes;
            let decoder = Decoder::new(&model, &Frozen, &prompts(), 6).unwrap();
            let taken = model.kernels().usage().live_bytes - before;
            assert_eq!(taken, model.footprint().cache(&[11, 7, 13]), "{}", family.name);
            drop(decoder);
        }
    }
}

#[test]
fn greedy_takes_the_likeliest_and_together_is_alone() {
    for family in families::all_decoders() {
        let model = family.model();
        let together = run(&model, &prompts(), &greedy(9), 0);
        for (prompt, text) in prompts().into_iter().zip(&together) {
            let alone = run(&model, std::slice::from_ref(&prompt), &greedy(9), 0);
            assert_eq!(&alone[0], text, "{}", family.name);
            let mut ids = prompt;
            for &id in text {
                let logits = last_logits(&model, &ids);
                let highest = logits.iter().copied().fold(f32::MIN, f32::max);
                // Two tokens may be equally likely but for the order of the sums.
                let tolerance = 64.0 * f32::EPSILON * largest(&logits);
                assert!(logits[id as usize] >= highest - tolerance, "{}", family.name);
                ids.push(id);
            }
        }
    }
}

#[test]
fn what_is_drawn_for_a_prompt_does_not_depend_on_the_others() {
    let (model, options) = (model(json!({})), random(0.9, Some(20), Some(0.95)));
    let options = Generation { max_new_tokens: 7, ..options };
    let together = run(&model, &prompts(), &options, 5);
    for (index, prompt) in prompts().into_iter().enumerate() {
        let mut own = [Generator::new(5, Stream::Sampling, index as u64)];
        let alone =
            generate(&model, &Frozen, &[prompt], &options, &mut own, &mut |_, _| Next::Continue).unwrap();
        assert_eq!(alone[0], together[index]);
    }
}

#[test]
fn a_logit_that_is_not_finite_is_an_error() {
    for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut model = model(json!({}));
        let kernels = model.kernels().clone();
        let gain = model.weight_mut(Parameter::Gain(Norm::Final)).unwrap();
        let mut values = kernels.to_f32(gain).unwrap();
        values[2] = wrong;
        kernels.write_f32(gain, &values).unwrap();
        let (prompts, options) = (prompts(), random(1.0, None, None));
        let mut generators = generators(&prompts, 0);
        let error =
            generate(&model, &Frozen, &prompts, &options, &mut generators, &mut |_, _| Next::Continue);
        assert!(error.unwrap_err().to_string().contains("the logit of token 0 after prompt 0"));
    }
}

#[test]
fn the_caller_ends_a_text() {
    let model = model(json!({}));
    let free = run(&model, &prompts(), &greedy(9), 0);
    let mut generators = generators(&prompts(), 0);
    let mut counts = [0; 3];
    let mut on_token = |index: usize, _| {
        counts[index] += 1;
        if index == 1 && counts[index] == 4 { Next::Stop } else { Next::Continue }
    };
    let ended = generate(&model, &Frozen, &prompts(), &greedy(9), &mut generators, &mut on_token).unwrap();
    assert_eq!(ended[1], free[1][..4], "the token with which it ends is its last");
    assert_eq!((&ended[0], &ended[2]), (&free[0], &free[2]));
    assert_eq!(counts, [9, 4, 9]);
}

#[test]
fn an_encoder_writes_no_text() {
    for family in families::all_encoders() {
        let model = family.model();
        let error = Decoder::new(&model, &Frozen, &prompts(), 1).err().unwrap().to_string();
        assert!(error.contains(model.config().family.model_type()), "{error}");
    }
}

#[test]
fn equal_logits_give_the_lowest_id() {
    let mut model = model(json!({}));
    let kernels = model.kernels().clone();
    let head = model.weight_mut(Parameter::Head).unwrap();
    kernels.write_f32(head, &[0.0; 29 * 13]).unwrap();
    assert_eq!(run(&model, &prompts(), &greedy(3), 0), vec![vec![0; 3]; 3]);
}

#[test]
fn a_stop_id_ends_its_text_alone() {
    let model = model(json!({}));
    let free = run(&model, &prompts(), &greedy(9), 0);
    let stop = free[0][3];
    let options = Generation { stop: vec![stop, 1000], ..greedy(9) };
    let mut told = Vec::new();
    let mut generators = generators(&prompts(), 0);
    let stopped = generate(&model, &Frozen, &prompts(), &options, &mut generators, &mut |i, id| {
        told.push((i, id));
        Next::Continue
    })
    .unwrap();
    for (free, stopped) in free.iter().zip(&stopped) {
        let end = free.iter().position(|&id| id == stop).unwrap_or(free.len());
        assert_eq!(stopped, &free[..end]);
    }
    assert!(stopped[0].len() <= 3);
    assert_eq!(told.len(), stopped.iter().map(Vec::len).sum::<usize>());
    assert!(told.iter().all(|&(_, id)| id != stop));
}

#[test]
fn a_seed_is_a_text() {
    let model = model(json!({}));
    let options = random(1.3, Some(20), Some(0.95));
    let one = run(&model, &prompts(), &options, 5);
    assert_eq!(one, run(&model, &prompts(), &options, 5));
    assert_ne!(one, run(&model, &prompts(), &options, 6));
    assert!(one.iter().all(|text| text.len() == 11));
}

#[test]
fn tight_limits_leave_only_the_likeliest() {
    let model = model(json!({}));
    let expected = run(&model, &prompts(), &greedy(11), 0);
    assert_eq!(run(&model, &prompts(), &random(2.0, Some(1), None), 3), expected);
    assert_eq!(run(&model, &prompts(), &random(2.0, None, Some(1e-9)), 3), expected);
    assert_eq!(run(&model, &prompts(), &random(1e-4, None, None), 3), expected);
}

#[test]
fn draws_follow_the_probabilities() {
    let model = model(json!({}));
    let prompt = vec![1, 17, 3];
    let logits = last_logits(&model, &prompt);
    let highest = logits.iter().copied().fold(f32::MIN, f32::max);
    let weights: Vec<f64> = logits.iter().map(|&logit| (f64::from(logit - highest) / 1.5).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let (count, mut drawn) = (4000, vec![0.0; 29]);
    let options = Generation { max_new_tokens: 1, ..random(1.5, None, None) };
    for text in run(&model, &vec![prompt; count], &options, 17) {
        drawn[text[0] as usize] += 1.0;
    }
    for (weight, drawn) in weights.iter().zip(drawn) {
        let p = weight / sum;
        // Five standard deviations of a binomial, and one draw for the rarest.
        let bound = 5.0 * (p * (1.0 - p) * count as f64).sqrt() + 1.0;
        assert!((drawn - p * count as f64).abs() <= bound, "p {p}: {drawn} of {count}");
    }
}

#[test]
fn settings_out_of_range_are_named() {
    let model = model(json!({}));
    let failed = |prompts: &[Vec<u32>], options: &Generation| {
        let mut generators = generators(prompts, 0);
        generate(&model, &Frozen, prompts, options, &mut generators, &mut |_, _| Next::Continue)
            .unwrap_err()
            .to_string()
    };
    for (options, part) in [
        (random(0.0, None, None), "temperature"),
        (random(f64::NAN, None, None), "temperature"),
        (random(1.0, Some(0), None), "top_k"),
        (random(1.0, None, Some(0.0)), "top_p"),
        (random(1.0, None, Some(1.5)), "top_p"),
        (greedy(60), "67 tokens"),
    ] {
        assert!(failed(&prompts(), &options).contains(part));
    }
    assert!(failed(&[vec![1], vec![]], &greedy(2)).contains("prompt 1"));
    let one = &mut generators(&[vec![1]], 0);
    let error =
        generate(&model, &Frozen, &prompts(), &greedy(1), one, &mut |_, _| Next::Continue).unwrap_err();
    assert!(error.to_string().contains("3 prompts with 1 generators"), "{error}");
    assert_eq!(run(&model, &prompts(), &greedy(0), 0), vec![Vec::<u32>::new(); 3]);
    let prompts = prompts();
    let mut decoder = Decoder::new(&model, &Frozen, &prompts, 1).unwrap();
    for pieces in [[(3, &[1u32][..])], [(1, &[])], [(1, &[1, 2, 3])]] {
        assert!(decoder.advance(&pieces).unwrap_err().to_string().contains("sequence"));
    }
    assert!(decoder.advance(&[(1, &[1]), (1, &[1])]).is_err());
}
