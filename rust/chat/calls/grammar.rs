//! llama.cpp's grammars of answers, cut down to the calls in them.

use serde_json::{Value, json};

use crate::llama::ChatFormat;

/// The rules of llama.cpp's parsers that stand for calls.
const ONE: &str = "tool-call";
const MANY: &str = "tool-calls";

/// The header that may be left before a call of Harmony, once thoughts are gone.
const HARMONY_HEADER: &str = r#"("<|start|>assistant")? "#;

/// The grammar of a format with calls alone as its root: llama.cpp's begins with the header of the answer and with
/// what may precede a call. `free` is the format where calling is free, whose root has the calls already.
pub fn of_calls(format: &ChatFormat, free: &ChatFormat, parallel: bool, is_harmony: bool) -> Option<String> {
    let root = root_of(format, free, parallel)?;
    let header = if is_harmony { HARMONY_HEADER } else { "" };
    let others = format.grammar.lines().filter(|line| !line.starts_with("root ::="));
    let lines: Vec<&str> = others.collect();
    Some(format!("root ::= {header}{root}\n{}\n", lines.join("\n")))
}

fn root_of(format: &ChatFormat, free: &ChatFormat, parallel: bool) -> Option<String> {
    let rule = |name: &str| body(&format.grammar, name);
    let repeats = rule(MANY).is_some_and(|calls| calls.starts_with("(tool-call"));
    match (body(&free.grammar, "root"), rule(ONE), rule(MANY)) {
        // One after the other, each complete in itself.
        (_, Some(_), Some(_)) if repeats && !parallel => Some(ONE.into()),
        (_, Some(_), Some(_)) => Some(MANY.into()),
        (Some(root), ..) => Some(root.into()),
        (None, Some(_), None) => Some(ONE.into()),
        (None, None, _) => None,
    }
}

fn body<'a>(grammar: &'a str, rule: &str) -> Option<&'a str> {
    grammar.lines().find_map(|line| line.strip_prefix(rule)?.strip_prefix(" ::= "))
}

/// The first key of a call that nothing opens.
pub fn first_key() -> Value {
    json!({"kind": "pattern", "value": r#"(\{\s*"name"\s*:\s*")"#})
}
