//! What files of labelled texts are to an encoder: the report and the first examples with their labels.
//! `cargo run -p lora-sb-data --example show_labelled -- TOKENIZER_DIR MAX_LENGTH FILE...`

use std::path::{Path, PathBuf};

use lora_sb_data::{LabelOptions, SkipSpecial, Tokenizer, load_labelled};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, max_length, files @ ..] = arguments.as_slice() else {
        return Err("expected TOKENIZER_DIR MAX_LENGTH FILE...".into());
    };
    let tokenizer = Tokenizer::from_dir(Path::new(dir))?;
    let files: Vec<PathBuf> = files.iter().map(PathBuf::from).collect();
    match load_labelled(&files, &tokenizer, &LabelOptions::new(max_length.parse()?)) {
        Ok(data) => {
            println!("{}\n", data.report);
            for example in data.examples.iter().take(2) {
                let text = tokenizer.decode(&example.ids, SkipSpecial::No)?;
                println!(
                    "{}: {text} {:?}, second text from {:?}\n",
                    example.source, example.label, example.second
                );
            }
        }
        Err(error) => {
            let hint = error.hint().unwrap_or_default();
            println!("error: {error}\nhint: {hint}");
        }
    }
    Ok(())
}
