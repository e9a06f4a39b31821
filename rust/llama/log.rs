//! llama.cpp's log: silent unless asked, then to stderr. Never calls Python.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};
use std::io::Write;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};

use llama_cpp_sys_2 as sys;

/// How much of llama.cpp's log goes to stderr.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum LogLevel {
    /// Everything.
    Debug = 1,
    /// What loading and decoding say about themselves.
    Info = 2,
    /// Warnings and errors.
    Warn = 3,
    /// Errors only.
    Error = 4,
    /// Nothing (the default).
    Off = 5,
}

impl FromStr for LogLevel {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "debug" => Ok(Self::Debug),
            "info" => Ok(Self::Info),
            "warn" => Ok(Self::Warn),
            "error" => Ok(Self::Error),
            "off" => Ok(Self::Off),
            _ => Err(format!("log level {name:?} is unknown; use off, error, warn, info or debug")),
        }
    }
}

static LEVEL: AtomicU32 = AtomicU32::new(LogLevel::Off as u32);
/// Level of the last whole line, for the fragments that continue it (`GGML_LOG_LEVEL_CONT`).
static LAST: AtomicU32 = AtomicU32::new(LogLevel::Info as u32);

thread_local! {
    /// What llama.cpp last called an error on this thread: the reason behind a bare null pointer.
    static LAST_ERROR: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Takes what llama.cpp last logged as an error on this thread.
pub(super) fn take_last_error() -> String {
    LAST_ERROR.with_borrow_mut(std::mem::take)
}

/// Chooses how much of llama.cpp's log reaches stderr from now on.
pub fn set_log_level(level: LogLevel) {
    LEVEL.store(level as u32, Ordering::Relaxed);
}

/// Takes over the log of llama.cpp and ggml.
pub(super) fn install() {
    // SAFETY: the callback lives for ever, takes no user data and never unwinds.
    unsafe { sys::llama_log_set(Some(write_line), std::ptr::null_mut()) };
}

unsafe extern "C" fn write_line(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    let level = match level {
        sys::GGML_LOG_LEVEL_CONT => LAST.load(Ordering::Relaxed),
        other => other,
    };
    LAST.store(level, Ordering::Relaxed);
    if text.is_null() {
        return;
    }
    // SAFETY: llama.cpp passes a NUL-terminated string that lives during the call.
    let text = unsafe { CStr::from_ptr(text) };
    if level >= LogLevel::Error as u32 {
        remember(text);
    }
    if level < LEVEL.load(Ordering::Relaxed) {
        return;
    }
    // A closed stderr is no reason to fail.
    let _ = std::io::stderr().lock().write_all(text.to_bytes());
}

/// Keeps the first error of a failing call: later ones only say that it failed.
fn remember(text: &CStr) {
    // A thread that is being torn down has no cell any more; nothing is lost then.
    let _ = LAST_ERROR.try_with(|last| {
        if let Ok(mut last) = last.try_borrow_mut()
            && last.is_empty()
        {
            last.push_str(text.to_string_lossy().trim());
        }
    });
}
