//! The filter `tojson` as Hugging Face defines it: Python's `json.dumps` with `ensure_ascii=False`.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

use super::spans::Alphabet;
use super::text::escape_into;

/// How the JSON is laid out.
#[derive(Clone, Debug)]
pub struct Style {
    /// What one level is indented with; `None` puts everything on one line.
    pub indent: Option<String>,
    /// Between items.
    pub item_separator: String,
    /// Between a key and its value.
    pub key_separator: String,
    /// Whether keys are sorted.
    pub sort_keys: bool,
    /// Whether what is not ASCII is escaped.
    pub ascii: bool,
}

/// Writes JSON of a value.
pub struct Writer<'a> {
    /// The text so far.
    pub out: String,
    style: &'a Style,
    alphabet: &'a Alphabet,
    limit: usize,
}

impl<'a> Writer<'a> {
    /// A writer of at most `limit` bytes or so.
    #[must_use]
    pub fn new(style: &'a Style, alphabet: &'a Alphabet, limit: usize) -> Self {
        Self { out: String::new(), style, alphabet, limit }
    }

    /// Writes one value at a depth.
    ///
    /// # Errors
    /// For what JSON cannot say, and for too much of it.
    pub fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if self.out.len() > self.limit || depth > 200 {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: the value is too large"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)),
            ValueKind::String => self.write_text(value.as_str().unwrap_or_default()),
            ValueKind::Map => self.write_map(value, depth)?,
            ValueKind::Seq | ValueKind::Iterable => self.write_list(value, depth)?,
            other => {
                let reason = format!("tojson: a value of type {other} is not JSON serializable");
                return Err(Error::new(ErrorKind::InvalidOperation, reason));
            }
        }
        Ok(())
    }

    fn write_text(&mut self, text: &str) {
        let ascii = self.style.ascii;
        self.out.push('"');
        escape_into(&mut self.out, text, self.alphabet, |c| escape(c, ascii));
        self.out.push('"');
    }

    fn write_list(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut empty = true;
        self.out.push('[');
        for item in value.try_iter()? {
            self.begin_item(empty, depth + 1);
            empty = false;
            self.write(&item, depth + 1)?;
        }
        self.end(empty, depth);
        self.out.push(']');
        Ok(())
    }

    fn write_map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.style.sort_keys {
            keys.sort_by_key(ToString::to_string);
        }
        self.out.push('{');
        for (index, key) in keys.iter().enumerate() {
            self.begin_item(index == 0, depth + 1);
            self.write_text(&key_text(key));
            self.out.push_str(&self.style.key_separator);
            self.write(&value.get_item(key)?, depth + 1)?;
        }
        self.end(keys.is_empty(), depth);
        self.out.push('}');
        Ok(())
    }

    fn begin_item(&mut self, first: bool, depth: usize) {
        if !first {
            self.out.push_str(&self.style.item_separator);
        }
        self.break_line(depth);
    }

    fn end(&mut self, empty: bool, depth: usize) {
        if !empty {
            self.break_line(depth);
        }
    }

    fn break_line(&mut self, depth: usize) {
        if let Some(indent) = &self.style.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }
}

/// Keys that are no strings, as Python writes them.
fn key_text(key: &Value) -> String {
    match key.kind() {
        ValueKind::None => "null".into(),
        ValueKind::Bool => if key.is_true() { "true" } else { "false" }.into(),
        ValueKind::Number => number(key),
        _ => key.to_string(),
    }
}

/// How JSON writes a character of a text; `None` if as it is.
#[must_use]
pub fn escape(c: char, ascii: bool) -> Option<String> {
    Some(match c {
        '"' => "\\\"".into(),
        '\\' => "\\\\".into(),
        '\n' => "\\n".into(),
        '\r' => "\\r".into(),
        '\t' => "\\t".into(),
        '\u{8}' => "\\b".into(),
        '\u{c}' => "\\f".into(),
        c if c < ' ' => format!("\\u{:04x}", u32::from(c)),
        c if ascii && !c.is_ascii() => {
            c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect()
        }
        _ => return None,
    })
}

fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float)
}

/// Python's `repr` of a float, which is how `json.dumps` writes it.
#[must_use]
pub fn float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let size = value.abs();
    if value == 0.0 || (1e-4..1e16).contains(&size) {
        return format!("{value:?}");
    }
    let text = format!("{value:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
    format!("{digits}e{sign}{exponent:0>2}")
}

#[cfg(test)]
mod tests {
    use super::float;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-7, "1.5e-07"),
            (1e100, "1e+100"),
            (0.0001, "0.0001"),
            (f64::INFINITY, "Infinity"),
        ];
        for (value, text) in cases {
            assert_eq!(float(value), text);
        }
    }
}
