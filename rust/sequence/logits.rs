//! Arithmetic on a row of logits, written so that the compiler makes vector code of it. NaN never wins.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use crate::llama::Token;

/// Values worked on side by side: one or two vector registers.
const LANES: usize = 16;
/// Values whose maximum is looked at as one: small enough to search again, large enough to pass over quickly.
const BLOCK: usize = 128;

/// The largest value; -inf if there is none but NaN.
#[must_use]
pub fn max(row: &[f32]) -> f32 {
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = larger(value, *lane);
        }
    }
    rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |best, &value| larger(value, best))
}

/// The token of the largest value, the first of equal ones; `None` if all are NaN or -inf.
#[must_use]
pub fn argmax(row: &[f32]) -> Option<Token> {
    let mut best = f32::NEG_INFINITY;
    let mut start = 0;
    for (index, block) in row.chunks(BLOCK).enumerate() {
        let block_best = max(block);
        if block_best > best {
            best = block_best;
            start = index * BLOCK;
        }
    }
    // Still -inf: nothing was larger. `position` alone would find a token that is -inf.
    let offset = row[start..].iter().position(|&value| value == best && best > f32::NEG_INFINITY)?;
    Token::try_from(start + offset).ok()
}

/// ln of the sum of exp of all values, of which `best` is the largest.
#[must_use]
pub fn log_sum_exp(row: &[f32], best: f32) -> f32 {
    if best.is_infinite() {
        return best;
    }
    let sum: f64 = row.chunks(BLOCK).map(|block| f64::from(sum_exp(block, best))).sum();
    best + sum.ln() as f32
}

/// Up to `n` tokens with the largest values, best first, the lower token first among equals; no NaN, no -inf.
pub fn top_n(row: &[f32], n: usize, ranked: &mut Vec<(Token, f32)>) {
    ranked.clear();
    if n == 0 {
        return;
    }
    let mut heap = BinaryHeap::with_capacity(n.min(row.len()) + 1);
    let mut floor = f32::NEG_INFINITY;
    for (index, block) in row.chunks(BLOCK).enumerate() {
        if max(block) > floor {
            floor = keep_best(&mut heap, n, block, index * BLOCK, floor);
        }
    }
    ranked.extend(heap.into_sorted_vec().into_iter().map(|Reverse(best)| (best.token, best.value)));
}

#[derive(PartialEq)]
struct Ranked {
    value: f32,
    token: Token,
}

impl Eq for Ranked {}

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> Ordering {
        self.value.total_cmp(&other.value).then(other.token.cmp(&self.token))
    }
}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Puts what of the block is above the floor into the heap of `n`; returns the new floor.
fn keep_best(heap: &mut BinaryHeap<Reverse<Ranked>>, n: usize, block: &[f32], start: usize, mut floor: f32) -> f32 {
    for (&value, token) in block.iter().zip(start as Token..) {
        if value > floor {
            heap.push(Reverse(Ranked { value, token }));
            if heap.len() > n {
                heap.pop();
            }
            if heap.len() == n {
                floor = heap.peek().map_or(floor, |Reverse(worst)| worst.value);
            }
        }
    }
    floor
}

/// `value` unless it is NaN or smaller; this way round it is one instruction.
fn larger(value: f32, best: f32) -> f32 {
    if value > best { value } else { best }
}

fn sum_exp(block: &[f32], best: f32) -> f32 {
    let (chunks, rest) = block.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += exp_not_positive(value - best);
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|&value| exp_not_positive(value - best)).sum::<f32>()
}

/// exp(x) for x ≤ 0 within 2e-7 of it, nearly nothing for NaN and -inf. The library's is a call per value.
fn exp_not_positive(x: f32) -> f32 {
    const LOWEST: f32 = -87.0;
    // Adding it leaves the nearest whole number in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = larger(x, LOWEST);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let series = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r / 720.0)))));
    let exponent = rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    series * f32::from_bits(exponent << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look like logits, the same at every run.
    fn row(n: usize) -> Vec<f32> {
        let mut state = 88_172_645_463_325_252_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 24) as f32
        };
        (0..n).map(|_| (next() + next() + next() - 1.5) * 12.0).collect()
    }

    #[test]
    fn argmax_finds_the_first_of_the_largest_at_any_length() {
        for n in 1..600 {
            let mut values = row(n);
            let expected = n * 2 / 3;
            values[expected] = 100.0;
            values[n - 1] = values[n - 1].max(if expected < n - 1 { 100.0 } else { 0.0 });
            assert_eq!(argmax(&values), Some(expected as Token), "{n} values");
        }
    }

    #[test]
    fn nan_and_minus_infinity_never_win() {
        assert_eq!(argmax(&[]), None);
        assert_eq!(argmax(&[f32::NAN, f32::NEG_INFINITY]), None);
        assert_eq!(argmax(&[f32::NAN, -3.0, f32::NAN]), Some(1));
        let mut values = vec![f32::NAN; 1000];
        values[777] = f32::MIN;
        assert_eq!(argmax(&values), Some(777));
        assert_eq!(max(&values), f32::MIN);
    }

    #[test]
    fn log_sum_exp_agrees_with_double_precision() {
        for n in [1, 15, 16, 17, 4_097, 151_936] {
            let values = row(n);
            let exact = values.iter().map(|&value| f64::from(value).exp()).sum::<f64>().ln();
            let ours = f64::from(log_sum_exp(&values, max(&values)));
            assert!((ours - exact).abs() < 2e-6, "{n} values: {ours} is not {exact}");
        }
    }

    #[test]
    fn log_sum_exp_passes_over_impossible_tokens() {
        let values = [f32::NEG_INFINITY, 2.0, f32::NAN, 2.0];
        assert!((log_sum_exp(&values, 2.0) - (2.0 + 2.0_f32.ln())).abs() < 1e-6);
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY], f32::NEG_INFINITY), f32::NEG_INFINITY);
    }

    #[test]
    fn exp_is_close_over_its_whole_range() {
        for step in 0..87_000 {
            let x = -(step as f32) / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp_not_positive(x)) - exact).abs() / exact;
            assert!(error < 3e-7, "exp({x}) is off by {error}");
        }
        assert!(exp_not_positive(f32::NAN) < 1e-37);
        assert!(exp_not_positive(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn top_n_is_the_head_of_a_stable_sort() {
        let mut values = row(3_000);
        values[17] = values[2_900];
        values[5] = f32::NAN;
        values[6] = f32::NEG_INFINITY;
        let mut expected: Vec<(Token, f32)> =
            (0..).zip(values.iter().copied()).filter(|pair| pair.1.is_finite()).collect();
        expected.sort_by(|a, b| b.1.total_cmp(&a.1));
        let mut ranked = Vec::new();
        for n in [0, 1, 2, 40, 500, 2_998, 5_000] {
            top_n(&values, n, &mut ranked);
            assert_eq!(ranked, expected[..n.min(expected.len())], "n = {n}");
        }
    }
}
