//! The parameters of tools, as llama.cpp can read them.
//!
//! llama.cpp makes grammars of them in C++ that nothing interrupts: it follows references round in circles, copies
//! what is below a list of types for each of them, and needs n³ steps for n optional properties. It refuses much that a
//! JSON Schema may say, and misreads some of it. So it gets a schema with what its grammars can hold: references to
//! definitions by plain names, no lists of types, no `allOf`, patterns that it can follow. What is left out is checked
//! when the call is there; only what no grammar can be made of is refused.

mod pattern;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// Schemas in all tools of a request; each stands for some rules of the grammar.
const MAX_PLACES: usize = 6_000;
/// Bytes of the names that their rules get, which are made of where they are.
const MAX_NAMES: usize = 2 << 20;
/// Bytes of the name of a property.
const MAX_NAME: usize = 256;
/// What objects may cost: n³ for n optional properties, and 100 n² for n of any kind. Half a second.
const MAX_WORK: u64 = 150_000_000;
/// Patterns; llama.cpp copies all rules for each.
const MAX_PATTERNS: usize = 200;
/// Alternatives of one value, those of its alternatives included.
const MAX_ALTERNATIVES: u64 = 1_000;
/// The largest bound of an integer: so many digits are certain everywhere.
const MAX_BOUND: f64 = 9_007_199_254_740_992.0;

/// Keywords that llama.cpp reads, or that are replaced.
const READ: [&str; 24] = [
    "$ref",
    "$defs",
    "definitions",
    "anyOf",
    "oneOf",
    "allOf",
    "type",
    "const",
    "enum",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "prefixItems",
    "minItems",
    "maxItems",
    "pattern",
    "format",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
];

type Fields = Map<String, Value>;
type Read<T> = Result<T, String>;

/// Definitions of tools whose parameters llama.cpp can read, in little time.
///
/// # Errors
/// `Grammar` names the tool, and what in its parameters is wrong or too large.
pub fn readable(tools: &[Value]) -> Result<Vec<Value>> {
    let mut budget = Budget::default();
    tools.iter().map(|tool| readable_tool(tool, &mut budget)).collect()
}

fn readable_tool(tool: &Value, budget: &mut Budget) -> Result<Value> {
    let mut tool = tool.clone();
    let Some(Value::Object(function)) = tool.get_mut("function") else { return Ok(tool) };
    let given = function.remove("parameters").filter(|given| !given.is_null()).unwrap_or_else(|| json!({}));
    let read = Reader::new(&given, budget).document();
    let read = read.map_err(|why| {
        let name = function.get("name").and_then(Value::as_str).unwrap_or("?");
        Error::Grammar(format!("no grammar can be made of the parameters of the tool {name:?}: {why}"))
    })?;
    function.insert("parameters".into(), read);
    if function.get("description").is_some_and(|text| !text.is_string()) {
        function.remove("description");
    }
    Ok(tool)
}

/// What was used up.
#[derive(Default)]
struct Budget {
    places: usize,
    names: usize,
    work: u64,
    patterns: usize,
}

impl Budget {
    fn place(&mut self, at: &str) -> Read<()> {
        self.places += 1;
        self.names += at.len();
        match self.places > MAX_PLACES || self.names > MAX_NAMES {
            true => {
                Err(format!("they are too large; {MAX_PLACES} schemas with {MAX_NAMES} bytes of names may be in them"))
            }
            false => Ok(()),
        }
    }

    fn object(&mut self, properties: usize, optional: usize, at: &str) -> Read<()> {
        let (all, optional) = (properties as u64, optional as u64);
        self.work = self.work.saturating_add(all.saturating_mul(all).saturating_mul(100));
        self.work = self.work.saturating_add(optional.saturating_mul(optional).saturating_mul(optional));
        match self.work > MAX_WORK {
            true => Err(format!("{properties} properties at {at} are too many, {optional} of them optional")),
            false => Ok(()),
        }
    }
}

/// Reads one schema.
struct Reader<'a> {
    root: &'a Value,
    budget: &'a mut Budget,
    /// The names of the definitions that references lead to.
    names: HashMap<String, String>,
    definitions: Fields,
}

impl<'a> Reader<'a> {
    fn new(root: &'a Value, budget: &'a mut Budget) -> Self {
        Self { root, budget, names: HashMap::new(), definitions: Map::new() }
    }

    fn document(mut self) -> Read<Value> {
        let root = self.followed(self.root, "#")?;
        let Value::Object(mut read) = self.schema(root, "#")? else { return Err("they are no object".into()) };
        if !["type", "anyOf", "const", "enum", "$ref"].iter().any(|key| read.contains_key(*key)) {
            read.insert("type".into(), "object".into());
        }
        if !self.definitions.is_empty() {
            read.insert("$defs".into(), self.definitions.into());
        }
        let read = read.into();
        Alternatives::of(&read, &self.names).check_below(&read)?;
        Ok(read)
    }

    fn schema(&mut self, schema: &Value, at: &str) -> Read<Value> {
        self.budget.place(at)?;
        match schema {
            Value::Bool(_) => Ok(json!({})),
            Value::Object(fields) => {
                let others = fields.iter().filter(|(key, _)| !is_read(key));
                let mut out: Fields = others.map(|(key, value)| (key.clone(), value.clone())).collect();
                out.extend(self.meaning(fields, at)?);
                Ok(out.into())
            }
            _ => Err(format!("a schema is an object, or true or false, not {} at {at}", shown(schema))),
        }
    }

    /// What is read of a schema, in the order in which llama.cpp decides.
    fn meaning(&mut self, fields: &Fields, at: &str) -> Read<Fields> {
        if let Some(reference) = fields.get("$ref") {
            return self.reference(reference, at);
        }
        let has_properties = fields.contains_key("properties");
        for key in ["anyOf", "oneOf"] {
            // Beside properties they mostly say which of these are required.
            if let Some(choices) = fields.get(key).filter(|_| !has_properties) {
                return self.choices(choices, &format!("{at}/{key}"));
            }
        }
        if let Some(parts) = fields.get("allOf") {
            return self.merged(fields, parts, at);
        }
        if let Some(value) = fields.get("const") {
            return Ok(one("const", value.clone()));
        }
        if let Some(values) = fields.get("enum") {
            let is_list = values.as_array().is_some_and(|values| !values.is_empty());
            return if is_list { Ok(one("enum", values.clone())) } else { Err(wrong("enum", values, at)) };
        }
        match fields.get("type") {
            None => self.of_type(guessed(fields), fields, at),
            Some(Value::String(kind)) => self.of_type(kind, fields, at),
            Some(Value::Array(kinds)) => self.of_types(kinds, fields, at),
            Some(other) => Err(wrong("type", other, at)),
        }
    }

    fn of_types(&mut self, kinds: &[Value], fields: &Fields, at: &str) -> Read<Fields> {
        let names: Option<BTreeSet<&str>> = kinds.iter().map(Value::as_str).collect();
        let Some(names) = names.filter(|names| !names.is_empty()) else {
            return Err(wrong("type", &kinds.into(), at));
        };
        let mut choices = Vec::new();
        for name in &names {
            self.budget.place(at)?;
            choices.push(self.of_type(name, fields, at)?);
        }
        Ok(if choices.len() == 1 { choices.remove(0) } else { one("anyOf", json!(choices)) })
    }

    fn of_type(&mut self, kind: &str, fields: &Fields, at: &str) -> Read<Fields> {
        let more = match kind {
            "object" => self.object(fields, at)?,
            "array" => self.array(fields, at)?,
            "string" => self.string(fields),
            "integer" => integer(fields),
            "number" | "boolean" | "null" => Map::new(),
            "" => return Ok(Map::new()),
            _ => return Err(wrong("type", &kind.into(), at)),
        };
        Ok(one("type", kind.into()).into_iter().chain(more).collect())
    }

    fn object(&mut self, fields: &Fields, at: &str) -> Read<Fields> {
        let mut out = Map::new();
        let empty = Map::new();
        let properties = match fields.get("properties") {
            None => &empty,
            Some(Value::Object(properties)) => properties,
            Some(other) => return Err(wrong("properties", other, at)),
        };
        let required = fields.get("required").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let required: BTreeSet<&str> = required.iter().filter_map(Value::as_str).collect();
        let optional = properties.keys().filter(|name| !required.contains(name.as_str())).count();
        self.budget.object(properties.len(), optional, at)?;
        let mut read = Map::new();
        for (name, property) in properties {
            if name.len() > MAX_NAME {
                return Err(format!("the name of a property has {} bytes at {at}; at most {MAX_NAME}", name.len()));
            }
            read.insert(name.clone(), self.schema(property, &format!("{at}/properties/{name}"))?);
        }
        if fields.contains_key("properties") {
            out.insert("properties".into(), read.into());
            out.insert("required".into(), json!(required));
        }
        out.extend(self.others(fields.get("additionalProperties"), properties, at)?);
        Ok(out)
    }

    /// The other properties that an object may have.
    fn others(&mut self, others: Option<&Value>, properties: &Fields, at: &str) -> Read<Fields> {
        let read = match others {
            None => return Ok(Map::new()),
            Some(Value::Bool(_)) => others.cloned().unwrap_or_default(),
            Some(others) => self.schema(others, &format!("{at}/additionalProperties"))?,
        };
        // llama.cpp spells out which names are none of these, and some characters come out as something else.
        let are_plain = properties.keys().all(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'));
        Ok(if are_plain { one("additionalProperties", read) } else { Map::new() })
    }

    fn array(&mut self, fields: &Fields, at: &str) -> Read<Fields> {
        match (fields.get("items"), fields.get("prefixItems")) {
            (Some(Value::Array(items)), _) | (None | Some(Value::Bool(false)), Some(Value::Array(items)))
                if !items.is_empty() =>
            {
                let read = self.list(items, &format!("{at}/items"))?;
                Ok(one("prefixItems", read.into()))
            }
            // A rest of another kind cannot be said.
            (_, Some(_)) => Ok(Map::new()),
            (items, None) => {
                let mut out = counts(fields, ["minItems", "maxItems"]);
                if let Some(items) = items.filter(|items| !items.is_array()) {
                    out.insert("items".into(), self.schema(items, &format!("{at}/items"))?);
                }
                Ok(out)
            }
        }
    }

    fn string(&mut self, fields: &Fields) -> Fields {
        let mut out = counts(fields, ["minLength", "maxLength"]);
        let found = fields.get("pattern").and_then(Value::as_str).and_then(pattern::plain);
        if let Some(found) = found.filter(|_| self.budget.patterns < MAX_PATTERNS) {
            self.budget.patterns += 1;
            out.insert("pattern".into(), found.into());
        }
        if let Some(format) = fields.get("format").filter(|format| format.is_string()) {
            out.insert("format".into(), format.clone());
        }
        out
    }

    fn choices(&mut self, choices: &Value, at: &str) -> Read<Fields> {
        match choices {
            Value::Array(choices) if !choices.is_empty() => Ok(one("anyOf", self.list(choices, at)?.into())),
            _ => Err(format!("{at} must be a list of schemas, not {}", shown(choices))),
        }
    }

    fn list(&mut self, schemas: &[Value], at: &str) -> Read<Vec<Value>> {
        schemas.iter().enumerate().map(|(index, schema)| self.schema(schema, &format!("{at}/{index}"))).collect()
    }

    /// Objects that must all hold become one; of anything else only what stands beside them is kept.
    fn merged(&mut self, fields: &Fields, parts: &Value, at: &str) -> Read<Fields> {
        let Some(parts) = parts.as_array().filter(|parts| !parts.is_empty()) else {
            return Err(wrong("allOf", parts, at));
        };
        let mut own = fields.clone();
        own.remove("allOf");
        let is_bare = !own.keys().any(|key| is_read(key) && !key.starts_with('$') && key != "definitions");
        if let ([part], true) = (parts.as_slice(), is_bare) {
            self.budget.place(at)?;
            return part.as_object().map_or_else(|| Ok(Map::new()), |part| self.meaning(part, at));
        }
        let mut whole = own.clone();
        for part in parts {
            match self.followed(part, at)? {
                Value::Object(part) if is_plain_object(part) => add(&mut whole, part),
                _ => return self.meaning(&own, at),
            }
        }
        if is_bare || is_plain_object(&own) { self.meaning(&whole, at) } else { self.meaning(&own, at) }
    }

    fn reference(&mut self, reference: &Value, at: &str) -> Read<Fields> {
        let (text, target) = self.target(reference, at)?;
        let known = self.names.get(text).cloned();
        let name = match known {
            Some(name) => name,
            None => {
                let name = self.name(text);
                self.names.insert(text.to_owned(), name.clone());
                let read = self.schema(target, text)?;
                self.definitions.insert(name.clone(), read);
                name
            }
        };
        Ok(one("$ref", format!("#/$defs/{name}").into()))
    }

    /// Letters and digits alone: llama.cpp takes names for one that differ in others.
    fn name(&self, reference: &str) -> String {
        let last = reference.rsplit('/').next().unwrap_or_default();
        let plain: String = last.chars().filter(char::is_ascii_alphanumeric).take(64).collect();
        format!("{plain}{:05}", self.names.len())
    }

    fn target<'v>(&self, reference: &'v Value, at: &str) -> Read<(&'v str, &'a Value)> {
        let text = reference.as_str().ok_or_else(|| wrong("$ref", reference, at))?;
        let found = text.strip_prefix('#').and_then(|pointer| self.root.pointer(pointer));
        let found = found.ok_or_else(|| format!("$ref at {at}: {} leads nowhere in it", shown(reference)))?;
        Ok((text, found))
    }

    /// The schema that references lead to in the end.
    fn followed<'v>(&self, schema: &'v Value, at: &str) -> Read<&'v Value>
    where
        'a: 'v,
    {
        let (mut schema, mut seen) = (schema, BTreeSet::new());
        while let Some(reference) = schema.get("$ref") {
            let (text, target) = self.target(reference, at)?;
            if !seen.insert(text.to_owned()) {
                return Err(circular(text));
            }
            schema = target;
        }
        Ok(schema)
    }
}

/// How many alternatives a value has, through references and alternatives of alternatives.
struct Alternatives<'a> {
    definitions: &'a Value,
    pointers: HashMap<&'a str, &'a str>,
    /// Of definitions; nothing while they are counted.
    known: HashMap<&'a str, Option<u64>>,
}

impl<'a> Alternatives<'a> {
    fn of(document: &'a Value, names: &'a HashMap<String, String>) -> Self {
        let pointers = names.iter().map(|(pointer, name)| (name.as_str(), pointer.as_str())).collect();
        Self { definitions: &document["$defs"], pointers, known: HashMap::new() }
    }

    /// Counts those of every value in a schema.
    fn check_below(&mut self, value: &'a Value) -> Read<()> {
        self.count(value)?;
        match value {
            Value::Object(fields) => fields.values().try_for_each(|value| self.check_below(value)),
            Value::Array(items) => items.iter().try_for_each(|item| self.check_below(item)),
            _ => Ok(()),
        }
    }

    fn count(&mut self, schema: &'a Value) -> Read<u64> {
        let mut count = match schema.get("$ref").and_then(Value::as_str) {
            Some(reference) => self.of_definition(reference.trim_start_matches("#/$defs/"))?,
            None => 1,
        };
        for choice in schema.get("anyOf").and_then(Value::as_array).into_iter().flatten() {
            count += self.count(choice)?;
        }
        match count > MAX_ALTERNATIVES {
            true => Err(format!("a value has more than {MAX_ALTERNATIVES} alternatives")),
            false => Ok(count),
        }
    }

    fn of_definition(&mut self, name: &'a str) -> Read<u64> {
        match self.known.get(name) {
            Some(Some(count)) => return Ok(*count),
            Some(None) => return Err(circular(self.pointers.get(name).unwrap_or(&name))),
            None => {}
        }
        self.known.insert(name, None);
        let count = self.definitions.get(name).map_or(Ok(1), |schema| self.count(schema))?;
        self.known.insert(name, Some(count));
        Ok(count)
    }
}

fn is_read(key: &str) -> bool {
    READ.contains(&key)
}

fn one(key: &str, value: Value) -> Fields {
    Map::from_iter([(key.to_owned(), value)])
}

/// The type that keywords speak of where none is named.
fn guessed(fields: &Fields) -> &'static str {
    let has = |keys: &[&str]| keys.iter().any(|key| fields.contains_key(*key));
    match fields.get("additionalProperties") {
        Some(others) if *others != json!(true) => "object",
        _ if has(&["properties"]) => "object",
        _ if has(&["items", "prefixItems"]) => "array",
        _ if has(&["pattern", "minLength", "maxLength"]) => "string",
        _ => "",
    }
}

/// Counts that are whole numbers, and not too large for llama.cpp.
fn counts(fields: &Fields, keys: [&str; 2]) -> Fields {
    let whole = |key: &&str| {
        let count = fields.get(*key)?.as_f64()?;
        let fits = count.fract() == 0.0 && (0.0..=f64::from(i32::MAX)).contains(&count);
        fits.then(|| ((*key).to_owned(), json!(number(count))))
    };
    keys.iter().filter_map(whole).collect()
}

#[expect(clippy::cast_possible_truncation, reason = "within MAX_BOUND")]
fn number(value: f64) -> i64 {
    value as i64
}

fn integer(fields: &Fields) -> Fields {
    let bound = |key: &str| fields.get(key).and_then(Value::as_f64).filter(|bound| bound.abs() < MAX_BOUND);
    let (low, above) = (bound("minimum").map(f64::ceil), bound("exclusiveMinimum").map(|bound| bound.floor() + 1.0));
    let (high, below) = (bound("maximum").map(f64::floor), bound("exclusiveMaximum").map(|bound| bound.ceil() - 1.0));
    let low = low.into_iter().chain(above).reduce(f64::max);
    let high = high.into_iter().chain(below).reduce(f64::min);
    if low.zip(high).is_some_and(|(low, high)| low > high) {
        return Map::new();
    }
    let bounds = [("minimum", low), ("maximum", high)];
    bounds.into_iter().filter_map(|(key, bound)| Some((key.to_owned(), json!(number(bound?))))).collect()
}

/// Whether a schema is of objects by their properties, and nothing more.
fn is_plain_object(fields: &Fields) -> bool {
    let others = ["$ref", "anyOf", "oneOf", "allOf", "const", "enum"];
    let is_object = fields.get("type").map_or_else(|| fields.contains_key("properties"), |kind| kind == "object");
    is_object && !others.iter().any(|key| fields.contains_key(*key))
}

/// Adds the properties of one object to another; of one that both have, both say what it is.
fn add(whole: &mut Fields, part: &Fields) {
    whole.insert("type".into(), "object".into());
    for (name, schema) in part.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let properties = whole.entry("properties").or_insert_with(|| json!({}));
        let Some(properties) = properties.as_object_mut() else { continue };
        let both = properties.get(name).map(|known| json!({"allOf": [known, schema]}));
        properties.insert(name.clone(), both.unwrap_or_else(|| schema.clone()));
    }
    let names = part.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
    if let Some(required) = whole.entry("required").or_insert_with(|| json!([])).as_array_mut() {
        required.extend(names);
    }
}

fn circular(pointer: &str) -> String {
    format!("$ref at {pointer}: leads back to the same schema")
}

fn wrong(key: &str, value: &Value, at: &str) -> String {
    format!("{key} cannot be {} at {at}", shown(value))
}

fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() > 60 { format!("{}…", text.chars().take(60).collect::<String>()) } else { text }
}
