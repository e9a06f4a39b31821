//! The schema as it was given: its subschemas by number, what they refer to, and which keywords they have.

use rustc_hash::{FxHashMap, FxHashSet};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A subschema's number.
pub type Id = u32;

/// Keywords that say nothing about which documents are valid.
const ANNOTATIONS: &[&str] = &[
    "title",
    "description",
    "default",
    "examples",
    "example",
    "deprecated",
    "readOnly",
    "writeOnly",
    "$schema",
    "$id",
    "$comment",
    "$anchor",
    "discriminator",
];

/// Keywords that hold subschemas for others to refer to.
const CONTAINERS: &[&str] = &["$defs", "definitions"];

/// Keywords that are understood.
const UNDERSTOOD: &[&str] = &[
    "type",
    "enum",
    "const",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "items",
    "prefixItems",
    "additionalItems",
    "minItems",
    "maxItems",
    "uniqueItems",
    "properties",
    "required",
    "additionalProperties",
    "minProperties",
    "maxProperties",
    "anyOf",
    "oneOf",
    "allOf",
    "$ref",
];

/// The subschemas met so far.
pub struct Source<'a> {
    root: &'a Value,
    values: Vec<(String, &'a Value)>,
    numbers: FxHashMap<*const Value, Id>,
    /// Subschemas that are known to lead to no circle of references.
    straight: FxHashSet<Id>,
}

impl<'a> Source<'a> {
    /// A schema; the root's number is 0.
    pub fn new(root: &'a Value) -> Result<Self> {
        let mut source =
            Self { root, values: Vec::new(), numbers: FxHashMap::default(), straight: FxHashSet::default() };
        source.intern(String::new(), root)?;
        Ok(source)
    }

    /// The number of a subschema. Its keywords are checked when it is first met.
    fn intern(&mut self, pointer: String, value: &'a Value) -> Result<Id> {
        if let Some(&id) = self.numbers.get(&std::ptr::from_ref(value)) {
            return Ok(id);
        }
        check_keywords(&pointer, value)?;
        let id = self.values.len() as Id;
        self.values.push((pointer, value));
        self.numbers.insert(value, id);
        Ok(id)
    }

    /// The subschema at `path` inside another one.
    pub fn child(&mut self, id: Id, path: &[&str], value: &'a Value) -> Result<Id> {
        let pointer = self.pointer(id, path);
        self.intern(pointer, value)
    }

    /// The subschemas in a list.
    pub fn children(&mut self, id: Id, keyword: &str) -> Result<Vec<Id>> {
        let Some(value) = self.keyword(id, keyword) else { return Ok(Vec::new()) };
        let list = value.as_array().filter(|list| !list.is_empty() || keyword == "prefixItems" || keyword == "items");
        let list = list.ok_or_else(|| self.wrong(id, keyword, "must be a list of schemas that is not empty"))?;
        list.iter().enumerate().map(|(at, value)| self.child(id, &[keyword, &at.to_string()], value)).collect()
    }

    /// What a keyword of a subschema says.
    pub fn keyword(&self, id: Id, keyword: &str) -> Option<&'a Value> {
        self.values[id as usize].1.as_object()?.get(keyword)
    }

    /// The schema `false`.
    pub fn is_false(&self, id: Id) -> bool {
        self.values[id as usize].1 == &Value::Bool(false)
    }

    /// Whether a subschema asks anything by itself, its references and alternatives left aside.
    pub fn asserts(&self, id: Id) -> bool {
        let beside = |keyword: &str| ["$ref", "allOf", "anyOf", "oneOf"].contains(&keyword);
        match self.values[id as usize].1 {
            Value::Object(object) => {
                object.keys().any(|keyword| UNDERSTOOD.contains(&keyword.as_str()) && !beside(keyword))
            }
            other => other == &Value::Bool(false),
        }
    }

    /// The subschema that `$ref` names.
    pub fn reference(&mut self, id: Id) -> Result<Option<Id>> {
        let Some(value) = self.keyword(id, "$ref") else { return Ok(None) };
        let name = value.as_str().ok_or_else(|| self.wrong(id, "$ref", "must be a string"))?;
        let Some(pointer) = self.local(name) else {
            let why = format!("{name:?} is not in this schema; only references that begin with # are followed");
            return Err(self.wrong(id, "$ref", &why));
        };
        let found =
            self.root.pointer(&pointer).ok_or_else(|| self.wrong(id, "$ref", &format!("{name:?} is not there")))?;
        if self.is_moved(&pointer) {
            return Err(self.wrong(id, "$ref", &format!("{name:?} is inside a schema with an $id of its own")));
        }
        self.intern(pointer, found).map(Some)
    }

    /// Whether a pointer leads through a schema inside which references are not those of the document.
    fn is_moved(&self, pointer: &str) -> bool {
        let ends = pointer.match_indices('/').map(|(end, _)| end).filter(|&end| end > 0);
        let mut above = ends.filter_map(|end| self.root.pointer(&pointer[..end])?.as_object());
        above.any(moves_references)
    }

    /// The JSON pointer of a reference into this document.
    fn local(&self, name: &str) -> Option<String> {
        let own = self.root.get("$id").and_then(Value::as_str).unwrap_or("").trim_end_matches('#');
        let fragment = name.strip_prefix(own).unwrap_or(name).strip_prefix('#')?;
        let pointer = percent_decoded(fragment);
        (pointer.is_empty() || pointer.starts_with('/')).then_some(pointer)
    }

    /// An error about a keyword of a subschema.
    pub fn wrong(&self, id: Id, keyword: &str, why: &str) -> Error {
        wrong(&self.values[id as usize].0, keyword, why)
    }

    /// Where a subschema is.
    pub fn place(&self, id: Id) -> String {
        format!("#{}", self.values[id as usize].0)
    }

    fn pointer(&self, id: Id, path: &[&str]) -> String {
        let mut pointer = self.values[id as usize].0.clone();
        for step in path {
            pointer.push('/');
            pointer.push_str(&step.replace('~', "~0").replace('/', "~1"));
        }
        pointer
    }

    /// Refuses a subschema that applies to the same value again through references alone.
    pub fn check_progress(&mut self, id: Id) -> Result<()> {
        let mut path = FxHashSet::default();
        let mut stack = vec![(id, false)];
        while let Some((id, left)) = stack.pop() {
            if left {
                path.remove(&id);
                self.straight.insert(id);
            } else if path.contains(&id) {
                return Err(self.wrong(id, "$ref", "leads back to the same schema without going into the value"));
            } else if !self.straight.contains(&id) {
                path.insert(id);
                stack.push((id, true));
                stack.extend(self.in_place(id)?.into_iter().map(|next| (next, false)));
            }
        }
        Ok(())
    }

    /// The subschemas that apply to the same value.
    fn in_place(&mut self, id: Id) -> Result<Vec<Id>> {
        let mut all: Vec<Id> = self.reference(id)?.into_iter().collect();
        for keyword in ["allOf", "anyOf", "oneOf"] {
            all.extend(self.children(id, keyword)?);
        }
        Ok(all)
    }
}

/// An error about a keyword.
fn wrong(pointer: &str, keyword: &str, why: &str) -> Error {
    Error::Grammar(format!("the schema cannot be used: {keyword} at #{pointer}: {why}"))
}

fn check_keywords(pointer: &str, value: &Value) -> Result<()> {
    match value {
        Value::Bool(_) => Ok(()),
        Value::Object(object) => check_object(pointer, object),
        other => Err(Error::Grammar(format!(
            "the schema cannot be used: #{pointer} is {}; a schema is an object, true or false",
            shortened(other)
        ))),
    }
}

fn check_object(pointer: &str, object: &Map<String, Value>) -> Result<()> {
    let known =
        |keyword: &&String| [ANNOTATIONS, CONTAINERS, UNDERSTOOD].iter().any(|list| list.contains(&keyword.as_str()));
    if !pointer.is_empty() && moves_references(object) {
        return Err(wrong(pointer, "$id", "only the whole schema may have one: it moves what # refers to"));
    }
    match object.keys().find(|keyword| !known(keyword)) {
        Some(keyword) => Err(wrong(pointer, keyword, "this keyword is not supported")),
        None => Ok(()),
    }
}

/// Whether references inside it are not those of the document: an `$id` that is more than a name.
fn moves_references(object: &Map<String, Value>) -> bool {
    object.get("$id").and_then(Value::as_str).is_some_and(|id| !id.starts_with('#'))
}

/// A value for a message.
pub fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// `%41` is `A`.
fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = tail.get(..2).filter(|_| *first == b'%').and_then(|code| std::str::from_utf8(code).ok());
        let byte = code.and_then(|code| u8::from_str_radix(code, 16).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
