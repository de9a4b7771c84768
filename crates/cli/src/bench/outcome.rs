//! What was measured, for people, for scripts and for the records.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use lora_sb_kernels::{DType, OpTime};
use lora_sb_model::Recompute;
use lora_sb_tune::Method;
use serde_json::{Value, json};

use super::machine::Machine;
use super::measure::{Decoded, Steps};
use super::work::DEFINITION;
use crate::display::{HEADING, bytes, columns, count, table};
use crate::failure::{Failure, Result};

/// What was measured.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    /// As it was asked for.
    pub(crate) model: String,
    pub(crate) random_weights: bool,
    pub(crate) parameters: usize,
    pub(crate) method: Method,
    pub(crate) rank: usize,
    /// Values that the optimizer changes.
    pub(crate) trained: usize,
    /// The examples of a step, in words.
    pub(crate) batches: String,
    /// Whether every step has the same sizes.
    pub(crate) even: bool,
    pub(crate) dtype: DType,
    pub(crate) recompute: Recompute,
    pub(crate) device: String,
    pub(crate) threads: usize,
    pub(crate) machine: Machine,
}

/// Rates of products alone, in operations a second, before and after the steps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ceiling {
    pub(crate) before: f64,
    pub(crate) after: f64,
    /// Rows of the products.
    pub(crate) rows: usize,
}

impl Ceiling {
    fn best(&self) -> f64 {
        self.before.max(self.after)
    }
}

/// Generated tokens beside what reading memory allows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decoding {
    pub(crate) decoded: Decoded,
    /// Bytes a second.
    pub(crate) read_rate: f64,
}

impl Decoding {
    /// The bytes of weights that the tokens read, a second, as a share of what can be read.
    fn share(&self) -> f64 {
        self.decoded.tokens_per_second * self.decoded.weight_bytes as f64 / self.read_rate
    }
}

/// The memory of the steps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    /// Bytes of the process at its largest, where the system tells.
    pub(crate) peak_process: Option<usize>,
    /// Bytes of the device's own tensors at their largest.
    pub(crate) peak_tensors: usize,
    /// Bytes that a GPU's driver and libraries are planned with besides.
    pub(crate) overhead: Option<usize>,
    /// Bytes of all in the device's memory, as a plan adds them up.
    pub(crate) planned: usize,
}

/// Everything that was measured.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) setting: Setting,
    pub(crate) steps: Steps,
    /// Necessary operations of each step.
    pub(crate) work: Vec<f64>,
    pub(crate) ceiling: Ceiling,
    /// Seconds until the first step could begin.
    pub(crate) ready: f64,
    pub(crate) memory: Memory,
    pub(crate) decoding: Option<Decoding>,
}

/// The middle, the smallest and the largest of some values.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Spread> {
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            0 => (values[middle - 1] + values[middle]) / 2.0,
            _ => values[middle],
        };
        Some(Spread { median, least, most })
    }
}

impl Outcome {
    fn per_second(&self, amounts: impl Iterator<Item = f64>) -> Option<Spread> {
        Spread::of(amounts.zip(&self.steps.seconds).map(|(amount, seconds)| amount / seconds).collect())
    }

    /// Tokens a second of a step.
    fn tokens_per_second(&self) -> Option<Spread> {
        self.per_second(self.steps.tokens.iter().map(|&tokens| tokens as f64))
    }

    /// Tokens a second of all steps together, which is what steps of unequal size come to.
    fn overall(&self) -> f64 {
        self.steps.tokens.iter().sum::<usize>() as f64 / self.seconds().max(f64::MIN_POSITIVE)
    }

    /// Necessary operations a second; of unequal steps, of all together.
    fn achieved(&self) -> Option<f64> {
        let median = self.per_second(self.work.iter().copied())?.median;
        Some(if self.setting.even { median } else { self.work.iter().sum::<f64>() / self.seconds() })
    }

    fn seconds(&self) -> f64 {
        self.steps.seconds.iter().sum()
    }

    /// One object with everything in it.
    pub(crate) fn json(&self) -> Value {
        let Setting { model, method, rank, dtype, device, threads, .. } = &self.setting;
        let speed = self.tokens_per_second();
        let achieved = self.achieved();
        let ops = |rows: &[OpTime]| rows.iter().map(|row| self.op_json(row)).collect::<Vec<_>>();
        json!({
            "model": model, "random_weights": self.setting.random_weights, "parameters": self.setting.parameters,
            "method": method.name(), "rank": rank, "trained": self.setting.trained, "batches": self.setting.batches,
            "dtype": dtype.name(), "recompute": self.setting.recompute != Recompute::None,
            "device": device, "threads": threads, "machine": self.setting.machine.described,
            "steps": self.steps.seconds.len(), "step_seconds": self.steps.seconds, "step_tokens": self.steps.tokens,
            "tokens_per_second": speed.map(|speed| speed.median), "slowest": speed.map(|speed| speed.least),
            "fastest": speed.map(|speed| speed.most), "tokens_per_second_overall": speed.map(|_| self.overall()),
            "necessary_flop_per_step": Spread::of(self.work.clone()).map(|work| work.median),
            "gflops": achieved.map(|rate| rate / 1e9),
            "ceiling_gflops": self.ceiling.best() / 1e9, "ceiling_before": self.ceiling.before / 1e9,
            "ceiling_after": self.ceiling.after / 1e9, "share": achieved.map(|rate| rate / self.ceiling.best()),
            "peak_rss_bytes": self.memory.peak_process, "peak_tensor_bytes": self.memory.peak_tensors,
            "device_overhead_bytes": self.memory.overhead, "planned_bytes": self.memory.planned, "ready_s": self.ready,
            "losses": self.steps.losses, "taken_by_others": self.steps.taken_by_others,
            "ops": ops(&self.steps.by_op), "ops_by_weight": ops(&self.steps.by_weight),
            "outside_ops_s": self.outside_operations(),
            "decode": self.decoding.map(|decoding| json!({
                "tokens_per_second": decoding.decoded.tokens_per_second,
                "weight_bytes": decoding.decoded.weight_bytes,
                "read_bytes_per_second": decoding.read_rate, "share": decoding.share(),
            })),
        })
    }

    /// An operation's part of a step.
    fn op_json(&self, row: &OpTime) -> Value {
        let steps = self.steps.counted.len().max(1) as f64;
        json!({
            "op": row.op, "weight": row.weight, "calls": row.calls as f64 / steps, "seconds": row.seconds / steps,
            "gflops": row.operations / row.seconds / 1e9, "gbytes_per_second": row.bytes / row.seconds / 1e9,
        })
    }

    /// Seconds of a step that no operation took: packing, bookkeeping, the clock.
    fn outside_operations(&self) -> f64 {
        let inside: f64 = self.steps.by_op.iter().map(|row| row.seconds).sum();
        (self.counted_seconds() - inside) / self.steps.counted.len().max(1) as f64
    }

    /// Seconds of all steps whose operations were counted.
    fn counted_seconds(&self) -> f64 {
        self.steps.counted.iter().sum()
    }

    /// What the numbers are about and the numbers, a line each.
    fn rows(&self) -> Vec<(&'static str, String)> {
        let Setting { method, rank, trained, parameters, batches, dtype, device, machine, .. } =
            &self.setting;
        let weights = if self.setting.random_weights { ", random weights" } else { "" };
        let mut rows = vec![
            ("model", format!("{}: {}{weights}", self.setting.model, count(*parameters, "parameter"))),
            (
                "method",
                match method {
                    Method::Full => format!("{method}"),
                    _ => format!("{method}, rank {rank}: {} trained", count(*trained, "value")),
                },
            ),
        ];
        let again = match self.setting.recompute {
            Recompute::None => String::new(),
            Recompute::Block => ", all blocks computed again".into(),
            Recompute::First(blocks) => format!(", {} computed again", count(blocks, "block")),
        };
        rows.push(("batches", batches.clone()));
        rows.push(("arithmetic", format!("{}{again}", dtype.name())));
        rows.push(("device", format!("{device} on {}", machine.described)));
        if let (Some(speed), Some(rate)) = (self.tokens_per_second(), self.achieved()) {
            let steps = count(self.steps.seconds.len(), "step");
            let Spread { median, least, most } = speed;
            let others = match self.steps.taken_by_others {
                Some(others) => format!("; {} of the processor taken by others", share(others, 1.0)),
                None => String::new(),
            };
            let overall =
                if self.setting.even { String::new() } else { format!("{:.1} overall; ", self.overall()) };
            rows.push((
                "tokens/s",
                format!("{overall}{median:.1} in the median of {steps}, {least:.1} to {most:.1}{others}"),
            ));
            rows.push(("achieved", self.achieved_line(rate)));
            rows.push(("memory", self.memory_line()));
            rows.push(("start", format!("{:.1} s to the first step", self.ready)));
        }
        rows.extend(self.decoding.map(|decoding| ("decoding", decoding_line(&decoding))));
        rows
    }

    fn achieved_line(&self, rate: f64) -> String {
        let Ceiling { before, after, rows } = self.ceiling;
        let (unit, name) = if self.ceiling.best() < 1e13 { (1e9, "GFLOP/s") } else { (1e12, "TFLOP/s") };
        format!(
            "{:.0} {name} of necessary operations, {} of the product's own {:.0} ({:.0} before, {:.0} after, {rows} rows)",
            rate / unit,
            share(rate, self.ceiling.best()),
            self.ceiling.best() / unit,
            before / unit,
            after / unit,
        )
    }

    fn memory_line(&self) -> String {
        let Memory { peak_process, peak_tensors, overhead, planned } = self.memory;
        let (tensors, planned) = (format!("{} of the device's tensors", bytes(peak_tensors)), bytes(planned));
        match (overhead, peak_process) {
            (Some(overhead), _) => {
                format!(
                    "{tensors} at their peak; with {} for the driver {planned} were planned",
                    bytes(overhead)
                )
            }
            (None, Some(peak)) => {
                format!("{} at the process's peak, planned {planned}; {tensors}", bytes(peak))
            }
            (None, None) => {
                format!("{tensors}, planned {planned}; this system does not tell the process's peak")
            }
        }
    }

    /// For a person.
    pub(crate) fn text(&self) -> String {
        let mut text = table(&self.rows());
        if self.steps.seconds.is_empty() {
            return text;
        }
        for (title, rows) in
            [("Time of a step by operation", self.op_rows()), ("Products by weight", self.product_rows())]
        {
            let _ = write!(text, "\n\n{HEADING}{title}{HEADING:#}\n{}", columns(&OP_HEADINGS, &rows));
        }
        let _ = write!(text, "\n\n{DEFINITION}");
        text
    }

    /// Appends the result to a file of records, which is begun where it is not there.
    pub(crate) fn record(&self, file: &Path, day: &str, command: &str) -> Result<()> {
        let failed = |error| Failure::file(file, "written", &error);
        if let Some(folder) = file.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let new = !file.exists();
        let mut out = std::fs::File::options().create(true).append(true).open(file).map_err(failed)?;
        let title = if new { format!("# Benchmarks, {day}\n") } else { String::new() };
        out.write_all(format!("{title}{}", self.markdown(day, command)).as_bytes()).map_err(failed)
    }

    /// A section of the records.
    fn markdown(&self, day: &str, command: &str) -> String {
        let Setting { model, method, rank, dtype, .. } = &self.setting;
        let rank = if *method == Method::Full { String::new() } else { format!(" r = {rank}") };
        let mut text = format!("\n## {model}, {method}{rank}, {}, {day}\n\n", dtype.name());
        let _ = writeln!(text, "Version {}.\n\n    {command}\n", env!("CARGO_PKG_VERSION"));
        for (name, value) in self.rows() {
            let _ = writeln!(text, "* {name}: {value}");
        }
        if self.steps.seconds.is_empty() {
            return text;
        }
        let _ = writeln!(text, "\n| {} |\n|---|---|---|---|---|---|", OP_HEADINGS.join(" | "));
        for row in self.op_rows() {
            let _ = writeln!(text, "| {} |", row.join(" | "));
        }
        let _ = writeln!(text, "\n({DEFINITION}.)");
        text
    }

    /// The breakdown of a step, with what no operation took.
    fn op_rows(&self) -> Vec<Vec<String>> {
        let mut rows: Vec<_> =
            self.steps.by_op.iter().map(|row| self.op_row(row.op.to_owned(), row)).collect();
        let outside = OpTime {
            op: "",
            weight: None,
            calls: 0,
            seconds: self.outside_operations() * self.steps.counted.len() as f64,
            operations: 0.0,
            bytes: 0.0,
        };
        rows.push(self.op_row("outside operations".into(), &outside));
        rows
    }

    fn product_rows(&self) -> Vec<Vec<String>> {
        let name = |row: &OpTime| row.weight.map(|[n, k]| format!("{} [{n}, {k}]", row.op));
        self.steps.by_weight.iter().filter_map(|row| Some(self.op_row(name(row)?, row))).collect()
    }

    fn op_row(&self, name: String, row: &OpTime) -> Vec<String> {
        let steps = self.steps.counted.len().max(1) as f64;
        let rate = |amount: f64| match amount {
            0.0 => "-".into(),
            _ => format!("{:.0}", amount / row.seconds / 1e9),
        };
        vec![
            name,
            format!("{:.0}", row.calls as f64 / steps),
            format!("{:.2}", 1e3 * row.seconds / steps),
            share(row.seconds, self.counted_seconds()),
            rate(row.operations),
            rate(row.bytes),
        ]
    }
}

const OP_HEADINGS: [&str; 6] = ["operation", "calls", "ms", "share", "GFLOP/s", "GB/s"];

fn decoding_line(decoding: &Decoding) -> String {
    let Decoding { decoded, read_rate } = decoding;
    format!(
        "{:.2} tokens/s, {} of weights each: {} of the {:.1} GB/s that its memory gives",
        decoded.tokens_per_second,
        bytes(decoded.weight_bytes),
        share(decoding.share(), 1.0),
        read_rate / 1e9,
    )
}

fn share(part: f64, whole: f64) -> String {
    format!("{:.1} %", 100.0 * part / whole)
}
