//! Work on a thread of its own, bounded in time and memory: for code that runs what others wrote.
//!
//! Rust has no way to make an allocation fail without ending the process, and none to end a thread. So a thread that
//! allocates more than it may is stopped where it stands, for ever: it keeps what it has, its caller gets an error,
//! and the process goes on. One whose caller no longer waits can end in order and give back what it holds, if it asks
//! ([`is_given_up`]); if it does not, it is stopped as well.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// What work may take.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Bytes that it may hold at a time.
    pub memory: usize,
    /// Time until its caller gives up.
    pub time: Duration,
    /// Bytes of its stack.
    pub stack: usize,
}

/// Why work has no outcome.
#[derive(Debug)]
pub enum Unfinished {
    /// It took too much memory. Its thread stands still for ever and keeps what it holds.
    Memory,
    /// It took too long. Its thread ends if it asks, or stops at an allocation a moment later.
    Time,
    /// It panicked.
    Panic,
    /// There is no thread to be had.
    NoThread(std::io::Error),
}

/// Time that work has to notice that its caller has given up.
const GRACE: Duration = Duration::from_secs(1);

/// Seen by both sides.
struct Watch {
    caller: Thread,
    exceeded: AtomicBool,
    abandoned: AtomicBool,
    /// When work that was given up is stopped.
    end: Instant,
}

impl Watch {
    fn is_overdue(&self) -> bool {
        self.abandoned.load(Ordering::Relaxed) && Instant::now() > self.end
    }
}

thread_local! {
    static WATCH: Cell<*const Watch> = const { Cell::new(null()) };
    static LEFT: Cell<isize> = const { Cell::new(0) };
}

/// Runs work within bounds, and waits for it.
///
/// # Errors
/// Why there is no outcome.
pub fn run_bounded<T: Send + 'static>(
    name: &str,
    bounds: Bounds,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Unfinished> {
    let caller = thread::current();
    let end = Instant::now() + bounds.time + GRACE;
    let watch = Arc::new(Watch { caller, exceeded: AtomicBool::new(false), abandoned: AtomicBool::new(false), end });
    let outcome: Arc<Mutex<Option<Result<T, Unfinished>>>> = Arc::default();
    let (watched, result) = (Arc::clone(&watch), Arc::clone(&outcome));
    let run = move || {
        WATCH.set(Arc::as_ptr(&watched));
        LEFT.set(isize::try_from(bounds.memory).unwrap_or(isize::MAX));
        let done = catch_unwind(AssertUnwindSafe(work)).map_err(|_| Unfinished::Panic);
        WATCH.set(null());
        *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
        watched.caller.unpark();
    };
    let builder = thread::Builder::new().name(name.into()).stack_size(bounds.stack);
    builder.spawn(run).map_err(Unfinished::NoThread)?;
    wait(&watch, &outcome, bounds.time)
}

/// Whether nobody waits any more for the work that asks. Without such bounds somebody does.
#[must_use]
pub fn is_given_up() -> bool {
    let watch = WATCH.get();
    // SAFETY: the thread itself holds the watch for as long as this points to it.
    !watch.is_null() && unsafe { &*watch }.abandoned.load(Ordering::Relaxed)
}

/// Does within such work what may not be stopped midway, since it holds what must come free. Its memory does not count.
pub fn unstoppable<T>(work: impl FnOnce() -> T) -> T {
    let watch = WATCH.replace(null());
    let done = work();
    WATCH.set(watch);
    done
}

fn wait<T>(watch: &Watch, outcome: &Mutex<Option<Result<T, Unfinished>>>, time: Duration) -> Result<T, Unfinished> {
    let end = Instant::now() + time;
    loop {
        if let Some(done) = outcome.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return done;
        }
        if watch.exceeded.load(Ordering::SeqCst) {
            return Err(Unfinished::Memory);
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            watch.abandoned.store(true, Ordering::SeqCst);
            return Err(Unfinished::Time);
        }
        thread::park_timeout(left);
    }
}

/// The system's allocator, counting for threads that are watched.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: everything is passed on to the system's allocator; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        give(layout.size());
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // Both may exist for a moment.
        take(new_size);
        give(layout.size());
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

fn take(size: usize) {
    let watch = WATCH.get();
    if watch.is_null() {
        return;
    }
    let left = LEFT.get().saturating_sub_unsigned(size);
    LEFT.set(left);
    // SAFETY: the thread itself holds the watch for as long as this points to it.
    let watch = unsafe { &*watch };
    if left < 0 || watch.is_overdue() {
        stop(watch);
    }
}

fn give(size: usize) {
    if !WATCH.get().is_null() {
        LEFT.set(LEFT.get().saturating_add_unsigned(size));
    }
}

#[cold]
fn stop(watch: &Watch) -> ! {
    WATCH.set(null());
    watch.exceeded.store(true, Ordering::SeqCst);
    watch.caller.unpark();
    loop {
        thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { memory: 1024 * 1024, time: Duration::from_secs(60), stack: 256 * 1024 };

    #[test]
    fn work_within_its_bounds_gives_its_outcome() {
        assert_eq!(run_bounded("test", BOUNDS, || vec![1u8; 1000].len()).unwrap(), 1000);
    }

    #[test]
    fn what_is_given_back_counts_no_more() {
        let work = || (0..100).map(|_| vec![1u8; 500_000].len()).sum::<usize>();
        assert_eq!(run_bounded("test", BOUNDS, work).unwrap(), 50_000_000);
    }

    #[test]
    fn work_that_takes_too_much_memory_is_stopped() {
        let doubled = || {
            let mut text = String::from("abc");
            loop {
                text = format!("{text}{text}");
            }
        };
        assert!(matches!(run_bounded::<String>("test", BOUNDS, doubled), Err(Unfinished::Memory)));
    }

    #[test]
    fn work_that_takes_too_long_is_left_behind() {
        let bounds = Bounds { time: Duration::from_millis(10), ..BOUNDS };
        let sleeping = || thread::sleep(Duration::from_secs(1));
        assert!(matches!(run_bounded("test", bounds, sleeping), Err(Unfinished::Time)));
    }

    #[test]
    fn what_may_not_be_stopped_is_done_and_does_not_count() {
        let work = || unstoppable(|| vec![1u8; 2 * BOUNDS.memory]).len() + vec![1u8; BOUNDS.memory / 2].len();
        assert_eq!(run_bounded("test", BOUNDS, work).unwrap(), 5 * BOUNDS.memory / 2);
        let too_much = || unstoppable(|| 1) + vec![1u8; 2 * BOUNDS.memory].len();
        assert!(matches!(run_bounded("test", BOUNDS, too_much), Err(Unfinished::Memory)));
    }

    #[test]
    fn work_that_was_given_up_can_end_in_order() {
        let bounds = Bounds { time: Duration::from_millis(100), ..BOUNDS };
        let held = Arc::new(());
        let seen = Arc::clone(&held);
        let asking = move || {
            while !is_given_up() {
                thread::yield_now();
            }
            drop(vec![seen]);
        };
        assert!(matches!(run_bounded("test", bounds, asking), Err(Unfinished::Time)));
        while Arc::strong_count(&held) > 1 {
            thread::yield_now();
        }
    }

    #[test]
    fn only_work_that_was_given_up_is_overdue_and_not_at_once() {
        let now = Instant::now();
        let watch = |abandoned: bool, end| Watch {
            caller: thread::current(),
            exceeded: AtomicBool::new(false),
            abandoned: AtomicBool::new(abandoned),
            end,
        };
        assert!(!watch(false, now).is_overdue());
        assert!(!watch(true, now + Duration::from_secs(3600)).is_overdue());
        while Instant::now() == now {}
        assert!(watch(true, now).is_overdue());
    }

    #[test]
    fn a_panic_is_caught() {
        let failing = || -> u8 { std::panic::resume_unwind(Box::new("on purpose")) };
        assert!(matches!(run_bounded("test", BOUNDS, failing), Err(Unfinished::Panic)));
    }
}
