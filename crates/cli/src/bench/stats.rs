//! What many measurements of one thing come to.

use serde::Serialize;

/// How measurements are spread. A percentile is a measured value, the smallest that so many percent do not exceed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Spread {
    /// How many there are.
    pub(super) n: usize,
    pub(super) min: f64,
    pub(super) p25: f64,
    pub(super) p50: f64,
    pub(super) p75: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Spread {
    /// The spread of these, if there are any.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let at = |percent| percentile(&values, percent);
        let (p25, p50, p75, p90, p99) = (at(25), at(50), at(75), at(90), at(99));
        Some(Spread { n: values.len(), min, p25, p50, p75, p90, p99, max })
    }

    /// The same in another unit.
    pub(super) fn map(self, to: impl Fn(f64) -> f64) -> Spread {
        let Spread { n, min, p25, p50, p75, p90, p99, max } = self;
        Spread {
            n,
            min: to(min),
            p25: to(p25),
            p50: to(p50),
            p75: to(p75),
            p90: to(p90),
            p99: to(p99),
            max: to(max),
        }
    }
}

/// The smallest of the sorted `values` that at least `percent` percent of them do not exceed. There is at least one.
fn percentile(values: &[f64], percent: usize) -> f64 {
    let rank = (values.len() * percent).div_ceil(100).max(1);
    values[rank - 1]
}

/// The middle one.
pub(super) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    Spread::of(values).map(|spread| spread.p50)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measured_values() {
        let spread = Spread::of((1..=100).rev().map(f64::from)).unwrap();
        let Spread { n, min, p25, p50, p75, p90, p99, max } = spread;
        assert_eq!((n, min, max), (100, 1.0, 100.0));
        assert_eq!([p25, p50, p75, p90, p99], [25.0, 50.0, 75.0, 90.0, 99.0]);
    }

    #[test]
    fn one_value_is_every_percentile_and_none_has_no_spread() {
        let spread = Spread::of([7.0]).unwrap();
        assert_eq!([spread.min, spread.p25, spread.p50, spread.p99, spread.max], [7.0; 5]);
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn few_values_give_the_largest_as_the_99th_percentile() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]).unwrap().p99, 3.0);
        assert_eq!(median([4.0, 1.0, 3.0, 2.0]), Some(2.0));
        assert_eq!(median([]), None);
    }
}
