//! The floating-point operations that a training step cannot do without.
//!
//! | part | operations |
//! |---|---|
//! | a linear layer `[N, K]` of the blocks, forward | `2 R N K` |
//! | gradient of its input | `2 R N K`; none for the first block's query, key and value, below which nothing is trained |
//! | gradient of its weight, full fine-tuning alone | `2 R N K` |
//! | attention, P pairs of a query and a key that it sees | `4 P H E` forward, `8 P H E` backward |
//! | vocabulary projection of L labelled tokens | `4 L V D`, with the gradient of its weight `6 L V D` |
//! | classification head of a text | `4 (D D + C D)`, with gradients of its weights `6 (D D + C D)` |
//!
//! R are the rows whose result somebody reads: all tokens, but in the last block, where only keys and values are read of
//! every token, the rows that something is predicted from. Not counted: an adapter's own thin products, whatever is
//! computed twice (scores in the attention's backward, blocks that are run again), and everything that is no product.

use lora_sb_data::Example;
use lora_sb_kernels::Mask;
use lora_sb_model::{BlockKind, Config, Projection, Task};
use lora_sb_tune::Method;

/// What is counted, for a line below the numbers.
pub(super) const DEFINITION: &str = "necessary operations: for each weight of the linear layers 2 a token forward and 2 for the input's \
     gradient (full fine-tuning: 2 more for its own), attention, and the head of labelled tokens; rows that nobody reads, \
     adapters' thin products and what is computed twice are not counted";

/// Operations of one step on `examples`.
pub(crate) fn necessary(config: &Config, method: Method, examples: &[Example]) -> f64 {
    examples.iter().map(|example| of_text(config, method, example)).sum()
}

fn of_text(config: &Config, method: Method, example: &Example) -> f64 {
    let tokens = example.ids.len();
    let read = rows_read(example);
    let passes = |input_gradient: bool| {
        1 + usize::from(input_gradient || method == Method::Full) + usize::from(method == Method::Full)
    };
    let mut multiplied = 0; // products of a value with a value, each worth 2 operations
    for (layer, block) in config.blocks.iter().enumerate() {
        let last = layer + 1 == config.num_hidden_layers;
        let rows = if last { read.len() } else { tokens };
        for &projection in &config.projections {
            let (out, input) = config.site_shape(projection.of(layer));
            let keys = 2 * config.num_key_value_heads * config.head_dim;
            let (of_all, of_read) = match projection {
                Projection::Key | Projection::Value => (out, 0),
                Projection::QueryKeyValue => (keys, out - keys),
                _ => (0, out),
            };
            let first = layer == 0 && reads_stream(projection);
            multiplied += passes(!first) * input * (of_all * tokens + of_read * rows);
        }
        let width = config.num_attention_heads * config.head_dim;
        let pairs: usize = match last {
            true => read.iter().map(|&row| seen(*block, row, tokens)).sum(),
            false => (0..tokens).map(|row| seen(*block, row, tokens)).sum(),
        };
        multiplied += 6 * pairs * width;
    }
    let (d, head_passes) = (config.hidden_size, passes(true));
    multiplied += head_passes
        * match config.task {
            Task::LanguageModel => read.len() * config.vocab_size * d,
            Task::Classification { labels } => d * d + labels * d,
            Task::Regression => d * d + d,
        };
    2.0 * multiplied as f64
}

/// The rows that something is predicted from.
fn rows_read(example: &Example) -> Vec<usize> {
    match example.label {
        Some(_) => vec![0],
        None => (1..example.ids.len()).filter(|&i| example.trained[i]).map(|i| i - 1).collect(),
    }
}

/// Whether a layer reads the residual stream before the attention.
fn reads_stream(projection: Projection) -> bool {
    projection.of_attention() && projection != Projection::Output
}

/// How many keys the query of a row sees.
fn seen(block: BlockKind, row: usize, tokens: usize) -> usize {
    match block.mask {
        Mask::Full => tokens,
        Mask::Causal => row + 1,
        Mask::Sliding { window } => (row + 1).min(window),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use lora_sb_data::{Label, Location};

    use super::*;

    fn config(extra: &str) -> Config {
        let json = format!(
            r#"{{"model_type": "llama", "vocab_size": 11, "hidden_size": 6, "intermediate_size": 10, "head_dim": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, {extra}}}"#
        );
        Config::from_json(json.as_bytes()).unwrap()
    }

    fn text(trained: &[bool]) -> Example {
        let source = Location { file: Arc::from(Path::new("test")), line: 1, element: None };
        Example::text(vec![5; trained.len()], trained.to_vec(), source)
    }

    /// Three tokens, all labelled: the head reads rows 0 and 1. D = 6, H E = 8, G E = 4, F = 10.
    #[test]
    fn a_decoder_counts_what_is_read() {
        let (query, keys, output, mlp) = (8 * 6, 2 * 4 * 6, 8 * 6, 3 * 10 * 6);
        let config = config(r#""num_hidden_layers": 2"#);
        let first = 3 * (query + keys + 2 * output + 2 * mlp) + 6 * (1 + 2 + 3) * 8;
        let last = 2 * 3 * keys + 2 * 2 * (query + output + mlp) + 6 * (1 + 2) * 8;
        let head = 2 * 2 * 11 * 6;
        let example = text(&[true; 3]);
        let low_rank = necessary(&config, Method::LoraSb, std::slice::from_ref(&example));
        assert_eq!(low_rank, 2.0 * (first + last + head) as f64);
        assert_eq!(necessary(&config, Method::Lora, &[example.clone(), example.clone()]), 2.0 * low_rank);
        let full = 3 * 3 * (query + keys + output + mlp)
            + 6 * 6 * 8
            + 3 * 3 * keys
            + 3 * 2 * (query + output + mlp)
            + 6 * 3 * 8
            + 3 * 2 * 11 * 6;
        assert_eq!(necessary(&config, Method::Full, &[example]), 2.0 * full as f64);
    }

    #[test]
    fn unlabelled_tokens_cost_less_in_the_last_block_and_the_head() {
        let config = config(r#""num_hidden_layers": 3"#);
        let all = necessary(&config, Method::LoraSb, &[text(&[true; 7])]);
        let answer =
            necessary(&config, Method::LoraSb, &[text(&[false, false, false, false, false, true, true])]);
        let (query, output, mlp) = (8 * 6, 8 * 6, 3 * 10 * 6);
        let pairs = (1 + 2 + 3 + 4 + 5 + 6) - (5 + 6);
        let saved = 4 * 2 * (query + output + mlp) + 6 * pairs * 8 + 4 * 2 * 11 * 6;
        assert_eq!(all - answer, 2.0 * saved as f64);
    }

    #[test]
    fn an_encoder_reads_the_first_row_of_its_last_block() {
        let json = r#"{"model_type": "bert", "vocab_size": 50, "hidden_size": 6, "intermediate_size": 10,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}"#;
        let config = Config::from_json(json.as_bytes()).unwrap();
        let example = Example { label: Some(Label::Class(1)), ..text(&[false; 5]) };
        let block = 5 * 2 * 36 + 36 + 2 * (36 + 2 * 60) + 6 * 5 * 6;
        let head = 2 * (36 + 2 * 6);
        assert_eq!(necessary(&config, Method::LoraSb, &[example]), 2.0 * f64::from(block + head));
    }

    #[test]
    fn a_window_bounds_the_pairs() {
        let window = config(r#""num_hidden_layers": 1"#);
        let block = BlockKind { mask: Mask::Sliding { window: 3 }, ..window.blocks[0] };
        assert_eq!((0..6).map(|row| seen(block, row, 6)).collect::<Vec<_>>(), [1, 2, 3, 3, 3, 3]);
    }
}
