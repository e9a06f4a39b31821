//! Follows a text through a GBNF grammar.
//!
//! llama.cpp keeps a list of stacks, each a vector; a grammar with two ways to say the same doubles them with every
//! character, in C++ that nothing can interrupt. Here stacks that go on alike are one: a *node* stands for everybody
//! who waits for a rule to end, and knows where each of them goes on. Nodes in which the same wait are one as well, so
//! what can be read in many ways that go on alike stays as small as it is. The work for a character is bounded by the
//! length of the text, whatever the grammar, and a rule may begin with itself.

mod rules;

use std::hash::BuildHasher;
use std::sync::Arc;

use llguidance::toktrie::{Recognizer, SimpleVob, TokTrie};
use rustc_hash::{FxBuildHasher, FxHashMap, FxHashSet};

use self::rules::Element;
pub use self::rules::{Rules, Tokens};
use crate::error::{Error, Result};
use crate::llama::Token;

/// Places in the grammar that one question may lead through; a tenth of a second's work, or two.
const MAX_PLACES: u32 = 5_000_000;
/// The same for each token of the vocabulary when all are asked for.
const PLACES_PER_TOKEN: u32 = 100;
/// Rules that wait for others to end.
const MAX_NODES: usize = 1_000_000;
/// Places where they wait.
const MAX_WAITING: usize = 4_000_000;
/// Nodes from which those that nobody needs are dropped.
const SWEEP: usize = 4_096;

/// Where a rule goes on once another has ended, or nowhere: the text is complete.
const DONE: u32 = u32::MAX;

/// What waits when nothing does.
const BOTTOM: u32 = 0;

/// A node in itself: who waits there waits there again.
const ITSELF: u32 = u32::MAX;

/// A place in the grammar, and who waits for its rule to end.
type Head = (u32, u32);

/// Who waits for a rule: where each goes on, and who waits for that. In order, once the step is over that made it.
type Node = Vec<Head>;

/// A character of which some bytes have come.
#[derive(Clone, Copy, Default, PartialEq)]
struct Partial {
    value: u32,
    missing: u32,
    /// The smallest character that so many bytes may stand for.
    smallest: u32,
}

enum Decoded {
    Char(u32),
    Partial(Partial),
    Invalid,
}

impl Partial {
    fn push(self, byte: u8) -> Decoded {
        let (value, missing, smallest) = match (self.missing, byte) {
            (0, 0x00..=0x7f) => return Decoded::Char(byte.into()),
            (0, 0xc2..=0xdf) => (u32::from(byte & 0x1f), 1, 0x80),
            (0, 0xe0..=0xef) => (u32::from(byte & 0x0f), 2, 0x800),
            (0, 0xf0..=0xf4) => (u32::from(byte & 0x07), 3, 0x1_0000),
            (1.., 0x80..=0xbf) => (self.value << 6 | u32::from(byte & 0x3f), self.missing - 1, self.smallest),
            _ => return Decoded::Invalid,
        };
        match missing {
            0 if value < smallest => Decoded::Invalid,
            0 => Decoded::Char(value),
            _ => Decoded::Partial(Self { value, missing, smallest }),
        }
    }

    /// The characters that it may become.
    fn range(self) -> (u32, u32) {
        let low = self.value << (6 * self.missing);
        (low.max(self.smallest), low | ((1 << (6 * self.missing)) - 1))
    }
}

/// What is known after some bytes.
#[derive(Clone, Copy)]
struct Frame {
    /// Its heads, in `Matcher::heads`.
    heads: (usize, usize),
    n_nodes: usize,
    partial: Partial,
}

/// A text on its way through a grammar.
#[derive(Clone)]
pub struct Matcher {
    rules: Arc<Rules>,
    nodes: Vec<Node>,
    heads: Vec<Head>,
    /// The first is the text so far; more follow while texts are tried.
    frames: Vec<Frame>,
    /// Nodes by what `print` makes of who waits in them.
    known: FxHashMap<u64, u32>,
    sweep_at: usize,
    /// Places in the nodes, those included that were dropped since the last sweep.
    n_waiting: usize,
    /// Places that may still be passed, and how many there are for each question.
    fuel: u32,
    fuel_per_question: u32,
    exceeded: bool,
    scratch: Scratch,
}

/// What one step needs: kept for its memory.
#[derive(Clone, Default)]
struct Scratch {
    work: Vec<Head>,
    seen: FxHashSet<Head>,
    /// The nodes of the rules that were called in this step.
    calls: FxHashMap<u32, u32>,
    /// The nodes that were left in this step: who waits there has gone on.
    left: FxHashSet<u32>,
    /// What has become of the nodes that were made in this step, and those that are to be looked at.
    fates: Vec<Fate>,
    todo: Vec<u32>,
}

/// What becomes of a node when the step is over that made it.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    /// Nobody leads to it so far.
    Unseen,
    /// Those who wait in it are being looked at.
    Open,
    /// It is this node.
    Named(u32),
}

/// Equal for nodes in which the same wait, and hardly ever for others.
fn print(node: &Node) -> u64 {
    FxBuildHasher.hash_one(node)
}

impl Matcher {
    /// At the beginning of a text.
    ///
    /// # Errors
    /// `Grammar` if there is no text to begin with.
    pub fn new(rules: Arc<Rules>) -> Result<Self> {
        let mut matcher = Self {
            rules,
            nodes: vec![Node::new()],
            heads: Vec::new(),
            frames: Vec::new(),
            known: FxHashMap::default(),
            sweep_at: SWEEP,
            n_waiting: 0,
            fuel: MAX_PLACES,
            fuel_per_question: MAX_PLACES,
            exceeded: false,
            scratch: Scratch::default(),
        };
        let starts = matcher.rules.starts[matcher.rules.root as usize].clone();
        matcher.scratch.work.extend(starts.into_iter().map(|start| (start, BOTTOM)));
        if !matcher.advance(Partial::default()) {
            return Err(Error::Grammar("the GBNF grammar allows no text: its rules never come to an end".into()));
        }
        Ok(matcher)
    }

    // ---- what others ask ------------------------------------------------------------------------------------------

    /// Whether the text may go on with these bytes. Nothing changes.
    pub fn allows(&mut self, bytes: &[u8]) -> bool {
        self.fuel = self.fuel_per_question;
        let allowed = bytes.iter().all(|&byte| self.push(byte));
        self.back_to(1);
        allowed
    }

    /// Goes on with these bytes if it may.
    pub fn accept(&mut self, bytes: &[u8]) -> bool {
        self.fuel = self.fuel_per_question;
        let allowed = bytes.iter().all(|&byte| self.push(byte));
        match allowed {
            true => self.settle(),
            false => self.back_to(1),
        }
        allowed
    }

    /// Whether the grammar names this token here.
    pub fn allows_token(&self, token: Token) -> bool {
        self.current().partial == Partial::default() && self.heads().iter().any(|&head| self.names(head, token))
    }

    /// Whether the grammar speaks of tokens here.
    pub fn speaks_of_tokens(&self) -> bool {
        let is_token = |&(place, _): &Head| matches!(self.element(place), Element::Token(_) | Element::NotToken(_));
        self.current().partial == Partial::default() && self.heads().iter().any(is_token)
    }

    /// Goes on with a token that the grammar names, or with its bytes, or both.
    pub fn accept_token(&mut self, token: Token, bytes: &[u8]) -> bool {
        if !self.allows_token(token) {
            return !bytes.is_empty() && self.accept(bytes);
        }
        self.fuel = self.fuel_per_question;
        let named: Vec<Head> = self.heads().iter().copied().filter(|&head| self.names(head, token)).collect();
        let by_text = !bytes.is_empty() && bytes.iter().all(|&byte| self.push(byte));
        let partial = if by_text { self.current().partial } else { Partial::default() };
        // The two ways to read it go on side by side, unless the token ends inside a character.
        if partial != Partial::default() {
            self.settle();
            return true;
        }
        let texts: Vec<Head> = if by_text { self.heads().to_vec() } else { Vec::new() };
        let work = named.into_iter().map(|(place, node)| (place + 1, node)).chain(texts);
        self.scratch.work.extend(work);
        let allowed = self.advance(partial);
        self.settle();
        allowed
    }

    /// Whether the text may end here.
    pub fn may_end(&self) -> bool {
        self.current().partial == Partial::default() && self.heads().iter().any(|&(place, _)| place == DONE)
    }

    /// Whether it must.
    pub fn is_over(&self) -> bool {
        self.may_end() && self.heads().len() == 1
    }

    /// Adds the tokens whose texts may follow.
    pub fn add_texts(&mut self, trie: &TokTrie, tokens: &mut SimpleVob) {
        let places = PLACES_PER_TOKEN.saturating_mul(trie.vocab_size() as u32);
        self.fuel = self.fuel_per_question.max(places);
        trie.add_bias(self, tokens, &[]);
    }

    /// Fails once there were too many ways to go on.
    pub fn check(&self) -> Result<()> {
        match self.exceeded {
            false => Ok(()),
            true => Err(Error::Grammar(format!(
                "the GBNF grammar is too ambiguous: a token leads through more than {MAX_PLACES} places in it, or has \
                 more than {MAX_NODES} rules wait for each other, or in more than {MAX_WAITING} places"
            ))),
        }
    }

    // ---- steps ----------------------------------------------------------------------------------------------------

    fn current(&self) -> &Frame {
        &self.frames[self.frames.len() - 1]
    }

    fn heads(&self) -> &[Head] {
        let (start, end) = self.current().heads;
        &self.heads[start..end]
    }

    fn element(&self, place: u32) -> Element {
        self.rules.elements.get(place as usize).copied().unwrap_or(Element::End)
    }

    fn names(&self, (place, _): Head, token: Token) -> bool {
        match self.element(place) {
            Element::Token(named) => named == token,
            Element::NotToken(named) => named != token,
            _ => false,
        }
    }

    fn push(&mut self, byte: u8) -> bool {
        let frame = *self.current();
        match frame.partial.push(byte) {
            Decoded::Invalid => false,
            Decoded::Partial(partial) => {
                let (low, high) = partial.range();
                let possible = self.heads().iter().any(|&(place, _)| self.fits(place, low, high));
                if possible {
                    self.frames.push(Frame { partial, n_nodes: self.nodes.len(), ..frame });
                }
                possible
            }
            Decoded::Char(c) => {
                for index in frame.heads.0..frame.heads.1 {
                    let (place, node) = self.heads[index];
                    if self.fits(place, c, c) {
                        self.scratch.work.push((place + 1, node));
                    }
                }
                self.advance(Partial::default())
            }
        }
    }

    fn fits(&self, place: u32, low: u32, high: u32) -> bool {
        match self.element(place) {
            Element::Chars(set) => self.rules.sets[set as usize].meets(low, high),
            _ => false,
        }
    }

    /// Follows what is in `work` to the next terminals, and makes a frame of them. False if there is none.
    fn advance(&mut self, partial: Partial) -> bool {
        let (start, n_nodes) = (self.heads.len(), self.nodes.len());
        self.scratch.seen.clear();
        self.scratch.calls.clear();
        self.scratch.left.clear();
        while let Some(head) = self.scratch.work.pop() {
            if self.scratch.seen.insert(head) {
                self.follow(head);
            }
            self.fuel = self.fuel.saturating_sub(1);
            if self.fuel == 0 || self.nodes.len() > MAX_NODES {
                self.exceeded = true;
                self.heads.truncate(start);
                self.scratch.work.clear();
            }
        }
        self.join(start, n_nodes);
        let end = self.heads.len();
        if start == end {
            return false;
        }
        self.frames.push(Frame { heads: (start, end), n_nodes, partial });
        true
    }

    fn follow(&mut self, head: Head) {
        let (place, node) = head;
        if place == DONE {
            return self.heads.push(head);
        }
        match self.element(place) {
            Element::End => self.leave(node),
            Element::Rule(rule) => self.call(rule, place + 1, node),
            _ => self.heads.push(head),
        }
    }

    /// A rule has ended: everybody who waits for it goes on.
    fn leave(&mut self, node: u32) {
        if node == BOTTOM {
            self.scratch.work.push((DONE, BOTTOM));
            return;
        }
        if self.scratch.left.insert(node) {
            let waiting = self.nodes[node as usize].iter();
            self.scratch.work.extend(waiting.map(|&(place, next)| (place, if next == ITSELF { node } else { next })));
        }
    }

    fn call(&mut self, rule: u32, back: u32, node: u32) {
        if self.element(back) == Element::End {
            // Nothing comes after it: who waits for this rule waits for that one.
            return self.enter(rule, node);
        }
        let callee = match self.scratch.calls.get(&rule) {
            Some(&callee) => callee,
            None => {
                let callee = self.nodes.len() as u32;
                self.nodes.push(Node::new());
                self.scratch.calls.insert(rule, callee);
                self.enter(rule, callee);
                callee
            }
        };
        self.nodes[callee as usize].push((back, node));
        self.n_waiting += 1;
        if self.scratch.left.contains(&callee) {
            // It can be nothing, and has been.
            self.scratch.work.push((back, node));
        }
    }

    fn enter(&mut self, rule: u32, node: u32) {
        let starts = &self.rules.starts[rule as usize];
        self.scratch.work.extend(starts.iter().map(|&start| (start, node)));
    }

    // ---- nodes ----------------------------------------------------------------------------------------------------

    /// Ends a step, whose heads begin at `start` and its nodes at `first`: those that are like older ones become these,
    /// and those that no head leads to go. So a rule that is begun again at every character is one node, not one for each.
    fn join(&mut self, start: usize, first: usize) {
        if self.nodes.len() == first {
            return;
        }
        self.scratch.fates.clear();
        self.scratch.fates.resize(self.nodes.len() - first, Fate::Unseen);
        self.scratch.todo.extend(self.heads[start..].iter().map(|head| head.1));
        while let Some(node) = self.scratch.todo.pop() {
            match self.fate(node, first) {
                Fate::Unseen => self.open(node, first),
                Fate::Open => self.scratch.fates[node as usize - first] = Fate::Named(self.name(node, first)),
                Fate::Named(_) => {}
            }
        }
        self.rename_heads(start, first);
        self.drop_others(first);
    }

    /// Has a node looked at once more, when those in which it waits have their names.
    fn open(&mut self, node: u32, first: usize) {
        let Scratch { fates, todo, .. } = &mut self.scratch;
        fates[node as usize - first] = Fate::Open;
        todo.push(node);
        let waiting = self.nodes[node as usize].iter().map(|&(_, next)| next);
        todo.extend(waiting.filter(|&next| next as usize >= first && fates[next as usize - first] == Fate::Unseen));
    }

    /// What becomes of a node; those before `first` stay.
    fn fate(&self, node: u32, first: usize) -> Fate {
        match (node as usize).checked_sub(first) {
            Some(index) => self.scratch.fates[index],
            None => Fate::Named(node),
        }
    }

    /// The node in which the same wait: an older one or, if there is none, itself. A name that is not known yet is that
    /// of a node in a circle with this one, which no older node can be alike.
    fn name(&mut self, node: u32, first: usize) -> u32 {
        let mut waiting = std::mem::take(&mut self.nodes[node as usize]);
        for (_, next) in &mut waiting {
            *next = match self.fate(*next, first) {
                _ if *next == node => ITSELF,
                Fate::Named(name) => name,
                Fate::Unseen | Fate::Open => *next,
            };
        }
        waiting.sort_unstable();
        waiting.dedup();
        let print = print(&waiting);
        match self.known.get(&print) {
            Some(&known) if (known as usize) < first && self.nodes[known as usize] == waiting => known,
            _ => {
                self.known.insert(print, node);
                self.nodes[node as usize] = waiting;
                node
            }
        }
    }

    /// Has the heads wait in the nodes as they are named now, each once.
    fn rename_heads(&mut self, start: usize, first: usize) {
        self.scratch.seen.clear();
        let mut end = start;
        for index in start..self.heads.len() {
            let (place, node) = self.heads[index];
            let Fate::Named(name) = self.fate(node, first) else { continue };
            if self.scratch.seen.insert((place, name)) {
                self.heads[end] = (place, name);
                end += 1;
            }
        }
        self.heads.truncate(end);
    }

    /// Drops the nodes of this step that are others now, or nobody's.
    fn drop_others(&mut self, first: usize) {
        let mut end = first;
        for node in first..self.nodes.len() {
            match self.scratch.fates[node - first] {
                Fate::Named(name) if name as usize == node => end = node + 1,
                _ => self.nodes[node] = Node::new(),
            }
        }
        self.nodes.truncate(end);
    }

    /// Forgets what was tried after the first `n` frames.
    fn back_to(&mut self, n: usize) {
        if n >= self.frames.len() {
            return;
        }
        let n_nodes = self.frames[n..].iter().map(|frame| frame.n_nodes).min().unwrap_or(usize::MAX);
        for node in self.nodes.drain(n_nodes.min(self.nodes.len())..) {
            self.known.remove(&print(&node));
        }
        self.frames.truncate(n);
        self.heads.truncate(self.current().heads.1);
    }

    /// What was tried last is the text now.
    fn settle(&mut self) {
        let frame = *self.current();
        self.heads.copy_within(frame.heads.0..frame.heads.1, 0);
        self.heads.truncate(frame.heads.1 - frame.heads.0);
        self.frames.clear();
        self.frames.push(Frame { heads: (0, self.heads.len()), n_nodes: self.nodes.len(), partial: frame.partial });
        if self.nodes.len() >= self.sweep_at || self.n_waiting > MAX_WAITING {
            self.sweep();
            self.sweep_at = SWEEP.max(2 * self.nodes.len());
            self.n_waiting = self.nodes.iter().map(Vec::len).sum();
            self.exceeded |= self.n_waiting > MAX_WAITING;
        }
    }

    /// Drops the nodes that no head leads to.
    fn sweep(&mut self) {
        let mut names = vec![u32::MAX; self.nodes.len()];
        let mut kept = vec![Node::new()];
        names[BOTTOM as usize] = BOTTOM;
        let mut todo = Vec::new();
        let mut name = |node: u32, kept: &mut Vec<Node>, todo: &mut Vec<u32>| {
            let known = &mut names[node as usize];
            if *known == u32::MAX {
                *known = kept.len() as u32;
                kept.push(Node::new());
                todo.push(node);
            }
            *known
        };
        for head in &mut self.heads {
            head.1 = name(head.1, &mut kept, &mut todo);
        }
        while let Some(node) = todo.pop() {
            let mut waiting = std::mem::take(&mut self.nodes[node as usize]);
            for (_, next) in waiting.iter_mut().filter(|waiting| waiting.1 != ITSELF) {
                *next = name(*next, &mut kept, &mut todo);
            }
            waiting.sort_unstable();
            let place = name(node, &mut kept, &mut todo);
            kept[place as usize] = waiting;
        }
        self.nodes = kept;
        self.known = self.nodes.iter().zip(0..).skip(1).map(|(node, name)| (print(node), name)).collect();
    }
}

impl Recognizer for Matcher {
    fn pop_bytes(&mut self, num: usize) {
        self.back_to(self.frames.len() - num);
    }

    fn collapse(&mut self) {
        self.settle();
    }

    fn trie_finished(&mut self) {
        self.back_to(1);
    }

    fn try_push_byte(&mut self, byte: u8) -> bool {
        self.push(byte)
    }
}

#[cfg(test)]
mod tests;
