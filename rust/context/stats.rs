//! Counters of a context, written by its decoder and read from anywhere.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// Counters since the context was made.
        #[derive(Debug, Default)]
        pub struct Stats { $($(#[$doc])* $name: AtomicU64),+ }

        /// The counters at one moment.
        #[derive(Clone, Copy, Debug, Default)]
        pub struct Snapshot { $($(#[$doc])* pub $name: u64),+ }

        impl Stats {
            /// The counters now.
            #[must_use]
            pub fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.load(Ordering::Relaxed)),+ }
            }

            $($(#[$doc])* pub fn $name(&self, n: u64) { self.$name.fetch_add(n, Ordering::Relaxed); })+
        }
    };
}

counters! {
    /// Decode calls.
    batches,
    /// Micro-batches in those calls.
    micro_batches,
    /// Tokens evaluated.
    evaluated_tokens,
    /// Of those, tokens of prompts.
    prompt_tokens,
    /// Of those, tokens that were drawn before.
    decoded_tokens,
    /// Prompt tokens found in the cache instead of being evaluated.
    cached_tokens,
    /// Of those, tokens found in another sequence.
    copied_tokens,
    /// Tokens dropped because a sequence had filled the context.
    shifted_tokens,
    /// Jobs that had to give up their cells for a while.
    preemptions,
    /// Idle sequences that lost their cached tokens.
    evictions,
    /// States of chats that were parked.
    parked_states,
    /// Tokens that came back from parked states.
    restored_tokens,
    /// Nanoseconds spent in decode calls.
    decode_nanoseconds,
}
