//! The grammar and the tracker are driven side by side, byte by byte.

use std::sync::LazyLock;

use llguidance::toktrie::{ApproximateTokEnv, TokEnv};
use llguidance::{Matcher, ParserFactory};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Limits, Schema, Tracker};

static BYTES: LazyLock<TokEnv> = LazyLock::new(ApproximateTokEnv::single_byte_env);

/// A schema that must compile.
fn compiled(schema: &Value) -> Schema {
    Schema::compile(schema, &Limits::default()).unwrap_or_else(|error| panic!("{schema}: {error}"))
}

/// What a schema that must not compile is refused with.
fn refusal(schema: &Value) -> String {
    match Schema::compile(schema, &Limits::default()) {
        Ok(schema) => panic!("compiled; shortest {:?}", schema.shortest()),
        Err(error) => error.to_string(),
    }
}

fn matcher(schema: &Schema) -> Matcher {
    let mut factory = ParserFactory::new_simple(&BYTES).unwrap();
    factory.quiet();
    Matcher::new(factory.create_parser_from_init_default(schema.grammar()))
}

/// Whether the grammar takes the text as a whole.
fn grammar_takes(schema: &Schema, text: &str) -> bool {
    let mut matcher = matcher(schema);
    let taken = text.bytes().all(|byte| {
        matcher.compute_mask().is_ok_and(|mask| mask.is_allowed(u32::from(byte)))
            && matcher.consume_token(u32::from(byte)).is_ok()
    });
    taken && matcher.is_accepting().unwrap()
}

fn tracker_takes(schema: &Schema, text: &str) -> bool {
    let mut tracker = schema.tracker();
    tracker.push(text.as_bytes()) && tracker.is_complete()
}

/// Holds grammar and tracker to the same answer.
fn takes(schema: &Schema, text: &str) -> bool {
    let taken = tracker_takes(schema, text);
    assert_eq!(grammar_takes(schema, text), taken, "the grammar and the tracker differ about {text:?}");
    taken
}

fn table(schema: &Value, accepted: &[&str], rejected: &[&str]) {
    let compiled = compiled(schema);
    for text in accepted {
        assert!(takes(&compiled, text), "{schema} should take {text}");
    }
    for text in rejected {
        assert!(!takes(&compiled, text), "{schema} should refuse {text}");
    }
    let shortest = compiled.shortest();
    assert!(takes(&compiled, shortest), "{schema} should take its shortest document {shortest}");
    assert!(valid(schema, shortest), "{schema} should be fulfilled by {shortest}");
}

/// What an independent validator says.
fn valid(schema: &Value, text: &str) -> bool {
    let document = serde_json::from_str(text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
    jsonschema::options().should_validate_formats(true).build(schema).unwrap().is_valid(&document)
}

/// A byte that may follow, picked by a number; the grammar and the tracker must agree on every byte.
fn step(matcher: &mut Matcher, tracker: &Tracker, pick: usize, so_far: &[u8]) -> Option<u8> {
    let mask = if matcher.is_stopped() { None } else { Some(matcher.compute_mask().unwrap()) };
    let allowed: Vec<u8> = (0..=255).filter(|&byte| tracker.clone().push(&[byte])).collect();
    let masked: Vec<u8> =
        (0..=255).filter(|&byte| mask.as_ref().is_some_and(|mask| mask.is_allowed(u32::from(byte)))).collect();
    assert_eq!(masked, allowed, "after {:?}", String::from_utf8_lossy(so_far));
    (!allowed.is_empty()).then(|| allowed[pick % allowed.len()])
}

/// Walks at random for some bytes, then closes: what comes out must be valid.
fn walk(schema: &Value, picks: &[u16]) {
    let compiled = compiled(schema);
    let mut matcher = matcher(&compiled);
    let mut tracker = compiled.tracker();
    let mut text = Vec::new();
    for &pick in picks {
        let Some(byte) = step(&mut matcher, &tracker, usize::from(pick), &text) else { break };
        text.push(byte);
        assert!(tracker.push(&[byte]));
        matcher.consume_token(u32::from(byte)).unwrap();
        let complete = matcher.is_accepting().unwrap();
        assert_eq!(complete, tracker.is_complete(), "{schema}: {:?}", String::from_utf8_lossy(&text));
    }
    let closing = tracker.closing();
    let cost = tracker.closing_cost();
    assert!(closing.len() <= cost, "{} > {cost}: {schema}: {:?}", closing.len(), String::from_utf8_lossy(&text));
    assert!(
        tracker.push(&closing) && tracker.is_complete(),
        "{schema}: {:?} + {:?}",
        String::from_utf8_lossy(&text),
        String::from_utf8_lossy(&closing)
    );
    for &byte in &closing {
        matcher.consume_token(u32::from(byte)).unwrap();
    }
    assert!(matcher.is_accepting().unwrap());
    text.extend(closing);
    let text = String::from_utf8(text).unwrap();
    assert!(valid(schema, &text), "{schema}: {text}");
}

#[test]
fn types_are_told_apart() {
    table(&json!({"type": "null"}), &["null"], &["nul", "true", " null", "null "]);
    table(&json!({"type": "boolean"}), &["true", "false"], &["null", "1"]);
    table(&json!({"type": "integer"}), &["0", "-1", "123456789012345"], &["01", "1.5", "1e3", "-", "1234567890123456"]);
    table(&json!({"type": "number"}), &["0", "-1", "1.5", "1e3", "-0.25E-10"], &["01", "1.", ".5", "1e400", "+1"]);
    table(
        &json!({"type": "string"}),
        &[r#""""#, r#""aé😀""#, r#""\u00e9\ud83d\ude00\n""#],
        &[r#"""#, "\"\n\"", r#""\ud83d""#, r#""\x""#, "a"],
    );
    table(
        &json!({"type": "array"}),
        &["[]", "[1, null, [[]], {\"a\": 1}]", "[\n  1,\n  2\n]"],
        &["[,]", "[1,]", "[1", "[1 2]"],
    );
    table(&json!({"type": "object"}), &["{}", r#"{"a": {"b": []}}"#], &[r#"{"a"}"#, r#"{a: 1}"#, "{,}", r#"{"a":1,}"#]);
    table(&json!({"type": ["string", "null"]}), &["null", r#""x""#], &["1", "nul"]);
    table(&json!(true), &["1", "null", r#"{"a": [true]}"#], &["", "nope"]);
}

#[test]
fn objects_have_their_properties_in_order() {
    let schema = json!({"properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {}}, "required": ["b"], "type": "object"});
    table(
        &schema,
        &[r#"{"b": ""}"#, r#"{"a":1,"b":"x"}"#, r#"{"a": 1, "b": "x", "c": [], "d": 1}"#, r#"{"b":"","z":0,"y":0}"#],
        &["{}", r#"{"a":1}"#, r#"{"b":1}"#, r#"{"b":"","a":1}"#, r#"{"b":"","b":""}"#, r#"{"a":"x","b":""}"#],
    );
    let closed = json!({"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}, "additionalProperties": false});
    table(
        &closed,
        &["{}", r#"{"a":null}"#, r#"{"b":null}"#, r#"{"a":null,"b":null}"#],
        &[r#"{"c":null}"#, r#"{"b":null,"a":null}"#],
    );
    table(
        &json!({"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 2}),
        &[r#"{"a":1}"#, r#"{"a":1,"b":2}"#],
        &["{}", r#"{"a":1,"b":2,"c":3}"#, r#"{"a":""}"#],
    );
    table(
        &json!({"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}}, "additionalProperties": false, "minProperties": 2}),
        &[
            r#"{"a":null,"b":null}"#,
            r#"{"b":null,"c":null}"#,
            r#"{"a":null,"c":null}"#,
            r#"{"a":null,"b":null,"c":null}"#,
        ],
        &["{}", r#"{"a":null}"#, r#"{"c":null}"#],
    );
}

#[test]
fn arrays_are_counted() {
    table(
        &json!({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3}),
        &["[1]", "[1,2]", "[1, 2,\n3]"],
        &["[]", "[1,2,3,4]", "[\"\"]"],
    );
    table(
        &json!({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": false}),
        &["[]", "[1]", r#"[1,""]"#],
        &[r#"[""]"#, r#"[1,"",2]"#],
    );
    table(
        &json!({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": {"type": "null"}, "minItems": 3, "maxItems": 4}),
        &[r#"[1,"",null]"#, r#"[1,"",null,null]"#],
        &[r#"[1,""]"#, r#"[1,"",1]"#, r#"[1,"",null,null,null]"#],
    );
}

#[test]
fn numbers_are_kept_in_their_ranges() {
    table(
        &json!({"type": "integer", "minimum": 3, "maximum": 120}),
        &["3", "9", "10", "99", "120"],
        &["2", "121", "-3", "1000", "3.0"],
    );
    table(
        &json!({"type": "integer", "minimum": -12, "exclusiveMaximum": 5}),
        &["-12", "-1", "0", "4"],
        &["-13", "5", "-0"],
    );
    table(
        &json!({"type": "number", "minimum": 0.5, "exclusiveMaximum": 2}),
        &["0.5", "1", "1.999", "0.50"],
        &["0.49", "2", "2.0", "-1", "0"],
    );
    table(
        &json!({"type": "number", "exclusiveMinimum": -1.25, "maximum": -0.5}),
        &["-1.2", "-0.5", "-1"],
        &["-1.25", "-0.49", "0", "1", "-1.250"],
    );
    table(&json!({"type": "integer", "multipleOf": 7}), &["0", "7", "-14", "70"], &["1", "-13", "71"]);
    table(
        &json!({"type": "number", "multipleOf": 0.5, "minimum": 1}),
        &["1", "1.5", "2.0", "100.5"],
        &["0.5", "1.25", "1.3"],
    );
}

#[test]
fn references_recur() {
    let tree = json!({"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "required": ["value", "children"], "additionalProperties": false}}});
    table(
        &tree,
        &[r#"{"value":1,"children":[]}"#, r#"{"value":1,"children":[{"value":2,"children":[]}]}"#],
        &["{}", r#"{"value":1,"children":[1]}"#],
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_walk_through_anything_ends_well(picks in proptest::collection::vec(any::<u16>(), 0..200)) {
        walk(&json!(true), &picks);
        walk(&json!({"properties": {"a": {"type": "integer"}, "b": {"type": "string", "minLength": 3}, "ab": {"items": {"$ref": "#"}}}, "required": ["ab"], "type": "object"}), &picks);
    }
}
