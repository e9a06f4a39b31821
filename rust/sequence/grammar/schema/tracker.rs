//! Reads a document byte by byte and knows at any time how it can end.
//!
//! The document may be several things at once (`anyOf`): each is a *head*, a state and what is around it. Brackets
//! tell how deep one is, so all heads are equally deep, and those in the same state are one: their surroundings are
//! joined. There are never more heads than states of the schema's places, however deep and ambiguous it is.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::program::{Leaf, Object, Program};
use super::text::space;

/// Arrays and objects within each other at most: what reads JSON gives up at some depth.
pub const DEEPEST: u32 = 64;

/// Heads from which on they are looked up instead of compared one by one.
const MANY: usize = 32;

/// Where one is in a value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Before the document.
    Start,
    /// In a regular expression.
    Term { term: u32, at: u32 },
    /// In a string, after `characters` whole ones and a part of one.
    Text { text: u32, characters: u32, at: u32 },
    /// In an array, after `items` whole ones.
    Array { array: u32, items: u32, spot: Spot },
    /// In an object.
    Object(Members),
    /// After the document.
    End,
}

/// Between the items of an array; numbers are states of white space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Spot {
    /// After the opening bracket.
    Open(u8),
    /// After an item.
    After(u8),
    /// After a comma.
    Comma(u8),
}

/// In an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Members {
    /// Which.
    pub object: u32,
    /// The first place among the named members that may come.
    pub next: u32,
    /// Members so far.
    pub count: u32,
    /// Where exactly.
    pub spot: Place,
    /// The keys so far of members without a name of their own, as long as they must differ.
    pub keys: Keys,
}

/// Between the members of an object; single bytes are states of white space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// After the opening brace.
    Open(u8),
    /// After a member.
    After(u8),
    /// After a comma.
    Comma(u8),
    /// In a name, at a branch of the tree of names.
    Name(u32),
    /// In another key: a state of its term, and a hash of what was read of it.
    Key { at: u32, hash: u64 },
    /// After the name of the member at a place.
    Named(u32),
    /// After another key.
    Keyed,
    /// After the colon: the member's place (the number of names for others).
    Value { place: u32, space: u8 },
}

/// Keys, by their hashes, in order; mostly none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Keys(Option<Arc<[u64]>>);

impl Keys {
    /// Whether a key is among them.
    pub fn has(&self, hash: u64) -> bool {
        self.hashes().binary_search(&hash).is_ok()
    }

    /// With one more.
    pub fn with(&self, hash: u64) -> Self {
        let (before, after) = self.hashes().split_at(self.hashes().partition_point(|&other| other < hash));
        Self(Some([before, &[hash], after].concat().into()))
    }

    /// The hashes.
    pub fn hashes(&self) -> &[u64] {
        self.0.as_deref().unwrap_or_default()
    }
}

/// The hash of nothing.
pub const EMPTY_HASH: u64 = 0xcbf2_9ce4_8422_2325;

/// The hash of a text and one more byte (FNV-1a).
pub fn hash(before: u64, byte: u8) -> u64 {
    (before ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
}

/// What is around a value: the states that may go on after it.
#[derive(Debug, PartialEq, Eq)]
pub struct Around {
    /// Each with what is around that in turn.
    pub frames: Vec<Head>,
    /// Bytes from the end of the value to the end of the document.
    pub cost: u64,
    /// How deep the value is.
    pub depth: u32,
}

/// A state and what is around it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The state.
    pub state: State,
    /// `None` for the document itself.
    pub around: Option<Arc<Around>>,
}

impl Head {
    /// How deep its value is.
    pub fn depth(&self) -> u32 {
        self.around.as_ref().map_or(0, |around| around.depth)
    }
}

/// Follows a document.
#[derive(Clone, Debug)]
pub struct Tracker {
    program: Arc<Program>,
    heads: Vec<Head>,
}

impl Tracker {
    /// At the beginning of a document.
    pub fn new(program: Arc<Program>) -> Self {
        let mut heads = vec![Head { state: State::Start, around: None }];
        if program.is_whole_when_empty() {
            heads.push(Head { state: State::End, around: None });
        }
        Self { program, heads }
    }

    /// Reads on. False if no document begins like this; nothing can be read after that.
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        bytes.iter().all(|&byte| {
            self.heads = Step::new(&self.program, byte).all(&self.heads);
            !self.heads.is_empty()
        })
    }

    /// Whether what was read is a whole document.
    pub fn is_complete(&self) -> bool {
        self.heads.iter().any(|head| head.state == State::End)
    }

    /// Whether something can still follow.
    pub fn goes_on(&self) -> bool {
        self.heads.iter().any(|head| head.state != State::End)
    }

    /// Bytes of [`Tracker::closing`] at most.
    pub fn closing_cost(&self) -> usize {
        self.heads.iter().map(|head| self.program.head_cost(head)).min().unwrap_or(0).try_into().unwrap_or(usize::MAX)
    }

    /// The shortest text, or nearly, that completes the document.
    pub fn closing(&self) -> Vec<u8> {
        let mut out = Vec::new();
        if let Some(head) = self.heads.iter().min_by_key(|head| self.program.head_cost(head)) {
            self.program.close_head(head, &mut out);
        }
        out
    }
}

/// One byte for all heads.
struct Step<'a> {
    program: &'a Program,
    byte: u8,
    out: Vec<Head>,
    /// Where the heads are, once there are many.
    index: FxHashMap<State, usize>,
}

impl<'a> Step<'a> {
    fn new(program: &'a Program, byte: u8) -> Self {
        Self { program, byte, out: Vec::new(), index: FxHashMap::default() }
    }

    fn all(mut self, heads: &[Head]) -> Vec<Head> {
        for head in heads {
            self.head(head);
        }
        self.out
    }

    fn head(&mut self, head: &Head) {
        match &head.state {
            State::Start => self.begin(self.program.root, &None),
            State::Term { term, at } => self.term(*term, *at, &head.around),
            State::Text { text, characters, at } => self.text(*text, *characters, *at, &head.around),
            State::Array { array, items, spot } => self.array(*array, *items, *spot, head),
            State::Object(members) => self.object(members, head),
            State::End => {}
        }
    }

    /// Begins a value: the byte is its first.
    fn begin(&mut self, node: u32, around: &Option<Arc<Around>>) {
        for &leaf in &self.program.nodes[node as usize].leaves {
            match leaf {
                Leaf::Term(term) => self.term(term, 0, around),
                Leaf::Text(text) if self.byte == b'"' => {
                    self.add(State::Text { text, characters: 0, at: 0 }, around);
                }
                Leaf::Array(array) if self.byte == b'[' && self.is_shallow(leaf, around) => {
                    self.add(State::Array { array, items: 0, spot: Spot::Open(0) }, around);
                }
                Leaf::Object(object) if self.byte == b'{' && self.is_shallow(leaf, around) => {
                    let spot = Place::Open(0);
                    let keys = Keys::default();
                    self.add(State::Object(Members { object, next: 0, count: 0, spot, keys }), around);
                }
                _ => {}
            }
        }
    }

    fn is_shallow(&self, leaf: Leaf, around: &Option<Arc<Around>>) -> bool {
        let depth = around.as_ref().map_or(0, |around| around.depth);
        depth + super::shortest::leaf_height(self.program, leaf) <= DEEPEST
    }

    fn term(&mut self, term: u32, at: u32, around: &Option<Arc<Around>>) {
        let dfa = &self.program.terms[term as usize].dfa;
        let Some(at) = dfa.step(at, self.byte) else { return };
        if dfa.accepts(at) {
            self.finish(around);
        }
        if dfa.goes_on(at) {
            self.add(State::Term { term, at }, around);
        }
    }

    fn text(&mut self, text: u32, characters: u32, at: u32, around: &Option<Arc<Around>>) {
        let size = self.program.texts[text as usize];
        if at == 0 && self.byte == b'"' {
            if characters >= size.min {
                self.finish(around);
            }
            return;
        }
        if at == 0 && size.max.is_some_and(|max| characters >= max) {
            return;
        }
        if let Some(next) = self.program.character.step(at, self.byte) {
            let whole = self.program.character.accepts(next);
            let (characters, at) = if whole { (characters.saturating_add(1), 0) } else { (characters, next) };
            self.add(State::Text { text, characters, at }, around);
        }
    }

    fn array(&mut self, array: u32, items: u32, spot: Spot, head: &Head) {
        let at = |spot| State::Array { array, items, spot };
        let rules = &self.program.arrays[array as usize];
        let may_end = items >= rules.size.min;
        match (spot, self.byte) {
            (Spot::Open(_) | Spot::After(_), b']') if may_end => self.finish(&head.around),
            (Spot::After(0), b',') if rules.takes_more(items) && self.fits_item(array, items, head) => {
                self.add(at(Spot::Comma(0)), &head.around);
            }
            (Spot::After(state), byte) if may_end => {
                self.space(state, byte, &|state| at(Spot::After(state)), head);
            }
            (Spot::After(_), _) => {}
            (Spot::Open(state), byte) if space(state, byte).is_some() => {
                self.space(state, byte, &|state| at(Spot::Open(state)), head);
            }
            (Spot::Comma(state), byte) if space(state, byte).is_some() => {
                self.space(state, byte, &|state| at(Spot::Comma(state)), head);
            }
            _ if rules.takes_more(items) => self.item(array, items, head),
            _ => {}
        }
    }

    /// Whether the next item can be as deep as it has to be.
    fn fits_item(&self, array: u32, items: u32, head: &Head) -> bool {
        self.program.item(array, items).is_some_and(|node| self.program.fits(node, head.depth()))
    }

    /// Begins an item.
    fn item(&mut self, array: u32, items: u32, head: &Head) {
        if let Some(node) = self.program.item(array, items) {
            let after = State::Array { array, items: items.saturating_add(1), spot: Spot::After(0) };
            self.begin_inside(node, after, head);
        }
    }

    /// Begins a value inside an array or object, which goes on with a state after it.
    fn begin_inside(&mut self, node: u32, after: State, head: &Head) {
        let frame = Head { state: after, around: head.around.clone() };
        let cost = self.program.head_cost(&frame);
        let around = Some(Arc::new(Around { frames: vec![frame], cost, depth: head.depth() + 1 }));
        self.begin(node, &around);
    }

    fn space(&mut self, state: u8, byte: u8, then: &dyn Fn(u8) -> State, head: &Head) {
        if let Some(next) = space(state, byte) {
            self.add(then(next), &head.around);
        }
    }

    fn object(&mut self, members: &Members, head: &Head) {
        let object = &self.program.objects[members.object as usize];
        let at = |spot| State::Object(Members { spot, ..members.clone() });
        let may_end = object.may_end(members.next, members.count);
        match (members.spot, self.byte) {
            (Place::Open(_) | Place::After(_), b'}') if may_end => self.finish(&head.around),
            (Place::After(0), b',') if self.program.takes_member(object, members, head.depth()) => {
                self.add(at(Place::Comma(0)), &head.around);
            }
            (Place::After(state), byte) if may_end => {
                self.space(state, byte, &|state| at(Place::After(state)), head);
            }
            (Place::Open(_) | Place::Comma(_), b'"') => self.key(object, members, head),
            (Place::Open(state), byte) => self.space(state, byte, &|state| at(Place::Open(state)), head),
            (Place::Comma(state), byte) => self.space(state, byte, &|state| at(Place::Comma(state)), head),
            (Place::Name(branch), byte) => self.name(object, branch, byte, members, head),
            (Place::Key { at, hash: before }, byte) => self.other(object, at, hash(before, byte), members, head),
            (Place::Named(place), b':') => self.add(at(Place::Value { place, space: 0 }), &head.around),
            (Place::Keyed, b':') => {
                let place = object.named.len() as u32;
                self.add(at(Place::Value { place, space: 0 }), &head.around);
            }
            (Place::Value { place, space: state }, byte) if space(state, byte).is_some() => {
                self.space(state, byte, &|space| at(Place::Value { place, space }), head);
            }
            (Place::Value { place, .. }, _) => self.value(object, place, members, head),
            _ => {}
        }
    }

    /// The quotation mark that begins a key.
    fn key(&mut self, object: &Object, members: &Members, head: &Head) {
        self.name(object, 0, b'"', members, head);
        if self.program.takes_other(object, members, head.depth()) {
            self.other(object, 0, hash(EMPTY_HASH, b'"'), members, head);
        }
    }

    /// Goes on in the tree of names, as long as one of them may come.
    fn name(&mut self, object: &Object, branch: u32, byte: u8, members: &Members, head: &Head) {
        let Some(branch) = object.names.step(branch, byte) else { return };
        let last = object.last(members.next);
        let possible = object.names.between(branch, members.next, last);
        let takes = |place: &&u32| self.program.takes_named(object, **place, members, head.depth());
        let Some(&place) = possible.iter().find(takes) else { return };
        // Names are told apart by the quotation mark at the end: there is one left there.
        let spot = if object.names.ends(branch) { Place::Named(place) } else { Place::Name(branch) };
        self.add(State::Object(Members { spot, ..members.clone() }), &head.around);
    }

    /// Goes on in a key without a name of its own.
    fn other(&mut self, object: &Object, at: u32, hash: u64, members: &Members, head: &Head) {
        let Some(others) = &object.others else { return };
        let dfa = &self.program.terms[others.key as usize].dfa;
        let Some(next) = dfa.step(at, self.byte) else { return };
        if !dfa.accepts(next) {
            let spot = Place::Key { at: next, hash };
            self.add(State::Object(Members { spot, ..members.clone() }), &head.around);
        } else if !object.must_differ(members.count) {
            let keys = Keys::default();
            self.add(State::Object(Members { spot: Place::Keyed, keys, ..members.clone() }), &head.around);
        } else if !members.keys.has(hash) {
            let keys = members.keys.with(hash);
            self.add(State::Object(Members { spot: Place::Keyed, keys, ..members.clone() }), &head.around);
        }
    }

    /// Begins a member's value.
    fn value(&mut self, object: &Object, place: u32, members: &Members, head: &Head) {
        if let Some((node, after)) = object.after(place, members) {
            self.begin_inside(node, State::Object(after), head);
        }
    }

    /// A value is whole: what is around it goes on.
    fn finish(&mut self, around: &Option<Arc<Around>>) {
        match around {
            None => self.add(State::End, &None),
            Some(around) => {
                for frame in &around.frames {
                    self.add(frame.state.clone(), &frame.around);
                }
            }
        }
    }

    /// A further head, joined with one in the same state.
    fn add(&mut self, state: State, around: &Option<Arc<Around>>) {
        match self.place(&state) {
            Some(place) => self.out[place].widen(around),
            None => {
                if self.out.len() >= MANY {
                    self.index.insert(state.clone(), self.out.len());
                }
                self.out.push(Head { state, around: around.clone() });
            }
        }
    }

    /// Where the head in that state is.
    fn place(&mut self, state: &State) -> Option<usize> {
        if self.out.len() < MANY {
            return self.out.iter().position(|head| head.state == *state);
        }
        if self.index.is_empty() {
            self.index.extend(self.out.iter().enumerate().map(|(place, head)| (head.state.clone(), place)));
        }
        self.index.get(state).copied()
    }
}

impl Head {
    /// Takes further surroundings.
    fn widen(&mut self, around: &Option<Arc<Around>>) {
        if let (Some(one), Some(more)) = (&self.around, around)
            && !Arc::ptr_eq(one, more)
        {
            self.around = Some(joined(one, more));
        }
    }
}

/// Both surroundings at once.
fn joined(one: &Arc<Around>, more: &Arc<Around>) -> Arc<Around> {
    let mut frames = one.frames.clone();
    for frame in &more.frames {
        match frames.iter_mut().find(|other| other.state == frame.state) {
            Some(other) => other.widen(&frame.around),
            None => frames.push(frame.clone()),
        }
    }
    if frames == one.frames {
        return one.clone();
    }
    Arc::new(Around { frames, cost: one.cost.min(more.cost), depth: one.depth })
}

impl Object {
    /// Whether the member at a place may come next, and a whole object can follow.
    pub fn allows(&self, place: u32, next: u32, count: u32) -> bool {
        self.takes(place, next, count) && self.can_end(place + 1, count + 1)
    }

    /// Whether the key of a member without a name of its own must differ from those of the others, after `count`
    /// members: only where their number counts, and as long as it does.
    pub fn must_differ(&self, count: u32) -> bool {
        self.size.min > 1 && count < self.size.min
    }

    /// The value of the member at a place, and how the object goes on after it.
    pub fn after(&self, place: u32, members: &Members) -> Option<(u32, Members)> {
        let node = match self.named.get(place as usize) {
            Some(member) => member.node,
            None => self.others.as_ref()?.node,
        };
        let next = (place + 1).min(self.named.len() as u32);
        let count = members.count.saturating_add(1);
        Some((node, Members { next, count, spot: Place::After(0), ..members.clone() }))
    }
}
