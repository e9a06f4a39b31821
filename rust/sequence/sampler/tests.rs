//! Samplers against plain arithmetic, on small vocabularies and rows that a model could have made.

use std::collections::BTreeMap;

use super::*;
use crate::error::ForeignError;
use crate::llama::penalised_by_llama_cpp;

const NONE: Vocabulary<'static> =
    Vocabulary { size: 0, newline: None, eog: &[], suppressed: &[], context_size: 64, model: None };

/// Numbers in 0..1, the same at every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1 << 24) as f32
    }

    fn row(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.next() + self.next() + self.next() - 1.5) * 8.0).collect()
    }
}

fn noise(seed: u64) -> Noise {
    Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
}

fn sampler(spec: SamplerSpec, n_vocab: usize) -> Sampler {
    Sampler::new(spec, Vocabulary { size: n_vocab, ..NONE }).expect("a valid spec")
}

/// Everything off but the temperature.
fn plain(temperature: f32) -> SamplerSpec {
    SamplerSpec { temperature, top_k: 0, seed: 42, ..SamplerSpec::default() }
}

fn logits_of(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln() + 3.0).collect()
}

fn draw(sampler: &mut Sampler, row: &[f32], times: usize) -> Vec<Token> {
    (0..times).map(|_| sampler.sample(row).expect("a token").token).collect()
}

fn frequencies(tokens: &[Token]) -> BTreeMap<Token, f32> {
    let mut counts = BTreeMap::new();
    for &token in tokens {
        *counts.entry(token).or_insert(0.0) += 1.0 / tokens.len() as f32;
    }
    counts
}

/// The tokens that could still be drawn at the last draw.
fn support(spec: SamplerSpec, row: &[f32]) -> Vec<Token> {
    let mut sampler = sampler(spec, row.len());
    sampler.sample(row).expect("a token");
    let mut tokens: Vec<Token> =
        sampler.candidates.iter().filter(|(_, logit)| logit.is_finite()).map(|(token, _)| token).collect();
    tokens.sort_unstable();
    tokens
}

fn message<T>(result: Result<T>) -> String {
    result.err().map(|error| error.to_string()).unwrap_or_default()
}

const TOY: [f32; 5] = [0.1, 0.4, 0.05, 0.25, 0.2];

#[test]
fn temperature_zero_takes_the_largest_logit_whatever_truncation_says() {
    for seed in 1..50 {
        let row = noise(seed).row(1_000);
        let xtc = Some(Xtc { probability: 1.0, threshold: 0.0 });
        let mut greedy = sampler(SamplerSpec { xtc, top_k: 1, ..plain(0.0) }, row.len());
        assert!(greedy.is_greedy_argmax());
        assert_eq!(Some(greedy.sample(&row).expect("a token").token), logits::argmax(&row));
    }
}

#[test]
fn only_a_bare_greedy_sampler_is_an_argmax() {
    let row_edits = SamplerSpec { logit_bias: vec![(1, 2.0)], ..plain(0.0) };
    assert!(!sampler(row_edits, 5).is_greedy_argmax());
    assert!(!sampler(SamplerSpec { logprobs: Some(0), ..plain(0.0) }, 5).is_greedy_argmax());
    assert!(!sampler(SamplerSpec { repeat_penalty: Some(repeat(1.1, 4)), ..plain(0.0) }, 5).is_greedy_argmax());
    assert!(sampler(SamplerSpec { repeat_penalty: Some(repeat(1.0, 4)), ..plain(0.0) }, 5).is_greedy_argmax());
    assert!(!sampler(plain(0.7), 5).is_greedy_argmax());
}

#[test]
fn one_seed_gives_the_same_tokens_and_another_gives_others() {
    let rows: Vec<_> = (1..40).map(|seed| noise(seed).row(300)).collect();
    let run = |seed| -> Vec<Token> {
        let mut sampler = sampler(SamplerSpec { seed, ..plain(1.0) }, 300);
        rows.iter().map(|row| sampler.sample(row).expect("a token").token).collect()
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
    assert_eq!(run(u32::MAX), run(u32::MAX), "llama.cpp's mark for a random seed");
}

#[test]
fn draws_follow_the_probabilities() {
    let drawn = frequencies(&draw(&mut sampler(plain(1.0), 5), &logits_of(&TOY), 40_000));
    for (token, expected) in (0..).zip(TOY) {
        assert!((drawn[&token] - expected).abs() < 0.01, "token {token}: {} of {expected}", drawn[&token]);
    }
}

#[test]
fn temperature_sharpens_as_the_formula_says() {
    let drawn = frequencies(&draw(&mut sampler(plain(0.5), 5), &logits_of(&TOY), 40_000));
    let total: f32 = TOY.iter().map(|p| p * p).sum();
    for (token, p) in (0..).zip(TOY) {
        let seen = drawn.get(&token).unwrap_or(&0.0);
        assert!((seen - p * p / total).abs() < 0.01, "token {token}: {seen}");
    }
}

#[test]
fn truncation_keeps_the_tokens_it_should() {
    let row = logits_of(&TOY);
    let keeps = |change: fn(&mut SamplerSpec), expected: &[Token]| {
        let mut spec = plain(1.0);
        change(&mut spec);
        assert_eq!(support(spec, &row), expected);
    };
    keeps(|_| {}, &[0, 1, 2, 3, 4]);
    keeps(|spec| spec.top_k = 2, &[1, 3]);
    keeps(|spec| spec.top_k = 99, &[0, 1, 2, 3, 4]);
    keeps(|spec| spec.top_p = 0.6, &[1, 3]);
    keeps(|spec| spec.top_p = 0.0, &[1]);
    keeps(|spec| spec.min_p = 0.45, &[1, 3, 4]);
    keeps(|spec| spec.min_p = 1.0, &[1]);
    keeps(|spec| spec.typical_p = Some(0.3), &[3, 4]);
    keeps(|spec| spec.top_n_sigma = Some(1.0), &[1, 3, 4]);
    keeps(|spec| spec.xtc = Some(Xtc { probability: 1.0, threshold: 0.15 }), &[0, 2, 4]);
    keeps(|spec| spec.xtc = Some(Xtc { probability: 0.0, threshold: 0.15 }), &[0, 1, 2, 3, 4]);
}

#[test]
fn xtc_acts_as_often_as_its_probability() {
    let xtc = Some(Xtc { probability: 0.5, threshold: 0.3 });
    let row = logits_of(&[0.5, 0.4, 0.1]);
    let drawn = frequencies(&draw(&mut sampler(SamplerSpec { xtc, ..plain(1.0) }, 3), &row, 40_000));
    assert!((drawn[&0] - 0.25).abs() < 0.02, "{drawn:?}");
}

#[test]
fn dynamic_temperature_is_cold_where_the_model_is_sure() {
    let dynamic =
        |range| SamplerSpec { dynamic_temperature: Some(DynamicTemperature { range, exponent: 1.0 }), ..plain(1.0) };
    let row = logits_of(&[0.97, 0.01, 0.01, 0.01]);
    let best = |range| frequencies(&draw(&mut sampler(dynamic(range), 4), &row, 20_000))[&0];
    assert!((best(0.0) - 0.97).abs() < 0.01);
    assert!(best(0.9) > 0.995);
    let even = frequencies(&draw(&mut sampler(dynamic(0.9), 4), &[1.0; 4], 20_000));
    assert!(even.values().all(|share| (share - 0.25).abs() < 0.02), "{even:?}");
}

#[test]
fn mirostat_steers_the_surprise_to_its_target() {
    let row: Vec<f32> = (1..2_000).map(|rank| -(rank as f32).ln()).collect();
    let total = logits::log_sum_exp(&row, 0.0);
    for version in [1, 2] {
        let average = |tau| {
            let spec = SamplerSpec { mirostat: Some(Mirostat { version, tau, eta: 0.1 }), ..plain(1.0) };
            let tokens = draw(&mut sampler(spec, row.len()), &row, 4_000);
            let surprise = |&token: &Token| (total - row[token as usize]) / std::f32::consts::LN_2;
            tokens[1_000..].iter().map(surprise).sum::<f32>() / 3_000.0
        };
        assert!(average(2.0) + 1.0 < average(6.0), "Mirostat {version}: {} {}", average(2.0), average(6.0));
    }
}

#[test]
fn mirostat_leaves_truncation_out_but_not_penalties() {
    let mirostat = Some(Mirostat { version: 2, tau: 50.0, eta: 0.1 });
    assert_eq!(support(SamplerSpec { mirostat, top_k: 1, ..plain(1.0) }, &logits_of(&TOY)).len(), 5);
    let spec = SamplerSpec {
        mirostat,
        repeat_penalty: Some(RepeatPenalty { presence: 200.0, ..repeat(1.0, 8) }),
        ..plain(1.0)
    };
    let mut tokens = draw(&mut sampler(spec, 5), &logits_of(&TOY), 5);
    tokens.sort_unstable();
    assert_eq!(tokens, [0, 1, 2, 3, 4]);
}

fn repeat(penalty: f32, last_tokens: usize) -> RepeatPenalty {
    RepeatPenalty { penalty, last_tokens, frequency: 0.0, presence: 0.0, penalize_newline: true, filter: None }
}

/// The row as it is when the scan begins.
fn edited(sampler: &mut Sampler, row: &[f32]) -> Vec<f32> {
    let mut row = row.to_vec();
    sampler.edit(&mut row).expect("valid edits");
    row
}

#[test]
fn penalties_are_those_of_llama_cpp() {
    for seed in 1..40 {
        let mut noise = noise(seed);
        let row = noise.row(50);
        let history: Vec<Token> = (0..30).map(|_| (noise.next() * 50.0) as Token).collect();
        for (last, penalty, frequency, presence) in
            [(8, 1.3, 0.0, 0.0), (64, 0.8, 0.4, -0.2), (1, 1.0, 0.0, 1.5), (30, 2.0, 0.1, 0.1)]
        {
            let options = RepeatPenalty { frequency, presence, ..repeat(penalty, last) };
            let mut sampler = sampler(SamplerSpec { repeat_penalty: Some(options), ..plain(1.0) }, row.len());
            history.iter().for_each(|&token| sampler.accept(token).expect("accepted"));
            let expected = penalised_by_llama_cpp(&row, &history, last as i32, penalty, frequency, presence);
            assert_eq!(edited(&mut sampler, &row), expected);
        }
    }
}

#[test]
fn penalties_ordered_after_the_temperature_see_the_divided_logits() {
    let row = [3.0, -2.0, 1.0, -4.0, 2.5];
    let dynamic = DynamicTemperature { range: 0.0, exponent: 1.0 };
    for dynamic_temperature in [None, Some(dynamic)] {
        let spec = SamplerSpec {
            dynamic_temperature,
            repeat_penalty: Some(RepeatPenalty { frequency: 0.3, ..repeat(1.5, 8) }),
            order: vec![SamplerKind::Temperature, SamplerKind::Penalties],
            ..plain(2.0)
        };
        let mut sampler = sampler(spec, row.len());
        [0, 0, 1, 4].into_iter().for_each(|token| sampler.accept(token).expect("accepted"));
        sampler.sample(&row).expect("a token");
        let divided: Vec<f32> = row.iter().map(|logit| logit / 2.0).collect();
        let expected = penalised_by_llama_cpp(&divided, &[0, 0, 1, 4], 8, 1.5, 0.3, 0.0);
        let best = logits::max(&expected);
        for (token, logit) in sampler.candidates.iter() {
            let expected = expected[token as usize] - best;
            assert!((logit - expected).abs() < 1e-5, "token {token}: {logit} is not {expected}");
        }
    }
}

#[test]
fn the_prompt_is_not_penalised() {
    let mut sampler = sampler(SamplerSpec { repeat_penalty: Some(repeat(9.0, 8)), ..plain(0.0) }, 5);
    sampler.prime(&[0, 1, 2, 3, 4]).expect("primed");
    assert_eq!(edited(&mut sampler, &TOY), TOY);
}

#[test]
fn the_newline_is_penalised_only_if_asked_for() {
    for penalize_newline in [false, true] {
        let options = RepeatPenalty { penalize_newline, ..repeat(2.0, 8) };
        let spec = SamplerSpec { repeat_penalty: Some(options), ..plain(0.0) };
        let vocabulary = Vocabulary { size: 3, newline: Some(2), ..NONE };
        let mut sampler = Sampler::new(spec, vocabulary).expect("a valid spec");
        [1, 2].into_iter().for_each(|token| sampler.accept(token).expect("accepted"));
        let newline = if penalize_newline { 2.0 } else { 4.0 };
        assert_eq!(edited(&mut sampler, &[4.0, 4.0, 4.0]), [4.0, 2.0, newline]);
    }
}

struct Filter(fn(&[Token]) -> Result<Vec<Token>, ForeignError>);

impl PunishFilter for Filter {
    fn filter(&mut self, tokens: &[Token]) -> Result<Vec<Token>, ForeignError> {
        (self.0)(tokens)
    }
}

fn filtered(filter: fn(&[Token]) -> Result<Vec<Token>, ForeignError>) -> Sampler {
    let options = RepeatPenalty { filter: Some(Box::new(Filter(filter))), ..repeat(2.0, 2) };
    let mut sampler = sampler(SamplerSpec { repeat_penalty: Some(options), ..plain(0.0) }, 3);
    [0, 1, 2].into_iter().for_each(|token| sampler.accept(token).expect("accepted"));
    sampler
}

#[test]
fn the_filter_sees_the_window_and_chooses_what_is_penalised() {
    let mut sampler = filtered(|window| Ok(if window == [1, 2] { vec![0] } else { vec![1, 2] }));
    assert!(sampler.has_callbacks() && !sampler.is_cheap());
    assert_eq!(edited(&mut sampler, &[4.0, 4.0, 4.0]), [2.0, 4.0, 4.0]);
}

#[test]
fn a_filter_that_raises_or_answers_nonsense_ends_the_draw() {
    let raised = filtered(|_| Err(ForeignError(Box::new("mine")))).sample(&[1.0; 3]);
    assert!(matches!(raised, Err(Error::Foreign(ForeignError(inner))) if inner.downcast_ref() == Some(&"mine")));
    let nonsense = message(filtered(|_| Ok(vec![3])).sample(&[1.0; 3]));
    assert_eq!(nonsense, "token returned by punish_tokens_filter is 3; it must be from 0 to 2");
}

/// Forbids the token drawn last.
struct NoRepeat;

impl LogitsProcessor for NoRepeat {
    fn process(&mut self, tokens: &[Token], logits: &mut [f32]) -> Result<(), ForeignError> {
        if let Some(&last) = tokens.last() {
            logits[last as usize] = f32::NEG_INFINITY;
        }
        if tokens.len() == 4 { Err(ForeignError(Box::new("enough"))) } else { Ok(()) }
    }
}

#[test]
fn a_processor_edits_the_row_and_sees_every_token() {
    let spec = SamplerSpec { processor: Some(Box::new(NoRepeat)), logprobs: Some(1), ..plain(0.0) };
    let mut sampler = sampler(spec, 5);
    let row = logits_of(&TOY);
    assert_eq!(draw(&mut sampler, &row, 3), [1, 3, 1]);
    let drawn = sampler.sample(&row).expect("a token");
    let logprob = drawn.logprob.expect("asked for");
    assert!((logprob.logprob - TOY[3].ln()).abs() < 1e-5, "of the model, not of the edited row");
    assert_eq!(logprob.top[0].0, 1);
    assert!(matches!(sampler.sample(&row), Err(Error::Foreign(_))));
}

#[test]
fn forbidden_tokens_are_never_drawn() {
    for temperature in [0.0, 5.0] {
        let spec = SamplerSpec { logit_bias: vec![(1, f32::NEG_INFINITY)], ignore_eos: true, ..plain(temperature) };
        let vocabulary = Vocabulary { size: 5, eog: &[3], suppressed: &[4], ..NONE };
        let mut sampler = Sampler::new(spec, vocabulary).expect("a valid spec");
        let tokens = draw(&mut sampler, &logits_of(&TOY), 500);
        assert!(tokens.iter().all(|token| [0, 2].contains(token)));
    }
}

#[test]
fn end_tokens_may_be_drawn_unless_ignored() {
    let vocabulary = Vocabulary { size: 5, eog: &[1], ..NONE };
    let mut sampler = Sampler::new(plain(0.0), vocabulary).expect("a valid spec");
    assert_eq!(draw(&mut sampler, &logits_of(&TOY), 1), [1]);
}

#[test]
fn a_bias_adds_to_the_logit() {
    let spec = SamplerSpec { logit_bias: vec![(0, 4.0_f32.ln())], ..plain(1.0) };
    let drawn = frequencies(&draw(&mut sampler(spec, 5), &logits_of(&TOY), 40_000));
    assert!((drawn[&0] - 0.4 / 1.3).abs() < 0.01, "{drawn:?}");
}

#[test]
fn log_probabilities_sum_to_one_and_come_best_first() {
    let row = noise(3).row(777);
    let spec = SamplerSpec { logprobs: Some(777), temperature: 3.0, top_k: 5, ..plain(1.0) };
    let drawn = sampler(spec, row.len()).sample(&row).expect("a token");
    let logprob = drawn.logprob.expect("asked for");
    let total: f32 = logprob.top.iter().map(|pair| pair.1.exp()).sum();
    assert!((total - 1.0).abs() < 1e-5, "{total}");
    assert!(logprob.top.is_sorted_by(|a, b| a.1 >= b.1));
    assert!(logprob.top.contains(&(drawn.token, logprob.logprob)));
}

#[test]
fn logprobs_zero_tells_the_drawn_token_only() {
    let spec = SamplerSpec { logprobs: Some(0), ..plain(0.0) };
    let logprob = sampler(spec, 5).sample(&logits_of(&TOY)).expect("a token").logprob.expect("asked for");
    assert!((logprob.logprob - 0.4_f32.ln()).abs() < 1e-5);
    assert!(logprob.top.is_empty());
}

#[test]
fn a_row_without_a_possible_token_is_an_error() {
    for temperature in [0.0, 1.0] {
        for (top_k, logit) in [(0, f32::NAN), (0, f32::NEG_INFINITY), (40, f32::NAN)] {
            let mut sampler = sampler(SamplerSpec { top_k, ..plain(temperature) }, 300);
            assert!(message(sampler.sample(&vec![logit; 300])).starts_with("no token can be drawn"));
            assert_eq!(draw(&mut sampler, &vec![0.5; 300], 1).len(), 1, "the next row is served");
        }
    }
}

#[test]
fn nan_in_a_row_is_never_drawn() {
    for top_k in [0, 2] {
        let mut row = noise(1).row(2_000);
        row.iter_mut().step_by(2).for_each(|logit| *logit = f32::NAN);
        let mut sampler = sampler(SamplerSpec { top_k, typical_p: Some(0.9), top_p: 0.99, ..plain(2.0) }, 2_000);
        assert!(draw(&mut sampler, &row, 200).iter().all(|token| token % 2 == 1));
    }
}

#[test]
fn an_infinite_logit_forces_its_token() {
    for (top_k, temperature) in [(0, 1.0), (3, 1.0), (0, 0.0)] {
        let mut row = vec![1.0; 10];
        row[6] = f32::INFINITY;
        let spec = SamplerSpec { top_k, logprobs: Some(2), ..plain(temperature) };
        let drawn = sampler(spec, 10).sample(&row).expect("a token");
        assert_eq!(drawn.token, 6);
        assert_eq!(drawn.logprob.expect("asked for").logprob, 0.0);
    }
}

#[test]
fn a_row_of_the_wrong_length_is_an_error() {
    assert_eq!(message(sampler(plain(0.0), 5).sample(&[0.0; 4])), "a row of 4 logits for a vocabulary of 5");
}

#[test]
fn extreme_values_neither_crash_nor_draw_the_improbable() {
    let row: Vec<f32> = (0..5_000).map(|token| if token == 7 { 1e30 } else { -(token as f32) * 1e27 }).collect();
    for temperature in [1e-37, 1.0] {
        for order in [SamplerKind::DEFAULT_ORDER.to_vec(), SamplerKind::DEFAULT_ORDER.into_iter().rev().collect()] {
            for version in [0, 1, 2] {
                let spec = SamplerSpec {
                    typical_p: Some(0.5),
                    top_n_sigma: Some(1.0),
                    top_p: 0.9,
                    min_p: 0.1,
                    xtc: Some(Xtc { probability: 1.0, threshold: 0.1 }),
                    mirostat: (version > 0).then_some(Mirostat { version, tau: 5.0, eta: 0.1 }),
                    order: order.clone(),
                    ..plain(temperature)
                };
                assert_eq!(draw(&mut sampler(spec, row.len()), &row, 3), [7; 3]);
            }
        }
    }
}

#[test]
fn typical_sampling_survives_tokens_of_no_probability() {
    let mut row = logits_of(&TOY);
    row.extend([-500.0; 40]);
    let spec = SamplerSpec { typical_p: Some(0.3), ..plain(1.0) };
    assert_eq!(support(spec, &row), [3, 4]);
}

#[test]
fn samplers_act_in_the_order_given_and_only_if_named() {
    use SamplerKind::{MinP, Temperature, TopK};
    let row = logits_of(&TOY);
    let ordered = |order: &[SamplerKind]| {
        support(SamplerSpec { min_p: 0.4, top_k: 4, order: order.to_vec(), ..plain(0.5) }, &row)
    };
    assert_eq!(ordered(&[TopK, MinP, Temperature]), [1, 3, 4]);
    assert_eq!(ordered(&[TopK, Temperature, MinP]), [1]);
    assert_eq!(ordered(&[TopK]), [0, 1, 3, 4]);
    assert_eq!(ordered(&[]), [0, 1, 2, 3, 4]);
}

#[test]
fn top_k_scans_to_the_same_tokens_as_llama_cpp() {
    for k in [1, 40, 129, 500] {
        let row = noise(k).row(4_000);
        let spec = |order: &[SamplerKind]| SamplerSpec { top_k: k as i32, order: order.to_vec(), ..plain(0.9) };
        let scanned = support(spec(&[SamplerKind::TopK, SamplerKind::Temperature]), &row);
        let theirs = support(spec(&[SamplerKind::Temperature, SamplerKind::TopK]), &row);
        assert_eq!(scanned, theirs);
        assert_eq!(scanned.len(), k as usize);
    }
}

#[test]
fn names_of_samplers_read_back() {
    for kind in SamplerKind::DEFAULT_ORDER {
        assert_eq!(SamplerKind::from_name(kind.name()), Some(kind));
    }
    assert_eq!(SamplerKind::from_name("grammar"), None);
}

#[test]
fn values_out_of_range_are_refused_with_the_value_and_the_limit() {
    let refused = |change: fn(&mut SamplerSpec), expected: &str| {
        for temperature in [0.0, 1.0] {
            let mut spec = plain(temperature);
            change(&mut spec);
            let error = Sampler::new(spec, Vocabulary { size: 5, ..NONE }).err();
            assert!(matches!(&error, Some(Error::Value(text)) if text == expected), "{error:?} is not {expected}");
        }
    };
    refused(|spec| spec.top_p = 1.5, "top_p is 1.5; it must be from 0 to 1");
    refused(|spec| spec.top_p = f32::NAN, "top_p is NaN; it must be from 0 to 1");
    refused(|spec| spec.min_p = -0.1, "min_p is -0.1; it must be from 0 to 1");
    refused(|spec| spec.typical_p = Some(2.0), "typical_p is 2; it must be from 0 to 1");
    refused(
        |spec| spec.xtc = Some(Xtc { probability: 3.0, threshold: 0.1 }),
        "xtc probability is 3; it must be from 0 to 1",
    );
    refused(
        |spec| spec.mirostat = Some(Mirostat { version: 3, tau: 5.0, eta: 0.1 }),
        "mirostat version is 3; it must be from 1 to 2",
    );
    refused(|spec| spec.logit_bias = vec![(5, 1.0)], "logit_bias token is 5; it must be from 0 to 4");
    refused(|spec| spec.logit_bias = vec![(-1, 1.0)], "logit_bias token is -1; it must be from 0 to 4");
    refused(|spec| spec.logprobs = Some(6), "number of logprobs is 6; it must be at most 5");
    refused(|spec| spec.order = vec![SamplerKind::TopK; 2], "sampler_order names top_k twice");
    refused(
        |spec| {
            let breakers = Vec::new();
            let (multiplier, base, allowed_length) = (0.8, 1.75, 2);
            spec.dry = Some(Dry { multiplier, base, allowed_length, last_tokens: None, breakers });
        },
        "dry needs a model with a vocabulary",
    );
    for (value, part) in [(0.0, "penalty is 0;"), (f32::INFINITY, "penalty is inf;"), (f32::NAN, "penalty is NaN;")] {
        let spec = SamplerSpec { repeat_penalty: Some(repeat(value, 4)), ..plain(1.0) };
        assert!(message(Sampler::new(spec, Vocabulary { size: 5, ..NONE })).contains(part));
    }
    for value in [f32::NAN, f32::INFINITY] {
        assert!(message(Sampler::new(plain(value), Vocabulary { size: 5, ..NONE })).starts_with("temperature is"));
    }
}

#[test]
fn draws_that_scan_little_are_cheap() {
    assert!(sampler(plain(0.0), 151_936).is_cheap());
    assert!(sampler(SamplerSpec { top_k: 40, ..plain(0.8) }, 49_152).is_cheap());
    assert!(!sampler(plain(0.8), 49_152).is_cheap());
}
