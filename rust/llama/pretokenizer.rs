//! What a text costs the regular expressions that cut it into words before byte-pair merges.
//!
//! llama.cpp has loops for some expressions and runs the others with `std::regex`, which calls itself for each
//! character of a match and takes the square of a run's length where an expression looks ahead. A long run of letters
//! then overflows the stack, which kills the process. So runs are measured first: they get a stack that is large
//! enough, or are refused.

use crate::error::{Error, Result};

/// Longest run of characters that is tokenised where `std::regex` recurses.
const MAX_RUN: usize = 256 * 1024;

/// What `std::regex` of GNU's C++ library needs for each character of a match; 256 to 335 bytes were measured.
const STACK_PER_CHARACTER: usize = 768;

/// Longest run that any caller's stack holds, besides what llama.cpp needs anyway.
const SMALL_RUN: usize = 4 * 1024;

/// Steps of an expression that looks ahead from each character; a step takes 50 to 80 ns.
const MAX_STEPS: usize = 1 << 27;

/// Names of `tokenizer.ggml.pre` whose expressions llama.cpp has loops for, or that match single characters.
const LOOPS: &[&str] = &[
    "a.x-4.0",
    "chatglm-bpe",
    "codeshell",
    "command-r",
    "dbrx",
    "deepseek-r1-qwen",
    "exaone",
    "exaone4",
    "f2llmv2",
    "falcon-h1",
    "falcon3",
    "gemma4",
    "gigachat",
    "glm4",
    "glm5",
    "gpt-2",
    "granite-docling",
    "granite-embed-multi-311m",
    "grok-2",
    "hunyuan",
    "jais",
    "jina-de",
    "jina-es",
    "jina-v1-en",
    "jina-v2-code",
    "jina-v2-de",
    "jina-v2-es",
    "jina-v5-nano",
    "kimi-k2",
    "kormo",
    "laguna",
    "lfm2",
    "llama-bpe",
    "llama-v3",
    "llama3",
    "megrez",
    "mellum",
    "mellum2",
    "midm-2.0",
    "minerva-7b",
    "mmbert",
    "modern-bert",
    "mpt",
    "olmo",
    "phi-2",
    "pixtral",
    "qwen2",
    "qwen35",
    "refact",
    "roberta-bpe",
    "sarvam-moe",
    "smaug-bpe",
    "smollm",
    "solar-open",
    "stablelm2",
    "starcoder",
    "trillion",
];

/// Names whose expressions match whole words, whatever they consist of.
const WORDS: &[&str] = &["bloom", "gpt3-finnish", "poro-chat", "viking", "whitespace"];

/// The expressions of a vocabulary, as far as their cost goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pretokenizer {
    /// Whether an expression is compiled for each stretch of text, which takes up to a millisecond.
    pub compiles: bool,
    class: fn(u8) -> u8,
    looks_ahead: Option<fn(char) -> bool>,
}

impl Pretokenizer {
    /// For the value of `tokenizer.ggml.pre`. `None` if every text takes linear time and little stack.
    pub fn named(name: &str) -> Option<Self> {
        if LOOPS.contains(&name) {
            return None;
        }
        let class = match name {
            _ if WORDS.contains(&name) => word_class,
            "exaone-moe" => phrase_class,
            _ => class,
        };
        let looks_ahead: Option<fn(char) -> bool> = match name {
            "deepseek-llm" => Some(|c| c.is_whitespace() && !matches!(c, '\r' | '\n')),
            "superbpe" => Some(|c| c.is_ascii_digit()),
            _ => None,
        };
        Some(Self { compiles: true, class, looks_ahead })
    }

    /// Bytes of stack that a text needs; `None` if any stack will do.
    ///
    /// # Errors
    /// `Value` for a run that is too long.
    pub fn stack(&self, text: &[u8]) -> Result<Option<usize>> {
        let run = self.longest_run(text);
        if run > MAX_RUN {
            return Err(Error::Value(format!(
                "the text has {run} characters of one kind (such as letters or spaces) in a row; this model's \
                 pre-tokenizer takes {MAX_RUN} at most: break the run"
            )));
        }
        self.check_steps(text)?;
        Ok((run > SMALL_RUN).then_some((run + SMALL_RUN) * STACK_PER_CHARACTER))
    }

    /// Characters of the longest match that there can be. What is not ASCII may belong to any class.
    fn longest_run(&self, text: &[u8]) -> usize {
        let (mut runs, mut longest) = ([0usize; 4], 0);
        for &byte in text.iter().filter(|&&byte| !is_continuation(byte)) {
            let class = if byte.is_ascii() { (self.class)(byte) } else { ANY };
            for (bit, run) in runs.iter_mut().enumerate() {
                *run = if class >> bit & 1 == 1 { *run + 1 } else { 0 };
                longest = longest.max(*run);
            }
        }
        longest
    }

    fn check_steps(&self, text: &[u8]) -> Result<()> {
        let Some(looks_ahead) = self.looks_ahead else { return Ok(()) };
        let (mut run, mut steps) = (0, 0usize);
        for c in String::from_utf8_lossy(text).chars() {
            run = if looks_ahead(c) { run + 1 } else { 0 };
            steps += run;
        }
        if steps > MAX_STEPS {
            return Err(Error::Value(
                "the text has too many long runs of digits or spaces for this model's pre-tokenizer, which takes the \
                 square of a run's length: at most 16384 in a row, or as many shorter ones as take the same time"
                    .into(),
            ));
        }
        Ok(())
    }
}

const LETTER: u8 = 1;
const DIGIT: u8 = 2;
const OTHER: u8 = 4;
const SPACE: u8 = 8;
const ANY: u8 = LETTER | DIGIT | OTHER | SPACE;

/// Which kinds of run a character of ASCII goes on with.
fn class(byte: u8) -> u8 {
    match byte {
        b'a'..=b'z' | b'A'..=b'Z' => LETTER,
        b'0'..=b'9' => DIGIT,
        // Expressions for punctuation take the line breaks after it.
        b'\r' | b'\n' => OTHER | SPACE,
        b' ' | b'\t'..=b'\r' => SPACE,
        _ => OTHER,
    }
}

fn word_class(byte: u8) -> u8 {
    if class(byte) & SPACE == 0 { LETTER } else { SPACE }
}

/// Letters with single spaces between them.
fn phrase_class(byte: u8) -> u8 {
    if byte == b' ' { LETTER | SPACE } else { class(byte) }
}

fn is_continuation(byte: u8) -> bool {
    byte & 0xC0 == 0x80
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str, text: &str) -> usize {
        Pretokenizer::named(name).unwrap().longest_run(text.as_bytes())
    }

    #[test]
    fn the_longest_run_is_of_one_kind_of_character() {
        assert_eq!(run("gpt-4o", "abc12 ....\n\n x"), 6);
        assert_eq!(run("gpt-4o", "ab字字cd."), 6);
        assert_eq!(run("bloom", "ab12.. x"), 6);
        assert_eq!(run("exaone-moe", "one two, x"), 7);
    }

    #[test]
    fn long_runs_get_a_large_stack_and_longer_ones_are_refused() {
        let pre = Pretokenizer::named("tekken").unwrap();
        assert_eq!(pre.stack(&b"ab "[..].repeat(9999)).unwrap(), None);
        assert!(pre.stack(&[b'a'; MAX_RUN]).unwrap().unwrap() > MAX_RUN * 512);
        assert!(pre.stack(&[b'a'; MAX_RUN + 1]).unwrap_err().to_string().contains("262144"));
    }

    #[test]
    fn runs_that_take_the_square_of_their_length_have_a_budget() {
        let pre = Pretokenizer::named("superbpe").unwrap();
        assert!(pre.stack(&[b'1'; 16 * 1024 - 1]).is_ok());
        assert!(pre.stack(&[b'1'; 17 * 1024]).is_err());
        assert!(pre.stack("123 字".repeat(100_000).as_bytes()).is_ok());
    }

    #[test]
    fn expressions_with_a_loop_of_their_own_cost_nothing() {
        assert!(Pretokenizer::named("smollm").is_none());
        assert!(Pretokenizer::named("a name of tomorrow").is_some());
    }
}
