//! Deadlines of those who wait in a sequence's queue. The decoder, which has a clock, rings them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

/// Somebody who waits until a deadline.
pub trait Late: Send + Sync {
    /// The deadline has passed; does nothing where the waiting has ended.
    fn late(&self);
}

/// Deadlines, few at a time. Those of waiters that have gone are forgotten.
#[derive(Default)]
pub struct Alarms {
    set: Mutex<Vec<(Instant, Weak<dyn Late>)>>,
    n_set: AtomicUsize,
}

impl Alarms {
    /// Rings `late` at `at`, unless it has gone by then.
    pub fn set(&self, at: Instant, late: &Arc<dyn Late>) {
        let mut set = self.lock();
        set.retain(|(_, late)| late.strong_count() > 0);
        set.push((at, Arc::downgrade(late)));
        self.n_set.store(set.len(), Ordering::Release);
    }

    /// When the next one is to be rung.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        if self.n_set.load(Ordering::Acquire) == 0 {
            return None;
        }
        self.lock().iter().filter(|(_, late)| late.strong_count() > 0).map(|&(at, _)| at).min()
    }

    /// Rings what is due.
    pub fn ring(&self, now: Instant) {
        let mut set = self.lock();
        let due: Vec<_> = set.extract_if(.., |(at, _)| *at <= now).collect();
        self.n_set.store(set.len(), Ordering::Release);
        drop(set);
        // Outside the lock: ending a prediction may set or drop others.
        for late in due.iter().filter_map(|(_, late)| late.upgrade()) {
            late.late();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Instant, Weak<dyn Late>)>> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use super::*;

    #[derive(Default)]
    struct Waiter(AtomicBool);

    impl Late for Waiter {
        fn late(&self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[test]
    fn only_what_is_due_rings() {
        let (alarms, now) = (Alarms::default(), Instant::now());
        let (soon, later) = (Arc::new(Waiter::default()), Arc::new(Waiter::default()));
        alarms.set(now, &(soon.clone() as Arc<dyn Late>));
        alarms.set(now + Duration::from_secs(1), &(later.clone() as Arc<dyn Late>));
        alarms.ring(now);
        assert!(soon.0.load(Ordering::SeqCst) && !later.0.load(Ordering::SeqCst));
        assert_eq!(alarms.next(), Some(now + Duration::from_secs(1)));
    }

    #[test]
    fn a_waiter_that_has_gone_is_no_alarm() {
        let alarms = Alarms::default();
        let waiter: Arc<dyn Late> = Arc::new(Waiter::default());
        alarms.set(Instant::now(), &waiter);
        drop(waiter);
        assert_eq!(alarms.next(), None);
    }
}
