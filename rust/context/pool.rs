//! Free sequences and who waits for one: first come, first served within a priority.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use super::cache::Slot;
use crate::error::{Error, Result, closed};

/// Called with the sequence, or with why there is none.
pub type Grant = Box<dyn FnOnce(Result<Slot>) + Send>;

/// Names a waiter.
pub type WaiterId = u64;

struct Waiter {
    id: WaiterId,
    priority: i32,
    deadline: Option<Instant>,
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
    waiters: VecDeque<Waiter>,
    closed: bool,
}

impl Pool {
    /// All of `n_slots` sequences are free.
    #[must_use]
    pub fn new(n_slots: usize) -> Self {
        Self {
            inner: Mutex::new(Inner { free: (0..n_slots as Slot).collect(), waiters: VecDeque::new(), closed: false }),
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
        let slot = if inner.waiters.is_empty() { inner.free.pop_front() } else { None };
        self.count(&inner);
        Ok(slot)
    }

    /// Calls `grant` with a sequence, at once if one is free. Returns the waiter's name, by which it can leave.
    pub fn take(&self, priority: i32, deadline: Option<Instant>, grant: Grant) -> WaiterId {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut inner = self.lock();
        if inner.closed {
            drop(inner);
            grant(Err(closed("context")));
            return id;
        }
        let at = inner.waiters.iter().position(|other| other.priority < priority).unwrap_or(inner.waiters.len());
        inner.waiters.insert(at, Waiter { id, priority, deadline, grant });
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
            served.extend(inner.free.pop_front().map(|slot| (waiter.grant, slot)));
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
