//! How JSON spells: white space, characters and literals as regular expressions.

use llguidance::derivre::RegexAst;
use serde_json::Value;

/// Blanks at most after a line break.
pub const BLANKS: u8 = 32;
/// Tabs at most after a line break.
pub const TABS: u8 = 16;

/// Between two tokens: nothing, a blank, or a line break with blanks or tabs.
pub const SPACE: &str = r"( |\n( {0,32}|\t{1,16}))?";

/// One character of a string, in any spelling; no surrogate is alone.
const CHARACTER: &str = concat!(
    r#"[^"\\\x00-\x1f]|\\(["\\/bfnrt]|u([0-9a-cefA-CEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}"#,
    r"|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
);

/// One character of a key, in its only spelling: keys that are equal look equal.
const CANONICAL: &str = r#"[^"\\\x00-\x1f]|\\["\\bfnrt]|\\u00(0[0-7be-f]|1[0-9a-f])"#;

/// One character of a string.
pub fn character() -> RegexAst {
    RegexAst::Regex(CHARACTER.into())
}

/// One character of a key.
pub fn canonical() -> RegexAst {
    RegexAst::Regex(CANONICAL.into())
}

/// From `min` to `max` times.
pub fn times(what: RegexAst, min: u32, max: Option<u32>) -> RegexAst {
    RegexAst::Repeat(Box::new(what), min, max.unwrap_or(u32::MAX))
}

/// Between quotation marks.
pub fn quoted(inside: RegexAst) -> RegexAst {
    RegexAst::Concat(vec![RegexAst::Byte(b'"'), inside, RegexAst::Byte(b'"')])
}

/// A value as JSON, without white space.
pub fn literal(value: &Value) -> String {
    value.to_string()
}

/// The state of white space after one more byte, if that is allowed: 0 at first, 1 after a blank, 2 after a line
/// break, then counting.
pub fn space(state: u8, byte: u8) -> Option<u8> {
    let tabs = 3 + BLANKS;
    match (state, byte) {
        (0, b' ') => Some(1),
        (0, b'\n') => Some(2),
        (2.., b' ') if state < 2 + BLANKS => Some(state + 1),
        (2, b'\t') => Some(tabs),
        (_, b'\t') if state >= tabs && state + 1 < tabs + TABS => Some(state + 1),
        _ => None,
    }
}
