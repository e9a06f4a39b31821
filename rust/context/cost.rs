//! What a decode of a given width costs, learnt while running.
//!
//! On CPUs a wider batch is not always faster, so `ready` streams are served once each (a *round*) by
//! several narrow calls where that is quicker than one wide call. Pure: no clock, no randomness;
//! time is the count of recorded calls, and the same records give the same widths.
//!
//! *Knowledge.* Per width the last few calls after a call of the same width, and after one of another
//! (which cannot reuse its graph), each summed up by a low median, so that calls disturbed by a
//! neighbour hardly count and old ones fade. The first call after anything else, such as a prompt, is
//! unlike all others and counts only where there are hardly any.
//!
//! *Choice.* Of the widths 1, 2, 4, … and `ready` the one with the shortest round; a narrower one only
//! if it is [`MARGIN`] faster, and widths are compared only by calls made at about the same time.
//!
//! *Trials.* A width that might be better and was never seen is tried at once, for one call to three.
//! After that a trial must be affordable: the time a trial is likely to lose, doubled with every
//! trial that led nowhere, is saved up at [`TRIAL_SHARE`] of the running time. So what trials lose in
//! the long run stays below that share, however wrong the guesses are.
//!
//! *Doubt.* Machines that are shared change their speed from one second to the next, and not by the same
//! factor at every width. So when decoding begins anew, or a call of the width in use costs something
//! else, the narrowest and the widest calls are tried again as soon as a few calls of the width in use
//! are there to compare them with: one call each where all is as it was. The longer that leaves the
//! widths as they were, the rarer it is; what it loses is taken off what was saved up for trials, but it
//! does not wait for that. A width that was left gets a second look after a few tokens: what spoke
//! against it may have been a moment's disturbance.

/// A narrower width must make the round shorter by this factor, and a wider one is taken when its
/// round is at most longer by it than the best. So, trials aside, a round takes at most `1 + MARGIN`
/// of the shortest round known: nobody waits much longer for a turn than at the best width.
pub const MARGIN: f64 = 0.02;

/// The share of the running time that repeated trials may lose.
pub const TRIAL_SHARE: f64 = 0.005;

/// A round at this many times the best one needs no further calls to be judged.
const HOPELESS: f64 = 6.0;
/// The same, once it is known what a change of width costs.
const POOR: f64 = 1.5;
/// The same, for a width that is tried again out of doubt.
const WORSE: f64 = 1.1;
/// What was worse by this factor is not tried again out of doubt.
const UNLIKELY: f64 = 2.0;
/// Calls at the same width that end a trial.
const TRIAL_CALLS: u32 = 2;
/// Asks for a width after which a trial ends though the records do not come.
const TRIAL_ASKS: u32 = 8;
/// Recorded calls between two trials that are not the first of their width.
const PAUSE: u64 = 32;
/// Recorded calls that are lately.
const LATELY: u64 = 16;
/// A width not used for so many recorded calls is learnt anew.
const STALE: u64 = 64;
/// Recorded calls between two doubts when decoding begins anew, doubled with every second vain doubt.
const CERTAIN: u64 = 64;
/// The same, where a changed cost is the reason.
const LEAST_CERTAIN: u64 = 12;
/// Vain doubts in a row that count.
const MOST_VAIN: u32 = 10;
/// Calls of the width in use, after a doubt, before others are compared with it: fewer may have been disturbed.
const SURE: usize = 4;
/// Tokens after which a width that was left is looked at again.
const SECOND_LOOK: u64 = 8;
/// How often the price of a trial doubles at most.
const MOST_FAILS: u32 = 3;
/// The price of a trial is at most so many rounds, before doubling.
const MOST_ROUNDS: f64 = 2.0;
/// What never seen widths may cost at least, of the cost of the next narrower known one.
const MONOTONE: f64 = 0.9;
/// The same, of what the known widths on both sides let expect.
const BETWEEN: f64 = 0.75;
/// A change of cost by this factor is another load: what failed may now succeed.
const DRIFT: f64 = 1.15;
/// Calls that take longer than a day are the clock's mistake.
const LONGEST: f64 = 86_400.0;

/// The costs of decode calls by width, and the width to use.
#[derive(Debug)]
pub struct CostModel {
    /// By width; the first one is unused.
    widths: Vec<Width>,
    /// The width in use, by the number of streams ready.
    chosen: Vec<usize>,
    /// What a change of width adds to a call.
    change: Samples,
    trial: Option<Trial>,
    /// Seconds that trials may lose.
    credit: f64,
    /// No trial before this many calls.
    quiet_until: u64,
    /// The width in use and its cost, when last looked at for drift.
    reference: (usize, f64),
    /// Calls recorded so far.
    now: u64,
    /// Tokens of these calls.
    served: u64,
    doubt: Doubt,
    most: Most,
}

/// When what is known was last doubted.
#[derive(Debug, Default)]
struct Doubt {
    at: u64,
    /// Doubts in a row after which the widths in use were as before.
    vain: u32,
    /// The widths in use when it was doubted.
    chosen: Vec<usize>,
    /// The width that was left last, and after how many tokens it gets its second look.
    left: Option<(usize, u64)>,
}

/// The most streams that were ready lately.
#[derive(Debug, Default)]
struct Most {
    latest: usize,
    earlier: usize,
    since: u64,
}

#[derive(Debug, Clone, Default)]
struct Width {
    same: Samples,
    changed: Samples,
    /// Calls ever recorded.
    n_seen: u64,
    last: u64,
    fails: u32,
    /// Whether what is known may be of another time.
    doubted: bool,
}

#[derive(Debug)]
struct Trial {
    width: usize,
    price: f64,
    /// Whether it is tried out of doubt.
    again: bool,
    n_calls: u32,
    n_same: u32,
    n_asks: u32,
}

impl CostModel {
    /// A model that knows nothing and so prefers the widest calls, up to `max_width`.
    #[must_use]
    pub fn new(max_width: usize) -> Self {
        let n_widths = max_width.max(1) + 1;
        Self {
            widths: vec![Width::default(); n_widths],
            chosen: (0..n_widths).collect(),
            change: Samples::default(),
            trial: None,
            credit: 0.0,
            quiet_until: 0,
            reference: (0, 0.0),
            now: 0,
            served: 0,
            doubt: Doubt::default(),
            most: Most::default(),
        }
    }

    /// Learns that a call of `width` decode tokens took `seconds`, coming after a call of `previous`
    /// tokens (0: none, or another kind of call). Impossible values are ignored.
    pub fn record(&mut self, previous: usize, width: usize, seconds: f64) {
        let possible = seconds > 0.0 && seconds < LONGEST;
        if !possible || width == 0 || width >= self.widths.len() {
            return;
        }
        self.now += 1;
        self.served += width as u64;
        if previous == 0 && self.now - self.doubt.at >= self.doubt.pause() {
            self.doubt();
        }
        if let Some((left, _)) = self.doubt.left.take_if(|(_, after)| *after <= self.served) {
            self.widths[left].doubted = true;
        }
        let before = self.same(width);
        self.widths[width].n_seen += 1;
        // See *Knowledge*.
        if previous > 0 || before.is_none() || self.now - self.widths[width].last > LATELY {
            self.learn_change(previous, width, seconds);
            self.widths[width].record(previous == width, seconds, self.now);
        }
        self.credit += TRIAL_SHARE * self.guess(width).map_or(seconds, |usual| seconds.min(2.0 * usual));
        self.note_trial(previous, width);
        self.note_drift(width, before);
    }

    /// The width of the next decode call, `1..=ready`, when `ready` streams want a token each.
    pub fn width(&mut self, ready: usize) -> usize {
        let ready = ready.clamp(1, self.widths.len() - 1);
        if ready == 1 {
            return 1;
        }
        if let Some(width) = self.go_on(ready) {
            return width;
        }
        self.follow(ready);
        self.settle(ready);
        if let Some((width, price)) = self.next_trial(ready) {
            let again = self.widths[width].doubted;
            self.trial = Some(Trial { width, price, again, n_calls: 0, n_same: 0, n_asks: 1 });
            return width;
        }
        self.chosen[ready]
    }

    /// The seconds a call of `width` tokens after one of `previous` usually takes, if one was seen.
    #[must_use]
    pub fn expected(&self, previous: usize, width: usize) -> Option<f64> {
        if previous == width { self.same(width) } else { self.changed(width) }
    }

    // Knowledge.

    fn learn_change(&mut self, previous: usize, width: usize, seconds: f64) {
        let known = &self.widths[width];
        let change = match (known.same.typical(), known.changed.typical()) {
            (Some(same), _) if previous != width => seconds - same,
            (None, Some(changed)) if previous == width => changed - seconds,
            _ => return,
        };
        self.change.push(change.max(0.0));
    }

    fn same(&self, width: usize) -> Option<f64> {
        let known = self.widths.get(width)?;
        match (known.same.typical(), known.changed.typical()) {
            (Some(same), Some(changed)) if known.same.len == 1 => Some(same.min(changed)),
            (Some(same), _) => Some(same),
            (None, changed) => changed.map(|changed| (changed - self.change()).max(0.5 * changed)),
        }
    }

    fn changed(&self, width: usize) -> Option<f64> {
        let known = self.widths.get(width)?.changed.typical();
        known.or_else(|| Some(self.same(width)? + self.change()))
    }

    fn change(&self) -> f64 {
        self.change.typical().unwrap_or(0.0)
    }

    /// The cost of a width, from its neighbours if it was never seen itself.
    fn guess(&self, width: usize) -> Option<f64> {
        self.same(width).or_else(|| match (self.narrower(width), self.wider(width)) {
            (Some(low), Some(high)) => Some(between(low, high, width)),
            (Some((at, cost)), None) | (None, Some((at, cost))) => Some(cost * width as f64 / at as f64),
            (None, None) => None,
        })
    }

    /// The nearest narrower width that was seen, with its cost.
    fn narrower(&self, width: usize) -> Option<(usize, f64)> {
        (1..width).rev().find_map(|at| Some((at, self.same(at)?)))
    }

    fn wider(&self, width: usize) -> Option<(usize, f64)> {
        (width + 1..self.widths.len()).find_map(|at| Some((at, self.same(at)?)))
    }

    /// The least that a width never seen can be hoped to cost.
    fn hope(&self, width: usize) -> f64 {
        let Some(low) = self.narrower(width) else {
            return 0.0;
        };
        let least = MONOTONE * low.1;
        self.wider(width).map_or(least, |high| least.max(BETWEEN * between(low, high, width)))
    }

    // Choice.

    /// The seconds of a round of calls of `width` that cost `full` each.
    fn round_at(&self, ready: usize, width: usize, full: f64) -> f64 {
        let (n_full, rest) = ((ready / width) as f64, ready % width);
        if rest == 0 {
            return n_full * full;
        }
        let rest = self.guess(rest).unwrap_or(full);
        n_full * full + rest + 2.0 * self.change()
    }

    fn round(&self, ready: usize, width: usize) -> Option<f64> {
        Some(self.round_at(ready, width, self.same(width)?))
    }

    /// Fewer streams than a moment ago are served no wider than those were, where nothing recent says otherwise.
    fn follow(&mut self, ready: usize) {
        self.most.note(ready, self.now);
        let known = &self.widths[self.chosen[ready]];
        if self.most.is_more_than(ready) && self.now - known.last > STALE {
            self.chosen[ready] = self.chosen[ready].min(self.chosen[self.most.ready()]);
        }
    }

    /// Makes the best known width the chosen one.
    fn settle(&mut self, ready: usize) {
        let chosen = self.chosen[ready];
        let Some(now) = self.round(ready, chosen) else {
            return;
        };
        let last = self.widths[chosen].last;
        let known = |width: usize| {
            let known = &self.widths[width];
            let fresh = !known.doubted && known.last.abs_diff(last) <= STALE;
            Some((width, self.round(ready, width).filter(|_| fresh)?))
        };
        let rounds = || candidates(ready).filter_map(known);
        let best = rounds().map(|(_, round)| round).fold(now, f64::min);
        let near = rounds().filter(|&(_, round)| round <= best * (1.0 + MARGIN));
        let Some((width, round)) = near.max_by_key(|&(width, _)| width) else {
            return;
        };
        // Back to a wider one only when it is no slower: the margin keeps the choice from flapping.
        if width != chosen && (width < chosen || round <= now) {
            self.doubt.left = Some((chosen, self.served + SECOND_LOOK));
            self.chosen[ready] = width;
        }
    }

    // Trials.

    /// The width of the trial that runs, unless it is over.
    fn go_on(&mut self, ready: usize) -> Option<usize> {
        let mut trial = self.trial.take()?;
        trial.n_asks += 1;
        let fits = candidates(ready).any(|width| width == trial.width);
        if trial.n_asks > TRIAL_ASKS || (fits && self.is_over(&trial, ready)) {
            self.finish(&trial, ready);
            return None;
        }
        let width = trial.width;
        self.trial = Some(trial);
        fits.then_some(width)
    }

    fn is_over(&self, trial: &Trial, ready: usize) -> bool {
        let rounds = (self.round(ready, trial.width), self.round(ready, self.chosen[ready]));
        let (Some(round), Some(best)) = rounds else {
            return false;
        };
        let enough = match (trial.again, self.change.len > 0) {
            (true, _) => WORSE,
            (false, true) => POOR,
            (false, false) => HOPELESS,
        };
        trial.n_same >= TRIAL_CALLS || (trial.n_calls > 0 && round > enough * best)
    }

    fn finish(&mut self, trial: &Trial, ready: usize) {
        self.settle(ready);
        let lost = f64::from(trial.n_calls) * self.loss(ready, trial.width);
        let known = &mut self.widths[trial.width];
        if self.chosen[ready] == trial.width {
            known.fails = 0;
        } else if trial.again {
            // Doubts need no credit, but must not use up what the other widths' trials will be paid with.
            self.credit = (self.credit - lost).max(self.credit.min(0.0));
        } else if trial.price > 0.0 {
            known.fails = (known.fails + 1).min(MOST_FAILS);
            self.credit -= trial.price.max(lost);
            self.quiet_until = self.now + PAUSE;
        }
    }

    /// The next width to try and what it takes off the credit.
    fn next_trial(&mut self, ready: usize) -> Option<(usize, f64)> {
        let best = self.round(ready, self.chosen[ready])?;
        if self.trial.is_some() {
            return None;
        }
        // The last few tokens of replies that end together are no time to learn wider calls for fewer streams.
        let widest = if self.most.is_more_than(ready) { self.chosen[self.most.ready()] } else { ready };
        let others = || candidates(ready).filter(|&width| width != self.chosen[ready] && width <= widest);
        if let Some(width) = others().find(|&width| self.is_urgent(ready, width, best)) {
            return Some((width, 0.0));
        }
        if self.now < self.quiet_until {
            return None;
        }
        let prices = others().map(|width| (width, self.price(ready, width, best)));
        let cheapest = prices.min_by(|a, b| a.1.total_cmp(&b.1));
        // Credit beyond the dearest trial would only allow a burst of them.
        self.credit = self.credit.min(MOST_ROUNDS * f64::from(1 << MOST_FAILS) * best);
        cheapest.filter(|&(_, price)| price <= self.credit)
    }

    /// May it be better, with too little known to tell?
    fn is_urgent(&self, ready: usize, width: usize, best: f64) -> bool {
        let near = |factor: f64| self.round(ready, width).is_some_and(|round| round <= factor * best);
        match self.widths[width].n_seen {
            0 => self.round_at(ready, width, self.hope(width)) < best,
            1 | 2 => near(POOR),
            _ => self.is_doubtful(ready, width) && near(UNLIKELY),
        }
    }

    /// Is it to be compared again with the width in use, now that this one was seen often enough?
    fn is_doubtful(&self, ready: usize, width: usize) -> bool {
        let extreme = width == 1 || width == ready;
        extreme && self.widths[width].doubted && self.widths[self.chosen[ready]].is_sure()
    }

    /// What must be saved up before the width is tried again.
    fn price(&self, ready: usize, width: usize, best: f64) -> f64 {
        let known = &self.widths[width];
        // What is known may be wrong by now, or was disturbed if it is one call: it is not waited out
        // in full, but what the trial then really loses is taken off the credit.
        let most = if known.n_seen == 1 { best } else { MOST_ROUNDS * best };
        let lost = f64::from(TRIAL_CALLS) * self.loss(ready, width);
        lost.clamp(0.25 * best, most) * f64::from(1 << known.fails)
    }

    /// The seconds that a call of this width loses against the chosen one.
    fn loss(&self, ready: usize, width: usize) -> f64 {
        let best = self.round(ready, self.chosen[ready]).unwrap_or(0.0);
        let fair = best * width as f64 / ready as f64;
        (self.guess(width).unwrap_or(0.0) - fair).max(0.0) + self.change()
    }

    fn note_trial(&mut self, previous: usize, width: usize) {
        if let Some(trial) = self.trial.as_mut().filter(|trial| trial.width == width) {
            trial.n_calls += 1;
            trial.n_same += u32::from(previous == width);
        }
    }

    /// What is known may be of another time. The less often that is so, the less often it is asked.
    fn doubt(&mut self) {
        let vain = self.doubt.chosen == self.chosen;
        self.doubt.vain = if vain { (self.doubt.vain + 1).min(MOST_VAIN) } else { 0 };
        self.doubt.chosen.clone_from(&self.chosen);
        self.doubt.at = self.now;
        self.widths.iter_mut().for_each(|width| width.doubted = true);
    }

    /// After a change of the load, what failed may succeed. The width in use shows it by a slow or
    /// sudden change, the others by having become faster (slower may be one disturbed call).
    fn note_drift(&mut self, width: usize, before: Option<f64>) {
        let Some(cost) = self.same(width) else { return };
        let (at, reference) = self.reference;
        let in_use = at == width && (cost > reference * DRIFT || reference > cost * DRIFT);
        if in_use && self.now - self.doubt.at >= LEAST_CERTAIN {
            self.doubt();
        }
        if in_use || before.is_some_and(|before| before > cost * DRIFT) {
            self.widths.iter_mut().for_each(|width| width.fails = 0);
        }
        if in_use || at != width {
            self.reference = (width, cost);
        }
    }
}

impl Doubt {
    /// Calls until decoding that begins anew is reason for the next.
    fn pause(&self) -> u64 {
        CERTAIN << (self.vain / 2)
    }
}

impl Most {
    fn note(&mut self, ready: usize, now: u64) {
        if now - self.since >= LATELY {
            *self = Self { latest: ready, earlier: self.latest, since: now };
        }
        self.latest = self.latest.max(ready);
    }

    fn ready(&self) -> usize {
        self.latest.max(self.earlier)
    }

    fn is_more_than(&self, ready: usize) -> bool {
        self.ready() > ready
    }
}

impl Width {
    /// Seen often enough, since it was last doubted, to compare others with it?
    fn is_sure(&self) -> bool {
        !self.doubted && self.same.len + self.changed.len >= SURE
    }

    fn record(&mut self, same: bool, seconds: f64, now: u64) {
        if now - self.last > STALE || self.doubted {
            self.same = Samples::default();
            self.changed = Samples::default();
            self.doubted = false;
        }
        let samples = if same { &mut self.same } else { &mut self.changed };
        samples.push(seconds);
        self.last = now;
    }
}

/// The widths that are worth a thought, the narrowest first, then from the widest down.
fn candidates(ready: usize) -> impl Iterator<Item = usize> {
    let powers = (1..=ready.ilog2()).rev().map(|bit| 1 << bit);
    [1, ready].into_iter().chain(powers.filter(move |&width| width != ready))
}

/// The straight line through the costs of two widths.
fn between(low: (usize, f64), high: (usize, f64), width: usize) -> f64 {
    let share = (width - low.0) as f64 / (high.0 - low.0) as f64;
    low.1 + share * (high.1 - low.1)
}

const N_SAMPLES: usize = 8;

/// The last few durations and what is typical of them.
#[derive(Debug, Clone, Default)]
struct Samples {
    ring: [f64; N_SAMPLES],
    len: usize,
    next: usize,
    typical: f64,
}

impl Samples {
    fn push(&mut self, seconds: f64) {
        self.ring[self.next] = seconds;
        self.next = (self.next + 1) % N_SAMPLES;
        self.len = (self.len + 1).min(N_SAMPLES);
        let mut sorted = self.ring;
        let sorted = &mut sorted[..self.len];
        sorted.sort_unstable_by(f64::total_cmp);
        // The lower median: disturbances only ever add time.
        self.typical = sorted[(self.len - 1) / 2];
    }

    fn typical(&self) -> Option<f64> {
        (self.len > 0).then_some(self.typical)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::collections::VecDeque;

    use proptest::prelude::*;

    /// Seconds per call by width, as straight lines between measured points.
    fn curve(points: &[(usize, f64)], width: usize) -> f64 {
        let at = points.iter().position(|point| point.0 >= width).expect("in range");
        match points[at] {
            (known, cost) if known == width => cost,
            high => between(points[at - 1], high, width),
        }
    }

    /// 135M Q8_0 with llama.cpp's default kernels: wider is slower but for eight.
    fn default_kernels(width: usize) -> f64 {
        let points =
            [(1, 1.0 / 154.0), (2, 2.0 / 70.0), (3, 3.0 / 81.0), (4, 4.0 / 93.0), (6, 6.0 / 112.0), (8, 8.0 / 164.0)];
        curve(&points, width)
    }

    /// The same with `GGML_LLAMAFILE=OFF`: wider is faster.
    fn other_kernels(width: usize) -> f64 {
        let points = [
            (1, 1.0 / 149.0),
            (2, 2.0 / 154.0),
            (3, 3.0 / 161.0),
            (4, 4.0 / 170.0),
            (6, 6.0 / 185.0),
            (8, 8.0 / 189.0),
        ];
        curve(&points, width)
    }

    /// 0.5B Q4_0, repacked: up and down.
    fn repacked(width: usize) -> f64 {
        let points =
            [(1, 1.0 / 65.0), (2, 2.0 / 47.0), (3, 3.0 / 52.0), (4, 4.0 / 74.0), (6, 6.0 / 62.0), (8, 8.0 / 108.0)];
        curve(&points, width)
    }

    fn flat(_: usize) -> f64 {
        0.003
    }

    fn linear(width: usize) -> f64 {
        0.004 * width as f64
    }

    fn tiny(width: usize) -> f64 {
        40e-6 + 70e-6 * width as f64
    }

    type Curve = fn(usize) -> f64;

    /// Name, seconds by width, and what a change of width adds.
    const CURVES: [(&str, Curve, f64); 6] = [
        ("default kernels", default_kernels, 0.0004),
        ("other kernels", other_kernels, 0.0004),
        ("repacked", repacked, 0.0005),
        ("flat", flat, 0.0003),
        ("linear", linear, 0.0002),
        ("tiny", tiny, 60e-6),
    ];

    /// What disturbs a call: a factor for the n-th call.
    type Noise = fn(u64) -> f64;

    fn quiet(_: u64) -> f64 {
        1.0
    }

    /// Up to a tenth more, and in one call of 16 five times as much.
    fn noisy(call: u64) -> f64 {
        let random = scramble(call);
        let jitter = 1.0 + (random % 1000) as f64 / 10_000.0;
        if (random >> 32).is_multiple_of(16) { 5.0 * jitter } else { jitter }
    }

    fn scramble(seed: u64) -> u64 {
        let mixed = (seed + 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 7
    }

    /// A machine that decodes the longest waiting streams first, as the planner does.
    struct Machine {
        cost: Curve,
        change: f64,
        noise: Noise,
        calls: u64,
        seconds: f64,
        previous: usize,
        /// One stream in so many calls misses the next call.
        stragglers: Option<u64>,
    }

    impl Machine {
        fn new(cost: Curve, change: f64, noise: Noise) -> Self {
            Self { cost, change, noise, calls: 0, seconds: 0.0, previous: 0, stragglers: None }
        }

        fn call(&mut self, width: usize) -> f64 {
            self.calls += 1;
            let change = if width == self.previous { 0.0 } else { self.change };
            self.previous = width;
            let seconds = ((self.cost)(width) + change) * (self.noise)(self.calls);
            self.seconds += seconds;
            seconds
        }

        fn straggler(&self) -> Option<usize> {
            let random = scramble(self.calls);
            random.is_multiple_of(self.stragglers?).then_some((random >> 20) as usize % 8)
        }

        /// Serves `n_streams` of `n_tokens` each and returns the seconds taken.
        fn serve(
            &mut self,
            n_streams: usize,
            n_tokens: usize,
            mut width: impl FnMut(usize) -> usize,
            mut seen: impl FnMut(usize, usize, f64),
        ) -> f64 {
            let before = self.seconds;
            let mut waiting: VecDeque<usize> = (0..n_streams).map(|_| n_tokens).collect();
            let mut late = Vec::new();
            while !waiting.is_empty() {
                let width = width(waiting.len()).min(waiting.len());
                let previous = self.previous;
                let seconds = self.call(width);
                seen(previous, width, seconds);
                let served: Vec<_> = waiting.drain(..width).map(|left| left - 1).filter(|&left| left > 0).collect();
                waiting.extend(late.drain(..));
                let straggler = self.straggler().filter(|&at| at < served.len() && served.len() + waiting.len() > 1);
                for (at, left) in served.into_iter().enumerate() {
                    if Some(at) == straggler { late.push(left) } else { waiting.push_back(left) }
                }
            }
            self.seconds - before
        }

        fn learn(&mut self, model: &mut CostModel, n_streams: usize, n_tokens: usize) -> f64 {
            let model = std::cell::RefCell::new(model);
            self.serve(
                n_streams,
                n_tokens,
                |ready| model.borrow_mut().width(ready),
                |previous, width, seconds| model.borrow_mut().record(previous, width, seconds),
            )
        }

        fn fixed(&mut self, width: usize, n_streams: usize, n_tokens: usize) -> f64 {
            self.serve(n_streams, n_tokens, |_| width, |_, _, _| {})
        }
    }

    /// The time of the best fixed width over the time of a model that knows nothing.
    fn ratio(cost: Curve, change: f64, noise: Noise, n_streams: usize, n_tokens: usize) -> f64 {
        let fixed = |width| Machine::new(cost, change, noise).fixed(width, n_streams, n_tokens);
        let best = (1..=n_streams).map(fixed).fold(f64::INFINITY, f64::min);
        let mut model = CostModel::new(8);
        best / Machine::new(cost, change, noise).learn(&mut model, n_streams, n_tokens)
    }

    #[test]
    fn from_cold_the_best_fixed_width_is_nearly_reached() {
        for (name, cost, change) in CURVES {
            for n_streams in [2, 3, 4, 8] {
                for n_tokens in [64, 200] {
                    let ratio = ratio(cost, change, quiet, n_streams, n_tokens);
                    assert!(ratio >= 0.95, "{name}, {n_streams} x {n_tokens}: {ratio:.3}");
                }
            }
        }
    }

    #[test]
    fn among_disturbances_the_best_fixed_width_is_nearly_reached_in_the_long_run() {
        for (name, cost, change) in CURVES {
            for n_streams in [2, 3, 4, 8] {
                let ratio = ratio(cost, change, noisy, n_streams, 2000);
                assert!(ratio >= 0.93, "{name}, {n_streams}: {ratio:.3}");
            }
        }
    }

    #[test]
    fn streams_that_come_one_by_one_reach_it_too() {
        for (name, cost, change) in CURVES {
            let mut model = CostModel::new(8);
            let mut machine = Machine::new(cost, change, quiet);
            for n_streams in 1..8 {
                machine.learn(&mut model, n_streams, 8);
            }
            let fixed = |width| Machine::new(cost, change, quiet).fixed(width, 8, 128);
            let best = (1..=8).map(fixed).fold(f64::INFINITY, f64::min);
            let ratio = best / machine.learn(&mut model, 8, 128);
            assert!(ratio >= 0.95, "{name}: {ratio:.3}");
        }
    }

    #[test]
    fn streams_that_miss_a_call_now_and_then_do_not_confuse_it() {
        for (name, cost, change) in CURVES {
            for n_streams in [3, 4, 8] {
                let machine = || Machine { stragglers: Some(5), ..Machine::new(cost, change, noisy) };
                let fixed = |width| machine().fixed(width, n_streams, 1000);
                let best = (1..=n_streams).map(fixed).fold(f64::INFINITY, f64::min);
                let ratio = best / machine().learn(&mut CostModel::new(8), n_streams, 1000);
                assert!(ratio >= 0.93, "{name}, {n_streams}: {ratio:.3}");
            }
        }
    }

    /// Once learnt, what is lost stays under the share for trials, the margin and a little.
    #[test]
    fn what_is_lost_in_the_long_run_is_bounded() {
        for (name, cost, change) in CURVES {
            for n_streams in [2, 3, 4, 7, 8] {
                let mut model = CostModel::new(8);
                let mut machine = Machine::new(cost, change, quiet);
                machine.learn(&mut model, n_streams, 500);
                let fixed = |width| Machine::new(cost, change, quiet).fixed(width, n_streams, 5000);
                let best = (1..=n_streams).map(fixed).fold(f64::INFINITY, f64::min);
                let ratio = best / machine.learn(&mut model, n_streams, 5000);
                assert!(ratio >= 1.0 - TRIAL_SHARE - MARGIN, "{name}, {n_streams}: {ratio:.4}");
            }
        }
    }

    #[test]
    fn another_load_is_learnt_anew() {
        let changes = [(default_kernels as Curve, flat as Curve), (flat, default_kernels)];
        for (before, after) in changes {
            for n_streams in [4, 8] {
                let mut model = CostModel::new(8);
                Machine::new(before, 0.0004, noisy).learn(&mut model, n_streams, 2000);
                let mut machine = Machine::new(after, 0.0004, quiet);
                machine.learn(&mut model, n_streams, 1500);
                let fixed = |width| Machine::new(after, 0.0004, quiet).fixed(width, n_streams, 200);
                let best = (1..=n_streams).map(fixed).fold(f64::INFINITY, f64::min);
                let ratio = best / machine.learn(&mut model, n_streams, 200);
                assert!(ratio >= 0.93, "{n_streams}: {ratio:.3}");
            }
        }
    }

    /// Wide calls become fast while the narrow ones in use cost what they did.
    #[test]
    fn what_failed_before_is_tried_again() {
        let better = |width: usize| default_kernels(1) * (1.0 + 0.1 * width as f64);
        for n_streams in [2, 3, 4] {
            let mut model = CostModel::new(8);
            Machine::new(default_kernels, 0.0004, quiet).learn(&mut model, n_streams, 20_000);
            assert_eq!(model.chosen[n_streams], 1);
            Machine::new(better, 0.0004, quiet).learn(&mut model, n_streams, 1500);
            assert_eq!(model.chosen[n_streams], n_streams);
        }
    }

    /// A shared machine at its two speeds, measured: 135M Q4_1 on one core, narrow calls the better ones at the
    /// one, wide calls at the other.
    fn undisturbed(width: usize) -> f64 {
        curve(&[(1, 0.0074), (2, 0.0183), (3, 0.026), (4, 0.0326), (8, 0.049)], width)
    }

    fn crowded(width: usize) -> f64 {
        curve(&[(1, 0.0136), (2, 0.0252), (3, 0.0366), (4, 0.0432), (8, 0.075)], width)
    }

    /// By request, the time of the best fixed width at that time over that of one model for all of them; best last.
    fn ratios_of_requests(loads: [Curve; 2], n_streams: usize) -> Vec<f64> {
        let mut model = CostModel::new(8);
        let mut ratios: Vec<f64> = (0..64)
            .map(|request| {
                let cost = loads[usize::from(scramble(request).is_multiple_of(2))];
                let machine = || Machine::new(cost, 0.0006, quiet);
                let fixed = |width| machine().fixed(width, n_streams, 64);
                let best = (1..=n_streams).map(fixed).fold(f64::INFINITY, f64::min);
                best / machine().learn(&mut model, n_streams, 64)
            })
            .collect();
        ratios.sort_by(f64::total_cmp);
        ratios
    }

    #[test]
    fn a_load_that_changes_from_one_request_to_the_next_is_followed() {
        for (name, loads) in [("crowded", [undisturbed, crowded]), ("other", [undisturbed, other_kernels])] {
            for n_streams in [2, 3, 4, 8] {
                let ratios = ratios_of_requests(loads, n_streams);
                let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
                assert!(mean >= 0.97, "{name}, {n_streams}: {mean:.3} of {ratios:.3?}");
                assert!(ratios[ratios.len() / 10] >= 0.95, "{name}, {n_streams}: {ratios:.3?}");
            }
        }
    }

    fn first_one_disturbed(call: u64) -> f64 {
        if call == 1 { 3.0 } else { 1.0 }
    }

    #[test]
    fn a_disturbed_first_call_widens_no_reply() {
        let mut model = CostModel::new(8);
        let mut calls_of = || {
            let mut machine = Machine::new(undisturbed, 0.0006, first_one_disturbed);
            machine.learn(&mut model, 4, 64);
            machine.calls
        };
        let calls: Vec<u64> = (0..64).map(|_| calls_of()).collect();
        assert!(calls.iter().skip(4).all(|&calls| calls >= 240), "alone it is 256 calls, together 64: {calls:?}");
    }

    #[test]
    fn fewer_streams_are_served_as_narrowly_as_more_were() {
        let mut model = CostModel::new(8);
        for _ in 0..8 {
            Machine::new(undisturbed, 0.0006, quiet).learn(&mut model, 4, 200);
        }
        assert_eq!([model.width(4), model.width(3), model.width(2)], [1, 1, 1]);
    }

    #[test]
    fn another_number_of_streams_soon_has_its_own_width() {
        for (name, cost, change) in CURVES {
            for (before, after) in [(8, 2), (8, 3), (8, 4), (8, 5), (4, 2), (4, 3), (3, 8), (2, 4)] {
                let mut model = CostModel::new(8);
                let machine = || Machine::new(cost, change, quiet);
                machine().learn(&mut model, before, 300);
                let fixed = |width| machine().fixed(width, after, 300);
                let best = (1..=after).map(fixed).fold(f64::INFINITY, f64::min);
                let ratio = best / machine().learn(&mut model, after, 300);
                assert!(ratio >= 0.92, "{name}, {before} and then {after}: {ratio:.3}");
            }
        }
    }

    /// As beside prompts that come all the time: no call is like the one before.
    #[test]
    fn calls_that_all_follow_something_else_still_teach() {
        for (cost, best) in [(default_kernels as Curve, 1), (other_kernels, 4)] {
            let mut model = CostModel::new(4);
            let mut served = [0; 5];
            for call in 0..4000 {
                let width = model.width(4);
                model.record(0, width, cost(width) + 0.0004);
                served[width] += if call < 400 { 0 } else { width };
            }
            assert!(served[best] * 10 >= served.iter().sum::<usize>() * 9, "{best} is best: {served:?}");
        }
    }

    /// Widths between the extremes are only tried with what was saved up.
    #[test]
    fn after_many_doubts_all_widths_are_still_tried() {
        let middling = |width: usize| [0.0, 0.010, 0.018, 0.026, 0.020, 0.040, 0.050, 0.060, 0.070][width];
        let mut model = CostModel::new(8);
        for request in 0..4000 {
            let cost = if scramble(request).is_multiple_of(2) { undisturbed } else { crowded };
            Machine::new(cost, 0.0006, quiet).learn(&mut model, 8, 8);
        }
        Machine::new(middling, 0.0006, quiet).learn(&mut model, 8, 500);
        assert_eq!(model.chosen[8], 4);
    }

    #[test]
    fn before_anything_is_known_the_widest_is_used() {
        assert_eq!(CostModel::new(8).width(5), 5);
        assert_eq!(CostModel::new(8).width(50), 8, "no wider than the model was made for");
        assert_eq!(CostModel::new(0).width(0), 1);
    }

    #[test]
    fn equally_fast_widths_leave_the_widest() {
        let mut model = CostModel::new(8);
        Machine::new(linear, 0.0, quiet).learn(&mut model, 8, 500);
        assert_eq!(model.chosen[8], 8);
    }

    #[test]
    fn a_change_of_width_is_learnt_apart() {
        let mut model = CostModel::new(4);
        for (previous, seconds) in [(0, 0.5), (2, 0.2), (2, 0.2), (1, 0.4)] {
            model.record(previous, 2, seconds);
        }
        assert_eq!(model.expected(2, 2), Some(0.2));
        assert_eq!(model.expected(4, 2), Some(0.4));
        assert_eq!(model.expected(3, 3), None);
        assert_eq!(model.expected(9, 9), None);
    }

    #[test]
    fn impossible_durations_teach_nothing() {
        let mut model = CostModel::new(4);
        for seconds in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 0.0, -0.0, 1e300] {
            model.record(1, 1, seconds);
        }
        assert_eq!(model.expected(1, 1), None);
        assert_eq!(model.now, 0);
    }

    #[test]
    fn one_disturbed_call_among_eight_changes_nothing() {
        let mut model = CostModel::new(4);
        (0..8).for_each(|call| model.record(2, 2, if call == 5 { 1.0 } else { 0.2 }));
        assert_eq!(model.expected(2, 2), Some(0.2));
    }

    fn seconds() -> impl Strategy<Value = f64> {
        prop_oneof![any::<f64>(), 1e-6..1.0f64, Just(f64::MIN_POSITIVE), Just(LONGEST / 2.0)]
    }

    proptest! {
        /// Whatever is recorded, and whether or not it was asked for, widths stay in range and the
        /// same input gives the same widths.
        #[test]
        fn any_records_give_sane_widths(
            steps in prop::collection::vec((0..20usize, 0..20usize, seconds(), 0..20usize), 0..400),
            max_width in 0..17usize,
        ) {
            let (mut model, mut twin) = (CostModel::new(max_width), CostModel::new(max_width));
            for (previous, width, seconds, ready) in steps {
                model.record(previous, width, seconds);
                twin.record(previous, width, seconds);
                let width = model.width(ready);
                prop_assert!((1..=ready.min(max_width).max(1)).contains(&width));
                prop_assert_eq!(width, twin.width(ready));
                let known = model.expected(previous, width);
                prop_assert!(known.is_none_or(|seconds| seconds.is_finite() && seconds > 0.0));
                prop_assert!(model.credit.is_finite());
            }
        }

        /// Over smooth costs of any slope a cold model is never much slower than the best width.
        #[test]
        fn any_affine_cost_is_learnt(base in 1e-4..1e-2f64, slope in 1e-5..1e-2f64, n_streams in 2..17usize) {
            let cost = |width: usize| base + slope * width as f64;
            let mut model = CostModel::new(16);
            let (mut seconds, mut served, mut previous) = (0.0, 0, 0);
            while served < 128 * n_streams {
                let width = model.width(n_streams);
                model.record(previous, width, cost(width));
                (seconds, served, previous) = (seconds + cost(width), served + width, width);
            }
            let best = (1..=n_streams).map(|width| cost(width) / width as f64).fold(f64::INFINITY, f64::min);
            prop_assert!(best * served as f64 / seconds >= 0.95);
        }
    }
}
