//! The normal form as a grammar of llguidance: its terms are lexemes, everything else is rules.

use llguidance::api::GrammarInit;
use llguidance::derivre::RegexAst;
use llguidance::earley::lexerspec::LexerSpec;
use llguidance::earley::{Grammar, SymIdx, SymbolProps};
use rustc_hash::FxHashMap;

use super::Limits;
use super::program::{Array, Leaf, Object, Program};
use super::text::{self, SPACE};
use crate::error::{Error, Result};

/// Members times their number, where the grammar counts them.
const COUNTED: usize = 1_000;

/// Parts of this many repetitions are named.
const CHUNK: u32 = 4;

/// The grammar of a program.
pub fn grammar(program: &Program, limits: &Limits) -> Result<GrammarInit> {
    check_optional(program, limits)?;
    let mut emitter = Emitter::new(program).map_err(refused)?;
    emitter.all().map_err(refused)?;
    let size = emitter.grammar.num_symbols();
    if size > limits.symbols {
        return Err(Error::Grammar(format!(
            "the schema is too big: its grammar has {size} symbols; at most {} are allowed",
            limits.symbols
        )));
    }
    Ok(GrammarInit::Internal(emitter.grammar, emitter.lexer))
}

/// Refuses objects in which too many members may come next: each is a possibility that the grammar follows.
fn check_optional(program: &Program, limits: &Limits) -> Result<()> {
    let longest = |object: &Object| {
        (0..object.named.len()).map(|place| object.last(place as u32) as usize - place).max().unwrap_or(0)
    };
    match program.objects.iter().map(longest).max() {
        Some(longest) if longest > limits.optional => Err(Error::Grammar(format!(
            "the schema is too big: {longest} properties in a row that are not required; at most {} are allowed",
            limits.optional
        ))),
        _ => Ok(()),
    }
}

fn refused(error: impl std::fmt::Display) -> Error {
    Error::Grammar(format!("the schema cannot be used: {error}"))
}

type Made<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

struct Emitter<'a> {
    program: &'a Program,
    grammar: Grammar,
    lexer: LexerSpec,
    props: SymbolProps,
    nodes: FxHashMap<u32, SymIdx>,
    leaves: FxHashMap<Leaf, SymIdx>,
    lexemes: FxHashMap<Lexeme, SymIdx>,
    repeats: FxHashMap<(SymIdx, u32, bool), SymIdx>,
    /// Leaves whose rules are not written yet.
    open: Vec<Leaf>,
}

/// Lexemes that are not terms or strings.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Lexeme {
    Open(u8),
    Close(u8),
    Empty(u8, u8),
    Comma,
    Key(u32),
}

impl<'a> Emitter<'a> {
    fn new(program: &'a Program) -> Made<Self> {
        let mut lexer = LexerSpec::new()?;
        let class = lexer.setup_lexeme_class(RegexAst::NoMatch)?;
        Ok(Self {
            program,
            grammar: Grammar::new(None),
            lexer,
            props: SymbolProps { grammar_id: class, ..SymbolProps::default() },
            nodes: FxHashMap::default(),
            leaves: FxHashMap::default(),
            lexemes: FxHashMap::default(),
            repeats: FxHashMap::default(),
            open: Vec::new(),
        })
    }

    fn all(&mut self) -> Made<()> {
        let start = self.symbol("start");
        self.grammar.sym_props_mut(start).is_start = true;
        let root = self.node(self.program.root)?;
        self.grammar.add_rule(start, vec![root])?;
        while let Some(leaf) = self.open.pop() {
            let symbol = self.leaves[&leaf];
            match leaf {
                Leaf::Array(array) => self.array(symbol, &self.program.arrays[array as usize])?,
                Leaf::Object(object) => self.object(symbol, &self.program.objects[object as usize])?,
                Leaf::Term(_) | Leaf::Text(_) => {}
            }
        }
        Ok(())
    }

    fn symbol(&mut self, name: &str) -> SymIdx {
        self.grammar.fresh_symbol_ext(name, self.props.clone())
    }

    /// A symbol that is one of several sequences.
    fn either(&mut self, ways: Vec<Vec<SymIdx>>) -> Made<SymIdx> {
        let symbol = self.symbol("either");
        for way in ways {
            self.grammar.add_rule(symbol, way)?;
        }
        Ok(symbol)
    }

    fn node(&mut self, node: u32) -> Made<SymIdx> {
        if let Some(&symbol) = self.nodes.get(&node) {
            return Ok(symbol);
        }
        let leaves = &self.program.nodes[node as usize].leaves;
        let symbols = leaves.iter().map(|&leaf| self.leaf(leaf)).collect::<Made<Vec<_>>>()?;
        let symbol = match symbols.as_slice() {
            [only] => *only,
            several => self.either(several.iter().map(|&symbol| vec![symbol]).collect())?,
        };
        self.nodes.insert(node, symbol);
        Ok(symbol)
    }

    fn leaf(&mut self, leaf: Leaf) -> Made<SymIdx> {
        if let Some(&symbol) = self.leaves.get(&leaf) {
            return Ok(symbol);
        }
        let symbol = match leaf {
            Leaf::Term(term) => self.terminal("term", self.program.terms[term as usize].ast.clone())?,
            Leaf::Text(text) => {
                let size = self.program.texts[text as usize];
                self.terminal("text", text::quoted(text::times(text::character(), size.min, size.max)))?
            }
            Leaf::Array(_) | Leaf::Object(_) => {
                self.open.push(leaf);
                self.symbol("container")
            }
        };
        self.leaves.insert(leaf, symbol);
        Ok(symbol)
    }

    fn terminal(&mut self, name: &str, ast: RegexAst) -> Made<SymIdx> {
        let lexeme = self.lexer.add_greedy_lexeme(name.to_owned(), ast, false, None, usize::MAX)?;
        let symbol = self.symbol(name);
        self.grammar.make_terminal(symbol, lexeme, &self.lexer)?;
        Ok(symbol)
    }

    fn lexeme(&mut self, lexeme: Lexeme) -> Made<SymIdx> {
        if let Some(&symbol) = self.lexemes.get(&lexeme) {
            return Ok(symbol);
        }
        let space = || RegexAst::Regex(SPACE.into());
        let parts = match lexeme {
            Lexeme::Open(open) => vec![RegexAst::Byte(open), space()],
            Lexeme::Close(close) => vec![space(), RegexAst::Byte(close)],
            Lexeme::Empty(open, close) => vec![RegexAst::Byte(open), space(), RegexAst::Byte(close)],
            Lexeme::Comma => vec![RegexAst::Byte(b','), space()],
            Lexeme::Key(term) => {
                vec![self.program.terms[term as usize].ast.clone(), RegexAst::Byte(b':'), space()]
            }
        };
        let symbol = self.terminal("mark", RegexAst::Concat(parts))?;
        self.lexemes.insert(lexeme, symbol);
        Ok(symbol)
    }

    fn array(&mut self, symbol: SymIdx, array: &Array) -> Made<()> {
        if array.size.min == 0 {
            let empty = self.lexeme(Lexeme::Empty(b'[', b']'))?;
            self.grammar.add_rule(symbol, vec![empty])?;
        }
        if array.size.max == Some(0) {
            return Ok(());
        }
        let mut items = vec![self.lexeme(Lexeme::Open(b'['))?];
        items.extend(self.items(array)?);
        items.push(self.lexeme(Lexeme::Close(b']'))?);
        Ok(self.grammar.add_rule(symbol, items)?)
    }

    /// The items of an array that has some.
    fn items(&mut self, array: &Array) -> Made<Vec<SymIdx>> {
        let comma = self.lexeme(Lexeme::Comma)?;
        let min = array.size.min.max(1);
        let listed = array.prefix.len() as u32;
        let mut items = Vec::new();
        for &node in array.prefix.iter().take(min as usize) {
            items.extend((!items.is_empty()).then_some(comma));
            items.push(self.node(node)?);
        }
        let mut done = listed.min(min);
        if let (0, Some(rest)) = (listed, array.rest) {
            items.push(self.node(rest)?);
            done = 1;
        }
        let left = |count: u32| array.size.max.map(|max| max.saturating_sub(count));
        let from = done.max(listed);
        let rest = match array.rest {
            Some(rest) => {
                let item = self.node(rest)?;
                let item = self.either(vec![vec![comma, item]])?;
                Some(self.times(item, min.saturating_sub(from), left(from))?)
            }
            None => None,
        };
        let tail = self.optional_items(&array.prefix[(done as usize).min(array.prefix.len())..], comma, rest)?;
        items.extend(tail);
        Ok(items)
    }

    /// Items that may be left out from some place on, and then all the rest.
    fn optional_items(&mut self, nodes: &[u32], comma: SymIdx, rest: Option<SymIdx>) -> Made<Option<SymIdx>> {
        let mut tail = rest;
        for &node in nodes.iter().rev() {
            let more = [comma, self.node(node)?].into_iter().chain(tail).collect();
            tail = Some(self.either(vec![Vec::new(), more])?);
        }
        Ok(tail)
    }

    /// Between `min` and `max` times.
    fn times(&mut self, what: SymIdx, min: u32, max: Option<u32>) -> Made<SymIdx> {
        let exactly = self.exactly(what, min)?;
        let more = match max {
            Some(max) => self.at_most(what, max - min)?,
            None => self.any_number(what)?,
        };
        self.either(vec![vec![exactly, more]])
    }

    fn any_number(&mut self, what: SymIdx) -> Made<SymIdx> {
        let symbol = self.symbol("many");
        self.grammar.add_rule(symbol, Vec::new())?;
        self.grammar.add_rule(symbol, vec![symbol, what])?;
        Ok(symbol)
    }

    /// So many times: chunks of chunks, so that there are few rules.
    fn exactly(&mut self, what: SymIdx, times: u32) -> Made<SymIdx> {
        if let Some(&symbol) = self.repeats.get(&(what, times, true)) {
            return Ok(symbol);
        }
        let mut parts = vec![what; (times % CHUNK) as usize];
        if times >= CHUNK {
            let chunk = self.either(vec![vec![what; CHUNK as usize]])?;
            parts.push(self.exactly(chunk, times / CHUNK)?);
        }
        let symbol = self.either(vec![parts])?;
        self.repeats.insert((what, times, true), symbol);
        Ok(symbol)
    }

    /// At most so many times; each number in one way only.
    fn at_most(&mut self, what: SymIdx, times: u32) -> Made<SymIdx> {
        if let Some(&symbol) = self.repeats.get(&(what, times, false)) {
            return Ok(symbol);
        }
        let symbol = if times < 2 * CHUNK {
            let ways = (0..=times).map(|times| vec![what; times as usize]).collect();
            self.either(ways)?
        } else {
            let chunk = self.either(vec![vec![what; CHUNK as usize]])?;
            let fewer = [self.at_most(chunk, times / CHUNK - 1)?, self.at_most(what, CHUNK - 1)?];
            let most = [self.exactly(chunk, times / CHUNK)?, self.at_most(what, times % CHUNK)?];
            self.either(vec![fewer.into(), most.into()])?
        };
        self.repeats.insert((what, times, false), symbol);
        Ok(symbol)
    }

    fn object(&mut self, symbol: SymIdx, object: &Object) -> Made<()> {
        if object.may_end(0, 0) {
            let empty = self.lexeme(Lexeme::Empty(b'{', b'}'))?;
            self.grammar.add_rule(symbol, vec![empty])?;
        }
        let open = self.lexeme(Lexeme::Open(b'{'))?;
        let close = self.lexeme(Lexeme::Close(b'}'))?;
        // Where counting would take too many symbols, the tracker alone counts.
        let counts = object.counts() && object.named.len() * object.counted_to() <= COUNTED;
        let members = if counts { self.counted(object)? } else { self.uncounted(object)? };
        for way in members {
            let rule = [vec![open], way, vec![close]].concat();
            self.grammar.add_rule(symbol, rule)?;
        }
        Ok(())
    }

    /// A named member: key, colon, value.
    fn member(&mut self, object: &Object, place: usize) -> Made<Vec<SymIdx>> {
        let member = &object.named[place];
        let key = RegexAst::Concat(vec![RegexAst::Literal(member.key.clone()), RegexAst::Regex(SPACE.into())]);
        Ok(vec![self.terminal("key", key)?, self.node(member.node)?])
    }

    /// Any number of members without names of their own, a comma before each; and a first one without the comma.
    fn others(&mut self, object: &Object) -> Made<Option<(Vec<SymIdx>, SymIdx)>> {
        let Some(others) = &object.others else { return Ok(None) };
        let member = vec![self.lexeme(Lexeme::Key(others.key))?, self.node(others.node)?];
        let next = [vec![self.lexeme(Lexeme::Comma)?], member.clone()].concat();
        Ok(Some((member, self.either(vec![next])?)))
    }

    /// The ways of the members of an object that has some, where their number does not matter.
    ///
    /// The members before the first required one are joined from the left (each may or may not have a comma before
    /// it), all after it in one row: nothing nests deeper with the number of members.
    fn uncounted(&mut self, object: &Object) -> Made<Vec<Vec<SymIdx>>> {
        let comma = self.lexeme(Lexeme::Comma)?;
        let others = self.others(object)?;
        let first = object.last(0) as usize;
        let mut before = None;
        for place in 0..first {
            let member = self.member(object, place)?;
            before = Some(self.leading(before, comma, member)?);
        }
        let mut tail = Vec::new();
        if first < object.named.len() {
            tail.extend(self.member(object, first)?);
            for place in first + 1..object.named.len() {
                tail.extend(self.following(object, place, comma)?);
            }
        }
        let many = match &others {
            Some((_, next)) => Some(self.any_number(*next)?),
            None => None,
        };
        tail.extend(many);
        if first < object.named.len() {
            let led = before.map(|before| [vec![before, comma], tail.clone()].concat());
            return Ok(led.into_iter().chain([tail]).collect());
        }
        let led = before.map(|before| [vec![before], tail.clone()].concat());
        let alone = others.map(|(member, _)| [member, tail].concat());
        Ok(led.into_iter().chain(alone).collect())
    }

    /// At least one of the members up to this one, none of them required.
    fn leading(&mut self, before: Option<SymIdx>, comma: SymIdx, member: Vec<SymIdx>) -> Made<SymIdx> {
        let mut ways = vec![member.clone()];
        if let Some(before) = before {
            ways.push(vec![before]);
            ways.push([vec![before, comma], member].concat());
        }
        self.either(ways)
    }

    /// A named member after others, if it comes.
    fn following(&mut self, object: &Object, place: usize, comma: SymIdx) -> Made<Vec<SymIdx>> {
        let member = [vec![comma], self.member(object, place)?].concat();
        if object.named[place].required {
            return Ok(member);
        }
        Ok(vec![self.either(vec![Vec::new(), member])?])
    }

    /// The ways of the members of an object that has some, where their number matters: for each number of named
    /// members a symbol.
    fn counted(&mut self, object: &Object) -> Made<Vec<Vec<SymIdx>>> {
        let comma = self.lexeme(Lexeme::Comma)?;
        // For each count: the symbol of so many members among the first places; none for zero members.
        let mut rows: Vec<Option<SymIdx>> = Vec::new();
        let mut none = true;
        for place in 0..object.named.len() {
            let member = self.member(object, place)?;
            rows = self.row(object, place, &member, comma, none, &rows)?;
            none &= !object.named[place].required;
        }
        self.counts_of(object, none, &rows)
    }

    /// The symbols after one more place. `none`: no member at all so far is possible.
    fn row(
        &mut self,
        object: &Object,
        place: usize,
        member: &[SymIdx],
        comma: SymIdx,
        none: bool,
        rows: &[Option<SymIdx>],
    ) -> Made<Vec<Option<SymIdx>>> {
        let most = object.counted_to();
        let optional = !object.named[place].required;
        let mut next = Vec::new();
        for count in 1..=(rows.len() + 1).min(most) {
            let with = |count: usize| rows.get(count.wrapping_sub(1)).copied().flatten();
            let mut ways = Vec::new();
            ways.extend(with(count - 1).map(|before| [&[before, comma], member].concat()));
            // Without an upper bound, the last count stands for all greater ones.
            let same = with(count).filter(|_| count == most && object.size.max.is_none());
            ways.extend(same.map(|before| [&[before, comma], member].concat()));
            ways.extend((count == 1 && none).then(|| member.to_vec()));
            ways.extend(with(count).filter(|_| optional).map(|before| vec![before]));
            next.push(if ways.is_empty() { None } else { Some(self.either(ways)?) });
        }
        Ok(next)
    }

    /// The ways to the end of the object from each number of named members.
    fn counts_of(&mut self, object: &Object, none: bool, rows: &[Option<SymIdx>]) -> Made<Vec<Vec<SymIdx>>> {
        let others = self.others(object)?;
        let mut ways = Vec::new();
        for (at, row) in rows.iter().enumerate() {
            let count = at as u32 + 1;
            let Some(row) = *row else { continue };
            ways.extend(self.more(object, count, others.as_ref().map(|(_, next)| *next))?.map(|more| vec![row, more]));
        }
        if let (true, Some((member, next))) = (none && object.size.max != Some(0), others) {
            ways.extend(self.more(object, 1, Some(next))?.map(|more| [member, vec![more]].concat()));
        }
        Ok(ways)
    }

    /// What may follow `count` members up to the end of the object, if it can end at all.
    fn more(&mut self, object: &Object, count: u32, next: Option<SymIdx>) -> Made<Option<SymIdx>> {
        let missing = object.size.min.saturating_sub(count);
        let room = object.size.max.map(|max| max - count);
        match next {
            Some(next) => Ok(Some(self.times(next, missing, room)?)),
            None if missing == 0 => Ok(Some(self.either(vec![Vec::new()])?)),
            None => Ok(None),
        }
    }
}

impl Object {
    /// The number of members up to which they are counted.
    fn counted_to(&self) -> usize {
        let most = self.size.max.unwrap_or(self.size.min).max(1);
        if self.size.max.is_none() { most as usize } else { (most as usize).min(self.named.len().max(1)) }
    }

    /// Whether the number of members matters at all.
    fn counts(&self) -> bool {
        let required = self.required[0];
        let most = if self.others.is_some() { u32::MAX } else { self.named.len() as u32 };
        self.size.min > required || self.size.max.is_some_and(|max| max < most)
    }
}
