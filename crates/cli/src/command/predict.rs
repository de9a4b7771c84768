//! `predict`: the class or value of texts, by an encoder.

use std::process::ExitCode;

use lora_sb_data::{
    Example, Label, LabelKind, LabelOptions, Location, TextToPredict, Tokenizer, load_to_predict, thousands,
};
use lora_sb_model::{Batch, Config, Task};
use lora_sb_tune::eval::{Metric, metrics_of, scores, sequence};
use serde_json::{Map, Value, json};

use crate::args::PredictArgs;
use crate::base;
use crate::directory::{self, Loaded, Opened};
use crate::display;
use crate::failure::{Failure, Result};
use crate::resolve::longest_text;

/// Runs the command.
pub(crate) fn run(arguments: &PredictArgs) -> Result<ExitCode> {
    let Opened { mut loaded, base, max_length, .. } =
        directory::open_in(arguments.dtype, &arguments.source, arguments.adapter.as_deref())?;
    check(arguments, loaded.model().config())?;
    if let Some(names) = &arguments.label_names {
        loaded.model_mut().name_labels(names).map_err(|error| {
            Failure::usage(format!("--label-names: {error}"))
                .hint("give one name for each class, each another")
        })?;
    }
    if let Loaded::Plain(model) = &loaded {
        model.warnings().iter().for_each(|warning| display::warn(warning));
    }
    let config = loaded.model().config().clone();
    let metrics = metrics(arguments, config.task)?;
    let longest = arguments.max_length.or(max_length).unwrap_or_else(|| longest_text(&config));
    let texts = texts(arguments, &base.tokenizer()?, &config, longest)?;
    warn_of_cut(&texts, longest);
    let mut predicted = Vec::with_capacity(texts.len());
    for texts in texts.chunks(arguments.batch_size) {
        for (text, logits) in texts.iter().zip(logits(&loaded, texts, config.task)?) {
            if logits.iter().any(|logit| !logit.is_finite()) {
                return Err(Failure::new(format!("{}: the model's output is not finite", text.example.source))
                    .hint("a weight of the model or its adapter is not finite, or too large; take another checkpoint"));
            }
            let prediction = Prediction::of(&logits, config.task);
            display::output(&written(text, &prediction, &config).to_string())?;
            predicted.push(prediction.label);
        }
    }
    tell_scores(&texts, &predicted, config.task, &metrics)?;
    Ok(ExitCode::SUCCESS)
}

fn check(arguments: &PredictArgs, config: &Config) -> Result<()> {
    let family = config.family.model_type();
    if config.task == Task::LanguageModel {
        return Err(Failure::usage(format!(
            "a {family} model predicts tokens and has no classification head"
        ))
        .hint("`lora-sb generate` writes text; to classify take a BERT or RoBERTa model"));
    }
    if arguments.batch_size == 0 {
        return Err(Failure::usage("--batch-size: expected at least 1, found 0")
            .hint("leave it out for 32 texts at a time"));
    }
    let longest = longest_text(config);
    match arguments.max_length {
        Some(length) if length > longest => Err(Failure::usage(format!(
            "--max-length: the model has positions for {longest} tokens, found {length}"
        ))
        .hint("leave it out: longer texts are cut")),
        _ => Ok(()),
    }
}

fn metrics(arguments: &PredictArgs, task: Task) -> Result<Vec<Metric>> {
    let known = metrics_of(task);
    let Some(metrics) = &arguments.metrics else { return Ok(known) };
    match metrics.iter().find(|metric| !known.contains(metric)) {
        None => Ok(metrics.clone()),
        Some(metric) => {
            let known: Vec<&str> = known.into_iter().map(Metric::name).collect();
            Err(Failure::usage(format!("--metrics {metric}: says nothing of this model's task"))
                .hint(format!("choose from {}", known.join(", "))))
        }
    }
}

/// The texts that were given, by themselves or in files.
fn texts(
    arguments: &PredictArgs,
    tokenizer: &Tokenizer,
    config: &Config,
    max_length: usize,
) -> Result<Vec<TextToPredict>> {
    let texts = match (&arguments.text, &arguments.data) {
        (Some(first), _) => {
            let second = arguments.text_pair.clone();
            let tokens = tokenizer.encode_pair(first, second.as_deref(), max_length)?;
            let source = Location { file: std::path::Path::new("--text").into(), line: 1, element: None };
            let trained = vec![false; tokens.ids.len()];
            let example = Example { ids: tokens.ids, trained, second: tokens.second, label: None, source };
            vec![TextToPredict { first: first.clone(), second, example, whole: tokens.whole }]
        }
        (None, files) => {
            let options = match config.task {
                Task::Regression => {
                    LabelOptions { kind: Some(LabelKind::Values), ..LabelOptions::new(max_length) }
                }
                Task::LanguageModel | Task::Classification { .. } => LabelOptions {
                    kind: Some(LabelKind::Classes),
                    names: Some(config.label_names()),
                    ..LabelOptions::new(max_length)
                },
            };
            load_to_predict(files.as_deref().unwrap_or_default(), tokenizer, &options)?
        }
    };
    for text in &texts {
        base::check_ids(&text.example.ids, &text.example.source.to_string(), tokenizer, config)?;
    }
    Ok(texts)
}

fn warn_of_cut(texts: &[TextToPredict], longest: usize) {
    let cut = texts.iter().filter(|text| text.whole > text.example.ids.len());
    let (number, whole) = cut.fold((0, 0), |(number, most), text| (number + 1, most.max(text.whole)));
    if number > 0 {
        let (texts, most) = (display::count(number, "text"), thousands(whole));
        display::warn(&format!("{texts} cut to {longest} tokens; the longest had {most}"));
    }
}

/// The logits of each text, `[C]`.
fn logits(loaded: &Loaded, texts: &[TextToPredict], task: Task) -> Result<Vec<Vec<f32>>> {
    // A batch has labels; the logits do not depend on them.
    let any = if task == Task::Regression { Label::Value(0.0) } else { Label::Class(0) };
    let examples: Vec<Example> =
        texts.iter().map(|text| Example { label: Some(any), ..text.example.clone() }).collect();
    let sequences: Vec<_> = examples.iter().map(|example| sequence(example, 1.0)).collect();
    let model = loaded.model();
    let batch = Batch::pack(model.kernels().as_ref(), &sequences)?;
    let logits = model.logits(&batch, loaded.hook())?; // [N, C]
    let values = model.kernels().to_f32(&logits)?;
    Ok(values.chunks_exact(logits.shape()[1]).map(<[f32]>::to_vec).collect())
}

/// What is said of one text.
struct Prediction {
    label: Label,
    /// Of each class; none of a value.
    probabilities: Vec<f64>,
}

impl Prediction {
    /// The likeliest class, the first of equally likely ones; or the value.
    fn of(logits: &[f32], task: Task) -> Prediction {
        if task == Task::Regression {
            return Prediction { label: Label::Value(logits[0]), probabilities: Vec::new() };
        }
        let best = (1..logits.len()).fold(0, |best, at| if logits[at] > logits[best] { at } else { best });
        let weights: Vec<f64> =
            logits.iter().map(|&logit| (f64::from(logit) - f64::from(logits[best])).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let probabilities = weights.into_iter().map(|weight| weight / sum).collect();
        Prediction { label: Label::Class(best as u32), probabilities }
    }
}

/// A line of the output.
fn written(text: &TextToPredict, prediction: &Prediction, config: &Config) -> Value {
    let names = config.label_names();
    let said = |label: Label| match label {
        Label::Class(class) => json!(names.get(class as usize)),
        Label::Value(value) => json!(value),
    };
    let mut line = Map::new();
    line.insert("text".into(), json!(text.first));
    line.extend(text.second.as_ref().map(|second| ("text_pair".into(), json!(second))));
    line.insert("label".into(), said(prediction.label));
    if !prediction.probabilities.is_empty() {
        let shares = names.iter().zip(&prediction.probabilities);
        let shares: Map<String, Value> = shares.map(|(name, share)| (name.clone(), json!(share))).collect();
        line.insert("probabilities".into(), Value::Object(shares));
    }
    line.extend(text.example.label.map(|label| ("expected".into(), said(label))));
    Value::Object(line)
}

/// Prints the scores of the texts that have labels to the standard error: the standard output is for machines.
fn tell_scores(texts: &[TextToPredict], predicted: &[Label], task: Task, metrics: &[Metric]) -> Result<()> {
    let labelled = texts.iter().zip(predicted).filter(|(text, _)| text.example.label.is_some());
    let (examples, predicted): (Vec<Example>, Vec<Label>) =
        labelled.map(|(text, &label)| (text.example.clone(), label)).unzip();
    if examples.is_empty() {
        return Ok(());
    }
    let found = scores(task, &predicted, &examples, metrics)?;
    let score = |metric: &Metric| match found.get(metric.name()) {
        Some(score) => format!("{metric} {score:.4}"),
        None => format!("{metric} not defined"),
    };
    let shown: Vec<String> = metrics.iter().map(score).collect();
    anstream::eprintln!("{}: {}", display::count(examples.len(), "labelled example"), shown.join("  "));
    Ok(())
}
