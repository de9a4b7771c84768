//! Scores of predictions: pairs of what was predicted and what the data says, in this order.
//!
//! All are computed in `f64` and are `None` where scikit-learn and SciPy refuse to answer or answer with NaN; they
//! are 0 where scikit-learn says so.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// A score, under the name that `evaluate` and the model cards of Hugging Face give it. More is better in each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// The share of right classes.
    Accuracy,
    /// F1 of class 1 against the others.
    F1,
    /// The correlation of predicted and expected classes.
    #[serde(rename = "matthews_correlation")]
    Matthews,
    /// The linear correlation of values.
    Pearson,
    /// The correlation of the ranks of values.
    Spearman,
}

impl Metric {
    /// All of them.
    pub const ALL: [Metric; 5] =
        [Metric::Accuracy, Metric::F1, Metric::Matthews, Metric::Pearson, Metric::Spearman];

    /// The name used in options and records.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Accuracy => "accuracy",
            Metric::F1 => "f1",
            Metric::Matthews => "matthews_correlation",
            Metric::Pearson => "pearson",
            Metric::Spearman => "spearman",
        }
    }

    /// The metric of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|metric| metric.name() == name)
    }

    /// The score of (predicted, expected) classes; `None` of nothing, and of a metric of values.
    pub fn of_classes(self, pairs: &[(u32, u32)]) -> Option<f64> {
        match self {
            Metric::Accuracy => accuracy(pairs),
            Metric::F1 => f1(pairs),
            Metric::Matthews => matthews(pairs),
            Metric::Pearson | Metric::Spearman => None,
        }
    }

    /// The score of (predicted, expected) values; `None` where it is not defined, and of a metric of classes.
    pub fn of_values(self, pairs: &[(f64, f64)]) -> Option<f64> {
        match self {
            Metric::Pearson => pearson(pairs),
            Metric::Spearman => spearman(pairs),
            Metric::Accuracy | Metric::F1 | Metric::Matthews => None,
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The share of pairs whose classes are the same; `None` of nothing.
pub fn accuracy(pairs: &[(u32, u32)]) -> Option<f64> {
    let right = pairs.iter().filter(|(predicted, expected)| predicted == expected).count();
    (!pairs.is_empty()).then(|| right as f64 / pairs.len() as f64)
}

/// `F1 = 2 TP / (2 TP + FP + FN)` of class 1, the harmonic mean of its precision and recall (van Rijsbergen 1979,
/// chapter 7); all other classes are the negative one.
///
/// 0 where class 1 is neither predicted nor expected, as `f1_score` of scikit-learn; `None` of nothing.
pub fn f1(pairs: &[(u32, u32)]) -> Option<f64> {
    let count = |of: &dyn Fn(bool, bool) -> bool| {
        pairs.iter().filter(|&&(predicted, expected)| of(predicted == 1, expected == 1)).count()
    };
    let hits = count(&|predicted, expected| predicted && expected);
    let misses = count(&|predicted, expected| predicted != expected);
    let score = match 2 * hits + misses {
        0 => 0.0,
        denominator => 2.0 * hits as f64 / denominator as f64,
    };
    (!pairs.is_empty()).then_some(score)
}

/// Matthews' correlation of any number of classes: the `R_K` statistic of Gorodkin (2004, Comparing two K-category
/// assignments by a K-category correlation coefficient, eq. 8), which for two classes is Matthews' (1975).
///
/// ```text
/// R = (c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2))
/// ```
///
/// with `s` pairs, `c` of them right, and class `k` predicted `p_k` and expected `t_k` times.
///
/// 0 where all predictions, or all expected classes, are the same, as `matthews_corrcoef` of scikit-learn; `None` of
/// nothing.
pub fn matthews(pairs: &[(u32, u32)]) -> Option<f64> {
    // [predicted, expected] of each class
    let mut counts: BTreeMap<u32, [i128; 2]> = BTreeMap::new();
    let mut right = 0_i128;
    for &(predicted, expected) in pairs {
        counts.entry(predicted).or_default()[0] += 1;
        counts.entry(expected).or_default()[1] += 1;
        right += i128::from(predicted == expected);
    }
    let all = pairs.len() as i128;
    let sum = |a: usize, b: usize| counts.values().map(|count| count[a] * count[b]).sum::<i128>();
    let covariance = right * all - sum(0, 1);
    let (predicted, expected) = (all * all - sum(0, 0), all * all - sum(1, 1));
    let score = match (predicted, expected) {
        (0, _) | (_, 0) => 0.0,
        _ => covariance as f64 / ((predicted as f64).sqrt() * (expected as f64).sqrt()),
    };
    (!pairs.is_empty()).then_some(score)
}

/// Pearson's correlation of predicted `x` and expected `y` (Pearson 1895).
///
/// ```text
/// r = sum_i (x_i - mean x) (y_i - mean y) / sqrt(sum_i (x_i - mean x)^2  sum_i (y_i - mean y)^2)
/// ```
///
/// `None` of fewer than two pairs, where all `x` or all `y` are the same, and where a value is not finite: `pearsonr`
/// of SciPy gives NaN or an error there.
pub fn pearson(pairs: &[(f64, f64)]) -> Option<f64> {
    let (&first, rest) = pairs.split_first()?;
    let finite = pairs.iter().all(|(x, y)| x.is_finite() && y.is_finite());
    // Rounding in the mean would make a constant seem to vary.
    let constant = rest.iter().all(|(x, _)| *x == first.0) || rest.iter().all(|(_, y)| *y == first.1);
    if !finite || constant {
        return None;
    }
    let number = pairs.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| pairs.iter().map(of).sum::<f64>() / number;
    let (mean_x, mean_y) = (mean(|pair| pair.0), mean(|pair| pair.1));
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for (x, y) in pairs {
        let (x, y) = (x - mean_x, y - mean_y);
        xx += x * x;
        yy += y * y;
        xy += x * y;
    }
    let score = xy / (xx.sqrt() * yy.sqrt());
    score.is_finite().then(|| score.clamp(-1.0, 1.0))
}

/// Spearman's correlation (1904): [`pearson`] of the ranks. Equal values share the mean of their ranks.
///
/// `None` where [`pearson`] is.
pub fn spearman(pairs: &[(f64, f64)]) -> Option<f64> {
    if pairs.iter().any(|(x, y)| !x.is_finite() || !y.is_finite()) {
        return None;
    }
    let x = ranks(pairs.iter().map(|pair| pair.0));
    let y = ranks(pairs.iter().map(|pair| pair.1));
    pearson(&x.into_iter().zip(y).collect::<Vec<_>>())
}

/// Ranks from 1, `[N]`; equal values have the mean of the ranks that they take.
fn ranks(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut order: Vec<(usize, f64)> = values.enumerate().collect();
    order.sort_by(|(_, a), (_, b)| a.total_cmp(b));
    let mut ranks = vec![0.0; order.len()];
    let mut before = 0;
    // `==` and not the order of the sort: 0 and -0 are equal.
    for equal in order.chunk_by(|(_, a), (_, b)| a == b) {
        let rank = before as f64 + (equal.len() + 1) as f64 / 2.0;
        equal.iter().for_each(|&(index, _)| ranks[index] = rank);
        before += equal.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_near(found: Option<f64>, expected: f64) {
        let found = found.unwrap();
        assert!((found - expected).abs() <= 1e-15 * expected.abs().max(1.0), "{found} is not {expected}");
    }

    fn pairs<T: Copy, const N: usize>(predicted: [T; N], expected: [T; N]) -> Vec<(T, T)> {
        predicted.into_iter().zip(expected).collect()
    }

    #[test]
    fn two_classes() {
        // 4 hits, 2 false alarms, 1 miss, 4 right rejections: F1 = 8 / 11,
        // Matthews (4 4 - 2 1) / sqrt(6 5 6 5) = 14 / 30.
        let binary = pairs([1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1], [1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1]);
        assert_near(accuracy(&binary), 8.0 / 11.0);
        assert_near(f1(&binary), 8.0 / 11.0);
        assert_near(matthews(&binary), 14.0 / 30.0);
        // The other way round, misses are false alarms.
        let turned: Vec<_> = binary.iter().map(|&(predicted, expected)| (expected, predicted)).collect();
        assert_eq!((f1(&turned), matthews(&turned)), (f1(&binary), matthews(&binary)));
        // Positive and negative exchanged: 4 hits, 1 false alarm, 2 misses.
        let negated: Vec<_> =
            binary.iter().map(|&(predicted, expected)| (1 - predicted, 1 - expected)).collect();
        assert_near(f1(&negated), 8.0 / 11.0);
        assert_eq!(matthews(&negated), matthews(&binary));
        let unbalanced = pairs([1, 1, 0, 1], [1, 0, 0, 0]);
        assert_near(f1(&unbalanced), 0.5);
        assert_near(accuracy(&unbalanced), 0.5);
    }

    #[test]
    fn many_classes() {
        // scikit-learn 1.9.1
        let many = pairs([0, 1, 2, 2, 0, 1, 3, 0, 1, 2, 2, 3, 0], [0, 2, 2, 2, 1, 1, 0, 0, 1, 3, 0, 3, 0]);
        assert_near(accuracy(&many), 0.6153846153846154);
        assert_near(matthews(&many), 0.47969065035948494);
        // The numbers of the classes do not matter to either.
        let renamed: Vec<_> = many.iter().map(|&(p, e)| (u32::MAX - 7 * p, u32::MAX - 7 * e)).collect();
        assert_eq!((accuracy(&renamed), matthews(&renamed)), (accuracy(&many), matthews(&many)));
        // F1 asks for class 1 alone.
        assert_near(f1(&many), 2.0 * 2.0 / (2.0 * 2.0 + 1.0 + 1.0));
    }

    #[test]
    fn classes_without_variety() {
        // scikit-learn 1.9.1: accuracy, F1, Matthews
        for (predicted, expected, scores) in [
            ([0, 0, 0, 0], [0, 0, 0, 0], [1.0, 0.0, 0.0]),
            ([1, 1, 1, 1], [1, 1, 1, 1], [1.0, 1.0, 0.0]),
            ([0, 0, 1, 1], [1, 1, 0, 0], [0.0, 0.0, -1.0]),
            ([1, 1, 1, 1], [0, 1, 0, 1], [0.5, 2.0 / 3.0, 0.0]),
            ([0, 1, 0, 1], [1, 1, 1, 1], [0.5, 2.0 / 3.0, 0.0]),
            ([0, 0, 0, 0], [0, 1, 0, 1], [0.5, 0.0, 0.0]),
            ([0, 1, 0, 1], [0, 1, 0, 1], [1.0, 1.0, 1.0]),
        ] {
            let pairs = pairs(predicted, expected);
            let metrics = [Metric::Accuracy, Metric::F1, Metric::Matthews];
            for (metric, score) in metrics.into_iter().zip(scores) {
                assert_near(metric.of_classes(&pairs), score);
            }
        }
        for metric in Metric::ALL {
            assert_eq!((metric.of_classes(&[]), metric.of_values(&[])), (None, None));
        }
        assert_eq!(Metric::Accuracy.of_classes(&[(3, 3)]), Some(1.0));
    }

    #[test]
    fn correlations_of_values() {
        // SciPy 1.17.1
        let values = pairs([1.2, 2.9, 0.4, 4.4, 3.1, 3.1, -0.3], [1.0, 2.5, 1.0, 5.0, 2.5, 3.8, 0.0]);
        assert_near(pearson(&values), 0.952150068535308);
        assert_near(spearman(&values), 0.9633432944855657);
        // Far from zero, where sums of squares would cancel.
        let far: Vec<_> = pairs([0.0, 1.0, 2.0, 3.0, 4.0], [0.0, -1.0, 2.0, -3.0, 4.0]);
        let far: Vec<_> = far.into_iter().map(|(x, y)| (x + 1e8, y)).collect();
        assert_near(pearson(&far), 0.3511234415883917);
        assert_near(spearman(&far), 0.3);
    }

    #[test]
    fn ranks_of_equal_values_are_their_mean() {
        assert_eq!(ranks([3.0, -1.0, 3.0, 0.0, -0.0, 3.0].into_iter()), [5.0, 1.0, 5.0, 2.5, 2.5, 5.0]);
        assert_eq!(ranks([].into_iter()), Vec::<f64>::new());
    }

    #[test]
    fn laws_of_the_correlations() {
        let values = pairs([0.3, -2.0, 5.5, 1.1, 1.1, 7.0, -0.4], [1.0, 0.0, 4.0, 4.5, 2.0, 6.0, -3.0]);
        for metric in [Metric::Pearson, Metric::Spearman] {
            let score = metric.of_values(&values).unwrap();
            let turned: Vec<_> = values.iter().map(|&(x, y)| (y, x)).collect();
            assert_near(metric.of_values(&turned), score);
            let line: Vec<_> = values.iter().map(|&(x, y)| (-2.0 * x + 3.0, y)).collect();
            assert_near(metric.of_values(&line), -score);
            let own: Vec<_> = values.iter().map(|&(x, _)| (x, x)).collect();
            assert_near(metric.of_values(&own), 1.0);
        }
        let cubes: Vec<_> = values.iter().map(|&(x, y)| (x.powi(3), y)).collect();
        assert_eq!(spearman(&cubes), spearman(&values));
        assert_ne!(pearson(&cubes), pearson(&values));
    }

    #[test]
    fn values_without_a_correlation() {
        for pairs in [
            pairs([1.0], [2.0]).as_slice(),
            // The mean of these is not 0.1.
            &pairs([0.1; 3], [1.0, 2.0, 3.0]),
            &pairs([1.0, 2.0, 3.0], [0.1; 3]),
            &pairs([1.0, f64::NAN, 3.0], [1.0, 2.0, 3.0]),
            &pairs([1.0, 2.0, 3.0], [1.0, f64::INFINITY, 3.0]),
        ] {
            assert_eq!((pearson(pairs), spearman(pairs)), (None, None), "{pairs:?}");
        }
    }

    #[test]
    fn names_and_kinds() {
        for metric in Metric::ALL {
            assert_eq!(Metric::from_name(metric.name()), Some(metric));
            assert_eq!(serde_json::to_value(metric).unwrap(), metric.name());
            // Each is of classes or of values, never of both.
            let of_classes = metric.of_classes(&[(0, 0), (1, 1)]).is_some();
            let of_values = metric.of_values(&[(0.0, 0.0), (1.0, 1.0)]).is_some();
            assert!(of_classes != of_values, "{metric}");
        }
        assert_eq!(Metric::from_name("Accuracy"), None);
        assert_eq!(format!("{:>8}|{}", Metric::F1, Metric::Matthews), "      f1|matthews_correlation");
    }
}
