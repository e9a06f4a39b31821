//! Tokens of several sequences for one decode call.

use std::ffi::c_char;
use std::ptr::null_mut;

use llama_cpp_sys_2 as sys;

use super::Token;

/// A batch of fixed capacity (`llama_batch`): nothing is allocated while decoding. Each token has exactly one
/// sequence; sharing is done by copying cells.
pub struct Batch {
    tokens: Vec<Token>,
    positions: Vec<i32>,
    n_seq_ids: Vec<i32>,
    seq_ids: Vec<i32>,
    seq_id_pointers: Vec<*mut i32>,
    outputs: Vec<i8>,
    n_outputs: usize,
    capacity: usize,
}

impl Batch {
    /// An empty batch for at most `capacity` tokens.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let mut batch = Self {
            tokens: Vec::with_capacity(capacity),
            positions: Vec::with_capacity(capacity),
            n_seq_ids: vec![1; capacity],
            seq_ids: vec![0; capacity],
            seq_id_pointers: Vec::with_capacity(capacity),
            outputs: Vec::with_capacity(capacity),
            n_outputs: 0,
            capacity,
        };
        let first: *mut i32 = batch.seq_ids.as_mut_ptr();
        batch.seq_id_pointers.extend((0..capacity).map(|i| first.wrapping_add(i)));
        batch
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.outputs.clear();
        self.n_outputs = 0;
    }

    /// Tokens in the batch.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens whose logits are wanted.
    #[must_use]
    pub fn n_outputs(&self) -> usize {
        self.n_outputs
    }

    /// Appends a token and returns its index, by which its logits are found; `None` when the batch is full.
    #[must_use]
    pub fn push(&mut self, token: Token, position: usize, sequence: u32, output: bool) -> Option<usize> {
        let index = self.tokens.len();
        if index == self.capacity {
            return None;
        }
        self.tokens.push(token);
        self.positions.push(i32::try_from(position).ok()?);
        self.seq_ids[index] = sequence as i32;
        self.outputs.push(i8::from(output));
        self.n_outputs += usize::from(output);
        Some(index)
    }

    /// Whether every token is below `n_vocab` and every sequence below `n_seq_max`.
    pub(super) fn is_within(&self, n_vocab: usize, n_seq_max: usize) -> bool {
        let used = &self.seq_ids[..self.len()];
        self.tokens.iter().all(|&token| usize::try_from(token).is_ok_and(|token| token < n_vocab))
            && used.iter().all(|&id| usize::try_from(id).is_ok_and(|id| id < n_seq_max))
    }

    /// The view that llama.cpp reads; valid until the batch is changed.
    pub(super) fn native(&mut self) -> sys::llama_batch {
        sys::llama_batch {
            n_tokens: self.tokens.len() as i32,
            token: self.tokens.as_mut_ptr(),
            embd: null_mut(),
            pos: self.positions.as_mut_ptr(),
            n_seq_id: self.n_seq_ids.as_mut_ptr(),
            seq_id: self.seq_id_pointers.as_mut_ptr(),
            logits: self.outputs.as_mut_ptr().cast::<c_char>().cast(),
        }
    }
}
