//! What grammars say, what is refused, and that llama.cpp agrees token by token.

use std::path::Path;
use std::sync::OnceLock;

use llguidance::toktrie::{INVALID_TOKEN, TokRxInfo};
use proptest::prelude::*;

use super::*;
use crate::llama::grammar::ReferenceGrammar;
use crate::llama::{LoadParams, Model, SplitMode};

fn rules(text: &str) -> Result<Rules> {
    let by_name = |name: &str| (name == "<call>").then_some(7);
    Rules::parse(text, "root", Tokens { by_name: &by_name, is_end: &|token| token == 3 })
}

fn matcher(text: &str) -> Matcher {
    Matcher::new(Arc::new(rules(text).unwrap())).unwrap()
}

/// Whether the grammar allows a text as a whole, taken byte by byte.
fn says(grammar: &str, text: &str) -> bool {
    let mut matcher = matcher(grammar);
    text.bytes().all(|byte| matcher.accept(&[byte])) && matcher.may_end()
}

fn refusal(text: &str) -> String {
    let refused = rules(text).and_then(|rules| Matcher::new(Arc::new(rules)));
    refused.err().map_or_else(|| panic!("{text:?} was read"), |error| error.to_string())
}

// ---- what grammars say --------------------------------------------------------------------------------------------

#[test]
fn a_grammar_says_what_it_says() {
    let table: &[(&str, &[&str], &[&str])] = &[
        (r#"root ::= "yes" | "no""#, &["yes", "no"], &["", "ye", "yesno", "maybe"]),
        (r#"root ::= [a-c]+ "!""#, &["a!", "cab!"], &["!", "d!", "a"]),
        (r#"root ::= [^a-c\n]*"#, &["", "xyz", "é€😀"], &["a", "x\n", "xb"]),
        ("root ::= .*", &["", "anything\nat all é"], &["\0"]),
        (r#"root ::= "a"{2,3} "b"? "c"{0}"#, &["aa", "aaa", "aab", "aaab"], &["a", "aaaa", "aac"]),
        (r#"root ::= ("ab"){2}"#, &["abab"], &["ab", "abb", "ababab"]),
        (r#"root ::= "ab"{2,}"#, &["abab", "ababab"], &["ab", "abb"]),
        (r#"root ::= "\x41\u00e9\U0001f600\t\\\"""#, &["A\u{e9}\u{1f600}\t\\\""], &["A"]),
        ("root ::= (\n \"a\" | # a comment\n \"b\"\n)\n# the end", &["a", "b"], &["ab"]),
        ("root ::= list\nlist ::= \"(\" list* \")\"", &["()", "(()())"], &["(", "())"]),
        (r#"root ::= "" | "a""#, &["", "a"], &["aa"]),
        ("root ::= [-a\\]]+", &["-a]"], &["b"]),
    ];
    for (grammar, good, bad) in table {
        for text in *good {
            assert!(says(grammar, text), "{grammar} says {text:?}");
        }
        for text in *bad {
            assert!(!says(grammar, text), "{grammar} does not say {text:?}");
        }
    }
}

#[test]
fn a_rule_may_begin_with_itself() {
    let sums = "root ::= root \"+\" term | term\nterm ::= [0-9]+";
    assert!(says(sums, "1+22+3"));
    assert!(!says(sums, "1++2"));
    assert!(says("root ::= a\na ::= b \"x\" | \"x\"\nb ::= a \"y\"", "xyxyx"));
}

#[test]
fn rules_that_may_be_nothing_are_left_as_often_as_they_are_called() {
    let grammar = "root ::= e e \"a\" e\ne ::= \"\" | \"b\" | e e";
    for text in ["a", "ba", "bba", "bbab", "bbabbb"] {
        assert!(says(grammar, text), "{text}");
    }
    assert!(!says(grammar, "aa"));
}

#[test]
fn ambiguity_costs_no_more_than_the_text_is_long() {
    // Each `a` doubles the stacks of a parser that keeps them apart.
    let grammar = "root ::= \"a\" root \"b\" | \"a\" root \"c\" | \"x\"";
    let text = format!("{}x{}", "a".repeat(300), "bc".repeat(150));
    assert!(says(grammar, &text));
    assert!(!says(grammar, &text[..text.len() - 1]));
}

#[test]
fn deep_nesting_and_long_texts_are_followed() {
    let mut matcher = matcher("root ::= \"[\" root? \"]\" | ([a-z]+ \" \")*");
    assert!(matcher.accept("[".repeat(20_000).as_bytes()));
    assert!(matcher.accept("]".repeat(20_000).as_bytes()));
    assert!(matcher.is_over());
    let mut words = self::matcher("root ::= (word \" \")*\nword ::= [a-z]+");
    assert!((0..20_000).all(|_| words.accept(b"abc ")));
    assert!(words.nodes.len() < 2 * SWEEP, "what nobody waits for goes: {}", words.nodes.len());
}

#[test]
fn what_goes_on_alike_is_followed_once_however_often_it_may_begin() {
    let words = "root ::= (word \" \"?)+\nword ::= [a-z]+";
    let lines = "root ::= line+\nline ::= [^\\n]+ \"\\n\"?";
    let either = "root ::= (word | quoted)+\nword ::= [a-z]+\nquoted ::= \"'\" word \"'\"";
    let sums = "root ::= (sum \",\"?)+\nsum ::= sum \"+\"? [a-z] | [a-z]";
    let calls = "root ::= (a \",\"?)+\na ::= b \"y\"? | [a-z]\nb ::= a \"x\"? | \"z\"";
    for grammar in [words, lines, either, sums] {
        let mut matcher = matcher(grammar);
        assert!(matcher.accept(b"abcdefghij"));
        let n_heads = matcher.heads().len();
        assert!((0..1_000).all(|_| matcher.accept(b"abcdefghij")), "{grammar}");
        assert_eq!(matcher.heads().len(), n_heads, "{grammar}");
        assert!(matcher.accept("ab".repeat(5_000).as_bytes()), "{grammar}");
    }
    assert!(says(calls, "abzxyyx,azy"));
    assert!(!says(calls, "ab,,a"));
}

#[test]
fn what_was_tried_and_taken_back_is_forgotten() {
    let mut matcher = matcher("root ::= (\"(\" root \")\" | [a-z]+ \" \"?)+");
    for _ in 0..50 {
        assert!(matcher.accept(b"((a b"));
        let (n_nodes, n_known) = (matcher.nodes.len(), matcher.known.len());
        assert!(matcher.allows(b"((((x y)z)))") && !matcher.allows(b"((((]"));
        assert_eq!((matcher.nodes.len(), matcher.known.len()), (n_nodes, n_known));
    }
    assert!(matcher.accept(")".repeat(100).as_bytes()) && !matcher.allows(b")") && matcher.may_end());
}

#[test]
fn a_mask_over_a_large_vocabulary_is_made_where_much_may_begin_anywhere() {
    let mut seed = 1u64;
    let mut letter = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        b'a' + (seed >> 33) as u8 % 26
    };
    let words: Vec<Vec<u8>> = (0..152_000).map(|n| (0..3 + n % 6).map(|_| letter()).collect()).collect();
    let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, INVALID_TOKEN), &words);
    let mut matcher = matcher("root ::= (word | quoted)+\nword ::= [a-z]+\nquoted ::= \"'\" word \"'\"");
    let mut mask = trie.alloc_token_set();
    matcher.add_texts(&trie, &mut mask);
    matcher.check().unwrap();
    assert_eq!(mask.num_set(), words.len());
}

#[test]
fn a_character_may_come_in_parts() {
    let mut matcher = matcher("root ::= [α-ω]+");
    assert!(matcher.accept(&"α".as_bytes()[..1]));
    assert!(!matcher.may_end() && !matcher.allows(b"a"));
    assert!(matcher.accept(&"α".as_bytes()[1..]));
    assert!(matcher.may_end());
    assert!(!matcher.allows(&[0xf0]), "no character of four bytes is among them");
    assert!(!matcher.allows(&[0xc0, 0x80]) && !matcher.allows(&[0xed, 0xa0, 0x80]), "malformed");
}

#[test]
fn the_end_is_known() {
    let mut matcher = matcher(r#"root ::= "a" "b"?"#);
    assert!(!matcher.may_end());
    assert!(matcher.accept(b"a"));
    assert!(matcher.may_end() && !matcher.is_over());
    assert!(matcher.accept(b"b"));
    assert!(matcher.is_over() && !matcher.allows(b"b"));
}

#[test]
fn trying_changes_nothing() {
    let mut matcher = matcher("root ::= (\"a\" root \"b\")?");
    assert!(matcher.accept(b"aa"));
    for _ in 0..3 {
        assert!(matcher.allows(b"ab") && matcher.allows(b"bb") && !matcher.allows(b"bbb"));
    }
    assert!(matcher.accept(b"bb") && matcher.is_over());
}

#[test]
fn tokens_can_be_named() {
    let mut call = matcher("root ::= \"a\"* <call>");
    assert!(!call.allows_token(8) && call.allows_token(7));
    assert!(call.accept_token(1, b"a") && call.accept_token(7, b""));
    assert!(call.is_over());
    let mut other = matcher("root ::= !<[7]> \"b\"");
    assert!(!other.accept_token(7, b"x"));
    let mut other = matcher("root ::= !<[7]> \"b\"").clone();
    assert!(other.accept_token(9, b"anything") && other.accept_token(1, b"b") && other.is_over());
}

// ---- what is refused ----------------------------------------------------------------------------------------------

#[test]
fn malformed_grammars_are_refused_with_the_place() {
    let table = [
        ("root ::= \"a", "line 1, column 12, at \"\": unexpected end of input"),
        ("root ::= \"a\"\nroot2 = \"b\"", "line 2, column 7, at \"= \\\"b\\\"\": expecting ::="),
        ("root ::= (\"a\"", "expecting ')'"),
        ("root ::= *", "expecting preceding item to */+/?/{"),
        ("root ::= \"a\"{,2}", "expecting integer"),
        ("root ::= \"a\"{3,2}", "ends below its beginning"),
        ("root ::= \"a\"{1000000}", "1000000 repetitions; at most 2000"),
        ("root ::= \"\\q\"", "unknown escape \\q"),
        ("root ::= \"\\u12\"", "expecting 4 hex chars"),
        ("root ::= foo", "Undefined rule identifier 'foo'"),
        ("start ::= \"a\"", "does not contain a 'root' symbol; it has start"),
        ("root ::= \"a\" ]", "expecting newline or end"),
        ("root ::= <nobody>", "invalid token '<nobody>'"),
        ("root ::= \"a\" | !<[3]> <[3]>", "<[3]> ends a generation"),
        ("root ::= []", "a class of no characters"),
        ("root ::= root", "allows no text"),
        ("", "does not contain a 'root' symbol"),
    ];
    for (grammar, words) in table {
        let refused = refusal(grammar);
        assert!(refused.contains(words), "{grammar:?}: {refused}");
    }
}

#[test]
fn hostile_grammars_are_refused_at_once() {
    let deep = format!("root ::= {}\"a\"{}", "(".repeat(60_000), ")".repeat(60_000));
    assert!(refusal(&deep).contains("200 deep"));
    let wide = format!("root ::= {}", "\"a\"{2000} ".repeat(200));
    assert!(refusal(&wide).contains("more than 200000 elements"));
    // llama.cpp's search for left recursion takes a path for each subset of these.
    let mut chain: String = (0..200).map(|n| format!("r{n} ::= r{0}? r{0}? r{0}?\n", n + 1)).collect();
    chain.push_str("r200 ::= \"a\"\nroot ::= r0");
    assert!(says(&chain, "aaa"));
}

#[test]
fn too_many_ways_to_go_on_are_an_error_and_not_a_hang() {
    let mut matcher = matcher("root ::= root root root | \"a\" | \"\"");
    matcher.fuel_per_question = 10_000;
    assert!((0..20_000).any(|_| !matcher.accept(b"a")));
    assert!(matcher.check().unwrap_err().to_string().contains("too ambiguous"));
}

#[test]
fn what_waits_is_bounded_whatever_waits_at_once() {
    let grammar = format!("root ::= \"x\"{}", " | \"-\" root \"b\"".repeat(15_000));
    let mut matcher = matcher(&grammar);
    let steps = (0..1_000).take_while(|_| matcher.accept(b"-") && matcher.check().is_ok()).count();
    assert!((100..300).contains(&steps), "{steps}");
    assert!(matcher.nodes.iter().map(Vec::len).sum::<usize>() <= MAX_WAITING + 20_000);
}

#[test]
fn a_named_token_has_the_work_of_a_question_of_its_own() {
    let grammar = format!("root ::= a*\na ::= !<[2]>{}", " | !<[2]>".repeat(500));
    let mut matcher = matcher(&grammar);
    matcher.fuel_per_question = 10_000;
    assert!((0..100).all(|_| matcher.accept_token(9, b"")));
    matcher.check().unwrap();
}

// ---- llama.cpp's own ----------------------------------------------------------------------------------------------

fn tinychat() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tinychat/tinychat-3m-Q8_0.gguf");
        let params = LoadParams {
            n_gpu_layers: 0,
            devices: None,
            main_gpu: 0,
            split_mode: SplitMode::None,
            tensor_split: None,
            use_mmap: true,
            use_mlock: false,
            vocab_only: true,
            check_tensors: false,
            overrides: Vec::new(),
            lora: Vec::new(),
            outline: false,
        };
        Model::load(&path, &params, &mut |_| true).unwrap()
    })
}

/// The texts of all tokens, as llama.cpp's grammar reads them, and whether they end a generation.
fn texts(model: &Model) -> Vec<(Vec<u8>, bool)> {
    let text = |token| {
        let mut text = Vec::new();
        model.token_to_piece(token, true, &mut text).unwrap();
        (text, model.is_eog(token))
    };
    (0..model.n_vocab() as Token).map(text).collect()
}

/// Whether a text begins a character that may become malformed: ours refuses that, llama.cpp does not look.
fn may_be_malformed(text: &[u8]) -> bool {
    std::str::from_utf8(text).is_err()
        && text.iter().any(|byte| matches!(byte, 0xc0 | 0xc1 | 0xe0 | 0xed | 0xf0 | 0xf4..=0xff))
}

/// Grammars as a user may write them, most of them with some text.
fn grammars() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        "[a-e ]{1,3}".prop_map(|text| format!("\"{text}\"")),
        Just("[a-z]".to_owned()),
        Just("[^a-z\\n]".to_owned()),
        Just("[0-9é-ñ]".to_owned()),
        Just(".".to_owned()),
        Just("item".to_owned()),
    ];
    let body = leaf.prop_recursive(3, 12, 3, |inner| {
        let mark = prop::sample::select(vec!["", "*", "+", "?", "{2}", "{1,3}", "{2,}"]);
        prop_oneof![
            (inner.clone(), mark).prop_map(|(body, mark)| format!("({body}){mark}")),
            prop::collection::vec(inner.clone(), 1..3).prop_map(|parts| parts.join(" ")),
            prop::collection::vec(inner, 1..3).prop_map(|parts| format!("({})", parts.join(" | "))),
        ]
    });
    let item = prop::sample::select(vec!["\"x\" item?", "[0-9]+", "\"(\" item? \")\"", "\" \"? [A-Z]"]);
    (body, item).prop_map(|(body, item)| format!("root ::= {body}\nitem ::= {item}\n"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Along a random walk both allow the same tokens, at every step.
    #[test]
    fn the_tokens_that_llama_cpp_allows_are_allowed(grammar in grammars(), choices in prop::collection::vec(any::<prop::sample::Index>(), 12)) {
        let model = tinychat();
        let texts = texts(model);
        let Some(mut reference) = ReferenceGrammar::new(model, &grammar) else { return Ok(()) };
        let mut ours = matcher(&grammar);
        for choice in choices {
            let theirs = reference.allowed();
            let mut allowed = Vec::new();
            for (token, (text, is_end)) in texts.iter().enumerate().filter(|(_, (text, _))| !may_be_malformed(text)) {
                let may = if *is_end { ours.may_end() } else { !text.is_empty() && text[0] != 0 && ours.allows(text) };
                prop_assert_eq!(may, theirs[token], "{} {:?}", grammar, String::from_utf8_lossy(text));
                if may && !is_end {
                    allowed.push(token);
                }
            }
            let Some(&token) = (!allowed.is_empty()).then(|| choice.get(&allowed)) else { break };
            reference.accept(token as Token);
            prop_assert!(ours.accept(&texts[token].0));
        }
    }
}
