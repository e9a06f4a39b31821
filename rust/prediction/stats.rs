//! What a prediction cost.

use std::time::Instant;

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
    pub shifted_tokens: usize,
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
            shifted_tokens: counts.shifted,
            queue_time: between(Some(clock.created), clock.admitted),
            prefill_time: between(clock.admitted, clock.first_token),
            time_to_first_token: clock.first_token.map_or(0.0, |_| between(Some(clock.created), clock.first_token)),
            decode_time: between(clock.first_token, clock.ended),
            total_time: between(Some(clock.created), clock.ended),
        }
    }

    /// Tokens per second of the decoding phase: the first token belongs to the prefill. 0 with fewer than two tokens.
    #[must_use]
    pub fn tokens_per_second(&self) -> f64 {
        rate(self.predicted_tokens.saturating_sub(1), self.decode_time)
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
