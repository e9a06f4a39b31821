//! Which tokens of which sequences fill the next batch.
//!
//! Pure: no threads, no clock, no llama.cpp objects; the same calls give the same plans. Time is the
//! count of plans made. The decoder asks once before every decode call and evaluates what it is told.
//!
//! Works stand in three lanes. *Alone* works get a call to themselves, in chunks of `ubatch`.
//! *Decode* works (a running generation's next token) and *prompts* share calls: decode tokens first,
//! prompt chunks after them within their own budget. `width` bounds the decode tokens only of calls
//! without a prompt chunk: beside one, a further token costs next to nothing, so all of them go.
//!
//! Within a lane the higher priority goes first. Equal decode works take turns (longest waiting
//! first); of equal prompts the one with the fewest tokens left goes first, which makes the mean time
//! to the first token the shortest. Nobody starves: on every second plan the work that has waited
//! longest, if that is [`PATIENCE`] plans or more, goes before everybody else.

use std::cmp::Reverse;

/// A prompt chunk is at least this long (or the rest of its prompt), unless nothing else fits.
pub const MIN_CHUNK: u32 = 64;

/// After so many plans without a token a work may be put before those of higher priority.
pub const PATIENCE: u32 = 32;

/// The most plans a waiting work goes without a token, with `n_slots` sequences, as long as every
/// plan has a free cell (`alone` works need none).
#[must_use]
pub const fn longest_wait(n_slots: u32) -> u32 {
    PATIENCE + 2 * n_slots
}

/// What the waiting tokens are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The next token (or draft) of a running generation.
    Decode,
    /// Tokens of a prompt that are not evaluated yet.
    Prefill,
}

/// Tokens of one sequence that wait to be evaluated. A sequence has at most one work in a plan.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// The index of the sequence.
    pub slot: u32,
    /// What the tokens are for.
    pub phase: Phase,
    /// How many tokens wait, at least one.
    pub n_tokens: u32,
    /// Higher goes first.
    pub priority: i32,
    /// Must be evaluated in calls of its own, in fixed chunks of `ubatch` tokens.
    pub alone: bool,
    /// `Some(n)`: every token needs an output row, and at most `n` tokens may go at once.
    /// `None`: only the last token of the work needs a row.
    pub n_outputs_max: Option<u32>,
}

/// What one decode call can hold. `batch`, `ubatch`, `outputs`, `width` and `prefill_beside_decode`
/// count as one where they are zero.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Tokens per decode call.
    pub batch: u32,
    /// Tokens per chunk of an `alone` work; must not change while one is waiting.
    pub ubatch: u32,
    /// Prompt tokens at most when decode tokens are waiting.
    pub prefill_beside_decode: u32,
    /// Output rows at most per call.
    pub outputs: u32,
    /// Decode tokens wanted in a call that carries no prompt chunk.
    pub width: u32,
    /// Free KV cells.
    pub cells: u32,
}

/// The tokens of one sequence that go into the next call: the first `n_tokens` of those waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Take {
    /// The index of the sequence.
    pub slot: u32,
    /// How many of its waiting tokens go, at least one.
    pub n_tokens: u32,
}

/// Chooses the tokens of each decode call and remembers who has waited for how long.
#[derive(Debug)]
pub struct Planner {
    /// The number of the latest plan.
    tick: u64,
    /// Places given out in the line so far.
    turns: u64,
    slots: Vec<Slot>,
    order: Vec<usize>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// The plan in which the work began to wait: first seen, or last given tokens.
    since: u64,
    /// The place in the line of those who wait. Grows with `since`, and tells apart who began to wait
    /// in the same plan: ties by slot would serve the low slots more often.
    turn: u64,
    /// The last plan in which work was waiting; zero means never.
    seen: u64,
}

impl Planner {
    /// A planner for the sequences `0..n_slots`.
    #[must_use]
    pub fn new(n_slots: usize) -> Self {
        Self {
            // Not zero: a slot never seen must not look as if seen in the plan before.
            tick: 1,
            turns: 0,
            slots: vec![Slot::default(); n_slots],
            order: Vec::with_capacity(n_slots),
        }
    }

    /// Fills `takes`, in ascending order of slots, with what the next decode call evaluates.
    ///
    /// `takes` stays empty only without work or, for works that are not `alone`, without a free cell.
    pub fn plan(&mut self, work: &[Work], limits: &Limits, takes: &mut Vec<Take>) {
        takes.clear();
        self.tick += 1;
        self.note_waiting(work);
        let limits = limits.at_least_one();
        let mut order = std::mem::take(&mut self.order);
        self.rank(work, &limits, &mut order);
        self.fill(work, &order, &limits, takes);
        self.order = order;
        self.note_served(takes);
        takes.sort_unstable_by_key(|take| take.slot);
    }

    /// Forgets how long a sequence has waited: its work was cancelled or it has a new owner.
    pub fn forget(&mut self, slot: u32) {
        if let Some(slot) = self.slots.get_mut(slot as usize) {
            *slot = Slot::default();
        }
    }

    fn note_waiting(&mut self, work: &[Work]) {
        for work in work {
            let index = work.slot as usize;
            if index >= self.slots.len() {
                self.slots.resize(index + 1, Slot::default());
            }
            if self.slots[index].seen + 1 != self.tick {
                self.line_up(index);
            }
            self.slots[index].seen = self.tick;
        }
    }

    /// In the order of the takes as they were chosen, which is the order of rank.
    fn note_served(&mut self, takes: &[Take]) {
        for take in takes {
            self.line_up(take.slot as usize);
        }
    }

    fn line_up(&mut self, index: usize) {
        self.turns += 1;
        self.slots[index].since = self.tick;
        self.slots[index].turn = self.turns;
    }

    /// Puts the works that can go into `order`: by lane, in each lane by rank.
    fn rank(&self, work: &[Work], limits: &Limits, order: &mut Vec<usize>) {
        order.clear();
        order.extend((0..work.len()).filter(|&index| work[index].can_go(limits)));
        order.sort_unstable_by_key(|&index| {
            let work = &work[index];
            let rest = if work.lane() == Lane::Prompt { work.n_tokens } else { 0 };
            (work.lane(), Reverse(work.priority), rest, self.slot(work).turn)
        });
    }

    fn fill(&self, work: &[Work], order: &[usize], limits: &Limits, takes: &mut Vec<Take>) {
        let promoted = self.promoted(work, order);
        let (alone, decodes, prompts) = lanes(work, order);
        let heads = [alone.first(), decodes.first(), prompts.first()];
        match promoted.or_else(|| self.first(work, heads)) {
            Some(index) if work[index].alone => {
                takes.push(Take { slot: work[index].slot, n_tokens: work[index].chunk_alone(limits) })
            }
            Some(_) => Filling::new(work, decodes, prompts, limits, takes).fill(promoted),
            None => {}
        }
    }

    /// Who has waited longest, if that is too long. Only on every second plan, so that those of
    /// higher priority keep half of them however many are overdue.
    fn promoted(&self, work: &[Work], order: &[usize]) -> Option<usize> {
        let turn = |&index: &usize| self.slot(&work[index]).turn;
        let index = order.iter().copied().min_by_key(turn)?;
        let waited = self.tick - self.slot(&work[index]).since;
        (self.tick.is_multiple_of(2) && waited >= u64::from(PATIENCE)).then_some(index)
    }

    /// The head of the lane whose turn it is.
    fn first(&self, work: &[Work], heads: [Option<&usize>; 3]) -> Option<usize> {
        heads.into_iter().flatten().copied().min_by_key(|&index| {
            let work = &work[index];
            (Reverse(work.priority), self.slot(work).turn)
        })
    }

    fn slot(&self, work: &Work) -> &Slot {
        &self.slots[work.slot as usize]
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Lane {
    Alone,
    Decode,
    Prompt,
}

/// The three lanes of an order that is sorted by lane.
fn lanes<'a>(work: &[Work], order: &'a [usize]) -> (&'a [usize], &'a [usize], &'a [usize]) {
    let end_of = |lane| order.partition_point(|&index| work[index].lane() <= lane);
    let (alone, decodes) = (end_of(Lane::Alone), end_of(Lane::Decode));
    (&order[..alone], &order[alone..decodes], &order[decodes..])
}

impl Work {
    fn lane(&self) -> Lane {
        match (self.alone, self.phase) {
            (true, _) => Lane::Alone,
            (false, Phase::Decode) => Lane::Decode,
            (false, Phase::Prefill) => Lane::Prompt,
        }
    }

    fn can_go(&self, limits: &Limits) -> bool {
        self.n_tokens > 0 && (self.alone || limits.cells > 0)
    }

    /// The next fixed chunk; free cells must not change it.
    fn chunk_alone(&self, limits: &Limits) -> u32 {
        self.chunk_at_most(limits.outputs).min(limits.ubatch).min(limits.batch)
    }

    /// How many tokens may go with `outputs` rows to spare, all else being free.
    fn chunk_at_most(&self, outputs: u32) -> u32 {
        match self.n_outputs_max {
            Some(most) => self.n_tokens.min(most.max(1)).min(outputs),
            None => self.n_tokens,
        }
    }
}

impl Limits {
    fn at_least_one(self) -> Self {
        Self {
            batch: self.batch.max(1),
            ubatch: self.ubatch.max(1),
            prefill_beside_decode: self.prefill_beside_decode.max(1),
            outputs: self.outputs.max(1),
            width: self.width.max(1),
            cells: self.cells,
        }
    }
}

/// One shared call while it fills.
struct Filling<'a> {
    work: &'a [Work],
    decodes: &'a [usize],
    prompts: &'a [usize],
    takes: &'a mut Vec<Take>,
    tokens: u32,
    outputs: u32,
    width: u32,
    prompt_tokens: u32,
    has_prompt: bool,
}

impl<'a> Filling<'a> {
    fn new(
        work: &'a [Work],
        decodes: &'a [usize],
        prompts: &'a [usize],
        limits: &Limits,
        takes: &'a mut Vec<Take>,
    ) -> Self {
        Self {
            work,
            decodes,
            prompts,
            takes,
            tokens: limits.batch.min(limits.cells),
            outputs: limits.outputs,
            width: if prompts.is_empty() { limits.width } else { u32::MAX },
            prompt_tokens: if decodes.is_empty() { limits.batch } else { limits.prefill_beside_decode },
            has_prompt: false,
        }
    }

    fn fill(mut self, promoted: Option<usize>) {
        let others = |&&index: &&usize| Some(index) != promoted;
        if let Some(index) = promoted {
            self.add(&self.work[index]);
        }
        for &index in self.decodes.iter().filter(others) {
            self.add(&self.work[index]);
        }
        for &index in self.prompts.iter().filter(others) {
            self.add(&self.work[index]);
        }
    }

    fn add(&mut self, work: &Work) {
        let n_tokens = match work.phase {
            Phase::Decode => self.decode_tokens(work),
            Phase::Prefill => self.prompt_chunk(work),
        };
        if n_tokens > 0 {
            self.push(work, n_tokens);
        }
    }

    /// All or nothing as to the width (a draft is best checked whole), except that the first one goes.
    fn decode_tokens(&self, work: &Work) -> u32 {
        let n_tokens = self.room_for(work, self.tokens);
        if n_tokens <= self.width || self.takes.is_empty() { n_tokens } else { 0 }
    }

    /// A chunk that is worth its place: not a crumb left over by other prompts.
    fn prompt_chunk(&self, work: &Work) -> u32 {
        let n_tokens = self.room_for(work, self.tokens.min(self.prompt_tokens));
        let crumb = n_tokens < work.chunk_at_most(self.outputs).min(MIN_CHUNK);
        if crumb && self.has_prompt { 0 } else { n_tokens }
    }

    /// How many of the work's tokens fit; its last one only with an output row.
    fn room_for(&self, work: &Work, tokens: u32) -> u32 {
        let n_tokens = work.chunk_at_most(self.outputs).min(tokens);
        let ends = n_tokens == work.n_tokens;
        if ends && self.outputs == 0 { n_tokens.saturating_sub(1) } else { n_tokens }
    }

    fn push(&mut self, work: &Work, n_tokens: u32) {
        self.takes.push(Take { slot: work.slot, n_tokens });
        self.tokens -= n_tokens;
        self.outputs -= match work.n_outputs_max {
            Some(_) => n_tokens,
            None => u32::from(n_tokens == work.n_tokens),
        };
        match work.phase {
            Phase::Decode => self.width = self.width.saturating_sub(n_tokens),
            Phase::Prefill => {
                self.prompt_tokens -= n_tokens;
                self.has_prompt = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    const LIMITS: Limits =
        Limits { batch: 512, ubatch: 512, prefill_beside_decode: 128, outputs: 16, width: 8, cells: 4096 };

    fn work(slot: u32, phase: Phase, n_tokens: u32) -> Work {
        Work { slot, phase, n_tokens, priority: 0, alone: false, n_outputs_max: None }
    }

    fn decode(slot: u32) -> Work {
        work(slot, Phase::Decode, 1)
    }

    fn prompt(slot: u32, n_tokens: u32) -> Work {
        work(slot, Phase::Prefill, n_tokens)
    }

    fn plan(planner: &mut Planner, work: &[Work], limits: &Limits) -> Vec<(u32, u32)> {
        let mut takes = Vec::new();
        planner.plan(work, limits, &mut takes);
        takes.iter().map(|take| (take.slot, take.n_tokens)).collect()
    }

    fn first_plan(work: &[Work], limits: &Limits) -> Vec<(u32, u32)> {
        plan(&mut Planner::new(16), work, limits)
    }

    #[test]
    fn nothing_to_do_is_an_empty_plan() {
        assert_eq!(first_plan(&[], &LIMITS), []);
    }

    #[test]
    fn decode_tokens_go_before_a_capped_prompt_chunk() {
        let work = [prompt(0, 2000), decode(2), decode(1)];
        assert_eq!(first_plan(&work, &LIMITS), [(0, 128), (1, 1), (2, 1)]);
    }

    #[test]
    fn a_prompt_gets_the_whole_batch_when_nothing_decodes() {
        assert_eq!(first_plan(&[prompt(0, 2000)], &LIMITS), [(0, 512)]);
    }

    #[test]
    fn the_shortest_prompt_goes_first_and_leaves_its_room_to_the_next() {
        let work = [prompt(0, 2000), prompt(1, 100)];
        assert_eq!(first_plan(&work, &LIMITS), [(0, 412), (1, 100)]);
    }

    #[test]
    fn a_prompt_of_higher_priority_goes_before_a_shorter_one() {
        let work = [prompt(0, 100), Work { priority: 1, ..prompt(1, 2000) }];
        assert_eq!(first_plan(&work, &LIMITS), [(1, 512)]);
    }

    #[test]
    fn room_left_over_is_not_crumbled() {
        let work = [prompt(0, 500), prompt(1, 900)];
        assert_eq!(first_plan(&work, &LIMITS), [(0, 500)]);
    }

    #[test]
    fn decode_works_take_turns_when_the_width_is_smaller() {
        let mut planner = Planner::new(4);
        let (work, limits) = ([decode(0), decode(1), decode(2)], Limits { width: 2, ..LIMITS });
        assert_eq!(plan(&mut planner, &work, &limits), [(0, 1), (1, 1)]);
        assert_eq!(plan(&mut planner, &work, &limits), [(0, 1), (2, 1)]);
        assert_eq!(plan(&mut planner, &work, &limits), [(1, 1), (2, 1)]);
    }

    #[test]
    fn beside_a_prompt_chunk_every_decode_token_goes() {
        let work = [decode(0), decode(1), prompt(2, 40)];
        let limits = Limits { width: 1, ..LIMITS };
        assert_eq!(first_plan(&work, &limits), [(0, 1), (1, 1), (2, 40)]);
    }

    #[test]
    fn few_cells_go_to_decode_tokens_first() {
        let work = [prompt(0, 100), decode(1)];
        assert_eq!(first_plan(&work, &Limits { cells: 3, ..LIMITS }), [(0, 2), (1, 1)]);
        assert_eq!(first_plan(&work, &Limits { cells: 1, ..LIMITS }), [(1, 1)]);
        assert_eq!(first_plan(&work, &Limits { cells: 0, ..LIMITS }), []);
    }

    #[test]
    fn a_scored_prompt_takes_no_more_tokens_than_there_are_rows() {
        let scored = Work { n_outputs_max: Some(100), ..prompt(0, 300) };
        assert_eq!(first_plan(&[scored, decode(1)], &LIMITS), [(0, 15), (1, 1)]);
    }

    #[test]
    fn the_last_token_of_a_prompt_waits_for_a_row() {
        let limits = Limits { outputs: 1, ..LIMITS };
        assert_eq!(first_plan(&[prompt(0, 30), decode(1)], &limits), [(0, 29), (1, 1)]);
    }

    #[test]
    fn alone_works_take_turns_with_the_shared_call() {
        let mut planner = Planner::new(4);
        let work = [Work { alone: true, ..prompt(0, 2000) }, decode(1), decode(2)];
        let turns: Vec<_> = (0..4).map(|_| plan(&mut planner, &work, &LIMITS)).collect();
        let shared = vec![(1, 1), (2, 1)];
        assert_eq!(turns, [vec![(0, 512)], shared.clone(), vec![(0, 512)], shared]);
    }

    #[test]
    fn an_alone_chunk_is_whole_and_needs_none_of_the_shared_cells() {
        let alone = Work { alone: true, ..prompt(0, 2000) };
        let limits = Limits { cells: 0, ..LIMITS };
        assert_eq!(first_plan(&[alone, decode(1)], &limits), [(0, 512)]);
    }

    #[test]
    fn a_low_priority_waits_its_patience_and_no_longer() {
        let mut planner = Planner::new(2);
        let work = [Work { priority: i32::MAX, ..decode(0) }, Work { priority: i32::MIN, ..decode(1) }];
        let limits = Limits { width: 1, ..LIMITS };
        let low = (1..100).filter(|_| plan(&mut planner, &work, &limits) == [(1, 1)]).count();
        assert_eq!(low, 3, "every 32 plans, in the even ones");
    }

    #[test]
    fn a_prompt_progresses_though_decode_tokens_fill_every_batch() {
        let mut planner = Planner::new(3);
        let work = [decode(0), decode(1), prompt(2, 10)];
        let limits = Limits { batch: 2, ..LIMITS };
        let plans = longest_wait(3) as usize;
        assert!((0..=plans).any(|_| { plan(&mut planner, &work, &limits).iter().any(|take| take.0 == 2) }));
    }

    #[test]
    fn a_forgotten_slot_starts_to_wait_anew() {
        let mut planner = Planner::new(2);
        let limits = Limits { width: 1, ..LIMITS };
        plan(&mut planner, &[decode(0), decode(1)], &limits);
        planner.forget(1);
        assert_eq!(plan(&mut planner, &[decode(0), decode(1)], &limits), [(0, 1)]);
        planner.forget(999);
    }

    #[test]
    fn planning_allocates_nothing_after_warm_up() {
        let work: Vec<_> = (0..16).map(decode).collect();
        let (mut planner, mut takes) = (Planner::new(16), Vec::with_capacity(16));
        let before = (planner.order.as_ptr(), planner.slots.as_ptr(), takes.as_ptr());
        (0..100).for_each(|_| planner.plan(&work, &LIMITS, &mut takes));
        assert_eq!(before, (planner.order.as_ptr(), planner.slots.as_ptr(), takes.as_ptr()));
    }

    const N_SLOTS: u32 = 12;

    /// One sequence of the simulation: a prompt, then single tokens, with pauses for sampling.
    #[derive(Debug, Clone, Copy)]
    struct Stream {
        prompt: u32,
        decodes: u32,
        draft: u32,
        priority: i32,
        alone: bool,
        scored: Option<u32>,
        pause: u32,
        evaluated: u32,
        total: u32,
        waited: u32,
    }

    impl Stream {
        fn work(&self, slot: u32) -> Option<Work> {
            let (phase, n_tokens) = match self.prompt {
                0 => (Phase::Decode, self.draft.min(self.decodes)),
                n => (Phase::Prefill, n),
            };
            let (priority, alone, n_outputs_max) = (self.priority, self.alone, self.scored);
            let ready = n_tokens > 0 && self.pause == 0;
            ready.then_some(Work { slot, phase, n_tokens, priority, alone, n_outputs_max })
        }

        fn take(&mut self, n_tokens: u32, pause: u32) {
            self.evaluated += n_tokens;
            self.waited = 0;
            match self.prompt {
                0 => (self.decodes, self.pause) = (self.decodes - n_tokens, pause),
                _ => self.prompt -= n_tokens,
            }
        }
    }

    fn stream() -> impl Strategy<Value = Stream> {
        let scored = prop_oneof![3 => Just(None), 1 => (0..40u32).prop_map(Some)];
        let priority = prop_oneof![Just(0), -2..3, any::<i32>()];
        (1..700u32, 0..20u32, 1..4u32, priority, prop::bool::weighted(0.2), scored).prop_map(
            |(prompt, decodes, draft, priority, alone, scored)| Stream {
                prompt,
                decodes,
                draft,
                priority,
                alone,
                scored,
                pause: 0,
                evaluated: 0,
                total: prompt + decodes,
                waited: 0,
            },
        )
    }

    #[derive(Debug, Clone)]
    enum Event {
        Arrive(u32, Stream),
        Cancel(u32),
        Nothing,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            3 => (0..N_SLOTS, stream()).prop_map(|(slot, stream)| Event::Arrive(slot, stream)),
            1 => (0..N_SLOTS).prop_map(Event::Cancel),
            6 => Just(Event::Nothing),
        ]
    }

    fn limits() -> impl Strategy<Value = Limits> {
        (1..300u32, 1..200u32, 0..150u32, 0..20u32, 0..10u32).prop_map(
            |(batch, ubatch, prefill_beside_decode, outputs, width)| Limits {
                batch,
                ubatch,
                prefill_beside_decode,
                outputs,
                width,
                cells: 0,
            },
        )
    }

    struct Simulation {
        planner: Planner,
        streams: [Option<Stream>; N_SLOTS as usize],
        log: Vec<Vec<Take>>,
    }

    impl Simulation {
        fn new() -> Self {
            Self { planner: Planner::new(N_SLOTS as usize), streams: [None; 12], log: Vec::new() }
        }

        fn happen(&mut self, event: &Event) {
            match *event {
                Event::Arrive(slot, stream) => {
                    self.streams[slot as usize].get_or_insert(stream);
                }
                Event::Cancel(slot) => {
                    self.streams[slot as usize] = None;
                    self.planner.forget(slot);
                }
                Event::Nothing => {}
            }
        }

        fn step(&mut self, limits: &Limits, pauses: u32) {
            let streams = self.streams.iter().zip(0..);
            let work: Vec<_> = streams.filter_map(|(stream, slot)| stream.as_ref()?.work(slot)).collect();
            let mut takes = Vec::new();
            self.planner.plan(&work, limits, &mut takes);
            check_plan(&work, &takes, limits);
            self.age(&work, limits);
            for take in &takes {
                let stream = self.streams[take.slot as usize].as_mut().expect("a stream");
                stream.take(take.n_tokens, (take.slot + pauses) % 3);
            }
            self.finish();
            self.log.push(takes);
        }

        /// Waiting counts only while the promise holds: cells for a whole chunk.
        fn age(&mut self, work: &[Work], limits: &Limits) {
            for stream in self.streams.iter_mut().flatten() {
                stream.pause = stream.pause.saturating_sub(1);
            }
            for work in work {
                let stream = self.streams[work.slot as usize].as_mut().expect("a stream");
                let promised = limits.cells >= limits.ubatch;
                stream.waited = if promised { stream.waited + 1 } else { 0 };
                assert!(stream.waited <= longest_wait(N_SLOTS) + 1, "{work:?} starves");
            }
        }

        fn finish(&mut self) {
            for stream in &mut self.streams {
                if let Some(done) = stream.filter(|stream| stream.prompt + stream.decodes == 0) {
                    assert_eq!(done.evaluated, done.total);
                    *stream = None;
                }
            }
        }
    }

    fn check_plan(work: &[Work], takes: &[Take], limits: &Limits) {
        let limits = limits.at_least_one();
        assert!(takes.is_sorted_by(|a, b| a.slot < b.slot), "ascending, nobody twice");
        let of = |take: &Take| *work.iter().find(|work| work.slot == take.slot).expect("waiting");
        let tokens: u32 = takes.iter().map(|take| take.n_tokens).sum();
        let alone = takes.iter().any(|take| of(take).alone);
        assert!(tokens <= limits.batch && (alone || tokens <= limits.cells));
        assert!(takes.iter().all(|take| (1..=of(take).n_tokens).contains(&take.n_tokens)));
        assert!(takes.iter().map(|take| rows(&of(take), take)).sum::<u32>() <= limits.outputs);
        if alone {
            assert_eq!(takes.len(), 1, "alone is never mixed");
            assert_eq!(tokens, of(&takes[0]).chunk_alone(&limits), "chunks are fixed");
        }
        check_shares(work, takes, &limits);
        let could = work.iter().any(|work| work.alone || limits.cells > 0);
        assert!(!could || !takes.is_empty(), "somebody is served");
    }

    fn check_shares(work: &[Work], takes: &[Take], limits: &Limits) {
        let is =
            |phase, take: &&Take| work.iter().any(|work| work.slot == take.slot && work.phase == phase && !work.alone);
        let prompts: u32 = takes.iter().filter(|take| is(Phase::Prefill, take)).map(|take| take.n_tokens).sum();
        let decodes: Vec<_> = takes.iter().filter(|take| is(Phase::Decode, take)).collect();
        assert!(decodes.is_empty() || prompts <= limits.prefill_beside_decode);
        let tokens: u32 = decodes.iter().map(|take| take.n_tokens).sum();
        let prompt_waits = work.iter().any(|work| work.lane() == Lane::Prompt);
        assert!(prompt_waits || tokens <= limits.width || decodes.len() == 1);
    }

    fn rows(work: &Work, take: &Take) -> u32 {
        match work.n_outputs_max {
            Some(most) => {
                assert!(take.n_tokens <= most.max(1));
                take.n_tokens
            }
            None => u32::from(take.n_tokens == work.n_tokens),
        }
    }

    fn simulate(events: &[(Event, u32)], limits: &Limits) -> Vec<Vec<Take>> {
        let mut simulation = Simulation::new();
        for (event, cells) in events {
            simulation.happen(event);
            simulation.step(&Limits { cells: *cells, ..*limits }, *cells);
        }
        for step in 0..100_000 {
            if simulation.streams.iter().all(Option::is_none) {
                return simulation.log;
            }
            simulation.step(&Limits { cells: 4096, ..*limits }, step);
        }
        panic!("not every stream ends: {:?}", simulation.streams);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        /// No token lost, none twice, no budget exceeded, alone works alone, nobody starves.
        #[test]
        fn random_streams_are_served_whole_and_in_time(
            events in prop::collection::vec((event(), prop_oneof![0..3u32, 0..600u32, Just(4096)]), 1..300),
            limits in limits(),
        ) {
            let log = simulate(&events, &limits);
            prop_assert_eq!(log, simulate(&events, &limits), "the same input gives the same plans");
        }
    }
}
