//! One wake-up for everything an event loop waits for.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// Collects who has news for one event loop and makes a descriptor readable when there is any.
pub struct Hub {
    ends: Mutex<Option<Ends>>,
    /// Who has news; nothing is taken any more once the hub is closed.
    ready: Mutex<Option<Vec<Arc<Target>>>>,
    armed: AtomicBool,
    descriptor: RawFd,
}

/// The two ends of the descriptor: the same one for an eventfd.
struct Ends {
    reader: File,
    writer: File,
}

/// Somebody on an event loop who waits for news.
pub struct Target {
    hub: Arc<Hub>,
    id: u64,
    queued: AtomicBool,
}

impl Hub {
    /// A hub with its descriptor.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new() -> std::io::Result<Arc<Self>> {
        let ends = open()?;
        let descriptor = ends.reader.as_raw_fd();
        Ok(Arc::new(Self {
            ends: Mutex::new(Some(ends)),
            ready: Mutex::new(Some(Vec::new())),
            armed: AtomicBool::new(false),
            descriptor,
        }))
    }

    /// The descriptor to watch for reading.
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.descriptor
    }

    /// A new target of this hub.
    #[must_use]
    pub fn target(self: &Arc<Self>) -> Arc<Target> {
        Arc::new(Target {
            hub: Arc::clone(self),
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            queued: AtomicBool::new(false),
        })
    }

    /// Who has news, each once, in the order of arrival. Makes the descriptor unreadable until there is more.
    #[must_use]
    pub fn drain(&self) -> Vec<u64> {
        self.reset();
        // After this, the next news writes again.
        self.armed.store(false, Ordering::SeqCst);
        let ready = self.lock_ready().as_mut().map(std::mem::take).unwrap_or_default();
        ready
            .iter()
            .map(|target| {
                target.queued.store(false, Ordering::SeqCst);
                target.id
            })
            .collect()
    }

    /// Delivers nothing any more and closes the descriptor. Idempotent.
    pub fn close(&self) {
        drop(self.lock_ends().take());
        // Outside the lock: the targets hold the hub.
        let ready = self.lock_ready().take();
        drop(ready);
    }

    fn reset(&self) {
        if let Some(ends) = self.lock_ends().as_mut() {
            let mut buffer = [0u8; 64];
            // Non-blocking: nothing to read is no error.
            let _ = ends.reader.read(&mut buffer);
        }
    }

    fn post(&self, target: &Arc<Target>) {
        if target.queued.swap(true, Ordering::SeqCst) {
            return;
        }
        match self.lock_ready().as_mut() {
            Some(ready) => ready.push(Arc::clone(target)),
            None => return,
        }
        if !self.armed.swap(true, Ordering::SeqCst) {
            self.ring();
        }
    }

    fn ring(&self) {
        if let Some(ends) = self.lock_ends().as_mut() {
            // A full pipe is readable already.
            let _ = ends.writer.write(&1u64.to_ne_bytes());
        }
    }

    fn lock_ready(&self) -> std::sync::MutexGuard<'_, Option<Vec<Arc<Target>>>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_ends(&self) -> std::sync::MutexGuard<'_, Option<Ends>> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Target {
    /// Names the target when its hub is drained.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Tells the hub that there is news.
    pub fn post(self: &Arc<Self>) {
        self.hub.post(self);
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn open() -> std::io::Result<Ends> {
    use rustix::event::{EventfdFlags, eventfd};
    let reader = File::from(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let writer = reader.try_clone()?;
    Ok(Ends { reader, writer })
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn open() -> std::io::Result<Ends> {
    let (reader, writer) = rustix::pipe::pipe()?;
    rustix::io::ioctl_fionbio(&reader, true)?;
    rustix::io::ioctl_fionbio(&writer, true)?;
    Ok(Ends { reader: File::from(reader), writer: File::from(writer) })
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};
    use std::thread;

    use proptest::prelude::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
    /// Longer than any news takes.
    const EVER: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

    fn hub_and_targets(n: usize) -> (Arc<Hub>, Vec<Arc<Target>>) {
        let hub = Hub::new().expect("a descriptor");
        let targets = (0..n).map(|_| hub.target()).collect();
        (hub, targets)
    }

    /// As an event loop sees it.
    fn is_readable(hub: &Hub, within: Timespec) -> bool {
        let ends = hub.lock_ends().as_ref().map(|ends| ends.reader.try_clone().expect("a second descriptor"));
        let Some(reader) = ends else { return false };
        let mut watched = [PollFd::new(&reader, PollFlags::IN)];
        poll(&mut watched, Some(&within)).expect("poll works") > 0
    }

    #[test]
    fn nothing_is_readable_before_there_is_news() {
        let (hub, _targets) = hub_and_targets(3);
        assert!(!is_readable(&hub, NOW));
        assert!(hub.drain().is_empty());
    }

    #[test]
    fn the_descriptor_to_watch_is_the_one_that_becomes_readable() {
        let (hub, targets) = hub_and_targets(1);
        targets[0].post();
        let ends = hub.lock_ends();
        let reader = &ends.as_ref().expect("it is open").reader;
        assert_eq!(hub.descriptor(), reader.as_raw_fd());
    }

    #[test]
    fn each_target_comes_once_in_the_order_of_its_first_news() {
        let (hub, targets) = hub_and_targets(3);
        [2, 0, 2, 1, 0].into_iter().for_each(|i: usize| targets[i].post());
        assert_eq!(hub.drain(), [targets[2].id(), targets[0].id(), targets[1].id()]);
        assert!(hub.drain().is_empty());
    }

    #[test]
    fn targets_of_all_hubs_have_different_names() {
        let ((_one, first), (_other, second)) = (hub_and_targets(2), hub_and_targets(2));
        let ids: HashSet<_> = first.iter().chain(&second).map(|target| target.id()).collect();
        assert_eq!(ids.len(), 4);
    }

    #[test]
    fn news_of_one_hub_is_no_news_of_another() {
        let ((one, first), (other, _second)) = (hub_and_targets(1), hub_and_targets(1));
        first[0].post();
        assert!(is_readable(&one, NOW) && !is_readable(&other, NOW));
    }

    #[test]
    fn a_target_that_is_gone_is_still_named() {
        let (hub, mut targets) = hub_and_targets(1);
        let id = targets[0].id();
        targets.remove(0).post();
        assert_eq!(hub.drain(), [id]);
    }

    #[test]
    fn a_closed_hub_delivers_nothing() {
        let (hub, targets) = hub_and_targets(2);
        targets[0].post();
        hub.close();
        hub.close();
        assert!(hub.drain().is_empty());
        targets[1].post();
        assert!(hub.drain().is_empty(), "nor what comes later");
        assert!(hub.lock_ends().is_none(), "the descriptor is closed");
    }

    #[test]
    fn a_closed_hub_goes_with_its_last_target() {
        let (hub, targets) = hub_and_targets(2);
        hub.close();
        targets.iter().for_each(Target::post);
        let weak = Arc::downgrade(&hub);
        drop((hub, targets));
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn posting_from_many_threads_loses_nothing() {
        const THREADS: usize = 4;
        const POSTS: u64 = 2000;
        let (hub, targets) = hub_and_targets(3);
        let counters: Vec<_> = targets.iter().map(|_| AtomicU64::new(0)).collect();
        let indices: HashMap<_, _> = targets.iter().enumerate().map(|(i, target)| (target.id(), i)).collect();
        let mut seen = [0; 3];
        thread::scope(|scope| {
            for first in 0..THREADS {
                let (targets, counters) = (&targets, &counters);
                scope.spawn(move || {
                    for i in (first..).take(POSTS as usize).map(|i| i % 3) {
                        counters[i].fetch_add(1, Ordering::SeqCst);
                        targets[i].post();
                    }
                });
            }
            // Only woken by the descriptor: what is not seen after the last wake-up was lost.
            while seen.iter().sum::<u64>() < THREADS as u64 * POSTS {
                assert!(is_readable(&hub, EVER), "saw {seen:?} of {counters:?}");
                for index in hub.drain().iter().map(|id| indices[id]) {
                    seen[index] = counters[index].load(Ordering::SeqCst);
                }
            }
        });
    }

    #[test]
    fn closing_beside_posting_and_draining_ends_well() {
        let (hub, targets) = hub_and_targets(3);
        thread::scope(|scope| {
            for target in &targets {
                scope.spawn(|| (0..500).for_each(|_| target.post()));
            }
            scope.spawn(|| (0..100).for_each(|_| drop(hub.drain())));
            scope.spawn(|| hub.close());
        });
        assert!(!is_readable(&hub, NOW));
    }

    proptest! {
        /// `Some(target)` posts, `None` drains.
        #[test]
        fn news_is_readable_and_drained_once_in_the_order_of_arrival(
            ops in prop::collection::vec(prop::option::weighted(0.7, 0..5usize), 0..40),
        ) {
            let (hub, targets) = hub_and_targets(5);
            let mut expected = Vec::new();
            for op in ops {
                match op {
                    Some(index) => {
                        targets[index].post();
                        let id = targets[index].id();
                        if !expected.contains(&id) {
                            expected.push(id);
                        }
                    }
                    None => prop_assert_eq!(hub.drain(), std::mem::take(&mut expected)),
                }
                prop_assert_eq!(is_readable(&hub, NOW), !expected.is_empty());
            }
        }
    }
}
