//! The methods and filters that templates call on texts, over [`super::text`].

use std::sync::Arc;

use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::json::{Style, Writer};
use super::spans::Alphabet;
use super::text::{Text, escape_into};

/// Most bytes that one call may make.
const MAX_RESULT: usize = 64 * 1024 * 1024;

/// Gives an environment Python's methods and Hugging Face's filters, all aware of shades.
pub fn install(env: &mut Environment<'_>, alphabet: &Arc<Alphabet>) {
    let known = Arc::clone(alphabet);
    env.set_unknown_method_callback(move |state, value, method, args| match value.kind() {
        ValueKind::String => call(&known, state, value, method, args),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    });
    let known = Arc::clone(alphabet);
    env.add_filter("tojson", move |value: Value, options: Kwargs| to_json(&known, &value, &options));
    for name in ["upper", "lower", "title", "capitalize", "replace"] {
        let known = Arc::clone(alphabet);
        env.add_filter(name, move |state: &mut State, value: Value, args: Rest<Value>| {
            call(&known, state, &to_text(&value), name, &args)
        });
    }
    let known = Arc::clone(alphabet);
    env.add_filter("trim", move |state: &mut State, value: Value, args: Rest<Value>| {
        call(&known, state, &to_text(&value), "strip", &args)
    });
    for name in ["e", "escape"] {
        let known = Arc::clone(alphabet);
        env.add_filter(name, move |value: Value| escape_html(&known, &value.to_string()));
    }
    // Of nothing, jinja2 lists nothing.
    env.add_filter("items", |value: &Value| match value.is_undefined() {
        true => Ok(Value::from_iter(std::iter::empty::<Value>())),
        false => minijinja::filters::items(value),
    });
    // To Python a string can be iterated and indexed.
    env.add_test("iterable", |value: &Value| value.try_iter().is_ok() || value.as_str().is_some());
    env.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
}

fn to_text(value: &Value) -> Value {
    if value.as_str().is_some() { value.clone() } else { Value::from(value.to_string()) }
}

fn escape_html(alphabet: &Alphabet, text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    escape_into(&mut out, text, alphabet, |c| {
        let escaped = match c {
            '&' => "&amp;",
            '<' => "&lt;",
            '>' => "&gt;",
            '\'' => "&#39;",
            '"' => "&#34;",
            _ => return None,
        };
        Some(escaped.to_owned())
    });
    out
}

fn to_json(alphabet: &Alphabet, value: &Value, options: &Kwargs) -> Result<String, Error> {
    let indent = indentation(options.get::<Option<Value>>("indent")?)?;
    let separators = options.get::<Option<Vec<String>>>("separators")?.unwrap_or_default();
    let [item, key] = <[String; 2]>::try_from(separators)
        .unwrap_or_else(|_| [if indent.is_some() { "," } else { ", " }.into(), ": ".into()]);
    let style = Style {
        indent,
        item_separator: item,
        key_separator: key,
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let mut writer = Writer::new(&style, alphabet, MAX_RESULT);
    writer.write(value, 0)?;
    Ok(writer.out)
}

fn indentation(indent: Option<Value>) -> Result<Option<String>, Error> {
    match indent.filter(|value| !value.is_none()) {
        None => Ok(None),
        Some(value) if value.as_str().is_some() => Ok(value.as_str().map(str::to_owned)),
        Some(value) => Ok(Some(" ".repeat(usize::try_from(value)?.min(64)))),
    }
}

type Method = fn(&Alphabet, &str, &[Value]) -> Result<Value, Error>;

/// A method of `str`; what is not here is asked of minijinja-contrib, on the text as it is.
fn call(alphabet: &Alphabet, state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let text = value.as_str().unwrap_or_default();
    let method: Method = match name {
        "strip" => |alphabet, text, args| strip(alphabet, text, args, true, true),
        "lstrip" => |alphabet, text, args| strip(alphabet, text, args, true, false),
        "rstrip" => |alphabet, text, args| strip(alphabet, text, args, false, true),
        "split" => |alphabet, text, args| split(alphabet, text, args, false),
        "rsplit" => |alphabet, text, args| split(alphabet, text, args, true),
        "partition" => |alphabet, text, args| partition(alphabet, text, args, false),
        "rpartition" => |alphabet, text, args| partition(alphabet, text, args, true),
        "splitlines" => lines,
        "replace" => replace,
        "removeprefix" => |alphabet, text, args| without(alphabet, text, args, true),
        "removesuffix" => |alphabet, text, args| without(alphabet, text, args, false),
        "startswith" => |alphabet, text, args| borders(alphabet, text, args, |text, part| text.starts_with(part)),
        "endswith" => |alphabet, text, args| borders(alphabet, text, args, |text, part| text.ends_with(part)),
        "upper" => |alphabet, text, _| Ok(Text::new(text, alphabet).recased(alphabet, str::to_uppercase).into()),
        "lower" => |alphabet, text, _| Ok(Text::new(text, alphabet).recased(alphabet, str::to_lowercase).into()),
        "title" => |alphabet, text, _| Ok(Text::new(text, alphabet).recased(alphabet, title).into()),
        "capitalize" => |alphabet, text, _| Ok(Text::new(text, alphabet).recased(alphabet, capitalise).into()),
        "join" => join,
        _ => return ask_others(alphabet, state, value, name, args),
    };
    method(alphabet, text, args)
}

/// Methods that tell something of the text, and those that templates hardly use.
fn ask_others(
    alphabet: &Alphabet,
    state: &mut State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if name == "format" {
        return minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args);
    }
    let plain = Value::from(alphabet.plain(value.as_str().unwrap_or_default()).into_owned());
    let args: Vec<Value> = args.iter().map(|arg| plain_value(alphabet, arg)).collect();
    minijinja_contrib::pycompat::unknown_method_callback(state, &plain, name, &args)
}

fn plain_value(alphabet: &Alphabet, value: &Value) -> Value {
    value.as_str().map_or_else(|| value.clone(), |text| Value::from(alphabet.plain(text).into_owned()))
}

fn strip(alphabet: &Alphabet, text: &str, args: &[Value], left: bool, right: bool) -> Result<Value, Error> {
    let (chars,): (Option<String>,) = from_args(args)?;
    let chars = chars.map(|chars| alphabet.plain(&chars).into_owned());
    Ok(Text::new(text, alphabet).strip(chars.as_deref(), left, right).into())
}

/// Python's limits: none when negative.
fn limit_of(limit: Option<i64>) -> Option<usize> {
    limit.and_then(|limit| usize::try_from(limit).ok())
}

fn split(alphabet: &Alphabet, text: &str, args: &[Value], from_right: bool) -> Result<Value, Error> {
    let (separator, limit, options): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let limit = limit_of(limit.or(options.get("maxsplit")?));
    let text = Text::new(text, alphabet);
    let parts = match separator.as_ref().and_then(Value::as_str) {
        None => text.split_space(limit),
        Some("") => return Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
        Some(separator) if from_right => text.split_right(&alphabet.plain(separator), limit),
        Some(separator) => text.split(&alphabet.plain(separator), limit),
    };
    Ok(Value::from_iter(parts))
}

fn partition(alphabet: &Alphabet, text: &str, args: &[Value], from_right: bool) -> Result<Value, Error> {
    let (separator,): (String,) = from_args(args)?;
    Ok(Value::from_iter(Text::new(text, alphabet).partition(&alphabet.plain(&separator), from_right)))
}

fn lines(alphabet: &Alphabet, text: &str, args: &[Value]) -> Result<Value, Error> {
    let (keep,): (Option<bool>,) = from_args(args)?;
    Ok(Value::from_iter(Text::new(text, alphabet).lines(keep.unwrap_or(false))))
}

fn replace(alphabet: &Alphabet, text: &str, args: &[Value]) -> Result<Value, Error> {
    let (old, new, limit): (Value, Value, Option<i64>) = from_args(args)?;
    let (old, new) = (old.to_string(), new.to_string());
    let old = alphabet.plain(&old);
    let most = text.chars().count().saturating_add(1).saturating_mul(new.len().max(1));
    let finds = if old.is_empty() { usize::MAX } else { text.len() / old.chars().count().max(1) };
    if most.min(finds.saturating_mul(new.len()).saturating_add(text.len())) > MAX_RESULT {
        return Err(Error::new(ErrorKind::InvalidOperation, "replace: the result would be too large"));
    }
    Ok(Text::new(text, alphabet).replace(&old, &new, limit_of(limit)).into())
}

fn without(alphabet: &Alphabet, text: &str, args: &[Value], prefix: bool) -> Result<Value, Error> {
    let (part,): (String,) = from_args(args)?;
    let (text, part) = (Text::new(text, alphabet), alphabet.plain(&part));
    Ok(if prefix { text.without_prefix(&part) } else { text.without_suffix(&part) }.into())
}

fn borders(alphabet: &Alphabet, text: &str, args: &[Value], has: impl Fn(&str, &str) -> bool) -> Result<Value, Error> {
    let (parts,): (Value,) = from_args(args)?;
    let text = alphabet.plain(text);
    if let Some(part) = parts.as_str() {
        return Ok(has(&text, &alphabet.plain(part)).into());
    }
    let mut parts = parts.try_iter()?;
    Ok(parts.any(|part| part.as_str().is_some_and(|part| has(&text, &alphabet.plain(part)))).into())
}

fn join(_: &Alphabet, text: &str, args: &[Value]) -> Result<Value, Error> {
    let (values,): (Value,) = from_args(args)?;
    let mut joined = String::new();
    for (index, value) in values.try_iter()?.enumerate() {
        if index > 0 {
            joined.push_str(text);
        }
        joined.push_str(&value.to_string());
        if joined.len() > MAX_RESULT {
            return Err(Error::new(ErrorKind::InvalidOperation, "join: the result is too large"));
        }
    }
    Ok(joined.into())
}

fn title(text: &str) -> String {
    let mut inside = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase())
        } else {
            out.extend(c.to_uppercase())
        }
        inside = c.is_alphabetic();
    }
    out
}

fn capitalise(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().into_iter().flat_map(char::to_uppercase);
    first.chain(chars.flat_map(char::to_lowercase)).collect()
}
