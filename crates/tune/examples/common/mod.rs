//! What the examples share: arguments and the token stream.

use std::collections::BTreeMap;
use std::error::Error;

/// Any failure of a benchmark.
pub(crate) type Anything = Box<dyn Error>;

/// The arguments `--name=value`.
pub(crate) fn options() -> Result<BTreeMap<String, String>, Anything> {
    let option = |argument: String| {
        let named = argument.strip_prefix("--").and_then(|rest| rest.split_once('='));
        let (name, value) = named.ok_or_else(|| format!("{argument}: expected --name=value"))?;
        Ok((name.to_owned(), value.to_owned()))
    };
    std::env::args().skip(1).map(option).collect()
}

/// Row `number` of a token stream, of which `scripts/compare_step.py` makes the same: id t is
/// `5 + splitmix64(stream * 2^48 + number * length + t) mod (vocabulary - 5)`.
pub(crate) fn row(stream: u64, number: usize, length: usize, vocabulary: usize) -> Vec<u32> {
    let id = |t: usize| {
        let mut z = ((stream << 48) + (number * length + t) as u64).wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        5 + ((z ^ (z >> 31)) % (vocabulary as u64 - 5)) as u32
    };
    (0..length).map(id).collect()
}
