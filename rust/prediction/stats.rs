//! What a prediction cost.

use std::time::Instant;

use crate::context::parking::Source;

/// When what happened. A moment is `None` until it comes.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// The prediction was asked for.
    pub created: Instant,
    /// Evaluation of the prompt began.
    pub admitted: Option<Instant>,
    /// The first token was drawn.
    pub first_token: Option<Instant>,
    /// It ended.
    pub ended: Option<Instant>,
}

impl Default for Clock {
    fn default() -> Self {
        Self { created: Instant::now(), admitted: None, first_token: None, ended: None }
    }
}

/// Numbers of one prediction. Times are in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub struct Stats {
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    pub predicted_tokens: usize,
    /// Of those, the first of their rounds.
    pub first_tokens: usize,
    pub shifted_tokens: usize,
    pub prefix_source: Option<Source>,
    pub queue_time: f64,
    pub prefill_time: f64,
    pub time_to_first_token: f64,
    pub decode_time: f64,
    pub total_time: f64,
}

/// Token counts, as they grow.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Counts {
    pub prompt: usize,
    pub cached: usize,
    pub predicted: usize,
    pub shifted: usize,
    /// Where the cached ones were.
    pub source: Option<Source>,
}

impl Stats {
    /// The numbers at `now`, of a prediction that may still run.
    #[must_use]
    pub fn at(now: Instant, clock: &Clock, counts: Counts) -> Self {
        let end = clock.ended.unwrap_or(now);
        let between = |from: Option<Instant>, to: Option<Instant>| {
            from.map_or(0.0, |from| to.unwrap_or(end).saturating_duration_since(from).as_secs_f64())
        };
        Self {
            prompt_tokens: counts.prompt,
            cached_tokens: counts.cached,
            predicted_tokens: counts.predicted,
            first_tokens: counts.predicted.min(1),
            shifted_tokens: counts.shifted,
            prefix_source: counts.source,
            queue_time: between(Some(clock.created), clock.admitted),
            prefill_time: between(clock.admitted, clock.first_token),
            time_to_first_token: clock.first_token.map_or(0.0, |_| between(Some(clock.created), clock.first_token)),
            decode_time: between(clock.first_token, clock.ended),
            total_time: between(Some(clock.created), clock.ended),
        }
    }

    /// The numbers of one round and the next. What lay between them is time of neither.
    #[must_use]
    pub fn plus(&self, next: &Self) -> Self {
        let is_first = self.first_tokens == 0;
        Self {
            prompt_tokens: self.prompt_tokens + next.prompt_tokens,
            cached_tokens: self.cached_tokens + next.cached_tokens,
            predicted_tokens: self.predicted_tokens + next.predicted_tokens,
            first_tokens: self.first_tokens + next.first_tokens,
            shifted_tokens: self.shifted_tokens + next.shifted_tokens,
            prefix_source: self.prefix_source.or(next.prefix_source),
            queue_time: self.queue_time + next.queue_time,
            prefill_time: self.prefill_time + next.prefill_time,
            time_to_first_token: if is_first { next.time_to_first_token } else { self.time_to_first_token },
            decode_time: self.decode_time + next.decode_time,
            total_time: self.total_time + next.total_time,
        }
    }

    /// Tokens per second of the decoding phase: the first token of a round belongs to its prefill. 0 with no other.
    #[must_use]
    pub fn tokens_per_second(&self) -> f64 {
        rate(self.predicted_tokens - self.first_tokens, self.decode_time)
    }

    /// Evaluated prompt tokens per second.
    #[must_use]
    pub fn prompt_tokens_per_second(&self) -> f64 {
        rate(self.prompt_tokens - self.cached_tokens, self.prefill_time)
    }
}

fn rate(n: usize, seconds: f64) -> f64 {
    if seconds > 0.0 { n as f64 / seconds } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    /// A clock whose moments are so many milliseconds after the first, and that first moment.
    fn clock(moments: [Option<u64>; 3]) -> (Instant, Clock) {
        let created = Instant::now();
        let [admitted, first_token, ended] =
            moments.map(|moment| moment.map(|moment| created + Duration::from_millis(moment)));
        (created, Clock { created, admitted, first_token, ended })
    }

    fn stats(now: u64, moments: [Option<u64>; 3]) -> Stats {
        let (created, clock) = clock(moments);
        Stats::at(created + Duration::from_millis(now), &clock, Counts::default())
    }

    fn times(stats: &Stats) -> [f64; 4] {
        [stats.queue_time, stats.prefill_time, stats.decode_time, stats.total_time]
    }

    fn are_near(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-6
    }

    #[test]
    fn what_waits_has_only_waited() {
        assert_eq!(times(&stats(500, [None; 3])), [0.5, 0.0, 0.0, 0.5]);
    }

    #[test]
    fn what_ended_in_the_queue_waits_no_longer() {
        assert_eq!(times(&stats(900, [None, None, Some(250)])), [0.25, 0.0, 0.0, 0.25]);
    }

    #[test]
    fn a_running_prefill_lasts_until_now() {
        let stats = stats(500, [Some(125), None, None]);
        assert_eq!(times(&stats), [0.125, 0.375, 0.0, 0.5]);
        assert_eq!(stats.time_to_first_token, 0.0, "there is none yet");
    }

    #[test]
    fn after_the_end_nothing_changes() {
        let (created, clock) = clock([Some(125), Some(250), Some(1000)]);
        let after = |ms| Stats::at(created + Duration::from_millis(ms), &clock, Counts::default());
        assert_eq!(times(&after(1000)), [0.125, 0.125, 0.75, 1.0]);
        assert_eq!(after(1000), after(60_000));
    }

    #[test]
    fn counts_are_passed_on() {
        let (created, clock) = clock([None; 3]);
        let stats = Stats::at(created, &clock, Counts { prompt: 4, cached: 3, predicted: 2, shifted: 1, source: None });
        let counts = (stats.prompt_tokens, stats.cached_tokens, stats.predicted_tokens, stats.shifted_tokens);
        assert_eq!(counts, (4, 3, 2, 1));
    }

    #[test]
    fn the_first_token_belongs_to_the_prefill() {
        let stats = Stats { predicted_tokens: 9, first_tokens: 1, decode_time: 2.0, ..Stats::default() };
        assert_eq!(stats.tokens_per_second(), 4.0);
        let one = Stats { predicted_tokens: 1, first_tokens: 1, decode_time: 2.0, ..Stats::default() };
        assert_eq!(one.tokens_per_second(), 0.0);
        assert_eq!(stats.plus(&one).plus(&stats).tokens_per_second(), 16.0 / 6.0, "in every round");
    }

    #[test]
    fn rounds_add_up_but_for_the_time_to_the_first_token() {
        let one = stats(900, [Some(125), Some(250), Some(500)]);
        let both = one.plus(&one);
        assert_eq!(times(&both), times(&one).map(|time| 2.0 * time));
        let counts = Counts { prompt: 4, cached: 3, predicted: 2, shifted: 1, source: Some(Source::Host) };
        let (created, clock) = clock([Some(125), Some(250), Some(500)]);
        let drawn = Stats::at(created, &clock, counts);
        let both = Stats::default().plus(&drawn).plus(&drawn);
        assert_eq!((both.prompt_tokens, both.cached_tokens, both.predicted_tokens, both.shifted_tokens), (8, 6, 4, 2));
        assert_eq!((both.time_to_first_token, both.prefix_source), (0.25, Some(Source::Host)));
    }

    #[test]
    fn cached_tokens_are_no_speed_of_the_prefill() {
        let stats = Stats { prompt_tokens: 10, cached_tokens: 4, prefill_time: 3.0, ..Stats::default() };
        assert_eq!(stats.prompt_tokens_per_second(), 2.0);
    }

    #[test]
    fn in_no_time_there_is_no_speed() {
        let stats = Stats { prompt_tokens: 10, predicted_tokens: 10, first_tokens: 1, ..Stats::default() };
        assert_eq!((stats.tokens_per_second(), stats.prompt_tokens_per_second()), (0.0, 0.0));
        assert_eq!((Stats::default().tokens_per_second(), Stats::default().prompt_tokens_per_second()), (0.0, 0.0));
    }

    proptest! {
        /// Each moment is so much after the one before it; `n` of them have come.
        #[test]
        fn the_phases_add_up_to_the_total_at_every_moment(gaps in any::<[u16; 4]>(), n in 0..4usize) {
            let mut at = 0;
            let moments = gaps.map(|gap| { at += u64::from(gap); at });
            let stats = stats(at, [0, 1, 2].map(|i| (i < n).then_some(moments[i])));
            let sum = stats.queue_time + stats.prefill_time + stats.decode_time;
            prop_assert!(are_near(sum, stats.total_time), "{stats:?}");
            let first = if n > 1 { stats.queue_time + stats.prefill_time } else { 0.0 };
            prop_assert!(are_near(stats.time_to_first_token, first), "{stats:?}");
        }
    }
}
