//! What the files are to a model: the report and the first examples with their masks.
//! `cargo run -p lora-sb-data --example show_data -- TOKENIZER_DIR MAX_LENGTH FILE...`

use std::path::{Path, PathBuf};

use lora_sb_data::{Color, LoadOptions, Tokenizer, load, preview};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, max_length, files @ ..] = arguments.as_slice() else {
        return Err("expected TOKENIZER_DIR MAX_LENGTH FILE...".into());
    };
    let tokenizer = Tokenizer::from_dir(Path::new(dir))?;
    let files: Vec<PathBuf> = files.iter().map(PathBuf::from).collect();
    match load(&files, &tokenizer, &LoadOptions::new(max_length.parse()?)) {
        Ok(dataset) => {
            println!("{}\n", dataset.report);
            for example in dataset.examples.iter().take(2) {
                println!("{}: {}\n", example.source, preview(&tokenizer, example, Color::Always)?);
            }
        }
        Err(error) => {
            let hint = error.hint().unwrap_or_default();
            println!("error: {error}\nhint: {hint}");
        }
    }
    Ok(())
}
