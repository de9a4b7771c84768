//! The memory that `plan` foretells, against the peak that the system counts for the process.

use crate::common::Workshop;

/// The largest part by which the two may differ.
const BOUND: f64 = 0.1;

/// "... 188.1 MiB at its peak; planned 188.9 MiB": measured and planned.
fn peaks(out: &str) -> (f64, f64) {
    let line =
        out.lines().find(|line| line.contains("at its peak; planned")).unwrap_or_else(|| panic!("{out}"));
    let (measured, planned) = line.split_once("at its peak; planned").unwrap();
    let number = |words: &str| {
        let words: Vec<&str> = words.split_whitespace().collect();
        let at = words.iter().position(|&word| word == "MiB").unwrap_or_else(|| panic!("{line}"));
        words[at - 1].parse().unwrap()
    };
    (number(measured), number(planned))
}

/// One step of the built-in model, wide enough for its tensors to outweigh the process.
#[test]
fn the_planned_peak_is_the_measured_one() {
    let text = include_str!("../../../../assets/shakespeare.txt");
    let shop = Workshop::new();
    shop.write("plays.txt", &text[..60_000]);
    let shapes = [
        "--method lora-sb --rank 16 --max-length 200 --per-device-train-batch-size 6 --init-samples 9",
        "--method lora --rank 16 --max-length 509 --per-device-train-batch-size 4 --gradient-checkpointing true",
        "--method full --max-length 128 --per-device-train-batch-size 3",
    ];
    for (index, shape) in shapes.into_iter().enumerate() {
        let run = shop.run(&format!(
            "train --model built-in --data plays.txt --output-dir run-{index} --max-steps 1 --threads 2 \
             --gradient-accumulation-steps 1 {shape}"
        ));
        let (measured, planned) = peaks(&run.ok().out);
        let ratio = planned / measured;
        println!("{shape}: planned {planned} MiB, measured {measured} MiB, {ratio:.3}");
        assert!((ratio - 1.0).abs() <= BOUND, "{shape}: planned {planned} MiB, measured {measured} MiB");
    }
}
