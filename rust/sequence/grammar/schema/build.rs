//! From subschemas to the normal form: alternatives are multiplied out, everything that applies to one value is
//! joined.

use llguidance::derivre::RegexAst;
use rustc_hash::{FxHashMap, FxHashSet};
use serde_json::Value;

use super::dfa::{Dfa, Refused};
use super::number::{self, NumberRule};
use super::program::{Array, Leaf, Member, NEVER, Names, Node, Object, Others, Program, Term};
use super::rules::{All, ItemsRule, MembersRule, Rules, Size, TextRule, Types, with};
use super::source::{Id, Source};
use super::{Limits, disjoint, pattern, shortest, text};
use crate::error::{Error, Result};
use crate::llama::is_given_up;

/// The normal form of a schema.
pub fn program(schema: &Value, limits: &Limits) -> Result<Program> {
    let source = Source::new(schema)?;
    let mut builder = Builder::new(source, limits)?;
    let root = builder.node(vec![0])?;
    while let Some((node, all)) = builder.open.pop() {
        if is_given_up() {
            return Err(Error::Grammar("compiling the schema was given up".into()));
        }
        let leaves = builder.leaves(&all)?;
        builder.program.nodes[node as usize].leaves = leaves;
    }
    builder.program.root = root;
    shortest::settle(&mut builder.program);
    if builder.program.cost(root) == NEVER {
        return Err(Error::Grammar("the schema has no finite document: no value fulfils all of it".into()));
    }
    builder.keys()?;
    shortest::settle(&mut builder.program);
    Ok(builder.program)
}

/// The normal form of a single regular expression.
pub fn regex_program(ast: RegexAst, limits: &Limits) -> Result<Program, Refused> {
    let mut program = empty(limits)?;
    let dfa = Dfa::new(&ast, limits.states, limits.fuel)?;
    program.terms.push(Term { ast, dfa });
    program.nodes.push(Node { leaves: vec![Leaf::Term(0)], ..Node::default() });
    shortest::settle(&mut program);
    Ok(program)
}

fn empty(limits: &Limits) -> Result<Program, Refused> {
    Ok(Program {
        nodes: Vec::new(),
        terms: Vec::new(),
        texts: Vec::new(),
        arrays: Vec::new(),
        objects: Vec::new(),
        character: Dfa::new(&text::character(), limits.states, limits.fuel)?,
        root: 0,
    })
}

/// The normal form while it grows.
pub struct Builder<'s, 'l> {
    /// Where subschemas come from.
    pub source: Source<'s>,
    limits: &'l Limits,
    program: Program,
    nodes: FxHashMap<All, u32>,
    leaves: FxHashMap<All, Vec<Leaf>>,
    terms: FxHashMap<String, u32>,
    texts: FxHashMap<Size, u32>,
    /// Nodes whose leaves are not known yet.
    open: Vec<(u32, All)>,
    /// `oneOf`s whose branches exclude each other.
    apart: FxHashSet<Id>,
}

impl<'s, 'l> Builder<'s, 'l> {
    fn new(source: Source<'s>, limits: &'l Limits) -> Result<Self> {
        let program = empty(limits).map_err(|_| Error::Grammar("the limits are too small for any schema".into()))?;
        Ok(Self {
            source,
            limits,
            program,
            nodes: FxHashMap::default(),
            leaves: FxHashMap::default(),
            terms: FxHashMap::default(),
            texts: FxHashMap::default(),
            open: Vec::new(),
            apart: FxHashSet::default(),
        })
    }

    /// The place of values that fulfil all of these.
    fn node(&mut self, all: All) -> Result<u32> {
        if let Some(&node) = self.nodes.get(&all) {
            return Ok(node);
        }
        let node = self.fresh_node()?;
        self.nodes.insert(all.clone(), node);
        self.open.push((node, all));
        Ok(node)
    }

    fn fresh_node(&mut self) -> Result<u32> {
        if self.program.nodes.len() >= self.limits.nodes {
            return Err(Error::Grammar(format!(
                "the schema is too big: it has more than {} different places for values",
                self.limits.nodes
            )));
        }
        self.program.nodes.push(Node::default());
        Ok(self.program.nodes.len() as u32 - 1)
    }

    /// What values that fulfil all of these may be.
    fn leaves(&mut self, all: &All) -> Result<Vec<Leaf>> {
        let mut leaves = Vec::new();
        let mut seen = FxHashSet::default();
        for alternative in self.alternatives(all)? {
            leaves.extend(self.leaves_of(&alternative)?.into_iter().filter(|&leaf| seen.insert(leaf)));
        }
        Ok(leaves)
    }

    /// Subschemas without alternatives, each of which alone allows a part of what these allow.
    pub fn alternatives(&mut self, all: &All) -> Result<Vec<All>> {
        for &id in all {
            self.source.check_progress(id)?;
        }
        let mut found = Vec::new();
        let mut stack = vec![Branch { plain: Vec::new(), seen: Vec::new(), todo: all.clone(), choices: Vec::new() }];
        while let Some(mut branch) = stack.pop() {
            self.flatten(&mut branch)?;
            match branch.choices.pop() {
                Some(choice) => stack.extend(choice.into_iter().rev().map(|id| branch.choosing(id))),
                None => found.push(branch.settled()),
            }
            if found.len() + stack.len() > self.limits.alternatives {
                let place = self.source.place(all.first().copied().unwrap_or(0));
                let most = self.limits.alternatives;
                return Err(Error::Grammar(format!(
                    "the schema cannot be used: anyOf, oneOf and allOf at {place} multiply to more than {most} alternatives"
                )));
            }
        }
        let mut seen = FxHashSet::default();
        found.retain(|alternative| seen.insert(alternative.clone()));
        Ok(found)
    }

    /// Follows references and `allOf`, and collects the choices.
    fn flatten(&mut self, branch: &mut Branch) -> Result<()> {
        while let Some(id) = branch.todo.pop() {
            if branch.seen.contains(&id) {
                continue;
            }
            branch.seen.push(id);
            branch.plain.push(id);
            branch.todo.extend(self.source.reference(id)?);
            branch.todo.extend(self.source.children(id, "allOf")?);
            if self.source.keyword(id, "oneOf").is_some() {
                self.check_apart(id)?;
                branch.choices.push(self.source.children(id, "oneOf")?);
            }
            if self.source.keyword(id, "anyOf").is_some() {
                branch.choices.push(self.source.children(id, "anyOf")?);
            }
        }
        branch.plain.retain(|&id| self.source.asserts(id));
        Ok(())
    }

    /// Refuses a `oneOf` of which two branches may both match.
    fn check_apart(&mut self, id: Id) -> Result<()> {
        if !self.apart.insert(id) {
            return Ok(());
        }
        let branches = self.source.children(id, "oneOf")?;
        let branches = branches.into_iter().map(|branch| self.beside(branch, id)).collect::<Result<Vec<_>>>()?;
        for (at, one) in branches.iter().enumerate() {
            for (other_at, other) in branches.iter().enumerate().skip(at + 1) {
                if !disjoint::branches(self, one, other)? {
                    let why = format!("branches {at} and {other_at} may both match a value; use anyOf");
                    return Err(self.source.wrong(id, "oneOf", &why));
                }
            }
        }
        Ok(())
    }

    /// What values that fulfil all of these, which have no alternatives, may be.
    fn leaves_of(&mut self, all: &All) -> Result<Vec<Leaf>> {
        if let Some(leaves) = self.leaves.get(all) {
            return Ok(leaves.clone());
        }
        let rules = Rules::of(&mut self.source, all)?;
        let leaves = match &rules.values {
            Some(values) => self.values(&rules, values)?,
            None => self.types(&rules, all)?,
        };
        self.leaves.insert(all.clone(), leaves.clone());
        Ok(leaves)
    }

    /// The leaves of values that are told one by one.
    fn values(&mut self, rules: &Rules, values: &[Value]) -> Result<Vec<Leaf>> {
        let mut plain = Vec::new();
        let mut leaves = Vec::new();
        for value in values {
            if !self.admits(rules, value)? {
                continue;
            }
            match value {
                Value::Array(items) => leaves.push(self.literal_array(items)?),
                Value::Object(members) => leaves.push(self.literal_object(members)?),
                scalar => plain.push(literal(scalar)),
            }
        }
        if !plain.is_empty() {
            leaves.push(self.term(RegexAst::Or(plain), "an enum")?);
        }
        Ok(leaves)
    }

    fn literal_node(&mut self, value: &Value) -> Result<u32> {
        let leaf = match value {
            Value::Array(items) => self.literal_array(items)?,
            Value::Object(members) => self.literal_object(members)?,
            scalar => self.term(literal(scalar), "a constant")?,
        };
        let node = self.fresh_node()?;
        self.program.nodes[node as usize].leaves.push(leaf);
        Ok(node)
    }

    fn literal_array(&mut self, items: &[Value]) -> Result<Leaf> {
        let prefix = items.iter().map(|item| self.literal_node(item)).collect::<Result<Vec<_>>>()?;
        let size = Size { min: prefix.len() as u32, max: Some(prefix.len() as u32) };
        Ok(self.array(prefix, None, size))
    }

    fn literal_object(&mut self, members: &serde_json::Map<String, Value>) -> Result<Leaf> {
        let mut named = Vec::new();
        for (name, value) in members {
            named.push(member(name, self.literal_node(value)?, true));
        }
        let size = Size { min: 0, max: None };
        Ok(self.object(named, None, size))
    }

    /// The leaves of every type that is allowed.
    fn types(&mut self, rules: &Rules, all: &All) -> Result<Vec<Leaf>> {
        let place = all.last().map_or_else(|| "#".to_owned(), |&id| self.source.place(id));
        let mut leaves = Vec::new();
        if rules.types.has(Types::NUMBER) {
            self.check_numbers(&rules.number, all)?;
        }
        let scalars = scalars(rules);
        if !scalars.is_empty() {
            leaves.push(self.term(RegexAst::Or(scalars), &place)?);
        }
        if rules.types.has(Types::STRING) && !rules.text.size.is_empty() {
            leaves.push(self.text(&rules.text, &place)?);
        }
        if rules.types.has(Types::ARRAY) {
            leaves.push(self.items(&rules.items)?);
        }
        if rules.types.has(Types::OBJECT) {
            leaves.push(self.members(&rules.members, &place)?);
        }
        Ok(leaves)
    }

    /// Refuses bounds between which there are numbers, but none with so few digits as are written.
    fn check_numbers(&mut self, rule: &NumberRule, all: &All) -> Result<()> {
        let hopeless = |dfa: Dfa| dfa.is_empty();
        if !rule.is_fine() || rule.is_empty() || !self.dfa(&rule.regex()).is_ok_and(hopeless) {
            return Ok(());
        }
        let bounds = ["minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"];
        let places = all.iter().flat_map(|&id| bounds.map(|keyword| (id, keyword)));
        let longest = places.max_by_key(|&(id, keyword)| match self.source.keyword(id, keyword) {
            Some(Value::Number(bound)) => number::digits(bound),
            _ => 0,
        });
        let (id, keyword) = longest.unwrap_or((0, bounds[0]));
        let why = format!("no number of at most {} digits fulfils it, and more are not written", rule.digits());
        Err(self.source.wrong(id, keyword, &why))
    }

    fn text(&mut self, rule: &TextRule, place: &str) -> Result<Leaf> {
        if !rule.matches.is_empty() {
            return self.term(rule.regex(), place);
        }
        let next = self.program.texts.len() as u32;
        let number = *self.texts.entry(rule.size).or_insert(next);
        if number == next {
            self.program.texts.push(rule.size);
        }
        Ok(Leaf::Text(number))
    }

    fn items(&mut self, rule: &ItemsRule) -> Result<Leaf> {
        let prefix = rule.prefix.iter().map(|all| self.node(all.clone())).collect::<Result<Vec<_>>>()?;
        let rest = Some(self.node(rule.rest.clone())?);
        Ok(self.array(prefix, rest, rule.size))
    }

    fn members(&mut self, rule: &MembersRule, place: &str) -> Result<Leaf> {
        let others = (rule.size.min as usize).saturating_sub(rule.named.len());
        if others > self.limits.others {
            return Err(Error::Grammar(format!(
                "the schema is too big: minProperties at {place} asks for {others} properties without names of their own; at most {} are allowed",
                self.limits.others
            )));
        }
        let required: FxHashSet<&str> = rule.required.iter().map(String::as_str).collect();
        let mut named = Vec::new();
        for (name, all) in &rule.named {
            named.push(member(name, self.node(all.clone())?, required.contains(name.as_str())));
        }
        let node = self.node(rule.rest.clone())?;
        // The term of the keys comes later, if others are possible at all.
        Ok(self.object(named, Some(Others { key: u32::MAX, key_cost: 2, node, cost: NEVER }), rule.size))
    }

    fn array(&mut self, prefix: Vec<u32>, rest: Option<u32>, size: Size) -> Leaf {
        self.program.arrays.push(Array { prefix, rest, size, ahead: Vec::new() });
        Leaf::Array(self.program.arrays.len() as u32 - 1)
    }

    fn object(&mut self, named: Vec<Member>, others: Option<Others>, size: Size) -> Leaf {
        self.program.objects.push(Object {
            names: Names::default(),
            barred: Vec::new(),
            named,
            others,
            size,
            reach: Vec::new(),
            required: Vec::new(),
            ahead: Vec::new(),
        });
        Leaf::Object(self.program.objects.len() as u32 - 1)
    }

    /// A term: the same expression has the same number.
    fn term(&mut self, ast: RegexAst, place: &str) -> Result<Leaf> {
        let mut name = String::new();
        ast.write_to_str(&mut name, usize::MAX, None);
        if let Some(&number) = self.terms.get(&name) {
            return Ok(Leaf::Term(number));
        }
        let dfa = self.dfa(&ast).map_err(|refused| match refused {
            Refused::Malformed(why) => Error::Grammar(format!("the schema cannot be used: {place}: {why}")),
            Refused::TooBig => Error::Grammar(format!(
                "the schema is too big: what {place} matches needs more than {} states; use a simpler pattern or smaller counts",
                self.limits.states
            )),
        })?;
        self.program.terms.push(Term { ast, dfa });
        let number = self.program.terms.len() as u32 - 1;
        self.terms.insert(name, number);
        Ok(Leaf::Term(number))
    }

    /// The automaton of an expression.
    pub fn dfa(&mut self, ast: &RegexAst) -> Result<Dfa, Refused> {
        Dfa::new(ast, self.limits.states, self.limits.fuel)
    }

    /// Makes the terms of all other keys: once it is known which names are possible.
    fn keys(&mut self) -> Result<()> {
        for at in 0..self.program.objects.len() {
            let object = &self.program.objects[at];
            if object.others.is_none() {
                continue;
            }
            let names = object.named.iter().map(Member::name).chain(object.barred.iter().map(String::as_str));
            let taken = names.map(|name| RegexAst::Literal(name.to_owned())).collect();
            let any = text::quoted(text::times(text::canonical(), 0, None));
            let ast = RegexAst::And(vec![any, RegexAst::Not(Box::new(RegexAst::Or(taken)))]);
            let Leaf::Term(key) = self.term(ast, "the names of the properties")? else { continue };
            let cost = self.program.terms[key as usize].dfa.distance(0);
            if let Some(others) = &mut self.program.objects[at].others {
                others.key = key;
                others.key_cost = cost;
            }
        }
        Ok(())
    }

    /// Whether a value fulfils all of these.
    pub fn fulfils(&mut self, all: &All, value: &Value) -> Result<bool> {
        for alternative in self.alternatives(all)? {
            let rules = Rules::of(&mut self.source, &alternative)?;
            let told =
                rules.values.as_ref().is_none_or(|values| values.iter().any(|other| super::rules::equal(value, other)));
            if told && self.admits(&rules, value)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether a value fulfils what is asked of its type.
    pub fn admits(&mut self, rules: &Rules, value: &Value) -> Result<bool> {
        if !rules.types.has(Types::of(value)) {
            return Ok(false);
        }
        match value {
            Value::Null | Value::Bool(_) => Ok(true),
            Value::Number(number) => Ok(rules.number.admits(number)),
            Value::String(text) => Ok(self.admits_text(&rules.text, text)),
            Value::Array(items) => self.admits_items(&rules.items, items),
            Value::Object(members) => self.admits_members(&rules.members, members),
        }
    }

    fn admits_text(&mut self, rule: &TextRule, text: &str) -> bool {
        let spelt = Value::from(text).to_string();
        let inside = &spelt.as_bytes()[1..spelt.len() - 1];
        rule.size.holds(text.chars().count())
            && rule
                .matches
                .iter()
                .all(|ast| self.dfa(ast).is_ok_and(|dfa| dfa.run(inside).is_some_and(|state| dfa.accepts(state))))
    }

    fn admits_items(&mut self, rule: &ItemsRule, items: &[Value]) -> Result<bool> {
        for (at, item) in items.iter().enumerate() {
            if !self.fulfils(rule.prefix.get(at).unwrap_or(&rule.rest), item)? {
                return Ok(false);
            }
        }
        Ok(rule.size.holds(items.len()))
    }

    fn admits_members(&mut self, rule: &MembersRule, members: &serde_json::Map<String, Value>) -> Result<bool> {
        for (name, value) in members {
            if !self.fulfils(rule.of(name), value)? {
                return Ok(false);
            }
        }
        Ok(rule.size.holds(members.len()) && rule.required.iter().all(|name| members.contains_key(name)))
    }

    /// The alternatives of a branch together with what stands beside it.
    fn beside(&mut self, branch: Id, beside: Id) -> Result<Vec<Rules>> {
        let alternatives = self.alternatives(&vec![branch])?;
        alternatives.iter().map(|all| Rules::of(&mut self.source, &with(all, Some(beside)))).collect()
    }
}

/// One way through the alternatives.
struct Branch {
    /// What it asks.
    plain: All,
    /// What was followed already.
    seen: Vec<Id>,
    /// What is still to be followed.
    todo: Vec<Id>,
    /// Lists of which one each has to be chosen.
    choices: Vec<Vec<Id>>,
}

impl Branch {
    fn choosing(&self, id: Id) -> Self {
        Self { plain: self.plain.clone(), seen: self.seen.clone(), todo: vec![id], choices: self.choices.clone() }
    }

    fn settled(mut self) -> All {
        self.plain.sort_unstable();
        self.plain.dedup();
        self.plain
    }
}

impl TextRule {
    /// The strings, quotes included.
    pub fn regex(&self) -> RegexAst {
        let mut all = self.matches.clone();
        if self.matches.is_empty() || self.size != Size::default() {
            all.push(text::times(text::character(), self.size.min, self.size.max));
        }
        text::quoted(RegexAst::And(all))
    }
}

/// Everything that is not a string, an array or an object.
fn scalars(rules: &Rules) -> Vec<RegexAst> {
    let mut all = Vec::new();
    if rules.types.has(Types::NULL) {
        all.push(RegexAst::Literal("null".into()));
    }
    if rules.types.has(Types::BOOLEAN) {
        all.push(RegexAst::Regex("true|false".into()));
    }
    if rules.types.has(Types::NUMBER) {
        all.push(rules.number.regex());
    }
    all
}

/// A value that has no others inside, as it is spelt.
fn literal(value: &Value) -> RegexAst {
    match value {
        Value::String(text) => text::quoted(pattern::literal(text)),
        other => RegexAst::Literal(text::literal(other)),
    }
}

fn member(name: &str, node: u32, required: bool) -> Member {
    Member { key: format!("{}:", Value::from(name)), node, required, cost: NEVER }
}

impl Member {
    /// The name in its quotes.
    pub fn name(&self) -> &str {
        &self.key[..self.key.len() - 1]
    }
}
