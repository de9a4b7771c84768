//! The recipes of `examples/` run, on a tiny model and their own data.

use std::path::Path;

use crate::common::Workshop;

/// Recipes for models that classify texts; the others are for models that write them.
const OF_ENCODERS: [&str; 2] = ["paper-glue", "similarity"];

#[test]
fn every_recipe_trains() {
    let (decoder, encoder) = (Workshop::new(), Workshop::encoder());
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let mut recipes = 0;
    for entry in std::fs::read_dir(&examples).unwrap() {
        let recipe = entry.unwrap().path();
        if recipe.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        recipes += 1;
        let name = recipe.file_stem().unwrap().to_string_lossy().into_owned();
        let (shop, longest) = match OF_ENCODERS.contains(&name.as_str()) {
            true => (&encoder, "40"),
            false => (&decoder, "400"),
        };
        // Paths of a recipe are relative to the repository, where a reader stands.
        let mut command = shop.command(&["train", "--config"]);
        command.arg(&recipe).args(["--model".as_ref(), shop.path("model").as_os_str()]);
        command.args(["--rank", "3", "--max-steps", "2", "--max-length", longest, "--val-set-size", "1"]);
        command.arg("--output-dir").arg(shop.path(&name)).current_dir(examples.parent().unwrap());
        let run = crate::common::Run::of(command.output().unwrap());
        assert_eq!(run.code, Some(0), "{name}: {}\n{}", run.out, run.err);
        assert!(shop.path(&name).join("plan.json").exists());
    }
    assert!(recipes >= 8, "{recipes} recipes");
}
