//! What each kind of memory can do: the one table that decides about sharing, removing, shifting and checkpoints.

use crate::llama::Model;

/// How a model remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// Keys and values of every token (most models).
    Attention,
    /// Some layers keep only the tokens of a window, and the cache has room for no more (`swa_full=False`).
    SlidingWindow,
    /// One state per sequence (Mamba, RWKV).
    Recurrent,
    /// Attention layers beside recurrent ones (Jamba, LFM2).
    Hybrid,
}

impl MemoryKind {
    /// The kind of a model's memory in a context with or without a full-size window cache.
    #[must_use]
    pub fn of(model: &Model, swa_full: bool) -> Self {
        if model.is_hybrid() {
            Self::Hybrid
        } else if model.is_recurrent() {
            Self::Recurrent
        } else if model.n_swa() > 0 && !swa_full {
            Self::SlidingWindow
        } else {
            Self::Attention
        }
    }

    /// Whether a sequence can lose its tail and keep the rest.
    #[must_use]
    pub fn is_divisible(self) -> bool {
        self == Self::Attention
    }

    /// The name users see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::SlidingWindow => "sliding_window",
            Self::Recurrent => "recurrent",
            Self::Hybrid => "hybrid",
        }
    }
}

/// What may be done with the cells of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The tail of a sequence can be removed.
    pub remove_tail: bool,
    /// A prefix of one sequence can be shared with another (`seq_cp` of a part).
    pub share_prefix: bool,
    /// Positions can be moved (`seq_add`).
    pub shift: bool,
    /// A state that cannot be rolled back is saved after each prompt, so that the prompt's prefix can be reused.
    pub checkpoints: bool,
    /// A state that was put back is complete. llama.cpp leaves out what a window no longer sees, also where the cache
    /// has room for it, so that a shorter prefix could not be used any more.
    pub restore: bool,
    /// A cell belongs to a token, so that the context's size bounds all sequences together.
    pub cells: bool,
}

impl Capabilities {
    /// The table. `unified`: all sequences share one pool of cells; `can_shift`: what llama.cpp says of this cache;
    /// `has_window`: some layers attend to a window only.
    #[must_use]
    pub fn of(kind: MemoryKind, unified: bool, can_shift: bool, has_window: bool) -> Self {
        let attention = kind.is_divisible();
        Self {
            remove_tail: attention,
            share_prefix: attention && unified,
            shift: attention && can_shift,
            checkpoints: !attention,
            restore: !(attention && has_window),
            cells: unified && kind != MemoryKind::Recurrent,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_attention_can_do_everything_in_one_pool() {
        let can = Capabilities::of(MemoryKind::Attention, true, true, false);
        assert!(can.remove_tail && can.share_prefix && can.shift && can.cells && !can.checkpoints);
    }

    #[test]
    fn split_caches_share_no_prefix() {
        assert!(!Capabilities::of(MemoryKind::Attention, false, true, false).share_prefix);
    }

    #[test]
    fn states_that_cannot_be_rolled_back_have_checkpoints() {
        for kind in [MemoryKind::Recurrent, MemoryKind::Hybrid, MemoryKind::SlidingWindow] {
            let can = Capabilities::of(kind, true, false, true);
            assert!(can.checkpoints && !can.remove_tail && !can.share_prefix && !can.shift);
        }
    }
}
