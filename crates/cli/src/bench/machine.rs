//! Where and when something was measured.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::device::all_cores;
use crate::display::{bytes, count};

/// A machine, as far as it tells what it is.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    /// Processor, cores, instructions for products, memory, system.
    pub(crate) described: String,
}

/// Instructions that decide the speed of products, by the names of `/proc/cpuinfo`.
const INSTRUCTIONS: [&str; 5] = ["avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd"];

impl Machine {
    /// This one.
    pub(crate) fn this() -> Machine {
        Machine { described: Processor::this().described() }
    }
}

/// A processor and its memory.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Processor {
    pub(crate) name: String,
    /// Cores that this process may use.
    pub(crate) cores: usize,
    /// Those of [`INSTRUCTIONS`] that it has.
    pub(crate) instructions: Vec<&'static str>,
    /// Bytes of the machine's memory.
    pub(crate) memory: Option<usize>,
}

impl Processor {
    /// This machine's; from `/proc` where there is one.
    pub(crate) fn this() -> Processor {
        let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
        Processor::of(&read("/proc/cpuinfo"), &read("/proc/meminfo"), all_cores())
    }

    fn of(cpuinfo: &str, meminfo: &str, cores: usize) -> Processor {
        let flags = field(cpuinfo, "flags").or_else(|| field(cpuinfo, "Features")).unwrap_or_default();
        let has = |known: &&str| flags.split_whitespace().any(|flag| flag == *known);
        let kibibytes = |rest: &str| rest.strip_suffix("kB")?.trim().parse::<usize>().ok();
        Processor {
            name: field(cpuinfo, "model name").unwrap_or(std::env::consts::ARCH).to_owned(),
            cores,
            instructions: INSTRUCTIONS.into_iter().filter(has).collect(),
            memory: field(meminfo, "MemTotal").and_then(kibibytes).map(|kibibytes| kibibytes * 1024),
        }
    }

    fn described(&self) -> String {
        let mut text = format!("{}, {}", self.name, count(self.cores, "core"));
        if !self.instructions.is_empty() {
            text += &format!(" ({})", self.instructions.join(", "));
        }
        if let Some(memory) = self.memory {
            text += &format!(", {}", bytes(memory));
        }
        text + ", " + std::env::consts::OS
    }
}

/// What stands behind a name and a colon.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let named = |line: &'a str| line.split_once(':').filter(|(found, _)| found.trim() == name);
    text.lines().find_map(named).map(|(_, value)| value.trim())
}

/// The processor time that a machine and this process have had so far, in the system's ticks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ProcessorTime {
    own: u64,
    /// Of all programs, and what the machine's host took for others.
    busy: u64,
    /// Busy or not.
    all: u64,
}

impl ProcessorTime {
    /// Now; `None` where the system does not tell.
    pub(crate) fn now() -> Option<ProcessorTime> {
        let read = |file: &str| std::fs::read_to_string(file).ok();
        ProcessorTime::of(&read("/proc/stat")?, &read("/proc/self/stat")?)
    }

    /// From the texts of `/proc/stat` and `/proc/self/stat`, see proc(5).
    fn of(machine: &str, own: &str) -> Option<ProcessorTime> {
        let numbers = |text: &str| {
            text.split_whitespace().map_while(|word| word.parse::<u64>().ok()).collect::<Vec<_>>()
        };
        let machine = numbers(machine.lines().next()?.strip_prefix("cpu ")?);
        let [user, nice, system, idle, waiting, interrupts, soft, stolen] = *machine.first_chunk()?;
        let busy = user + nice + system + interrupts + soft + stolen;
        // The second field is the program's name in parentheses; utime and stime are the 14th and 15th.
        let mut fields = own.rsplit_once(')')?.1.split_whitespace().skip(11);
        let mut ticks = || fields.next()?.parse::<u64>().ok();
        Some(ProcessorTime { own: ticks()? + ticks()?, busy, all: busy + idle + waiting })
    }

    /// The share of the machine that others have had since `earlier`: below a few hundredths, times can be trusted.
    pub(crate) fn taken_by_others(&self, earlier: &ProcessorTime) -> f64 {
        let since = |of: fn(&ProcessorTime) -> u64| of(self).saturating_sub(of(earlier));
        let others = since(|time| time.busy).saturating_sub(since(|time| time.own));
        others as f64 / since(|time| time.all).max(1) as f64
    }
}

/// The day of a moment, in UTC, as `2026-11-24`.
///
/// The calendar's arithmetic is that of Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`: days
/// are counted from 1 March of the year 0, so that a leap day is a year's last.
pub(crate) fn date(now: SystemTime) -> String {
    let since: Duration = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let days = since.as_secs() as i64 / 86_400 + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153; // months from March on
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Days by GNU date.
    #[test]
    fn days_are_those_of_the_calendar() {
        for (seconds, day) in [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (951_868_799, "2000-02-29"),
            (951_868_800, "2000-03-01"),
            (1_735_689_599, "2024-12-31"),
            (4_107_542_400, "2100-03-01"),
        ] {
            assert_eq!(date(UNIX_EPOCH + Duration::from_secs(seconds)), day, "{seconds}");
        }
    }

    #[test]
    fn what_others_take_is_told_from_the_own() {
        let at = |user: u64, stolen: u64, idle: u64, own: u64| {
            let machine = format!("cpu  {user} 10 20 {idle} 5 1 2 {stolen} 0 0\ncpu0 1 2 3\n");
            let own = format!("42 (a (b) c) S 1 1 1 0 -1 4 0 0 0 0 {own} 7 0 0 20 0 2 0 99");
            ProcessorTime::of(&machine, &own).unwrap()
        };
        let (before, after) = (at(100, 0, 50, 30), at(240, 10, 100, 130));
        // 150 more busy ticks of 200, 100 of them ours.
        assert_eq!(after.taken_by_others(&before), 0.25);
        assert_eq!(before.taken_by_others(&before), 0.0);
        assert_eq!(ProcessorTime::of("intr 1", "1 (a) S"), None);
    }

    #[test]
    fn a_machine_says_what_it_is_or_nothing() {
        let cpuinfo = "processor\t: 0\nmodel name\t: A Processor\nflags\t\t: fpu avx2 avx512f avx512_bf16\n";
        let text = Processor::of(cpuinfo, "MemTotal:       2097152 kB\n", 3).described();
        let system = std::env::consts::OS;
        assert_eq!(text, format!("A Processor, 3 cores (avx2, avx512f, avx512_bf16), 2.00 GiB, {system}"));
        assert_eq!(
            Processor::of("", "", 1).described(),
            format!("{}, 1 core, {system}", std::env::consts::ARCH)
        );
    }
}
