//! `generate`: text from a model, with or without an adapter.

use std::borrow::Cow;
use std::io::{IsTerminal, Write as _};
use std::path::Path;
use std::process::ExitCode;

use lora_sb_data::Tokenizer;
use lora_sb_kernels::{Generator, Stream};
use lora_sb_model::{Generation, Sampling, generate};
use serde_json::json;

use crate::args::GenerateArgs;
use crate::directory::{self, Loaded, Opened};
use crate::display;
use crate::failure::{Failure, Result};
use crate::text::{TokenStream, prompt_ids};

/// Prompts that advance together.
const BATCH: usize = 16;

/// Runs the command.
pub(crate) fn run(arguments: &GenerateArgs) -> Result<ExitCode> {
    let sampling = sampling(arguments)?;
    let prompts = match (&arguments.prompt, &arguments.prompts) {
        (Some(prompt), _) => vec![prompt.clone()],
        (None, Some(file)) => read_prompts(file)?,
        (None, None) => Vec::new(),
    };
    let Opened { mut loaded, base, .. } = directory::open(&arguments.source, arguments.adapter.as_deref())?;
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
    match &arguments.prompt {
        Some(prompt) => stream(&loaded, &tokenizer, prompt, &ids[0], &options, arguments.seed)?,
        None => write_lines(&loaded, &tokenizer, &prompts, &ids, &options, arguments.seed)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// One prompt, its continuation written as it comes.
fn stream(
    loaded: &Loaded,
    tokenizer: &Tokenizer,
    prompt: &str,
    ids: &[u32],
    options: &Generation,
    seed: u64,
) -> Result<()> {
    let terminal = std::io::stdout().is_terminal();
    // A file gets the text as it is, a terminal without what it would take for commands. A reader that has gone
    // away does not want the rest; neither is it an error.
    let write = |text: &str| {
        let mut out = std::io::stdout();
        let text = if terminal { Cow::Owned(display::printable(text)) } else { Cow::Borrowed(text) };
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    };
    let dim = display::DIM;
    let _ = write!(anstream::stdout(), "{dim}{prompt}{dim:#}");
    let mut pieces = TokenStream::after(tokenizer, ids);
    let mut failed = None;
    let mut generator = Generator::new(seed, Stream::Sampling, 0);
    let mut on_token = |_, id| match pieces.push(id) {
        Ok(text) => write(&text),
        Err(error) => failed = Some(error),
    };
    generate(loaded.model(), loaded.hook(), &[ids.to_vec()], options, &mut generator, &mut on_token)?;
    if let Some(error) = failed {
        return Err(error);
    }
    write(&pieces.finish()?);
    write("\n");
    Ok(())
}

/// Many prompts, a JSON line each.
fn write_lines(
    loaded: &Loaded,
    tokenizer: &Tokenizer,
    prompts: &[String],
    ids: &[Vec<u32>],
    options: &Generation,
    seed: u64,
) -> Result<()> {
    for (batch, (prompts, ids)) in prompts.chunks(BATCH).zip(ids.chunks(BATCH)).enumerate() {
        let mut generator = Generator::new(seed, Stream::Sampling, batch as u64);
        let (model, hook) = (loaded.model(), loaded.hook());
        let new = generate(model, hook, ids, options, &mut generator, &mut |_, _| {})?;
        for ((prompt, ids), new) in prompts.iter().zip(ids).zip(&new) {
            let mut stream = TokenStream::after(tokenizer, ids);
            let mut completion = String::new();
            for &id in new {
                completion.push_str(&stream.push(id)?);
            }
            completion.push_str(&stream.finish()?);
            display::line(&json!({ "prompt": prompt, "completion": completion }).to_string());
        }
    }
    Ok(())
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
