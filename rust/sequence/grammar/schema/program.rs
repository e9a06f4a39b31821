//! The normal form of a schema: what the grammar and the tracker are both made from.
//!
//! A value is one of a node's leaves. A leaf is a regular expression (a *term*), a string of which only the length
//! matters, an array or an object. Lengths and sizes are counted, never unrolled. Every leaf has a shortest text;
//! what has none is not here.

use llguidance::derivre::RegexAst;
use rustc_hash::FxHashMap;

use super::dfa::Dfa;
use super::rules::Size;
use super::tracker::{DEEPEST, Members};

/// More than any text.
pub const NEVER: u64 = u64::MAX;

/// A kind of value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Leaf {
    /// A regular expression.
    Term(u32),
    /// A string of some length.
    Text(u32),
    /// An array.
    Array(u32),
    /// An object.
    Object(u32),
}

/// A place where a value is expected.
#[derive(Debug, Default)]
pub struct Node {
    /// What it may be.
    pub leaves: Vec<Leaf>,
    /// Bytes of the shortest value.
    pub cost: u64,
    /// Which leaf that is.
    pub best: usize,
    /// How deep the arrays and objects of the shortest value are in each other.
    pub height: u32,
}

/// A regular expression.
#[derive(Debug)]
pub struct Term {
    /// For the grammar.
    pub ast: RegexAst,
    /// For the tracker.
    pub dfa: Dfa,
}

/// Items.
#[derive(Debug)]
pub struct Array {
    /// The first ones.
    pub prefix: Vec<u32>,
    /// All others, if there may be others.
    pub rest: Option<u32>,
    /// How many.
    pub size: Size,
    /// Bytes of the first `i` shortest items, commas not counted.
    pub ahead: Vec<u64>,
}

/// A property.
#[derive(Debug)]
pub struct Member {
    /// Its name, quoted, with the colon.
    pub key: String,
    /// Its value.
    pub node: u32,
    /// Whether it must be there.
    pub required: bool,
    /// Bytes of the key and the shortest value.
    pub cost: u64,
}

/// Members without names of their own.
#[derive(Debug)]
pub struct Others {
    /// The term of their keys, quotes included.
    pub key: u32,
    /// Bytes of the shortest key.
    pub key_cost: u64,
    /// Their values.
    pub node: u32,
    /// Bytes of the shortest key, the colon and the shortest value.
    pub cost: u64,
}

/// Members.
#[derive(Debug)]
pub struct Object {
    /// Those with names, in their order.
    pub named: Vec<Member>,
    /// All others, if there may be others; they come after the named ones.
    pub others: Option<Others>,
    /// Names that no member may have, quoted.
    pub barred: Vec<String>,
    /// How many.
    pub size: Size,
    /// The names, letter by letter.
    pub names: Names,
    /// For each place among the named members: the next required one from there on (or their number).
    pub reach: Vec<u32>,
    /// For each place: how many required ones are left.
    pub required: Vec<u32>,
    /// For each place: bytes of the required ones left, with a comma each.
    pub ahead: Vec<u64>,
}

/// The names of an object's members as a tree of bytes, quotes included.
#[derive(Debug, Default)]
pub struct Names {
    edges: FxHashMap<(u32, u8), u32>,
    /// The members under each branch, in their order.
    under: Vec<Vec<u32>>,
    /// Which branches are whole names.
    whole: Vec<bool>,
    /// Bytes from the root to each branch.
    depth: Vec<u32>,
}

impl Names {
    /// The tree of some keys, without their colons.
    pub fn new<'a>(keys: impl Iterator<Item = &'a str>) -> Self {
        let mut names =
            Self { edges: FxHashMap::default(), under: vec![Vec::new()], whole: vec![false], depth: vec![0] };
        for (number, key) in keys.enumerate() {
            names.under[0].push(number as u32);
            let end = key.bytes().fold(0, |at, byte| names.grow(at, byte, number as u32));
            names.whole[end as usize] = true;
        }
        names
    }

    fn grow(&mut self, at: u32, byte: u8, number: u32) -> u32 {
        let next = *self.edges.entry((at, byte)).or_insert_with(|| {
            self.under.push(Vec::new());
            self.whole.push(false);
            self.depth.push(self.depth[at as usize] + 1);
            self.under.len() as u32 - 1
        });
        self.under[next as usize].push(number);
        next
    }

    /// Where a byte leads.
    pub fn step(&self, at: u32, byte: u8) -> Option<u32> {
        self.edges.get(&(at, byte)).copied()
    }

    /// Bytes of a branch.
    pub fn depth(&self, at: u32) -> u64 {
        u64::from(self.depth[at as usize])
    }

    /// Whether a branch is a whole name: nothing is longer than its closing quotation mark.
    pub fn ends(&self, at: u32) -> bool {
        self.whole[at as usize]
    }

    /// The members under a branch whose places are from `first` to `last`.
    pub fn between(&self, at: u32, first: u32, last: u32) -> &[u32] {
        let under = &self.under[at as usize];
        &under[under.partition_point(|&number| number < first)..under.partition_point(|&number| number <= last)]
    }
}

/// A compiled schema.
#[derive(Debug)]
pub struct Program {
    /// Places.
    pub nodes: Vec<Node>,
    /// Regular expressions.
    pub terms: Vec<Term>,
    /// Lengths of strings.
    pub texts: Vec<Size>,
    /// Arrays.
    pub arrays: Vec<Array>,
    /// Objects.
    pub objects: Vec<Object>,
    /// One character of a string.
    pub character: Dfa,
    /// The document's node.
    pub root: u32,
}

impl Program {
    /// Bytes of a node's shortest text.
    pub fn cost(&self, node: u32) -> u64 {
        self.nodes[node as usize].cost
    }

    /// Whether the empty text is a document: only where all is a regular expression.
    pub fn is_whole_when_empty(&self) -> bool {
        self.nodes[self.root as usize]
            .leaves
            .iter()
            .any(|leaf| matches!(leaf, Leaf::Term(term) if self.terms[*term as usize].dfa.accepts(0)))
    }

    /// Whether the shortest value of a node has room inside an array or object that is `depth` levels deep.
    pub fn fits(&self, node: u32, depth: u32) -> bool {
        depth + 1 + self.nodes[node as usize].height <= DEEPEST
    }

    /// Whether the member at a place may come next, and a whole object can follow.
    pub fn takes_named(&self, object: &Object, place: u32, members: &Members, depth: u32) -> bool {
        object.allows(place, members.next, members.count)
            && self.fits(object.named[place as usize].node, depth)
            && self.fits_after(object, place + 1, members.count, depth)
    }

    /// Whether a member without a name of its own may come next, and a whole object can follow.
    pub fn takes_other(&self, object: &Object, members: &Members, depth: u32) -> bool {
        object.takes_others(members.next, members.count)
            && object.others.as_ref().is_some_and(|others| self.fits(others.node, depth))
    }

    /// Whether any member may come next, and a whole object can follow.
    pub fn takes_member(&self, object: &Object, members: &Members, depth: u32) -> bool {
        let mut places = members.next..object.named.len() as u32;
        places.any(|place| self.takes_named(object, place, members, depth)) || self.takes_other(object, members, depth)
    }

    /// Whether what is chosen to come after one more member has room. What is required has: else the object would
    /// not have begun.
    fn fits_after(&self, object: &Object, next: u32, count: u32, depth: u32) -> bool {
        let (chosen, others) = object.choice(next, count + 1);
        let other = object.others.as_ref().filter(|_| others > 0).map(|others| others.node);
        chosen.iter().map(|&place| object.named[place as usize].node).chain(other).all(|node| self.fits(node, depth))
    }

    /// The item at a place of an array.
    pub fn item(&self, array: u32, at: u32) -> Option<u32> {
        let array = &self.arrays[array as usize];
        array.prefix.get(at as usize).copied().or(array.rest)
    }

    /// Bytes of the items from `from` up to `to`, with a comma before each.
    pub fn items_ahead(&self, array: &Array, from: u32, to: u32) -> u64 {
        if from >= to {
            return 0;
        }
        let prefix = array.prefix.len() as u32;
        let listed = array.ahead[to.min(prefix) as usize] - array.ahead[from.min(prefix) as usize];
        let others = u64::from(to.max(prefix) - from.max(prefix));
        let rest = array.rest.map_or(0, |node| self.cost(node));
        u64::from(to - from).saturating_add(listed).saturating_add(others.saturating_mul(rest))
    }
}

impl Array {
    /// Whether an item may follow `items` others.
    pub fn takes_more(&self, items: u32) -> bool {
        self.size.max.is_none_or(|max| items < max) && (self.rest.is_some() || (items as usize) < self.prefix.len())
    }
}

impl Object {
    /// How many members more than the required ones must come after `count` ones when the next place is `next`.
    pub fn wanting(&self, next: u32, count: u32) -> u32 {
        self.size.min.saturating_sub(count.saturating_add(self.required[next as usize]))
    }

    /// The last place among the named members that can come next.
    pub fn last(&self, next: u32) -> u32 {
        self.reach[next as usize]
    }

    /// Whether a member that is not required may follow `count` members when the next place is `next`.
    fn has_room(&self, next: u32, count: u32) -> bool {
        self.size.max.is_none_or(|max| count.saturating_add(self.required[next as usize]) < max)
    }

    /// Whether one of the named members from `first` may come next: the required ones keep their room.
    pub fn takes(&self, place: u32, next: u32, count: u32) -> bool {
        place >= next && place <= self.last(next) && (self.named[place as usize].required || self.has_room(next, count))
    }

    /// Whether a member without a name of its own may come next.
    pub fn takes_others(&self, next: u32, count: u32) -> bool {
        self.others.is_some() && self.required[next as usize] == 0 && self.has_room(next, count)
    }

    /// Whether it may end.
    pub fn may_end(&self, next: u32, count: u32) -> bool {
        self.required[next as usize] == 0 && self.size.holds(count as usize)
    }

    /// Whether a whole object can still follow: enough members are left.
    pub fn can_end(&self, next: u32, count: u32) -> bool {
        let left = self.named.len() as u32 - next;
        self.others.is_some() || count.saturating_add(left) >= self.size.min
    }
}
