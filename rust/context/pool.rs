//! Free sequences and who waits for one: first come, first served within a priority.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use super::cache::Slot;
use super::job::Chat;
use crate::error::{Error, Result, closed};

/// Called with the sequence, or with why there is none.
pub type Grant = Box<dyn FnOnce(Result<Slot>) + Send>;

/// Names a waiter.
pub type WaiterId = u64;

struct Waiter {
    id: WaiterId,
    priority: i32,
    deadline: Option<Instant>,
    chat: Chat,
    grant: Grant,
}

/// The sequences of a context that nobody holds.
pub struct Pool {
    inner: Mutex<Inner>,
    n_waiting: AtomicUsize,
    n_active: AtomicUsize,
    next_id: AtomicU64,
    n_slots: usize,
}

struct Inner {
    /// Least recently used first, so that cached prefixes live long.
    free: VecDeque<Slot>,
    /// Whose chat had each sequence last.
    chats: Vec<Chat>,
    waiters: VecDeque<Waiter>,
    closed: bool,
}

impl Pool {
    /// All of `n_slots` sequences are free.
    #[must_use]
    pub fn new(n_slots: usize) -> Self {
        Self {
            inner: Mutex::new(Inner {
                free: (0..n_slots as Slot).collect(),
                chats: vec![0; n_slots],
                waiters: VecDeque::new(),
                closed: false,
            }),
            n_waiting: AtomicUsize::new(0),
            n_active: AtomicUsize::new(0),
            next_id: AtomicU64::new(1),
            n_slots,
        }
    }

    /// How many wait for a sequence.
    #[must_use]
    pub fn n_waiting(&self) -> usize {
        self.n_waiting.load(Ordering::Relaxed)
    }

    /// How many sequences somebody holds.
    #[must_use]
    pub fn n_active(&self) -> usize {
        self.n_active.load(Ordering::Relaxed)
    }

    /// Whether nobody holds the sequence.
    #[must_use]
    pub fn is_free(&self, slot: Slot) -> bool {
        self.lock().free.contains(&slot)
    }

    /// A sequence if one is free and nobody waits longer.
    ///
    /// # Errors
    /// `Closed` after [`Pool::close`].
    pub fn try_take(&self) -> Result<Option<Slot>> {
        let mut inner = self.lock();
        if inner.closed {
            return Err(closed("context"));
        }
        let slot = if inner.waiters.is_empty() { inner.take_free(0) } else { None };
        self.count(&inner);
        Ok(slot)
    }

    /// Calls `grant` with a sequence, at once if one is free. Returns the waiter's name, by which it can leave.
    pub fn take(&self, priority: i32, deadline: Option<Instant>, grant: Grant) -> WaiterId {
        self.take_for(0, priority, deadline, grant)
    }

    /// The same for a chat: of the free sequences it gets the one that it had last.
    pub fn take_for(&self, chat: Chat, priority: i32, deadline: Option<Instant>, grant: Grant) -> WaiterId {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut inner = self.lock();
        if inner.closed {
            drop(inner);
            grant(Err(closed("context")));
            return id;
        }
        let at = inner.waiters.iter().position(|other| other.priority < priority).unwrap_or(inner.waiters.len());
        inner.waiters.insert(at, Waiter { id, priority, deadline, chat, grant });
        self.serve(inner);
        id
    }

    /// Takes a waiter out of the queue: its `grant` is returned uncalled, or `None` if it was served already.
    pub fn leave(&self, id: WaiterId) -> Option<Grant> {
        let mut inner = self.lock();
        let at = inner.waiters.iter().position(|waiter| waiter.id == id)?;
        let waiter = inner.waiters.remove(at);
        self.count(&inner);
        waiter.map(|waiter| waiter.grant)
    }

    /// Gives a sequence back; the next waiter gets it.
    pub fn give_back(&self, slot: Slot) {
        let mut inner = self.lock();
        inner.free.push_back(slot);
        self.serve(inner);
    }

    /// Hands free sequences to waiters, outside the lock.
    fn serve(&self, mut inner: std::sync::MutexGuard<'_, Inner>) {
        let mut served = Vec::new();
        while !inner.free.is_empty()
            && let Some(waiter) = inner.waiters.pop_front()
        {
            served.extend(inner.take_free(waiter.chat).map(|slot| (waiter.grant, slot)));
        }
        self.count(&inner);
        drop(inner);
        for (grant, slot) in served {
            grant(Ok(slot));
        }
    }

    /// The earliest deadline of those who wait.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        if self.n_waiting() == 0 {
            return None;
        }
        self.lock().waiters.iter().filter_map(|waiter| waiter.deadline).min()
    }

    /// Fails those whose deadline has passed.
    pub fn expire(&self, now: Instant) {
        let mut inner = self.lock();
        let (late, waiting) = std::mem::take(&mut inner.waiters)
            .into_iter()
            .partition(|waiter| waiter.deadline.is_some_and(|deadline| deadline <= now));
        inner.waiters = waiting;
        self.count(&inner);
        drop(inner);
        let late: VecDeque<Waiter> = late;
        for waiter in late {
            (waiter.grant)(Err(Error::DeadlineExceeded(
                "the deadline passed while waiting for a free sequence".into(),
            )));
        }
    }

    /// Fails everybody who waits, and all later ones.
    pub fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        let waiters = std::mem::take(&mut inner.waiters);
        self.count(&inner);
        drop(inner);
        for waiter in waiters {
            (waiter.grant)(Err(closed("context")));
        }
    }

    fn count(&self, inner: &Inner) {
        self.n_waiting.store(inner.waiters.len(), Ordering::Relaxed);
        self.n_active.store(self.n_slots - inner.free.len(), Ordering::Relaxed);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Inner {
    /// The chat's sequence if that is free, else the one that was used longest ago.
    fn take_free(&mut self, chat: Chat) -> Option<Slot> {
        let own = |&slot: &Slot| chat != 0 && self.chats[slot as usize] == chat;
        let index = self.free.iter().position(own).unwrap_or(0);
        let slot = self.free.remove(index)?;
        self.chats[slot as usize] = chat;
        Some(slot)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::atomic::AtomicBool;
    use std::sync::{Arc, mpsc};
    use std::thread;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    /// What a waiter was told.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Told {
        Slot(Slot),
        Closed,
        Late,
    }

    fn told(granted: Result<Slot>) -> Told {
        match granted {
            Ok(slot) => Told::Slot(slot),
            Err(Error::Closed(_)) => Told::Closed,
            Err(Error::DeadlineExceeded(_)) => Told::Late,
            Err(other) => panic!("{other}"),
        }
    }

    /// Who was told what, in order.
    type Diary = Arc<Mutex<Vec<(usize, Told)>>>;

    fn written(diary: &Diary) -> Vec<(usize, Told)> {
        diary.lock().expect("no writer panicked").clone()
    }

    fn writes(diary: &Diary, name: usize) -> Grant {
        let diary = Arc::clone(diary);
        Box::new(move |granted| diary.lock().expect("no writer panicked").push((name, told(granted))))
    }

    fn busy(n_slots: usize) -> Arc<Pool> {
        let pool = Arc::new(Pool::new(n_slots));
        (0..n_slots).for_each(|_| assert!(matches!(pool.try_take(), Ok(Some(_)))));
        pool
    }

    fn counts(pool: &Pool) -> (usize, usize) {
        (pool.n_waiting(), pool.n_active())
    }

    /// Fails instead of hanging when `action` deadlocks.
    fn ends(action: impl FnOnce() + Send + 'static) {
        let (done, ended) = mpsc::channel();
        let worker = thread::spawn(move || {
            action();
            let _ = done.send(());
        });
        let outcome = ended.recv_timeout(Duration::from_secs(30));
        assert_ne!(outcome, Err(mpsc::RecvTimeoutError::Timeout), "a deadlock");
        worker.join().expect("the action did not panic");
    }

    #[test]
    fn the_sequence_that_was_used_longest_ago_is_taken_first() {
        let pool = Pool::new(3);
        assert!(matches!(pool.try_take(), Ok(Some(0))));
        pool.give_back(0);
        let taken =
            [pool.try_take(), pool.try_take(), pool.try_take(), pool.try_take()].map(|slot| slot.unwrap_or(None));
        assert_eq!(taken, [Some(1), Some(2), Some(0), None]);
    }

    #[test]
    fn a_chat_gets_the_sequence_that_it_had_last() {
        let (pool, diary) = (Pool::new(3), Diary::default());
        for (name, chat) in [(0, 7), (1, 8)] {
            pool.take_for(chat, 0, None, writes(&diary, name));
        }
        (0..2).for_each(|slot| pool.give_back(slot));
        pool.take_for(8, 0, None, writes(&diary, 2));
        pool.take_for(9, 0, None, writes(&diary, 3));
        assert_eq!(written(&diary)[2..], [(2, Told::Slot(1)), (3, Told::Slot(2))]);
    }

    #[test]
    fn a_free_sequence_is_granted_at_once() {
        let (pool, diary) = (Pool::new(1), Diary::default());
        pool.take(0, None, writes(&diary, 7));
        assert_eq!(written(&diary), [(7, Told::Slot(0))]);
        assert_eq!(counts(&pool), (0, 1));
        assert!(!pool.is_free(0));
    }

    #[test]
    fn who_waits_longest_is_next_within_a_priority() {
        let (pool, diary) = (busy(1), Diary::default());
        for (name, priority) in [0, 1, 0, 1].into_iter().enumerate() {
            pool.take(priority, None, writes(&diary, name));
        }
        assert_eq!(counts(&pool), (4, 1));
        (0..4).for_each(|_| pool.give_back(0));
        assert_eq!(written(&diary), [1, 3, 0, 2].map(|name| (name, Told::Slot(0))));
    }

    #[test]
    fn a_sequence_goes_from_hand_to_hand_past_those_who_only_try() {
        let (pool, diary) = (busy(1), Diary::default());
        pool.take(0, None, writes(&diary, 0));
        pool.give_back(0);
        assert!(matches!(pool.try_take(), Ok(None)));
        assert_eq!(written(&diary), [(0, Told::Slot(0))]);
    }

    #[test]
    fn who_leaves_is_told_nothing_and_takes_its_grant_along() {
        let (pool, diary) = (busy(1), Diary::default());
        let leaver = pool.take(0, None, writes(&diary, 0));
        pool.take(0, None, writes(&diary, 1));
        let grant = pool.leave(leaver);
        assert!(grant.is_some() && pool.leave(leaver).is_none());
        assert_eq!(counts(&pool), (1, 1));
        pool.give_back(0);
        assert_eq!(written(&diary), [(1, Told::Slot(0))]);
    }

    #[test]
    fn who_was_served_cannot_leave() {
        let (pool, diary) = (Pool::new(1), Diary::default());
        let served = pool.take(0, None, writes(&diary, 0));
        assert!(pool.leave(served).is_none());
        assert_eq!(counts(&pool), (0, 1));
    }

    #[test]
    fn closing_tells_all_who_wait_and_all_who_come() {
        let (pool, diary) = (busy(1), Diary::default());
        for name in 0..2 {
            pool.take(0, None, writes(&diary, name));
        }
        pool.close();
        pool.close();
        pool.take(0, None, writes(&diary, 2));
        assert_eq!(written(&diary), [0, 1, 2].map(|name| (name, Told::Closed)));
        assert!(matches!(pool.try_take(), Err(Error::Closed(_))));
        pool.give_back(0);
        assert_eq!(counts(&pool), (0, 0));
    }

    #[test]
    fn only_those_who_are_late_are_told_so() {
        let (pool, diary, now) = (busy(1), Diary::default(), Instant::now());
        let later = now + Duration::from_secs(1);
        for (name, deadline) in [Some(later), Some(now), None].into_iter().enumerate() {
            pool.take(0, deadline, writes(&diary, name));
        }
        assert_eq!(pool.next_deadline(), Some(now));
        pool.expire(now);
        assert_eq!((written(&diary), counts(&pool)), (vec![(1, Told::Late)], (2, 1)));
        assert_eq!(pool.next_deadline(), Some(later));
    }

    // ---- grants that call the pool --------------------------------------------------------------------------------

    #[test]
    fn a_grant_may_give_back_what_it_got() {
        ends(|| {
            let (pool, diary) = (busy(1), Diary::default());
            for name in 0..10 {
                let (again, write) = (Arc::clone(&pool), writes(&diary, name));
                let give_back: Grant = Box::new(move |granted| {
                    write(granted);
                    again.give_back(0);
                });
                pool.take(0, None, give_back);
            }
            pool.give_back(0);
            assert_eq!(written(&diary), (0..10).map(|name| (name, Told::Slot(0))).collect::<Vec<_>>());
            assert_eq!(counts(&pool), (0, 0));
        });
    }

    /// Uses everything a pool has, then tells.
    fn uses(pool: &Arc<Pool>, diary: &Diary, name: usize) -> Grant {
        let (pool, diary) = (Arc::clone(pool), Arc::clone(diary));
        Box::new(move |granted| {
            writes(&diary, name)(granted);
            let waiter = pool.take(0, None, writes(&diary, name + 100));
            drop(pool.leave(waiter));
            let _ = (pool.try_take(), pool.is_free(0), pool.n_waiting(), pool.next_deadline());
            pool.expire(Instant::now());
        })
    }

    #[test]
    fn a_grant_may_call_the_pool_however_it_was_told() {
        ends(|| {
            let (pool, diary, now) = (busy(1), Diary::default(), Instant::now());
            pool.take(2, None, uses(&pool, &diary, 0));
            pool.take(1, Some(now), uses(&pool, &diary, 1));
            pool.take(0, None, uses(&pool, &diary, 2));
            pool.expire(now);
            pool.give_back(0);
            pool.close();
            pool.take(0, None, uses(&pool, &diary, 3));
            let at_first: Vec<_> = written(&diary).into_iter().filter(|&(name, _)| name < 100).collect();
            assert_eq!(at_first, [(1, Told::Late), (0, Told::Slot(0)), (2, Told::Closed), (3, Told::Closed)]);
        });
    }

    // ---- any order ------------------------------------------------------------------------------------------------

    #[derive(Clone, Debug)]
    enum Op {
        TryTake,
        Take(i32, Option<u64>),
        Leave(usize),
        GiveBack(prop::sample::Index),
        Expire(u64),
        Close,
    }

    fn op() -> impl Strategy<Value = Op> {
        let deadline = || prop::option::weighted(0.3, 0..10u64);
        prop_oneof![
            20 => Just(Op::TryTake),
            40 => (-1..2i32, deadline()).prop_map(|(priority, deadline)| Op::Take(priority, deadline)),
            20 => (0..20usize).prop_map(Op::Leave),
            40 => any::<prop::sample::Index>().prop_map(Op::GiveBack),
            10 => (0..10u64).prop_map(Op::Expire),
            1 => Just(Op::Close),
        ]
    }

    const N_SLOTS: usize = 3;

    /// A waiter as the model knows it: its number, priority and deadline.
    type Known = (usize, i32, Option<u64>);

    /// A pool beside what it must be.
    struct Pair {
        pool: Pool,
        diary: Diary,
        start: Instant,
        ids: Vec<WaiterId>,
        free: VecDeque<Slot>,
        held: Vec<Slot>,
        waiting: Vec<Known>,
        expected: Vec<(usize, Told)>,
        closed: bool,
    }

    impl Pair {
        fn new() -> Self {
            Self {
                pool: Pool::new(N_SLOTS),
                diary: Diary::default(),
                start: Instant::now(),
                ids: Vec::new(),
                free: (0..N_SLOTS as Slot).collect(),
                held: Vec::new(),
                waiting: Vec::new(),
                expected: Vec::new(),
                closed: false,
            }
        }

        fn at(&self, seconds: u64) -> Instant {
            self.start + Duration::from_secs(seconds)
        }

        fn apply(&mut self, op: &Op) {
            match *op {
                Op::TryTake => self.try_take(),
                Op::Take(priority, deadline) => self.take(priority, deadline),
                Op::Leave(name) => self.leave(name),
                Op::GiveBack(index) => self.give_back(index),
                Op::Expire(now) => self.expire(now),
                Op::Close => self.close(),
            }
            self.serve();
            self.check();
        }

        fn try_take(&mut self) {
            let slot = self.free.front().copied().filter(|_| !self.closed);
            assert_eq!(self.pool.try_take().ok(), (!self.closed).then_some(slot));
            if let Some(slot) = slot {
                self.free.pop_front();
                self.held.push(slot);
            }
        }

        fn take(&mut self, priority: i32, deadline: Option<u64>) {
            let name = self.ids.len();
            let at = deadline.map(|deadline| self.at(deadline));
            self.ids.push(self.pool.take(priority, at, writes(&self.diary, name)));
            if self.closed {
                self.expected.push((name, Told::Closed));
            } else {
                self.waiting.push((name, priority, deadline));
            }
        }

        fn leave(&mut self, name: usize) {
            let Some(&id) = self.ids.get(name) else { return };
            let before = self.waiting.len();
            self.waiting.retain(|waiter| waiter.0 != name);
            assert_eq!(self.pool.leave(id).is_some(), self.waiting.len() < before);
        }

        fn give_back(&mut self, index: prop::sample::Index) {
            if !self.held.is_empty() {
                let slot = self.held.swap_remove(index.index(self.held.len()));
                self.free.push_back(slot);
                self.pool.give_back(slot);
            }
        }

        fn expire(&mut self, now: u64) {
            self.pool.expire(self.at(now));
            self.tell(Told::Late, |&(_, _, deadline)| deadline.is_some_and(|deadline| deadline <= now));
        }

        fn close(&mut self) {
            self.pool.close();
            self.closed = true;
            self.tell(Told::Closed, |_| true);
        }

        /// In the order in which they would have been served.
        fn tell(&mut self, what: Told, whom: impl Fn(&Known) -> bool) {
            self.waiting.sort_by_key(|&(name, priority, _)| (-priority, name));
            self.expected.extend(self.waiting.iter().filter(|waiter| whom(waiter)).map(|waiter| (waiter.0, what)));
            self.waiting.retain(|waiter| !whom(waiter));
        }

        fn serve(&mut self) {
            while let (Some(&slot), Some(next)) = (self.free.front(), self.next()) {
                self.free.pop_front();
                self.held.push(slot);
                self.waiting.retain(|waiter| waiter.0 != next);
                self.expected.push((next, Told::Slot(slot)));
            }
        }

        /// The longest waiting one of the highest priority.
        fn next(&self) -> Option<usize> {
            self.waiting.iter().min_by_key(|&&(name, priority, _)| (-priority, name)).map(|waiter| waiter.0)
        }

        fn check(&self) {
            assert_eq!(written(&self.diary), self.expected);
            assert_eq!(counts(&self.pool), (self.waiting.len(), self.held.len()));
            assert!((0..N_SLOTS as Slot).all(|slot| self.pool.is_free(slot) == self.free.contains(&slot)));
            let next = self.waiting.iter().filter_map(|waiter| waiter.2).min();
            assert_eq!(self.pool.next_deadline(), next.map(|deadline| self.at(deadline)));
        }
    }

    proptest! {
        #[test]
        fn everybody_is_told_once_and_in_turn(ops in prop::collection::vec(op(), 0..60)) {
            let mut pair = Pair::new();
            ops.iter().for_each(|op| pair.apply(op));
        }
    }

    // ---- many threads ---------------------------------------------------------------------------------------------

    /// Waits for a sequence, holds it alone, gives it back.
    fn use_once(pool: &Pool, in_use: &[AtomicBool]) {
        let (grant, granted) = mpsc::channel();
        pool.take(0, None, Box::new(move |slot| drop(grant.send(slot))));
        let slot = granted.recv_timeout(Duration::from_secs(30)).expect("served in time").expect("it is open");
        assert!(!in_use[slot as usize].swap(true, Ordering::SeqCst), "{slot} has two holders");
        in_use[slot as usize].store(false, Ordering::SeqCst);
        pool.give_back(slot);
    }

    #[test]
    fn a_sequence_has_one_holder_at_a_time_and_nobody_is_forgotten() {
        let pool = Pool::new(2);
        let in_use = [const { AtomicBool::new(false) }; 2];
        thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| (0..200).for_each(|_| use_once(&pool, &in_use)));
            }
        });
        assert_eq!(counts(&pool), (0, 0));
    }
}
