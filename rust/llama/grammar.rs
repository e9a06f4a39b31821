//! llama.cpp's own grammar, for tests to compare with. Nothing else uses it: see `rust/sequence/grammar/gbnf.rs`.

use std::ffi::CString;
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::sampler::{llamactor_sampler_accept, llamactor_sampler_apply};
use super::{Model, Token, guarded};

/// A grammar in the hands of llama.cpp: of harmless ones only.
pub struct ReferenceGrammar<'a> {
    raw: NonNull<sys::llama_sampler>,
    model: &'a Model,
}

impl<'a> ReferenceGrammar<'a> {
    /// `None` if llama.cpp cannot read it.
    pub fn new(model: &'a Model, text: &str) -> Option<Self> {
        let (text, root) = (CString::new(text).ok()?, c"root");
        // SAFETY: the vocabulary outlives the sampler, which borrows the model; both texts live during the call.
        let raw = unsafe { sys::llama_sampler_init_grammar(model.vocab_ptr(), text.as_ptr(), root.as_ptr()) };
        Some(Self { raw: NonNull::new(raw)?, model })
    }

    /// Which tokens may come next.
    pub fn allowed(&mut self) -> Vec<bool> {
        let candidate = |id: Token| sys::llama_token_data { id, logit: 0.0, p: 0.0 };
        let mut data: Vec<_> = (0..self.model.n_vocab() as Token).map(candidate).collect();
        let mut array =
            sys::llama_token_data_array { data: data.as_mut_ptr(), size: data.len(), selected: -1, sorted: false };
        guarded(|message, size| {
            // SAFETY: the array points to `data`, which lives until after the call and keeps its length.
            unsafe { llamactor_sampler_apply(self.raw.as_ptr(), &raw mut array, message, size) }
        })
        .expect("llama.cpp looks at every token");
        data.iter().map(|candidate| candidate.logit == 0.0).collect()
    }

    /// Takes a token that is allowed.
    pub fn accept(&mut self, token: Token) {
        // SAFETY: the sampler is alive; the token was found allowed, so that nothing aborts.
        guarded(|message, size| unsafe { llamactor_sampler_accept(self.raw.as_ptr(), token, message, size) })
            .expect("an allowed token is accepted");
    }
}

impl Drop for ReferenceGrammar<'_> {
    fn drop(&mut self) {
        // SAFETY: it came from an init function and is freed once.
        unsafe { sys::llama_sampler_free(self.raw.as_ptr()) }
    }
}
