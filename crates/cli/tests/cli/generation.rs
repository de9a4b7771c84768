//! `generate`: where a text ends, and how many are written together.

use crate::common::{Run, Workshop, json_lines};

const GREEDY: [&str; 6] = ["--model", "model", "--temperature", "0", "--max-new-tokens", "14"];

fn generate(shop: &Workshop, arguments: &[&str]) -> Run {
    let words = [&["generate"], &GREEDY[..], arguments].concat();
    Run::of(shop.command(&words).output().unwrap())
}

/// What a prompt is continued by.
fn continuation(shop: &Workshop, arguments: &[&str]) -> String {
    let out = generate(shop, &[&["--prompt", "river"], arguments].concat()).ok().out;
    out.strip_prefix("river").and_then(|text| text.strip_suffix('\n')).unwrap().to_owned()
}

#[test]
fn a_text_ends_before_the_first_stop_text() {
    let shop = Workshop::new();
    let whole = continuation(&shop, &[]);
    let places: Vec<usize> = whole.char_indices().map(|(at, _)| at).collect();
    assert!(places.len() > 12, "{whole:?}");
    // Three characters of the middle span tokens as they come.
    let (late, early) = (&whole[places[9]..places[12]], &whole[places[5]..places[8]]);
    let until = |stop: &str| whole[..whole.find(stop).unwrap()].to_owned();
    assert_eq!(continuation(&shop, &["--stop", late]), until(late));
    let both = continuation(&shop, &["--stop", late, early, "--seed", "1"]);
    assert!(
        both == until(early) || both == until(late) && until(late).len() < until(early).len(),
        "{both:?}"
    );
    assert_eq!(continuation(&shop, &["--stop", "never written by it"]), whole);
    shop.write("prompts.txt", "river\nthe sea\n");
    let lines = json_lines(&generate(&shop, &["--prompts", "prompts.txt", "--stop", late]).ok().out);
    assert_eq!(lines[0]["completion"], until(late).as_str());
    generate(&shop, &["--prompt", "river", "--stop", ""]).failed(2, &["--stop"]);
}

#[test]
fn prompts_are_continued_alike_however_many_at_a_time() {
    let shop = Workshop::new();
    shop.write("prompts.txt", "river\nthe sea and it\na\n3 and 2 is\nriver river\n");
    let all = generate(&shop, &["--prompts", "prompts.txt"]).ok().out;
    assert_eq!(json_lines(&all).len(), 5);
    for size in ["1", "2", "5"] {
        assert_eq!(
            generate(&shop, &["--prompts", "prompts.txt", "--batch-size", size]).ok().out,
            all,
            "{size}"
        );
    }
    assert_eq!(json_lines(&all)[0]["completion"], continuation(&shop, &[]).as_str());
    let drawn = |size: &str| {
        shop.run(&format!(
            "generate --model model --prompts prompts.txt --max-new-tokens 14 --batch-size {size}"
        ))
    };
    let all = drawn("5").ok().out;
    for size in ["1", "2"] {
        assert_eq!(drawn(size).ok().out, all, "{size}");
    }
    generate(&shop, &["--prompts", "prompts.txt", "--batch-size", "0"]).failed(2, &["--batch-size"]);
}

#[test]
fn more_tokens_than_a_memory_holds_are_refused() {
    let shop = Workshop::new();
    for most in ["1048577", "18446744073709551615"] {
        let arguments = format!("generate --model model --prompt river --max-new-tokens {most}");
        shop.run(&arguments).failed(2, &["--max-new-tokens", "1,048,576"]);
    }
    let run = shop.run("generate --model model");
    assert!(run.code == Some(2) && run.err.contains("<--prompt <TEXT>|--prompts <FILE>>"), "{}", run.err);
}
