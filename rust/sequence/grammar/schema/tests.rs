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
    // A repeated key ends with a quotation mark that only the tracker refuses.
    let repeated = allowed.iter().all(|byte| masked.contains(byte))
        && masked.iter().all(|byte| *byte == b'"' || allowed.contains(byte));
    assert!(masked == allowed || repeated, "{masked:?} {allowed:?} after {:?}", String::from_utf8_lossy(so_far));
    // Every third byte goes towards the end, so that walks see more than strings.
    let ahead = tracker.closing().first().copied().filter(|_| pick.is_multiple_of(3));
    ahead.or_else(|| (!allowed.is_empty()).then(|| allowed[pick % allowed.len()]))
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
fn bounds_that_no_written_number_reaches_are_named() {
    for (schema, words) in [
        (json!({"type": "number", "minimum": 1e16}), "minimum at #:"),
        (json!({"type": "number", "maximum": -1e16}), "maximum at #:"),
        (json!({"type": "integer", "minimum": 1_000_000_000_000_000_000_u64}), "minimum at #:"),
        (json!({"type": "number", "exclusiveMinimum": 0, "maximum": 1e-16}), "maximum at #:"),
        (json!({"type": "integer", "multipleOf": 7, "minimum": 999_999_995}), "minimum at #:"),
        (json!({"type": "object", "properties": {"a": {"minimum": 1e16}}}), "minimum at #/properties/a:"),
        (json!({"anyOf": [{"type": "null"}, {"type": "number", "minimum": 1e16}]}), "minimum at #/anyOf/1:"),
    ] {
        let message = refusal(&schema);
        assert!(message.contains(words) && message.contains("digits"), "{schema}: {message}");
    }
    table(
        &json!({"type": "integer", "minimum": i64::MIN, "maximum": u64::MAX}),
        &["0", "-123456789012345678"],
        &["1.5"],
    );
    table(
        &json!({"type": "integer", "exclusiveMinimum": 999_999_999_999_999_u64}),
        &["1000000000000000"],
        &["999999999999999"],
    );
    table(&json!({"type": "integer", "multipleOf": 7, "minimum": 999_999_999}), &["1000000001"], &["1000000006"]);
    table(&json!({"type": "number", "minimum": 0, "maximum": 1e-16}), &["0"], &["0.00000000000001", "1"]);
    table(&json!({"type": ["integer", "null"], "minimum": 2, "exclusiveMaximum": 2}), &["null"], &["2"]);
}

#[test]
fn references_recur() {
    let named = json!({"$id": "https://example.org/a", "type": "array", "items": {"$ref": "https://example.org/a#"}});
    table(&named, &["[[]]"], &["[1]"]);
    assert!(takes(&compiled(&json!({"items": {"$id": "#a", "type": "array"}})), "[[]]"));
    let tree = json!({"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "required": ["value", "children"], "additionalProperties": false}}});
    table(
        &tree,
        &[r#"{"value":1,"children":[]}"#, r#"{"value":1,"children":[{"value":2,"children":[]}]}"#],
        &["{}", r#"{"value":1,"children":[1]}"#],
    );
}

#[test]
fn alternatives_are_followed_side_by_side() {
    table(
        &json!({"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]}),
        &["1", r#""ab""#],
        &[r#""abc""#, "1.5"],
    );
    table(
        &json!({"anyOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"properties": {"a": {"const": 2}, "b": {"type": "null"}}, "required": ["a", "b"]}], "type": "object", "additionalProperties": true}),
        &[r#"{"a":1}"#, r#"{"a":1,"b":2}"#, r#"{"a":2,"b":null}"#],
        &["{}", r#"{"a":2}"#, r#"{"a":2,"b":1}"#, r#"{"a":3}"#],
    );
    table(
        &json!({"oneOf": [{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 4}]}),
        &["3", "4", "-1"],
        &["1.5", "null"],
    );
    table(
        &json!({"oneOf": [{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "^b"}, {"type": "array", "maxItems": 1}, {"type": "array", "minItems": 2}]}),
        &[r#""a""#, r#""b""#, "[]", "[1,2]"],
        &[r#""c""#],
    );
    for [low, high] in [
        [json!({"maximum": 1e17}), json!({"exclusiveMinimum": 1e17, "type": "integer"})],
        [json!({"type": "integer"}), json!({"minimum": 0.25, "maximum": 0.75})],
    ] {
        table(&json!({"type": "number", "oneOf": [low, high]}), &["3"], &["null"]);
    }
    table(&json!({"anyOf": [{"type": "integer"}, false]}), &["1"], &["null"]);
    // Each level may be either of two arrays: the possibilities do not multiply.
    let deep = json!({"$ref": "#/$defs/t", "$defs": {"t": {"anyOf": [
        {"type": "array", "items": {"$ref": "#/$defs/t"}}, {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/t"}, {"type": "null"}]}}]}}});
    let nested = format!("{}null{}", "[".repeat(40), "]".repeat(40));
    table(&deep, &["[]", &nested], &["null", "[[1]]"]);
}

#[test]
fn what_applies_to_one_value_is_joined() {
    table(
        &json!({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}], "multipleOf": 2}),
        &["4"],
        &["3", "5", "6", "2"],
    );
    table(
        &json!({"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"b": {"type": "string"}, "a": {"minimum": 5}}}], "type": "object"}),
        &[r#"{"a":5}"#, r#"{"a":6,"b":""}"#],
        &[r#"{"a":4}"#, "{}", r#"{"a":5,"b":1}"#],
    );
    table(
        &json!({"$ref": "#/$defs/small", "minimum": 2, "$defs": {"small": {"type": "integer", "maximum": 3}}}),
        &["2", "3"],
        &["1", "4"],
    );
    table(
        &json!({"allOf": [{"additionalProperties": {"type": "integer"}, "properties": {"a": {}}}, {"properties": {"b": {"minimum": 2}}}], "type": "object"}),
        &[r#"{"a":"x","b":2,"c":0}"#, r#"{"b":3}"#],
        &[r#"{"b":1}"#, r#"{"c":"x"}"#, r#"{"b":"x"}"#],
    );
    table(
        &json!({"type": "array", "allOf": [{"prefixItems": [{"type": "integer"}]}, {"items": {"minimum": 3}}]}),
        &["[3]", "[3,null]"],
        &["[2]", "[null]", "[3,1]"],
    );
}

#[test]
fn values_are_told_one_by_one() {
    table(
        &json!({"enum": ["a", "é\"\n", 1, null, [1, {"k": "v"}]]}),
        &[r#""a""#, r#""é\"\n""#, r#""\u00e9\"\n""#, "1", "null", r#"[1, {"k": "v"}]"#],
        &[r#""b""#, "2", "[]", r#"[1,{}]"#],
    );
    table(&json!({"const": {"a": 1, "b": []}}), &[r#"{"a":1,"b":[]}"#], &[r#"{"a":1}"#, r#"{"b":[],"a":1}"#, "{}"]);
    table(
        &json!({"enum": ["a", "bb", "ccc", 4], "type": "string", "minLength": 2, "pattern": "b|c"}),
        &[r#""bb""#, r#""ccc""#],
        &[r#""a""#, "4"],
    );
    table(&json!({"enum": [1, 2, 3], "allOf": [{"enum": [2.0, 3, 4]}, {"maximum": 2}]}), &["2"], &["1", "3", "4"]);
}

#[test]
fn strings_keep_to_their_patterns() {
    let long = format!("\"{}\"", "é".repeat(6));
    table(
        &json!({"type": "string", "minLength": 2, "maxLength": 6}),
        &[r#""ab""#, r#""\ud83d\ude00b""#, &long, r#""\n\\""#],
        &[r#""a""#, r#""\ud83d\ude00""#, r#""1234567""#],
    );
    table(
        &json!({"type": "string", "pattern": "^[a-z]+\\.[0-9]{2}$"}),
        &[r#""ab.12""#],
        &[r#""ab12""#, r#""ab.123""#, r#""1.12""#],
    );
    table(&json!({"type": "string", "pattern": "b"}), &[r#""abc""#, r#""b""#, r#""\u0041b\n""#], &[r#""ac""#, r#""""#]);
    table(&json!({"type": "string", "pattern": "^(a|b$)"}), &[r#""axx""#, r#""b""#], &[r#""ba""#, r#""xa""#]);
    table(&json!({"type": "string", "pattern": "^\"\\\\\n$"}), &[r#""\"\\\n""#], &[r#""n""#]);
    table(
        &json!({"type": "string", "pattern": "^[^x]$"}),
        &[r#""é""#, r#""\u00e9""#, r#""\ud83d\ude00""#, r#""\"""#],
        &[r#""x""#, r#""\ud83d""#, r#""ab""#],
    );
    table(
        &json!({"type": "string", "pattern": "^\\d\\w\\s.$"}),
        &[r#""1a x""#, r#""1_\tx""#],
        &[r#""1a x\n""#, r#""aa x""#],
    );
    table(&json!({"type": "string", "pattern": "^[\\d[]$"}), &[r#""1""#, r#""[""#], &[r#""]""#, r#""a""#]);
}

#[test]
fn opposites_of_classes_are_what_all_languages_mean_by_them() {
    let cases: [(&str, &[&str], &[&str]); 9] = [
        (r"^\S$", &["a", "é", "²"], &[" ", "\u{1c}", "\u{1f}", "\u{85}", "\u{a0}", "\u{feff}"]),
        (r"^[\S]$", &["a"], &["\u{1c}", "\u{feff}"]),
        (r"^[^\s]$", &["a"], &["\u{1c}", "\u{feff}", "\u{a0}"]),
        (r"^[^\S]$", &[" ", "\t"], &["\u{1c}", "\u{feff}", "\u{a0}", "a"]),
        (r"^\W$", &["-", " ", "€"], &["a", "_", "é", "²", "½", "Ⅷ", "٣"]),
        (r"^[^\w]$", &["-", "€"], &["a", "_", "é", "²"]),
        (r"^[^\W]$", &["a", "_", "7"], &["é", "²", "-"]),
        (r"^\D$", &["a", "²"], &["1", "٣"]),
        (r"^[\w-.]$", &["a", "-", "."], &["é", ","]),
    ];
    for (pattern, good, bad) in cases {
        let schema = compiled(&json!({"type": "string", "pattern": pattern}));
        let spelt = |text: &&str| json!(text).to_string();
        assert!(good.iter().map(spelt).all(|text| takes(&schema, &text)), "{pattern} should take all of {good:?}");
        assert!(!bad.iter().map(spelt).any(|text| takes(&schema, &text)), "{pattern} should refuse all of {bad:?}");
    }
}

#[test]
fn formats_are_what_they_say() {
    let cases: [(&str, &[&str], &[&str]); 10] = [
        (
            "date",
            &["2024-02-29", "0001-01-31", "2000-02-29"],
            &["2023-02-29", "0000-01-01", "2024-13-01", "2024-04-31", "1900-02-29"],
        ),
        ("time", &["12:00:00Z", "23:59:59.123+01:30"], &["24:00:00Z", "12:00:00", "12:60:00Z"]),
        (
            "date-time",
            &["2024-02-29T12:00:00Z", "1985-04-12T23:20:50.52-08:00"],
            &["2024-02-30T12:00:00Z", "2024-02-29 12:00:00Z", "2024-02-29"],
        ),
        ("duration", &["P1Y2M3DT4H5M6S", "PT1M", "P2W"], &["P", "PT", "1D", "P1D2Y"]),
        ("uuid", &["123e4567-e89b-12d3-a456-426614174000"], &["123e4567e89b12d3a456426614174000", "x"]),
        ("email", &["a.b@example.org"], &["a", "a@", "@b.c", "a@b@c.de"]),
        ("hostname", &["example.org", "a-b.c"], &["-a", "a-", "a..b", ""]),
        ("ipv4", &["0.0.0.0", "255.1.20.199"], &["256.1.1.1", "1.1.1", "01.1.1.1"]),
        ("ipv6", &["::", "2001:db8::1", "1:2:3:4:5:6:7:8"], &["1:2", ":::", "12345::"]),
        ("uri", &["https://example.org/a?b#c", "mailto:a@example.org", "urn:x:y"], &["example", "http://a b", ""]),
    ];
    for (format, good, bad) in cases {
        let quoted = |texts: &[&str]| texts.iter().map(|text| json!(text).to_string()).collect::<Vec<_>>();
        let (good, bad) = (quoted(good), quoted(bad));
        let good: Vec<&str> = good.iter().map(String::as_str).collect();
        let bad: Vec<&str> = bad.iter().map(String::as_str).collect();
        table(&json!({"type": "string", "format": format}), &good, &bad);
        assert!(good.iter().all(|text| valid(&json!({"format": format}), text)), "{format}");
    }
}

#[test]
fn equal_keys_do_not_count_twice() {
    let schema = compiled(&json!({"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 2}));
    let mut tracker = schema.tracker();
    assert!(tracker.push(br#"{"a":null,"a"#));
    assert!(!tracker.clone().push(b"\""));
    assert!(tracker.push(b"b\":null}") && tracker.is_complete());
}

#[test]
fn keys_are_told_apart_as_long_as_they_count() {
    let schema = compiled(&json!({"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 3}));
    let mut tracker = schema.tracker();
    assert!(tracker.push(br#"{"a":null,"b":null,"#));
    assert!(!tracker.clone().push(br#""a""#) && !tracker.clone().push(br#""b""#));
    assert!(tracker.push(br#""c":null,"a":null,"b":null}"#) && tracker.is_complete());
}

#[test]
fn many_keys_take_little_stack_and_time() {
    let schema = compiled(&json!({"type": "object", "minProperties": 2}));
    let members: Vec<String> = (0..100_000).map(|at| format!("\"k{at}\":0")).collect();
    let text = format!("{{{}}}", members.join(","));
    let small = std::thread::Builder::new().stack_size(256 << 10);
    assert!(small.spawn(move || tracker_takes(&schema, &text)).unwrap().join().unwrap());
}

#[test]
fn many_members_that_must_come_are_closed_within_their_cost() {
    let letters = || ('a'..='z').chain('0'..='9');
    let names: Vec<String> = letters()
        .map(String::from)
        .chain(letters().flat_map(|one| letters().map(move |other| format!("{one}{other}"))))
        .collect();
    let properties: serde_json::Map<String, Value> = names.iter().map(|name| (name.clone(), json!(true))).collect();
    for schema in [
        json!({"type": "object", "minProperties": 1_000}),
        json!({"type": "object", "minProperties": names.len() + 9, "properties": properties, "required": names}),
    ] {
        let schema = compiled(&schema);
        let tracker = schema.tracker();
        assert_eq!(tracker.closing(), schema.shortest().as_bytes());
        assert!(schema.shortest().len() <= tracker.closing_cost());
        assert!(tracker_takes(&schema, schema.shortest()));
    }
    let message = refusal(&json!({"type": "object", "minProperties": 1_001}));
    assert!(message.contains("at most 1000"), "{message}");
    assert!(refusal(&json!({"type": "object", "minProperties": 1_000_000_000})).contains("minProperties"));
}

#[test]
fn white_space_is_bounded() {
    let indented = format!("[\n{}1\n]", " ".repeat(32));
    table(
        &json!({"type": "array"}),
        &["[1, 2]", "[\n\t\t1,\n\t\t2\n]", &indented, "[ ]"],
        &["[  1]", "[\n\n1]", "[1 ,2]", "\n[]", "[] ", "[\r\n1]", "[\n \t1]"],
    );
}

#[test]
fn nesting_is_bounded() {
    let schema = compiled(&json!({"type": "array"}));
    let mut tracker = schema.tracker();
    assert!(tracker.push("[".repeat(64).as_bytes()));
    assert!(!tracker.clone().push(b"["));
    assert_eq!(tracker.closing(), "]".repeat(64).as_bytes());
}

/// Goes as deep as it can and stays there for some bytes: what was begun can be closed at every one.
fn dive(schema: &Value, bytes: usize) -> String {
    let schema = compiled(schema);
    let mut tracker = schema.tracker();
    let mut text = String::new();
    let tempting: Vec<u8> = br#"[{n,":0"#.iter().copied().chain(b'!'..=b'~').collect();
    while text.len() < bytes {
        let Some(&byte) = tempting.iter().find(|&&byte| tracker.clone().push(&[byte])) else { break };
        text.push(char::from(byte));
        assert!(tracker.push(&[byte]));
        let closing = tracker.closing();
        assert!(closing.len() <= tracker.closing_cost(), "{text}");
        let mut closed = tracker.clone();
        assert!(closed.push(&closing) && closed.is_complete(), "{text} + {:?}", String::from_utf8_lossy(&closing));
    }
    text
}

#[test]
fn nothing_is_begun_that_would_be_nested_too_deep() {
    let list = json!({"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": false});
    let mut tracker = compiled(&list).tracker();
    assert!(tracker.push(r#"{"next":"#.repeat(63).as_bytes()) && tracker.push(b"{"));
    assert!(!tracker.clone().push(b"\""));
    assert_eq!(tracker.closing(), "}".repeat(64).as_bytes());
    let pair = json!({"type": "array", "prefixItems": [{"type": "null"}, {"$ref": "#"}], "items": false});
    let mut tracker = compiled(&pair).tracker();
    assert!(tracker.push("[null,".repeat(63).as_bytes()) && tracker.push(b"[null"));
    assert!(!tracker.clone().push(b","));
    assert_eq!(tracker.closing(), "]".repeat(64).as_bytes());
    for schema in [list, pair, json!(true), json!({"type": "array", "items": {"$ref": "#"}})] {
        dive(&schema, 1_500);
    }
}

#[test]
fn what_is_required_keeps_its_room_below_every_level() {
    let member = |also: Value| {
        let mut schema = json!({"type": "object", "additionalProperties": false, "properties":
            {"next": {"$ref": "#"}, "nil": {"type": "null"}, "num": {"type": "string", "minLength": 9}}});
        schema.as_object_mut().unwrap().append(&mut also.as_object().unwrap().clone());
        schema
    };
    for also in [
        json!({"required": ["nil"]}),
        json!({"minProperties": 1}),
        json!({"minProperties": 2}),
        json!({"minProperties": 2, "properties": {"nil": {"type": "null"}, "num": {}, "next": {"$ref": "#"}}}),
        json!({"minProperties": 2, "properties": {"next": {"$ref": "#"}}, "additionalProperties": {"type": "null"}}),
        json!({"minProperties": 2, "properties": {"next": {"type": "null"}}, "additionalProperties": {"$ref": "#/$defs/leaf"},
            "$defs": {"leaf": {"anyOf": [{"type": "string", "minLength": 9}, {"$ref": "#"}]}}}),
        json!({"properties": {"next": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}}}),
        json!({"required": ["next"], "properties": {"next": {"anyOf": [{"$ref": "#"}, {"const": "far more than an object"}]}}}),
    ] {
        let text = dive(&member(also), 1_500);
        assert!(text.matches(['{', '[']).count() >= 60, "{text}");
    }
}

#[test]
fn sizes_are_counted_not_unrolled() {
    let text = compiled(&json!({"type": "string", "minLength": 10_000, "maxLength": 20_000}));
    assert_eq!(text.shortest().len(), 10_002);
    let mut tracker = text.tracker();
    assert!(tracker.push(b"\"") && tracker.push("é".repeat(9_999).as_bytes()));
    assert_eq!(tracker.closing(), b"a\"");
    let items = compiled(&json!({"type": "array", "items": {"type": "boolean"}, "minItems": 1_000, "maxItems": 1_000}));
    let full = format!("[{}]", vec!["true"; 1_000].join(", "));
    assert!(takes(&items, &full));
    assert!(!takes(&items, &full.replacen("true, ", "", 1)));
}

#[test]
fn the_shortest_end_is_known_everywhere() {
    let schema = compiled(
        &json!({"type": "object", "properties": {"name": {"type": "string", "minLength": 3}, "next": {"type": "integer", "minimum": 10}}, "required": ["name", "next"]}),
    );
    for (text, end) in [
        ("", r#"{"name":"aaa","next":10}"#),
        (r#"{"na"#, r#"me":"aaa","next":10}"#),
        (r#"{"name": "x\"#, r#"u0000a","next":10}"#),
        (r#"{"name": "xyz""#, r#","next":10}"#),
        (r#"{"name": "xyz", "next": 7"#, "0}"),
        (r#"{"name": "xyz", "next": 70"#, "}"),
        (r#"{"name": "xyz", "next": 70,"#, r#""":0}"#),
        (r#"{"name": "xyz", "next": 70, "x": [[1, {"#, r#"}]]}"#),
        (r#"{"name": "xyz", "next": 70}"#, ""),
    ] {
        let mut tracker = schema.tracker();
        assert!(tracker.push(text.as_bytes()));
        let closing = String::from_utf8(tracker.closing()).unwrap();
        assert!(closing.len() <= end.len(), "after {text}: {closing}");
        assert!(closing.len() <= tracker.closing_cost());
        assert!(tracker.push(closing.as_bytes()) && tracker.is_complete());
    }
}

#[test]
fn a_shortest_document_does_not_go_on_in_itself() {
    for min in 1..=3 {
        let schema = json!({"type": "object", "properties": {"next": {"$ref": "#"}, "long": {"minLength": 5, "type": "string"}},
            "additionalProperties": {"type": "null"}, "minProperties": min});
        table(&schema, &[r#"{"a":null,"b":null,"c":null}"#], &["{}"]);
        dive(&schema, 1_500);
    }
}

#[test]
fn what_is_not_supported_is_named() {
    let cases = [
        (json!({"type": "object", "properties": {"a/b": {"not": {}}}}), "not at #/properties/a~1b"),
        (json!({"if": true}), "if at #: this keyword is not supported"),
        (json!({"items": {"contains": {}}}), "contains at #/items"),
        (json!({"uniqueItems": true}), "uniqueItems at #"),
        (json!({"format": "zip"}), "format at #: \"zip\" is not among the known formats"),
        (json!({"type": "text"}), "type at #: \"text\" is no type"),
        (json!({"pattern": "a(?=b)"}), "pattern at #: look-around"),
        (json!({"pattern": "a\\b"}), "pattern at #"),
        (json!({"multipleOf": 0.1}), "multipleOf at #"),
        (json!({"multipleOf": 0}), "multipleOf at #"),
        (json!({"minLength": -1}), "minLength at #"),
        (json!({"minimum": "1"}), "minimum at #: must be a number"),
        (json!({"required": [1]}), "required at #"),
        (json!({"$ref": "https://example.org/a"}), "$ref at #"),
        (json!({"$ref": "#/$defs/none"}), "$ref at #"),
        (json!({"properties": {"a": {"$id": "https://example.org/a"}}}), "$id at #/properties/a"),
        (
            json!({"$ref": "#/$defs/a/items", "$defs": {"a": {"$id": "https://example.org/a", "items": {}}}}),
            "$ref at #: \"#/$defs/a/items\"",
        ),
        (json!({"anyOf": []}), "anyOf at #"),
        (json!({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf at #: branches 0 and 1"),
        (
            json!({"oneOf": [{"type": "integer"}, {"type": "integer", "minimum": 1_000_000_000_000_000_u64}]}),
            "oneOf at #: branches 0 and 1",
        ),
        (
            json!({"oneOf": [{"type": "number", "maximum": 1e-17}, {"type": "number", "exclusiveMinimum": 0}]}),
            "oneOf at #: branches 0 and 1",
        ),
        (json!({"properties": {"a": 1}}), "#/properties/a is 1"),
        (json!({"$ref": "#"}), "$ref at #: leads back"),
        (json!({"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"allOf": [{"$ref": "#"}]}}}), "leads back"),
        (json!({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}), "no finite document"),
        (json!({"type": "integer", "minimum": 2, "maximum": 1}), "no finite document"),
        (json!(false), "no finite document"),
    ];
    for (schema, words) in cases {
        let message = refusal(&schema);
        assert!(message.contains(words), "{schema}: {message:?} should say {words:?}");
    }
}

#[test]
fn hostile_schemas_are_refused_or_compiled_soon() {
    let branch = |name: &str, at: usize| json!({"required": [format!("{name}{at}")]});
    let product: Vec<Value> = (0..40).map(|at| json!({"anyOf": [branch("a", at), branch("b", at)]})).collect();
    assert!(refusal(&json!({"allOf": product})).contains("multiply to more than"));
    let chain = |count: usize, keys: &[&str]| {
        let mut definitions = serde_json::Map::new();
        for at in 0..count {
            let next = json!({"$ref": format!("#/$defs/d{}", at + 1)});
            let properties: serde_json::Map<String, Value> =
                keys.iter().map(|key| ((*key).to_owned(), next.clone())).collect();
            definitions.insert(format!("d{at}"), json!({"type": "object", "properties": properties, "required": keys}));
        }
        definitions.insert(format!("d{count}"), json!({"type": "null"}));
        json!({"$ref": "#/$defs/d0", "$defs": definitions})
    };
    assert!(refusal(&chain(2_000, &["a"])).contains("2000 levels"));
    assert!(refusal(&chain(50, &["a", "b"])).contains("its shortest document has"));
    assert!(refusal(&json!({"minLength": 1_000_000_000, "type": "string"})).contains("its shortest document has"));
    assert!(refusal(&json!({"type": "string", "pattern": "(".repeat(60_000)})).contains("60000 bytes"));
    assert!(refusal(&json!({"type": "string", "pattern": "(".repeat(5_000)})).contains("pattern at #"));
    assert!(refusal(&json!({"type": "string", "pattern": "^(a|b)*a(a|b){20}$"})).contains("more than 10000 states"));
    let many = |count: usize| -> serde_json::Map<String, Value> {
        (0..count).map(|at| (format!("p{at}"), json!({"type": "integer"}))).collect()
    };
    assert!(refusal(&json!({"type": "object", "properties": many(10_000)})).contains("10000 properties in a row"));
    let required: Vec<String> = (0..10_000).map(|at| format!("p{at}")).collect();
    let big = compiled(
        &json!({"type": "object", "properties": many(10_000), "required": required, "additionalProperties": false}),
    );
    assert!(tracker_takes(&big, big.shortest()));
}

#[test]
fn a_regular_expression_ends_soonest_too() {
    let schema = Schema::regex("[a-z]{3,}(-[0-9]{2})?|", &Limits::default()).unwrap();
    for text in ["", "abc", "abcd-12"] {
        assert!(takes(&schema, text), "{text}");
    }
    assert!(!takes(&schema, "ab") && !takes(&schema, "abc-1"));
    assert_eq!(schema.shortest(), "");
    let mut tracker = schema.tracker();
    assert!(tracker.push(b"abc-"));
    assert_eq!(tracker.closing(), b"00");
    assert!(Schema::regex("(", &Limits::default()).is_err());
    assert!(Schema::regex("(a|b)*a(a|b){30}", &Limits::default()).is_err());
}

/// A schema over all keywords, from a list of numbers: the same numbers make the same schema.
struct Maker<'a> {
    numbers: std::slice::Iter<'a, u32>,
    definitions: usize,
}

impl Maker<'_> {
    fn number(&mut self, below: u32) -> u32 {
        self.numbers.next().map_or(0, |number| number % below)
    }

    fn document(numbers: &[u32]) -> Value {
        let mut maker = Maker { numbers: numbers.iter(), definitions: 2 };
        let mut schema = maker.schema(3);
        let definitions: serde_json::Map<String, Value> =
            (0..2).map(|at| (format!("d{at}"), maker.schema(2))).collect();
        match &mut schema {
            Value::Object(object) => object.insert("$defs".into(), definitions.into()),
            _ => None,
        };
        schema
    }

    fn schema(&mut self, depth: u32) -> Value {
        match self.number(if depth == 0 { 8 } else { 16 }) {
            0 => json!({"type": "integer", "minimum": self.signed(50), "maximum": 50 + self.signed(200).abs()}),
            1 => json!({"type": "number", "exclusiveMinimum": f64::from(self.signed(30)) / 4.0, "maximum": 1000.5}),
            2 => json!({"type": "string", "minLength": self.number(4), "maxLength": 4 + self.number(9)}),
            3 => json!({"enum": [1, "é\"", null, true, [1, {"a": "b"}], self.number(9)]}),
            4 => self.patterned(),
            5 => {
                json!({"type": ["null", "boolean", "number"], "multipleOf": ([json!(1), json!(7), json!(0.5)][self.number(3) as usize])})
            }
            6 => {
                json!({"const": ([json!("x"), json!("\u{1}\n"), json!(-0.5), json!({"k": []})][self.number(4) as usize])})
            }
            7 => json!({"type": "string", "format": FORMATS[self.number(10) as usize]}),
            8 | 9 => self.array(depth - 1),
            10..=12 => self.object(depth - 1),
            13 => {
                let keyword = "anyOf";
                let branches: Vec<Value> = (0..=self.number(3)).map(|_| self.schema(depth - 1)).collect();
                json!({keyword: branches})
            }
            14 => json!({"$ref": format!("#/$defs/d{}", self.number(self.definitions as u32))}),
            _ => self.joined(depth - 1),
        }
    }

    fn signed(&mut self, below: i32) -> i32 {
        self.number(2 * below as u32) as i32 - below
    }

    fn patterned(&mut self) -> Value {
        let patterns = ["^[a-f]{2,5}$", "\\d+", "^(ab|c)*$", "é.", "^[^a-z]\\w", "x$", "^$|^a"];
        json!({"type": "string", "pattern": patterns[self.number(7) as usize], "maxLength": 6 + self.number(20)})
    }

    fn array(&mut self, depth: u32) -> Value {
        let mut array = json!({"type": "array", "minItems": self.number(4), "maxItems": 4 + self.number(4)});
        if self.number(2) == 0 {
            array["prefixItems"] = (0..=self.number(2)).map(|_| self.schema(depth)).collect();
        }
        if self.number(3) > 0 {
            array["items"] = self.schema(depth);
        }
        array
    }

    fn object(&mut self, depth: u32) -> Value {
        let names = ["a", "ab", "", "b\"", "é", "c/d"];
        let count = self.number(5) as usize;
        let properties: serde_json::Map<String, Value> =
            names[..count].iter().map(|name| ((*name).to_owned(), self.schema(depth))).collect();
        let required: Vec<&str> = names[..count].iter().copied().filter(|_| self.number(3) == 0).collect();
        let mut object = json!({"type": "object", "properties": properties, "required": required});
        match self.number(4) {
            0 => object["additionalProperties"] = false.into(),
            1 => object["additionalProperties"] = self.schema(depth),
            _ => {}
        }
        if self.number(3) == 0 {
            object["minProperties"] = self.number(4).into();
            object["maxProperties"] = (4 + self.number(3)).into();
        }
        object
    }

    /// Several subschemas for one value.
    fn joined(&mut self, depth: u32) -> Value {
        match self.number(3) {
            0 => json!({"allOf": [self.object(depth), self.object(depth)]}),
            1 => json!({"oneOf": [
                {"type": "object", "properties": {"kind": {"const": "a"}, "x": self.schema(depth)}, "required": ["kind"]},
                {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"], "additionalProperties": self.schema(depth)},
                {"type": "integer"},
            ]}),
            _ => json!({"minLength": 2, "minItems": 1, "anyOf": [self.schema(depth), {"type": ["string", "array"]}]}),
        }
    }
}

const FORMATS: [&str; 10] =
    ["date", "time", "date-time", "duration", "uuid", "email", "hostname", "ipv4", "ipv6", "uri"];

/// Whether a schema is refused for a reason that random ones may have.
fn is_hopeless(schema: &Value) -> bool {
    match Schema::compile(schema, &Limits::default()) {
        Ok(_) => false,
        Err(error) => ["no finite document", "leads back"].iter().any(|why| error.to_string().contains(why)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, max_shrink_iters: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_walk_through_any_schema_ends_well(
        numbers in proptest::collection::vec(any::<u32>(), 0..80),
        picks in proptest::collection::vec(any::<u16>(), 0..150),
    ) {
        let schema = Maker::document(&numbers);
        prop_assume!(!is_hopeless(&schema));
        walk(&schema, &picks);
    }

    #[test]
    fn a_dive_into_any_schema_ends_well(numbers in proptest::collection::vec(any::<u32>(), 0..80)) {
        let schema = Maker::document(&numbers);
        prop_assume!(!is_hopeless(&schema));
        dive(&schema, 700);
    }

    #[test]
    fn a_walk_through_anything_ends_well(picks in proptest::collection::vec(any::<u16>(), 0..200)) {
        walk(&json!(true), &picks);
        walk(&json!({"properties": {"a": {"type": "integer"}, "b": {"type": "string", "minLength": 3}, "ab": {"items": {"$ref": "#"}}}, "required": ["ab"], "type": "object"}), &picks);
    }
}
