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

/// Steps of expressions that look ahead, in all of a text; a step takes 50 to 80 ns.
const MAX_STEPS: usize = 1 << 27;

/// Names of `tokenizer.ggml.pre` whose expressions llama.cpp has loops for, or that match single characters.
#[rustfmt::skip]
const LOOPS: &[&str] = &[
    "a.x-4.0", "chatglm-bpe", "codeshell", "command-r", "dbrx", "deepseek-r1-qwen", "exaone", "exaone4", "f2llmv2",
    "falcon-h1", "falcon3", "gemma4", "gigachat", "glm4", "glm5", "gpt-2", "granite-docling",
    "granite-embed-multi-311m", "grok-2", "hunyuan", "jais", "jina-de", "jina-es", "jina-v1-en", "jina-v2-code",
    "jina-v2-de", "jina-v2-es", "jina-v5-nano", "kimi-k2", "kormo", "laguna", "lfm2", "llama-bpe", "llama-v3",
    "llama3", "megrez", "mellum", "mellum2", "midm-2.0", "minerva-7b", "mmbert", "modern-bert", "mpt", "olmo",
    "phi-2", "pixtral", "qwen2", "qwen35", "refact", "roberta-bpe", "sarvam-moe", "smaug-bpe", "smollm",
    "solar-open", "stablelm2", "starcoder", "trillion",
];

/// Names whose expressions match whole words, whatever they consist of.
const WORDS: &[&str] = &["bloom", "gpt3-finnish", "poro-chat", "viking", "whitespace"];

/// The expressions of a vocabulary, as far as their cost goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pretokenizer {
    /// Whether an expression is compiled for each stretch of text, which takes up to a millisecond.
    pub compiles: bool,
    class: fn(char) -> u8,
    looks_ahead: Option<LooksAhead>,
}

/// An expression that reads the rest of a run again and again.
#[derive(Clone, Copy, Debug)]
struct LooksAhead {
    /// What the runs consist of.
    over: fn(char) -> bool,
    /// After how many characters it reads the rest again.
    every: usize,
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
            "deepseek-llm" | "deepseek-coder" => line_class,
            _ => class,
        };
        let looks_ahead = match name {
            "deepseek-llm" => Some(LooksAhead { over: is_space_of_a_line, every: 1 }),
            "superbpe" => Some(LooksAhead { over: |c| c.is_ascii_digit(), every: 1 }),
            // It takes 512 at once, but reads them several times.
            "jais-2" => Some(LooksAhead { over: char::is_whitespace, every: 128 }),
            _ => None,
        };
        Some(Self { compiles: true, class, looks_ahead })
    }

    /// Bytes of stack that a stretch needs; `None` if any stack will do. `steps` counts over all stretches of a text.
    ///
    /// # Errors
    /// `Value` for a run that is too long, or too many that are long.
    pub fn stack(&self, text: &[u8], steps: &mut usize) -> Result<Option<usize>> {
        let text = String::from_utf8_lossy(text);
        let run = self.longest_run(&text);
        if run > MAX_RUN {
            return Err(Error::Value(format!(
                "the text has {run} characters of one kind (such as letters or spaces) in a row; this model's \
                 pre-tokenizer takes {MAX_RUN} at most: break the run"
            )));
        }
        *steps += self.steps(&text);
        if *steps > MAX_STEPS {
            return Err(Error::Value(
                "the text has too many long runs of digits or spaces for this model's pre-tokenizer, which takes the \
                 square of a run's length: break the runs, or split the text"
                    .into(),
            ));
        }
        Ok((run > SMALL_RUN).then_some((run + SMALL_RUN) * STACK_PER_CHARACTER))
    }

    /// Characters of the longest match that there can be.
    fn longest_run(&self, text: &str) -> usize {
        let (mut runs, mut longest) = ([0usize; 4], 0);
        for class in text.chars().map(self.class) {
            for (bit, run) in runs.iter_mut().enumerate() {
                *run = if class >> bit & 1 == 1 { *run + 1 } else { 0 };
                longest = longest.max(*run);
            }
        }
        longest
    }

    fn steps(&self, text: &str) -> usize {
        let Some(LooksAhead { over, every }) = self.looks_ahead else { return 0 };
        let (mut run, mut steps) = (0, 0);
        for c in text.chars() {
            run = if over(c) { run + 1 } else { 0 };
            steps += run;
        }
        steps / every
    }
}

fn is_space_of_a_line(c: char) -> bool {
    c.is_whitespace() && !matches!(c, '\r' | '\n')
}

const LETTER: u8 = 1;
const DIGIT: u8 = 2;
const OTHER: u8 = 4;
const SPACE: u8 = 8;

/// Which kinds of run a character goes on with. Only where there is no doubt what llama.cpp takes a character for it
/// ends the others: all else goes on with every run.
fn class(c: char) -> u8 {
    match c {
        'a'..='z' | 'A'..='Z' => LETTER,
        '0'..='9' => DIGIT,
        // Expressions for punctuation take the line breaks after it.
        '\r' | '\n' => OTHER | SPACE,
        ' ' | '\t'..='\r' => SPACE,
        '\0'..='\x7f' => OTHER,
        _ => class_beyond_ascii(c),
    }
}

fn class_beyond_ascii(c: char) -> u8 {
    match c {
        'À'..='Ö' | 'Ø'..='ö' | 'ø'..='ƺ' | 'Α'..='Ρ' | 'Σ'..='Ω' | 'α'..='ω' | 'А'..='я' => LETTER,
        'א'..='ת' | 'ء'..='غ' | 'ف'..='ي' | 'अ'..='ह' | 'ก'..='ะ' => LETTER,
        'ぁ'..='ゖ' | 'ァ'..='ヺ' | '㐀'..='䶵' | '一'..='龥' | '가'..='힣' => LETTER,
        '—' | '‘'..='‟' | '…' | '、'..='〃' | '〈'..='】' | '！'..='／' | '：'..='＠' => OTHER,
        _ => LETTER | DIGIT | OTHER | SPACE,
    }
}

fn word_class(c: char) -> u8 {
    let class = class(c);
    if class == SPACE || c == '\n' || c == '\r' { SPACE } else { LETTER | class & SPACE }
}

/// Letters with single spaces between them.
fn phrase_class(c: char) -> u8 {
    if c == ' ' { LETTER | SPACE } else { class(c) }
}

/// Everything between U+0800 and U+9FA5 in one run, but lines by themselves.
fn line_class(c: char) -> u8 {
    match c {
        '\r' | '\n' => 0,
        '\0'..='\x7f' => class(c),
        _ => LETTER | DIGIT | OTHER | SPACE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str, text: &str) -> usize {
        Pretokenizer::named(name).unwrap().longest_run(text)
    }

    #[test]
    fn the_longest_run_is_of_one_kind_of_character() {
        assert_eq!(run("gpt-4o", "abc12 ....\n\n x"), 6);
        assert_eq!(run("gpt-4o", "ab字字cd。"), 6);
        assert_eq!(run("gpt-4o", "字字，字\n字字字。字 字"), 3);
        assert_eq!(run("gpt-4o", "\u{301}.\u{301}a😀"), 3);
        assert_eq!(run("bloom", "ab12.. x"), 6);
        assert_eq!(run("deepseek-llm", "字、字、字\n字"), 5);
        assert_eq!(run("exaone-moe", "one two, x"), 7);
    }

    #[test]
    fn long_runs_get_a_large_stack_and_longer_ones_are_refused() {
        let pre = Pretokenizer::named("tekken").unwrap();
        assert_eq!(pre.stack(&b"ab "[..].repeat(9999), &mut 0).unwrap(), None);
        assert!(pre.stack(&[b'a'; MAX_RUN], &mut 0).unwrap().unwrap() > MAX_RUN * 512);
        assert!(pre.stack(&[b'a'; MAX_RUN + 1], &mut 0).unwrap_err().to_string().contains("262144"));
    }

    #[test]
    fn runs_that_take_the_square_of_their_length_have_a_budget() {
        let pre = Pretokenizer::named("superbpe").unwrap();
        assert!(pre.stack("123 字".repeat(100_000).as_bytes(), &mut 0).is_ok());
        let mut steps = 0;
        assert!(pre.stack(&[b'1'; 16_000], &mut steps).is_ok());
        assert!(pre.stack(&[b'1'; 16_000], &mut steps).is_err());
        let pre = Pretokenizer::named("jais-2").unwrap();
        assert!(pre.stack(&[b' '; 100_000], &mut 0).is_ok());
        assert!(pre.stack(&[b' '; 200_000], &mut 0).is_err());
    }

    #[test]
    fn expressions_with_a_loop_of_their_own_cost_nothing() {
        assert!(Pretokenizer::named("smollm").is_none());
        assert!(Pretokenizer::named("a name of tomorrow").is_some());
    }
}
