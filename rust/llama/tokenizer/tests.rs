//! The pieces' way compared with llama.cpp's own, for vocabularies of each kind.

use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;
use crate::llama::{LoadParams, SplitMode};

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// A vocabulary to write into a file.
struct Vocabulary {
    model: &'static str,
    pre: &'static str,
    name: &'static str,
    flags: Vec<(&'static str, bool)>,
    merges: Vec<String>,
    tokens: Vec<(String, f32, i32)>,
}

impl Vocabulary {
    fn new(model: &'static str) -> Self {
        Self { model, pre: "", name: "tiny", flags: Vec::new(), merges: Vec::new(), tokens: Vec::new() }
    }

    fn with(mut self, texts: impl IntoIterator<Item = impl Into<String>>, kind: i32) -> Self {
        for text in texts {
            let text = text.into();
            if self.tokens.iter().all(|(other, ..)| *other != text) {
                // Distinct but for a few, so that the order among equals counts too.
                let score = -(((self.tokens.len() * 7919) % 101) as f32);
                self.tokens.push((text, score, kind));
            }
        }
        self
    }

    fn flag(mut self, name: &'static str, value: bool) -> Self {
        self.flags.push((name, value));
        self
    }

    fn load(&self) -> Model {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vocabulary.gguf");
        std::fs::write(&path, self.file()).unwrap();
        load(&path)
    }

    fn file(&self) -> Vec<u8> {
        let mut entries: Vec<Vec<u8>> = Vec::new();
        for (key, value) in [("general.architecture", "llama"), ("general.name", self.name)] {
            entries.push(entry(key, 8, &string(value)));
        }
        for key in ["context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"]
        {
            entries.push(entry(&format!("llama.{key}"), 4, &32u32.to_le_bytes()));
        }
        entries.push(entry("llama.attention.layer_norm_rms_epsilon", 6, &1e-5f32.to_le_bytes()));
        entries.push(entry("tokenizer.ggml.model", 8, &string(self.model)));
        if !self.pre.is_empty() {
            entries.push(entry("tokenizer.ggml.pre", 8, &string(self.pre)));
        }
        for (name, value) in &self.flags {
            entries.push(entry(&format!("tokenizer.ggml.{name}"), 7, &[u8::from(*value)]));
        }
        for (name, id) in [("bos", 1u32), ("eos", 2), ("unknown", 0), ("seperator", 2)] {
            entries.push(entry(&format!("tokenizer.ggml.{name}_token_id"), 4, &id.to_le_bytes()));
        }
        let strings = |texts: Vec<&str>| array(8, texts.iter().map(|text| string(text)).collect());
        entries.push(entry("tokenizer.ggml.merges", 9, &strings(self.merges.iter().map(String::as_str).collect())));
        entries.push(entry("tokenizer.ggml.tokens", 9, &strings(self.tokens.iter().map(|t| t.0.as_str()).collect())));
        let scores = self.tokens.iter().map(|token| token.1.to_le_bytes().to_vec()).collect();
        entries.push(entry("tokenizer.ggml.scores", 9, &array(6, scores)));
        let kinds = self.tokens.iter().map(|token| token.2.to_le_bytes().to_vec()).collect();
        entries.push(entry("tokenizer.ggml.token_type", 9, &array(5, kinds)));
        let head =
            [b"GGUF".as_slice(), &3u32.to_le_bytes(), &0u64.to_le_bytes(), &(entries.len() as u64).to_le_bytes()];
        [head.concat(), entries.concat()].concat()
    }
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn array(element: u32, elements: Vec<Vec<u8>>) -> Vec<u8> {
    [&element.to_le_bytes()[..], &(elements.len() as u64).to_le_bytes(), &elements.concat()].concat()
}

fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&string(key)[..], &kind.to_le_bytes(), value].concat()
}

fn load(path: &Path) -> Model {
    let params = LoadParams {
        n_gpu_layers: 0,
        devices: None,
        main_gpu: 0,
        split_mode: SplitMode::None,
        tensor_split: None,
        use_mmap: true,
        use_mlock: false,
        vocab_only: true,
        outline: false,
        check_tensors: false,
        overrides: Vec::new(),
        lora: Vec::new(),
    };
    Model::load(path, &params, &mut |_| true).unwrap()
}

const SPECIAL: [&str; 12] = [
    "<unk>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<mask>",
    "<|im_start|>",
    "<s><s>",
    "s> <",
    "é<",
    "<|im_start|>user",
    "[X]",
    "<|",
];
const TEXTUAL: [&str; 7] = ["<think>", "\n\n", "\n\n\n", "  ", "k>\n", "▁▁▁", "ab"];
const WORDS: [&str; 24] = [
    "▁", "▁▁", "a", "b", "ab", "▁a", "▁ab", "s", ">", "s>", "<", "</", "t", "th", "the", "▁the", "é", "字", "éé", "1",
    "12", "k", "\n", "aaaa",
];

/// Texts of two and three letters that overlap in every way, as many as it takes for the order of equals to show.
fn overlapping() -> (Vec<String>, Vec<String>) {
    let letters = ["x", "y", "z"];
    let pairs = letters.iter().flat_map(|a| letters.map(|b| format!("{a}{b}")));
    let triples = pairs.clone().flat_map(|pair| letters.map(|c| format!("{pair}{c}")));
    pairs.chain(triples).enumerate().fold(Default::default(), |(mut even, mut odd), (index, text)| {
        if index % 3 == 0 {
            odd.push(text)
        } else {
            even.push(text)
        }
        (even, odd)
    })
}

fn with_specials(vocabulary: Vocabulary) -> Vocabulary {
    let (control, textual) = overlapping();
    let named = vocabulary.with(["<unk>"], UNKNOWN).with(SPECIAL, CONTROL);
    named.with(TEXTUAL, USER_DEFINED).with(control, CONTROL).with(textual, USER_DEFINED)
}

fn with_bytes(vocabulary: Vocabulary) -> Vocabulary {
    vocabulary.with((0..256).map(|byte| format!("<0x{byte:02X}>")), BYTE)
}

fn sentencepiece() -> Vocabulary {
    with_bytes(with_specials(Vocabulary::new("llama"))).with(WORDS, NORMAL).flag("add_eos_token", true)
}

/// GPT-2's letters for bytes, and some merges.
fn byte_pairs(pre: &'static str) -> Vocabulary {
    let own = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let letters = (0..256u32).filter(own).chain(256..256 + 68).map(|code| char::from_u32(code).unwrap().to_string());
    let merges = ["a b", "t h", "th e", "Ġ a", "Ġ th", "Ġth e", "a a", "aa aa", "Ċ Ċ", "Ã ©", "< /", "s >", "1 2"];
    let mut vocabulary = with_specials(Vocabulary::new("gpt2")).with(letters, NORMAL);
    vocabulary = vocabulary.with(merges.map(|merge| merge.replace(' ', "")), NORMAL);
    Vocabulary { pre, merges: merges.map(str::to_owned).to_vec(), ..vocabulary.flag("add_bos_token", true) }
}

/// Byte pairs over characters, with U+2581 for spaces, as Gemma 4 has them.
fn character_pairs(pre: &'static str) -> Vocabulary {
    let merges = ["▁ a", "a b", "t h", "th e", "▁ the", "s >"];
    let words = WORDS.iter().copied().chain(["h", "e"]);
    let vocabulary = with_bytes(with_specials(Vocabulary::new("gpt2"))).with(words, NORMAL);
    Vocabulary { pre, merges: merges.map(str::to_owned).to_vec(), ..vocabulary }
}

/// One of each kind.
fn vocabularies() -> Vec<(String, Model)> {
    let mut made = vec![
        ("SentencePiece", sentencepiece()),
        ("SentencePiece without a space", sentencepiece().flag("add_space_prefix", false)),
        ("stripping to the right", Vocabulary { name: "phi-3", ..sentencepiece() }),
        ("stripping to the left", byte_pairs("jina-v2-code").flag("add_eos_token", true)),
        ("character pairs", character_pairs("gemma4")),
        ("words of character pairs", character_pairs("mmbert")),
        ("unigrams", with_specials(Vocabulary::new("t5")).with(WORDS, NORMAL).flag("add_eos_token", true)),
        ("word pieces", with_specials(Vocabulary::new("bert")).with(WORDS, NORMAL).with(["▁s", "▁<"], NORMAL)),
        ("plamo", with_bytes(with_specials(Vocabulary::new("plamo2"))).with(WORDS, NORMAL)),
    ];
    for pre in ["smollm", "llama-bpe", "gpt-4o", "deepseek-llm", "default", "bloom", "superbpe"] {
        made.push((pre, byte_pairs(pre)));
    }
    let escaped = (0..256).map(|byte| format!("\\x{byte:02x}"));
    made.push(("rwkv", with_specials(Vocabulary::new("rwkv")).with(escaped, NORMAL).with(WORDS, NORMAL)));
    let made = made.into_iter().map(|(name, vocabulary)| (name.to_owned(), vocabulary.load()));
    made.chain(files().into_iter().map(|path| (path.display().to_string(), load(&path)))).collect()
}

/// The project's own chat model, and what `LLAMACTOR_TEST_VOCABULARIES` names, separated by colons.
fn files() -> Vec<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tinychat/tinychat-3m-Q8_0.gguf");
    let others = std::env::var_os("LLAMACTOR_TEST_VOCABULARIES");
    std::iter::once(own).chain(others.iter().flat_map(std::env::split_paths)).collect()
}

/// Texts that are rich in special tokens, parts of them, whitespace and characters without a token.
fn texts() -> impl Strategy<Value = String> {
    let words = || prop::sample::select([&SPECIAL[..], &TEXTUAL, &WORDS].concat()).prop_map(str::to_owned);
    let part = (words(), any::<prop::sample::Index>(), any::<prop::sample::Index>()).prop_map(|(word, from, to)| {
        let characters: Vec<char> = word.chars().collect();
        let (from, to) = (from.index(characters.len()), to.index(characters.len()));
        characters[from.min(to)..=from.max(to)].iter().collect()
    });
    let other = prop_oneof![
        2 => words(),
        1 => part,
        1 => "[xyzXY]{1,9}",
        1 => "[ \t\n\r\x0b]{1,4}",
        1 => "\\PC{1,3}",
        1 => "[a-z0-9 .,<>é]{1,12}",
    ];
    prop::collection::vec(other, 0..24).prop_map(|parts| parts.concat())
}

fn same(name: &str, model: &Model, text: &str) -> Result<(), TestCaseError> {
    for (add_special, parse_special) in [(false, false), (false, true), (true, false), (true, true)] {
        let whole = model.tokenize_whole(text.as_bytes(), add_special, parse_special);
        let pieces = model.tokenize_in_pieces(text.as_bytes(), add_special, parse_special);
        match (whole, pieces) {
            (Ok(whole), Ok(pieces)) => prop_assert_eq!(whole, pieces, "{}: {:?} {}", name, text, parse_special),
            (whole, pieces) => prop_assert!(whole.is_err() && pieces.is_err(), "{name}: {text:?} {whole:?} {pieces:?}"),
        }
    }
    Ok(())
}

#[test]
fn pieces_give_the_tokens_that_llama_cpp_gives() {
    let models = vocabularies();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(100));
    runner.run(&texts(), |text| models.iter().try_for_each(|(name, model)| same(name, model, &text))).unwrap();
}

#[test]
fn long_texts_give_the_tokens_that_llama_cpp_gives() {
    let texts = ["the sea and ", "a", " ", "字é", "<s>", "<|im_start|>user\n", "xyzzyx", "12 3\n\n", "\u{10fffe}a"];
    for (name, model) in vocabularies() {
        for text in texts {
            same(&name, &model, &text.repeat(2000 / text.len())).unwrap();
        }
    }
}

/// Everything in protected text, tokenised as a chat does it.
fn guarded(model: &Model, text: &str) -> Vec<Token> {
    let text = text.as_bytes();
    let mut stretches = Stretches::new(model, true);
    for piece in model.partition(text, true, std::slice::from_ref(&(0..text.len()))).unwrap() {
        match piece {
            Piece::Special { token, .. } => stretches.push(token),
            Piece::Text(range) => stretches.tokenize(&text[range]).unwrap(),
        }
    }
    stretches.finish()
}

#[test]
fn protected_text_names_no_special_token() {
    let models = vocabularies();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(100));
    let run = |text: String| {
        for (name, model) in &models {
            let tokens = guarded(model, &text);
            prop_assert!(!tokens.iter().any(|&token| model.is_guarded(token)), "{name}: {text:?} {tokens:?}");
        }
        Ok(())
    };
    runner.run(&texts(), run).unwrap();
}

#[test]
fn protected_text_stays_the_same_text() {
    for pre in ["smollm", "llama-bpe", "tekken"] {
        let model = byte_pairs(pre).load();
        for text in SPECIAL.iter().chain(&TEXTUAL).chain(&WORDS) {
            assert_eq!(model.detokenize(&guarded(&model, text), true).unwrap(), **text, "{pre}");
        }
    }
    let model = sentencepiece().flag("add_space_prefix", false).load();
    for text in SPECIAL {
        assert_eq!(model.detokenize(&guarded(&model, text), true).unwrap(), text);
    }
}

#[test]
fn a_run_that_would_overflow_the_stack_gets_a_larger_one_or_is_refused() {
    let model = byte_pairs("gpt-4o").load();
    assert_eq!(model.tokenize(&"a".repeat(200_000), false, false).unwrap().len(), 50_000);
    let error = model.tokenize(&"a".repeat(300_000), false, false).unwrap_err().to_string();
    assert!(error.contains("300000 characters") && error.contains("262144"), "{error}");
    let words = model.tokenize(&"a ".repeat(150_000), false, false);
    assert_eq!(words.unwrap().len(), 150_001);
}

#[test]
fn a_text_that_takes_an_expression_for_each_stretch_is_refused() {
    let model = byte_pairs("bloom").load();
    let text: String = (0..20_000).map(|number| format!("<s>{number}")).collect();
    let error = model.tokenize(&text, false, true).unwrap_err().to_string();
    assert!(error.contains("16384"), "{error}");
    assert!(byte_pairs("smollm").load().tokenize(&text, false, true).is_ok());
}

#[test]
fn bytes_that_rwkv_would_not_get_past_are_refused() {
    let model = Vocabulary::new("rwkv").with(["a", "é", "ab"], NORMAL).with(["<s>"], CONTROL).load();
    assert_eq!(model.tokenize("aab", false, false).unwrap(), [0, 2]);
    let error = model.tokenize("aè", false, false).unwrap_err().to_string();
    assert!(error.contains("0xC3"), "{error}");
    assert_eq!(unescape(br"a\x0a\t\\\'\"), b"a\n\t\\'");
}

#[test]
fn a_token_that_texts_shall_have_but_the_vocabulary_lacks_is_an_error() {
    let mut vocabulary = sentencepiece();
    vocabulary.tokens.truncate(1);
    let model = vocabulary.flag("add_bos_token", true).load();
    assert!(model.tokenize("", true, false).unwrap_err().to_string().contains("BOS"));
}
