//! `pattern` and `format`: regular expressions over characters become ones over the spelling of JSON strings.

use llguidance::derivre::RegexAst;
use regex_syntax::ParserBuilder;
use regex_syntax::hir::{Class, Hir, HirKind, Look};

use super::text::times;

/// Bytes of a pattern at most.
const LONGEST: usize = 10_000;
/// Groups within groups at most.
const DEEPEST: u32 = 100;
/// Ranges of characters beyond ASCII that are spelt as `\u….` too; classes of more are written as they are.
const SPELT_RANGES: usize = 16;

/// Strings in which the pattern is found, as they are spelt. `any` is one character, where the pattern does not care.
pub fn search(pattern: &str, any: &RegexAst) -> Result<RegexAst, String> {
    if pattern.len() > LONGEST {
        return Err(format!("it has {} bytes; at most {LONGEST} are allowed", pattern.len()));
    }
    let hir = ParserBuilder::new().nest_limit(DEEPEST).build().parse(&portable(pattern)).map_err(|error| {
        let text = error.to_string();
        text.lines().last().unwrap_or(&text).trim_start_matches("error: ").to_owned()
    })?;
    anywhere(&hir, any, Open { before: true, after: true })
}

/// Strings of a known format, as they are spelt.
pub fn format(name: &str, any: &RegexAst) -> Option<RegexAst> {
    let pattern = FORMATS.iter().find(|(known, _)| *known == name)?.1;
    search(&format!("^(?:{pattern})$"), any).ok()
}

/// The names of the formats.
pub fn formats() -> String {
    FORMATS.map(|(name, _)| name).join(", ")
}

/// Every day that exists from the year 1 on.
const DATE: &str = concat!(
    r"([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)-",
    r"((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))",
    r"|([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)-02-29"
);
const TIME: &str = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])";
const DATE_TIME: &str = concat!(
    r"(([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)-",
    r"((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))",
    r"|([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)-02-29)",
    r"T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
);
const UUID: &str = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}";
const EMAIL: &str = concat!(
    r"[A-Za-z0-9_%+-]{1,24}(\.[A-Za-z0-9_%+-]{1,24}){0,1}",
    r"@([A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?\.){1,3}[A-Za-z]{2,12}"
);
const IPV4: &str = r"((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])";
const IPV6: &str = concat!(
    r"([0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}|([0-9a-fA-F]{1,4}:){1,7}:|([0-9a-fA-F]{1,4}:){1,6}:[0-9a-fA-F]{1,4}",
    r"|([0-9a-fA-F]{1,4}:){1,5}(:[0-9a-fA-F]{1,4}){1,2}|([0-9a-fA-F]{1,4}:){1,4}(:[0-9a-fA-F]{1,4}){1,3}",
    r"|([0-9a-fA-F]{1,4}:){1,3}(:[0-9a-fA-F]{1,4}){1,4}|([0-9a-fA-F]{1,4}:){1,2}(:[0-9a-fA-F]{1,4}){1,5}",
    r"|[0-9a-fA-F]{1,4}:(:[0-9a-fA-F]{1,4}){1,6}|:(:[0-9a-fA-F]{1,4}){1,7}|::"
);
const HOSTNAME: &str =
    concat!(r"[A-Za-z0-9]([A-Za-z0-9-]{0,60}[A-Za-z0-9])?", r"(\.[A-Za-z0-9]([A-Za-z0-9-]{0,60}[A-Za-z0-9])?){0,3}");
const URI: &str = concat!(
    r"[A-Za-z][A-Za-z0-9+.-]*:",
    r"(//([A-Za-z0-9._~!$&'()*+,;=:-]|%[0-9a-fA-F]{2})*@)?",
    r"(//([A-Za-z0-9._~!$&'()*+,;=-]|%[0-9a-fA-F]{2})+(:[0-9]{1,4})?(/([A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9a-fA-F]{2})*)?",
    r"|([A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})([A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9a-fA-F]{2})*)",
    r"(\?([A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9a-fA-F]{2})*)?(#([A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9a-fA-F]{2})*)?"
);
const DURATION: &str = concat!(
    r"P([0-9]{1,4}W|([0-9]{1,4}Y([0-9]{1,4}M([0-9]{1,4}D)?)?|[0-9]{1,4}M([0-9]{1,4}D)?|[0-9]{1,4}D)",
    r"(T([0-9]{1,4}H([0-9]{1,4}M([0-9]{1,4}S)?)?|[0-9]{1,4}M([0-9]{1,4}S)?|[0-9]{1,4}S))?",
    r"|T([0-9]{1,4}H([0-9]{1,4}M([0-9]{1,4}S)?)?|[0-9]{1,4}M([0-9]{1,4}S)?|[0-9]{1,4}S))"
);
const FORMATS: [(&str, &str); 10] = [
    ("date", DATE),
    ("time", TIME),
    ("date-time", DATE_TIME),
    ("duration", DURATION),
    ("uuid", UUID),
    ("email", EMAIL),
    ("hostname", HOSTNAME),
    ("ipv4", IPV4),
    ("ipv6", IPV6),
    ("uri", URI),
];

/// Which ends of the string the pattern leaves open.
#[derive(Clone, Copy)]
struct Open {
    before: bool,
    after: bool,
}

/// A part of the pattern that reaches both ends of it: anchors close them.
fn anywhere(hir: &Hir, any: &RegexAst, mut open: Open) -> Result<RegexAst, String> {
    match hir.kind() {
        HirKind::Alternation(parts) => {
            Ok(RegexAst::Or(parts.iter().map(|part| anywhere(part, any, open)).collect::<Result<_, _>>()?))
        }
        HirKind::Capture(capture) => anywhere(&capture.sub, any, open),
        HirKind::Concat(parts) => {
            let mut parts = parts.as_slice();
            while let [first, rest @ ..] = parts
                && is_look(first, Look::Start)
            {
                (open.before, parts) = (false, rest);
            }
            while let [rest @ .., last] = parts
                && is_look(last, Look::End)
            {
                (open.after, parts) = (false, rest);
            }
            inside(parts, any, open)
        }
        HirKind::Look(Look::Start) => Ok(padded(RegexAst::EmptyString, any, Open { before: false, ..open })),
        HirKind::Look(Look::End) => Ok(padded(RegexAst::EmptyString, any, Open { after: false, ..open })),
        _ => Ok(padded(spelt(hir)?, any, open)),
    }
}

/// What is left of a sequence when its anchors are taken off.
fn inside(parts: &[Hir], any: &RegexAst, open: Open) -> Result<RegexAst, String> {
    if let [only] = parts {
        return anywhere(only, any, open);
    }
    let parts = parts.iter().map(spelt).collect::<Result<_, _>>()?;
    Ok(padded(RegexAst::Concat(parts), any, open))
}

fn padded(middle: RegexAst, any: &RegexAst, open: Open) -> RegexAst {
    let pad = |open| if open { times(any.clone(), 0, None) } else { RegexAst::EmptyString };
    RegexAst::Concat(vec![pad(open.before), middle, pad(open.after)])
}

fn is_look(hir: &Hir, look: Look) -> bool {
    matches!(hir.kind(), HirKind::Look(found) if *found == look)
}

/// An expression as it is spelt.
fn spelt(hir: &Hir) -> Result<RegexAst, String> {
    match hir.kind() {
        HirKind::Empty => Ok(RegexAst::EmptyString),
        HirKind::Literal(bytes) => {
            let text = std::str::from_utf8(&bytes.0).map_err(|_| "it matches bytes that are not UTF-8".to_owned())?;
            Ok(literal(text))
        }
        HirKind::Class(ranges) => Ok(class(&characters(ranges)?)),
        HirKind::Look(_) => Err("anchors and word boundaries are known at its ends only".into()),
        HirKind::Repetition(repetition) => Ok(times(spelt(&repetition.sub)?, repetition.min, repetition.max)),
        HirKind::Capture(capture) => spelt(&capture.sub),
        HirKind::Concat(parts) => Ok(RegexAst::Concat(parts.iter().map(spelt).collect::<Result<_, _>>()?)),
        HirKind::Alternation(parts) => Ok(RegexAst::Or(parts.iter().map(spelt).collect::<Result<_, _>>()?)),
    }
}

/// A text as it is spelt.
pub fn literal(text: &str) -> RegexAst {
    if text.is_ascii() {
        let quoted = serde_json::Value::from(text).to_string();
        return RegexAst::Literal(quoted[1..quoted.len() - 1].to_owned());
    }
    RegexAst::Concat(text.chars().map(|character| class(&[(character, character)])).collect())
}

fn characters(class: &Class) -> Result<Vec<(char, char)>, String> {
    match class {
        Class::Unicode(class) => Ok(class.ranges().iter().map(|range| (range.start(), range.end())).collect()),
        Class::Bytes(class) if class.is_ascii() => {
            Ok(class.ranges().iter().map(|range| (char::from(range.start()), char::from(range.end()))).collect())
        }
        Class::Bytes(_) => Err("it matches bytes that are not UTF-8".into()),
    }
}

/// One character of a class, as it is spelt: what JSON must escape in its shortest way, what is beyond ASCII also as
/// `\u….`.
fn class(ranges: &[(char, char)]) -> RegexAst {
    let holds = |character: char| ranges.iter().any(|&(first, last)| (first..=last).contains(&character));
    let mut alternatives: Vec<RegexAst> =
        ('\0'..='\x1f').chain(['"', '\\']).filter(|&character| holds(character)).map(escaped).collect();
    let plain: String = ranges.iter().flat_map(|&range| plain(range)).map(|(a, z)| span(a, z)).collect();
    if !plain.is_empty() {
        alternatives.push(RegexAst::Regex(format!("[{plain}]")));
    }
    let beyond: Vec<_> = ranges.iter().filter(|(_, last)| !last.is_ascii()).collect();
    if beyond.len() <= SPELT_RANGES {
        alternatives.extend(beyond.iter().flat_map(|&&(first, last)| hexadecimal(first.max('\u{80}'), last)));
    }
    RegexAst::Or(alternatives)
}

fn escaped(character: char) -> RegexAst {
    let quoted = serde_json::Value::from(character.to_string()).to_string();
    RegexAst::Literal(quoted[1..quoted.len() - 1].to_owned())
}

/// The parts of a range that need no escape.
fn plain((first, last): (char, char)) -> Vec<(char, char)> {
    const PLAIN: [(char, char); 3] = [(' ', '!'), ('#', '['), (']', char::MAX)];
    PLAIN.iter().map(|&(a, z)| (a.max(first), z.min(last))).filter(|(a, z)| a <= z).collect()
}

fn span(first: char, last: char) -> String {
    format!(r"\x{{{:x}}}-\x{{{:x}}}", first as u32, last as u32)
}

/// A range beyond ASCII as `\u….`, in pairs of surrogates above the basic plane.
fn hexadecimal(first: char, last: char) -> Vec<RegexAst> {
    let (first, last) = (first as u32, last as u32);
    let mut parts = Vec::new();
    for (low, high) in [(0x80, 0xd7ff), (0xe000, 0xffff)] {
        let (low, high) = (low.max(first), high.min(last));
        if low <= high {
            parts.push(format!(r"\\u({})", hex_range(low, high)));
        }
    }
    let (low, high) = (first.max(0x1_0000), last.max(0xffff));
    if low <= high {
        parts.push(pairs(low - 0x1_0000, high - 0x1_0000));
    }
    parts.into_iter().map(RegexAst::Regex).collect()
}

/// Pairs of surrogates for offsets above the basic plane.
fn pairs(low: u32, high: u32) -> String {
    let unit = |start: u32, a: u32, z: u32| format!(r"\\u({})", hex_range(start + a, start + z));
    let pair = |head: (u32, u32), tail: (u32, u32)| {
        format!("{}{}", unit(0xd800, head.0, head.1), unit(0xdc00, tail.0, tail.1))
    };
    let ((head, tail), (last_head, last_tail)) = ((low >> 10, low & 0x3ff), (high >> 10, high & 0x3ff));
    if head == last_head {
        return pair((head, head), (tail, last_tail));
    }
    let mut all = vec![pair((head, head), (tail, 0x3ff)), pair((last_head, last_head), (0, last_tail))];
    if head + 1 < last_head {
        all.push(pair((head + 1, last_head - 1), (0, 0x3ff)));
    }
    all.join("|")
}

/// Four hexadecimal digits from `low` to `high`, in either case.
fn hex_range(low: u32, high: u32) -> String {
    hex_digits(low, high, 4).join("|")
}

fn hex_digits(low: u32, high: u32, digits: u32) -> Vec<String> {
    if digits == 1 {
        return vec![hex_digit(low, high)];
    }
    let unit = 16u32.pow(digits - 1);
    let (first, last) = (low / unit, high / unit);
    let under = |digit: u32, low: u32, high: u32| {
        let head = hex_digit(digit, digit);
        format!("{head}({})", hex_digits(low, high, digits - 1).join("|"))
    };
    if first == last {
        return vec![under(first, low % unit, high % unit)];
    }
    let mut parts = vec![under(first, low % unit, unit - 1), under(last, 0, high % unit)];
    if first + 1 < last {
        parts.push(format!("{}[0-9a-fA-F]{{{}}}", hex_digit(first + 1, last - 1), digits - 1));
    }
    parts
}

fn hex_digit(low: u32, high: u32) -> String {
    let digits: String = (low..=high).map(|digit| format!("{digit:x}")).collect();
    format!("[{digits}{}]", digits.to_uppercase().trim_start_matches(|c: char| c.is_ascii_digit()))
}

/// A pattern of ECMA 262 in the words of regex-syntax, in the sense that JavaScript and Python share: `\d`, `\w` and
/// `\s` take ASCII, their opposites leave out what either language counts among them; a dot takes no line break;
/// brackets and set operators in a class are characters.
pub fn portable(pattern: &str) -> String {
    let mut out = String::new();
    let mut class = None;
    let mut characters = pattern.chars().peekable();
    while let Some(character) = characters.next() {
        match (character, class) {
            ('\\', _) => escape(characters.next(), class, &mut out),
            ('.', None) => out.push_str(r"[^\n\r\u{2028}\u{2029}]"),
            ('[', None) => {
                let negated = characters.next_if_eq(&'^').is_some();
                out.push_str(if negated { "[^" } else { "[" });
                class = Some(negated);
            }
            (']', Some(_)) => {
                out.push(']');
                class = None;
            }
            ('[' | '&' | '~', Some(_)) => out.extend(['\\', character]),
            _ => out.push(character),
        }
    }
    out
}

/// What follows a backslash; in a class it is known whether that is negated. What is taken is as narrow as in any
/// language, what is left out as wide.
fn escape(character: Option<char>, class: Option<bool>, out: &mut String) {
    let (narrow, wide) = match character.map(|character| character.to_ascii_lowercase()) {
        Some('d') => ("0-9", r"\d"),
        Some('w') => ("0-9A-Za-z_", r"\w\p{N}"),
        Some('s') => (r" \t\n\r\f\v", r"\s\x1c-\x1f\x{feff}"),
        _ => return out.extend(std::iter::once('\\').chain(character)),
    };
    let opposite = character.is_some_and(|character| character.is_ascii_uppercase());
    let taken = opposite == (class == Some(true));
    out.extend([if opposite { "[^" } else { "[" }, if taken { narrow } else { wide }, "]"]);
}
