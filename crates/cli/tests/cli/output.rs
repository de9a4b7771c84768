//! What is printed where: pipes, colours, quiet, help.

use std::time::Instant;

use crate::common::{Run, SMALL, Workshop};

#[test]
fn a_pipe_gets_plain_lines() {
    let shop = Workshop::new();
    let run = shop.train("run", "").ok();
    for text in [&run.out, &run.err] {
        assert!(!text.contains('\u{1b}') && !text.contains('\r'), "{text:?}");
    }
    let steps: Vec<&str> =
        run.out.lines().filter(|line| line.starts_with("step ") && line.contains("/8")).collect();
    assert_eq!(steps.len(), 4, "one line every two steps: {}", run.out);
    for part in ["loss ", "lr ", "grad norm ", "tokens/s", "left"] {
        assert!(steps.iter().all(|line| line.contains(part)), "{steps:?}");
    }
    for arguments in
        [format!("plan {SMALL}"), "inspect run".into(), "generate --adapter run --prompt x".into()]
    {
        assert!(!shop.run(&arguments).ok().out.contains('\u{1b}'), "{arguments}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_result_that_cannot_be_written_is_a_failure() {
    let shop = Workshop::new();
    shop.write("prompts.txt", "river\n");
    for arguments in [
        "generate --model model --prompt river --max-new-tokens 3",
        "generate --model model --prompts prompts.txt --max-new-tokens 3",
        "plan --model model --method all --rank 4",
        "plan --model model --method all --rank 4 --json",
        "inspect model --json",
        "doctor --json",
    ] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let words: Vec<&str> = arguments.split_whitespace().collect();
        let output = shop.command(&words).stdout(full).output().unwrap();
        Run::of(output).failed(1, &["the standard output", "No space left"]);
    }
}

#[test]
fn colours_are_forced_and_forbidden_by_the_environment() {
    let shop = Workshop::new();
    let words: Vec<&str> = SMALL.split_whitespace().collect();
    let mut command = shop.command(&["plan"]);
    let forced = command.args(&words).env("CLICOLOR_FORCE", "1").output().unwrap();
    assert!(String::from_utf8(forced.stdout).unwrap().contains("\u{1b}[32m"), "trained tokens are green");
    let mut command = shop.command(&["plan"]);
    let forbidden = command.args(&words).env("NO_COLOR", "1").output().unwrap();
    assert!(!String::from_utf8(forbidden.stdout).unwrap().contains('\u{1b}'));
}

#[test]
fn quiet_prints_the_result_alone() {
    let shop = Workshop::new();
    let run = shop.train("run", "--quiet").ok();
    assert_eq!((run.out.as_str(), run.err.as_str()), ("run/adapter\n", ""));
}

#[test]
fn help_is_complete_and_quick() {
    let shop = Workshop::new();
    let alone = shop.run("");
    assert_eq!(alone.code, Some(2));
    assert!(alone.err.contains("Usage: lora-sb") && alone.err.contains("Examples:"), "{}", alone.err);
    let help = shop.run("train --help").ok().out;
    for heading in ["Model and data:", "Adapter:", "Optimizer:", "Run:", "Examples:"] {
        assert!(help.contains(heading), "{heading}");
    }
    // Every setting says its default.
    let settings = help.matches("\n      --").count() + help.matches("\n  -r, --").count();
    let defaults = help.matches("[default:").count();
    // --config, --resume and --validation-data have none, --random-weights and --chat-template say it in words.
    assert!(settings - defaults <= 5, "{settings} settings, {defaults} defaults:\n{help}");
    let fastest = (0..5)
        .map(|_| {
            let start = Instant::now();
            shop.run("--help").ok();
            start.elapsed()
        })
        .min();
    assert!(fastest.unwrap().as_millis() < 50, "{fastest:?}");
}
