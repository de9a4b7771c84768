//! `generate`: text from a model, with or without an adapter.

use std::borrow::Cow;
use std::io::{IsTerminal, Write as _};
use std::path::Path;
use std::process::ExitCode;

use lora_sb_data::{Tokenizer, thousands};
use lora_sb_kernels::{Generator, Stream};
use lora_sb_model::{Generation, Next, Sampling, Task, generate};
use serde_json::json;

use crate::args::GenerateArgs;
use crate::directory::{self, Loaded, Opened};
use crate::display;
use crate::failure::{Failure, Result};
use crate::text::{Continuation, prompt_ids};

/// Positions beyond this are a slip of the finger: their rotations and cache would fill the memory.
const MOST_NEW_TOKENS: usize = 1 << 20;

/// Runs the command.
pub(crate) fn run(arguments: &GenerateArgs) -> Result<ExitCode> {
    let sampling = sampling(arguments)?;
    check(arguments)?;
    let prompts = match (&arguments.prompt, &arguments.prompts) {
        (Some(prompt), _) => vec![prompt.clone()],
        (None, Some(file)) => read_prompts(file)?,
        (None, None) => Vec::new(),
    };
    let Opened { mut loaded, base, .. } =
        directory::open_in(arguments.dtype, &arguments.source, arguments.adapter.as_deref())?;
    let config = loaded.model().config();
    if config.task != Task::LanguageModel {
        let family = config.family.model_type();
        return Err(Failure::usage(format!("a {family} model classifies texts and writes none"))
            .hint("`lora-sb predict` says the class of a text; to write text take a decoder"));
    }
    let tokenizer = base.tokenizer()?;
    let ids = prompts.iter().map(|prompt| prompt_ids(&tokenizer, loaded.model(), prompt));
    let ids: Vec<Vec<u32>> = ids.collect::<Result<_>>()?;
    let longest = ids.iter().map(Vec::len).max().unwrap_or(0).saturating_add(arguments.max_new_tokens);
    let positions = loaded.model().config().max_position_embeddings;
    if longest > positions {
        display::warn(&format!("up to {longest} tokens, and the model was trained on at most {positions}"));
    }
    loaded.model_mut().prepare(longest)?;
    let stop = tokenizer.stop_tokens().to_vec();
    let options = Generation { max_new_tokens: arguments.max_new_tokens, sampling, stop };
    let writer = Writer { loaded: &loaded, tokenizer: &tokenizer, options: &options, arguments };
    match &arguments.prompt {
        Some(prompt) => writer.stream(prompt, &ids[0])?,
        None => writer.lines(&prompts, &ids)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// What continues prompts, and how.
struct Writer<'a> {
    loaded: &'a Loaded,
    tokenizer: &'a Tokenizer,
    options: &'a Generation,
    arguments: &'a GenerateArgs,
}

impl Writer<'_> {
    /// One prompt, its continuation written as it comes.
    fn stream(&self, prompt: &str, ids: &[u32]) -> Result<()> {
        let terminal = std::io::stdout().is_terminal();
        // A file gets the text as it is, a terminal without what it would take for commands. A reader that has gone
        // away does not want the rest; neither is it an error.
        let write = |text: &str| {
            let mut out = std::io::stdout();
            let text = if terminal { Cow::Owned(display::printable(text)) } else { Cow::Borrowed(text) };
            out.write_all(text.as_bytes()).and_then(|()| out.flush())
        };
        let dim = display::DIM;
        let _ = write!(anstream::stdout(), "{dim}{prompt}{dim:#}");
        let mut growing = Continuation::after(self.tokenizer, ids, &self.arguments.stop);
        let mut generators = [Generator::new(self.arguments.seed, Stream::Sampling, 0)];
        let mut outcome = Ok(());
        let mut on_token = |_, id| {
            let (text, next) = growing.push(id);
            outcome = write(&text);
            if outcome.is_ok() { next } else { Next::Stop }
        };
        let (model, hook) = (self.loaded.model(), self.loaded.hook());
        generate(model, hook, &[ids.to_vec()], self.options, &mut generators, &mut on_token)?;
        let rest = growing.finish()?;
        display::written(outcome.and_then(|()| write(&rest)).and_then(|()| write("\n")))
    }

    /// Many prompts, a JSON line each.
    fn lines(&self, prompts: &[String], ids: &[Vec<u32>]) -> Result<()> {
        let size = self.arguments.batch_size;
        let (model, hook) = (self.loaded.model(), self.loaded.hook());
        for (batch, (prompts, ids)) in prompts.chunks(size).zip(ids.chunks(size)).enumerate() {
            let first = batch * size;
            let draws = |index| Generator::new(self.arguments.seed, Stream::Sampling, index as u64);
            let mut generators: Vec<Generator> = (first..first + ids.len()).map(draws).collect();
            let begun = |ids: &Vec<u32>| Continuation::after(self.tokenizer, ids, &self.arguments.stop);
            let mut growing: Vec<(Continuation<'_>, String)> =
                ids.iter().map(|ids| (begun(ids), String::new())).collect();
            let mut on_token = |index: usize, id| {
                let (continuation, text) = &mut growing[index];
                let (piece, next) = continuation.push(id);
                text.push_str(&piece);
                next
            };
            generate(model, hook, ids, self.options, &mut generators, &mut on_token)?;
            for (prompt, (continuation, mut completion)) in prompts.iter().zip(growing) {
                completion.push_str(&continuation.finish()?);
                display::output(&json!({ "prompt": prompt, "completion": completion }).to_string())?;
            }
        }
        Ok(())
    }
}

fn check(arguments: &GenerateArgs) -> Result<()> {
    if arguments.batch_size == 0 {
        return Err(Failure::usage("--batch-size: expected at least 1, found 0")
            .hint("leave it out for 16 prompts at a time"));
    }
    if arguments.max_new_tokens > MOST_NEW_TOKENS {
        let found = thousands(arguments.max_new_tokens);
        return Err(Failure::usage(format!(
            "--max-new-tokens: expected at most {}, found {found}",
            thousands(MOST_NEW_TOKENS)
        ))
        .hint("room for all of them is taken at the start; an end-of-sequence token or --stop ends a text sooner"));
    }
    match arguments.stop.iter().any(String::is_empty) {
        false => Ok(()),
        true => Err(Failure::usage("--stop: an empty text stands everywhere")
            .hint("give the text that is to end the continuation, in quotes")),
    }
}

fn sampling(arguments: &GenerateArgs) -> Result<Sampling> {
    let GenerateArgs { temperature, top_k, top_p, .. } = *arguments;
    if !(temperature.is_finite() && temperature >= 0.0) {
        return Err(Failure::usage(format!(
            "--temperature: expected a number of at least 0, found {temperature}"
        ))
        .hint("0 always takes the likeliest token, 1 draws as the model says"));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(Failure::usage(format!(
            "--top-p: expected a share above 0 and at most 1, found {top_p}"
        ))
        .hint("1 draws from all tokens"));
    }
    if temperature == 0.0 {
        return Ok(Sampling::Greedy);
    }
    let (top_k, top_p) = ((top_k > 0).then_some(top_k), (top_p < 1.0).then_some(top_p));
    Ok(Sampling::Random { temperature, top_k, top_p })
}

fn read_prompts(file: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(file).map_err(|error| Failure::file(file, "read", &error))?;
    let prompts: Vec<String> =
        text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect();
    if prompts.is_empty() {
        return Err(
            Failure::new(format!("{}: no prompt in it", file.display())).hint("write one prompt a line")
        );
    }
    Ok(prompts)
}
