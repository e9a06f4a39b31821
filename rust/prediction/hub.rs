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
    ready: Mutex<Vec<Arc<Target>>>,
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
            ready: Mutex::default(),
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
        let ready = std::mem::take(&mut *self.ready.lock().unwrap_or_else(PoisonError::into_inner));
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
        self.ready.lock().unwrap_or_else(PoisonError::into_inner).clear();
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
        self.ready.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(target));
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
