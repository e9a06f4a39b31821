//! What several subschemas together ask of a value, by its type.

use llguidance::derivre::RegexAst;
use rustc_hash::{FxHashMap, FxHashSet};
use serde_json::{Number, Value};

use super::number::{NumberRule, refuses_multiples_of};
use super::source::{Id, Source, shortened};
use super::{number, pattern, text};
use crate::error::Result;

/// The subschemas that all apply to a value: sorted, each once.
pub type All = Vec<Id>;

/// The types of JSON, as bits; an integer is a number with a rule.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Types(u8);

impl Types {
    /// `null`.
    pub const NULL: Self = Self(1);
    /// `true` and `false`.
    pub const BOOLEAN: Self = Self(2);
    /// Numbers.
    pub const NUMBER: Self = Self(4);
    /// Strings.
    pub const STRING: Self = Self(8);
    /// Arrays.
    pub const ARRAY: Self = Self(16);
    /// Objects.
    pub const OBJECT: Self = Self(32);
    /// All of them.
    pub const ANY: Self = Self(63);

    /// Whether one is among them.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// What is in both.
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The type of a value.
    pub fn of(value: &Value) -> Self {
        match value {
            Value::Null => Self::NULL,
            Value::Bool(_) => Self::BOOLEAN,
            Value::Number(_) => Self::NUMBER,
            Value::String(_) => Self::STRING,
            Value::Array(_) => Self::ARRAY,
            Value::Object(_) => Self::OBJECT,
        }
    }

    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "null" => Self::NULL,
            "boolean" => Self::BOOLEAN,
            "number" | "integer" => Self::NUMBER,
            "string" => Self::STRING,
            "array" => Self::ARRAY,
            "object" => Self::OBJECT,
            _ => return None,
        })
    }
}

/// How long or how many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Size {
    /// At least.
    pub min: u32,
    /// At most; `None` has no limit.
    pub max: Option<u32>,
}

impl Size {
    /// Whether a number is inside.
    pub fn holds(self, size: usize) -> bool {
        size >= self.min as usize && self.max.is_none_or(|max| size <= max as usize)
    }

    /// Whether no number is inside.
    pub fn is_empty(self) -> bool {
        self.max.is_some_and(|max| max < self.min)
    }
}

/// What a string has to fulfil.
#[derive(Clone, Default)]
pub struct TextRule {
    /// Characters.
    pub size: Size,
    /// What it matches, as it is spelt.
    pub matches: Vec<RegexAst>,
}

/// What an array has to fulfil.
#[derive(Clone, Default)]
pub struct ItemsRule {
    /// Items with schemas of their own.
    pub prefix: Vec<All>,
    /// What all the others fulfil.
    pub rest: All,
    /// How many.
    pub size: Size,
}

/// What an object has to fulfil.
#[derive(Clone, Default)]
pub struct MembersRule {
    /// Members with schemas of their own, in their order.
    pub named: Vec<(String, All)>,
    /// Where each of them is.
    places: FxHashMap<String, usize>,
    /// Those that must be there.
    pub required: Vec<String>,
    /// What all the others fulfil.
    pub rest: All,
    /// How many.
    pub size: Size,
}

impl MembersRule {
    /// Takes the properties of one more subschema, and what it asks of all others.
    fn join(&mut self, named: Vec<(String, Id)>, rest: Option<Id>) {
        let names: FxHashSet<&str> = named.iter().map(|(name, _)| name.as_str()).collect();
        for (_, all) in self.named.iter_mut().filter(|(name, _)| !names.contains(name.as_str())) {
            *all = with(all, rest);
        }
        for (name, id) in &named {
            let place = *self.places.entry(name.clone()).or_insert_with(|| {
                self.named.push((name.clone(), self.rest.clone()));
                self.named.len() - 1
            });
            self.named[place].1 = with(&self.named[place].1, Some(*id));
        }
        self.rest = with(&self.rest, rest);
    }

    /// What the member of that name fulfils.
    pub fn of(&self, name: &str) -> &All {
        self.places.get(name).map_or(&self.rest, |&place| &self.named[place].1)
    }

    /// Gives required members without a schema of their own a place after all others.
    fn place_required(&mut self) {
        for name in &self.required {
            self.places.entry(name.clone()).or_insert_with(|| {
                self.named.push((name.clone(), self.rest.clone()));
                self.named.len() - 1
            });
        }
    }
}

/// What subschemas without alternatives ask together.
#[derive(Clone)]
pub struct Rules {
    /// Which types are allowed.
    pub types: Types,
    /// The only values allowed, if they are told.
    pub values: Option<Vec<Value>>,
    /// For numbers.
    pub number: NumberRule,
    /// For strings.
    pub text: TextRule,
    /// For arrays.
    pub items: ItemsRule,
    /// For objects.
    pub members: MembersRule,
}

impl Rules {
    /// What the subschemas ask together, their alternatives and references left aside.
    pub fn of(source: &mut Source, all: &[Id]) -> Result<Self> {
        let mut rules = Self {
            types: Types::ANY,
            values: None,
            number: NumberRule::default(),
            text: TextRule::default(),
            items: ItemsRule::default(),
            members: MembersRule::default(),
        };
        for &id in all {
            Reader { source, id, rules: &mut rules }.read()?;
        }
        rules.members.place_required();
        Ok(rules)
    }
}

/// Adds what one subschema asks.
struct Reader<'a, 's> {
    source: &'a mut Source<'s>,
    id: Id,
    rules: &'a mut Rules,
}

impl<'s> Reader<'_, 's> {
    fn read(mut self) -> Result<()> {
        if self.source.is_false(self.id) {
            self.rules.types = Types(0);
            return Ok(());
        }
        self.types()?;
        self.values()?;
        self.numbers()?;
        self.text()?;
        self.items()?;
        self.members()
    }

    fn get(&self, keyword: &str) -> Option<&'s Value> {
        self.source.keyword(self.id, keyword)
    }

    fn types(&mut self) -> Result<()> {
        let Some(value) = self.get("type") else { return Ok(()) };
        let names: Vec<&Value> = value.as_array().map_or_else(|| vec![value], |list| list.iter().collect());
        let mut types = Types(0);
        for name in &names {
            let one = name.as_str().and_then(Types::named);
            types.0 |= one.ok_or_else(|| self.wrong("type", &format!("{} is no type", shortened(name))))?.0;
        }
        self.rules.types = self.rules.types.and(types);
        self.rules.number.integer |= names.iter().all(|name| *name != "number") && types.has(Types::NUMBER);
        Ok(())
    }

    fn values(&mut self) -> Result<()> {
        if let Some(value) = self.get("const") {
            self.keep(std::slice::from_ref(value));
        }
        if let Some(value) = self.get("enum") {
            let list = value.as_array().ok_or_else(|| self.wrong("enum", "must be a list"))?;
            self.keep(list);
        }
        Ok(())
    }

    /// Takes only those of the values that were allowed before.
    fn keep(&mut self, values: &[Value]) {
        match &mut self.rules.values {
            None => self.rules.values = Some(values.to_vec()),
            Some(before) => before.retain(|old| values.iter().any(|value| equal(value, old))),
        }
    }

    fn numbers(&mut self) -> Result<()> {
        for (keyword, excluded) in [("minimum", false), ("exclusiveMinimum", true)] {
            if let Some(bound) = self.number(keyword)? {
                self.rules.number.at_least(bound, excluded);
            }
        }
        for (keyword, excluded) in [("maximum", false), ("exclusiveMaximum", true)] {
            if let Some(bound) = self.number(keyword)? {
                self.rules.number.at_most(bound, excluded);
            }
        }
        if let Some(of) = self.number("multipleOf")? {
            if let Some(why) = refuses_multiples_of(of) {
                return Err(self.wrong("multipleOf", &why));
            }
            self.rules.number.multiples.push(of.clone());
        }
        Ok(())
    }

    fn text(&mut self) -> Result<()> {
        let size = self.size("minLength", "maxLength", self.rules.text.size)?;
        self.rules.text.size = size;
        if let Some(value) = self.get("pattern") {
            let written = value.as_str().ok_or_else(|| self.wrong("pattern", "must be a string"))?;
            let ast = pattern::search(written, &text::character()).map_err(|why| self.wrong("pattern", &why))?;
            self.rules.text.matches.push(ast);
        }
        if let Some(value) = self.get("format") {
            let known = value.as_str().and_then(|name| pattern::format(name, &text::character()));
            let why = || format!("{} is not among the known formats: {}", shortened(value), pattern::formats());
            self.rules.text.matches.push(known.ok_or_else(|| self.wrong("format", &why()))?);
        }
        Ok(())
    }

    fn items(&mut self) -> Result<()> {
        if !matches!(self.get("uniqueItems"), None | Some(Value::Bool(false))) {
            return Err(self.wrong("uniqueItems", "items cannot be kept apart"));
        }
        let size = self.size("minItems", "maxItems", self.rules.items.size)?;
        let listed = self.get("items").is_some_and(Value::is_array);
        let prefix = self.source.children(self.id, if listed { "items" } else { "prefixItems" })?;
        let rest = self.child(if listed { "additionalItems" } else { "items" })?;
        let mine = |at: usize| prefix.get(at).copied().or(rest);
        let old = std::mem::take(&mut self.rules.items);
        let positions = 0..old.prefix.len().max(prefix.len());
        let joined = positions.map(|at| with(old.prefix.get(at).unwrap_or(&old.rest), mine(at))).collect();
        self.rules.items = ItemsRule { prefix: joined, rest: with(&old.rest, rest), size };
        Ok(())
    }

    fn members(&mut self) -> Result<()> {
        let size = self.size("minProperties", "maxProperties", self.rules.members.size)?;
        let named = self.properties()?;
        let rest = self.child("additionalProperties")?;
        self.rules.members.size = size;
        self.rules.members.join(named, rest);
        self.required()
    }

    fn properties(&mut self) -> Result<Vec<(String, Id)>> {
        let Some(value) = self.get("properties") else { return Ok(Vec::new()) };
        let object = value.as_object().ok_or_else(|| self.wrong("properties", "must be an object of schemas"))?;
        let numbered = object.iter().map(|(name, value)| {
            let id = self.source.child(self.id, &["properties", name], value)?;
            Ok((name.clone(), id))
        });
        numbered.collect()
    }

    fn required(&mut self) -> Result<()> {
        let Some(value) = self.get("required") else { return Ok(()) };
        let names = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
        for name in names.ok_or_else(|| self.wrong("required", "must be a list of strings"))? {
            self.rules.members.required.push(name.to_owned());
        }
        Ok(())
    }

    /// The number of the subschema under a keyword, if it is there.
    fn child(&mut self, keyword: &str) -> Result<Option<Id>> {
        match self.get(keyword) {
            Some(value) => self.source.child(self.id, &[keyword], value).map(Some),
            None => Ok(None),
        }
    }

    fn number(&self, keyword: &str) -> Result<Option<&'s Number>> {
        match self.get(keyword) {
            None => Ok(None),
            Some(Value::Number(number)) => Ok(Some(number)),
            Some(_) => Err(self.wrong(keyword, "must be a number")),
        }
    }

    fn size(&self, min: &str, max: &str, old: Size) -> Result<Size> {
        let count = |keyword: &str| match self.number(keyword)? {
            None => Ok(None),
            Some(number) => match number.as_f64().filter(|size| *size >= 0.0 && size.fract() == 0.0) {
                Some(size) => Ok(Some(size.min(f64::from(u32::MAX - 1)) as u32)),
                None => Err(self.wrong(keyword, "must be an integer that is not negative")),
            },
        };
        let max = count(max)?.into_iter().chain(old.max).min();
        Ok(Size { min: count(min)?.unwrap_or(0).max(old.min), max })
    }

    fn wrong(&self, keyword: &str, why: &str) -> crate::error::Error {
        self.source.wrong(self.id, keyword, why)
    }
}

/// The subschemas and one more.
pub fn with(all: &All, more: Option<Id>) -> All {
    let mut joined = all.clone();
    if let Some(id) = more
        && let Err(place) = joined.binary_search(&id)
    {
        joined.insert(place, id);
    }
    joined
}

/// Whether two values are equal, as JSON Schema compares them.
pub fn equal(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => number::equal(one, other),
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| equal(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            one.len() == other.len()
                && one.iter().all(|(key, one)| other.get(key).is_some_and(|other| equal(one, other)))
        }
        _ => one == other,
    }
}
