//! A regular expression as a table: which byte leads where, and how far it is to a match.

use std::collections::VecDeque;

use llguidance::derivre::{Regex, RegexAst, RegexBuilder, StateID};
use rustc_hash::FxHashMap;

/// No match can follow.
const DEAD: u32 = u32::MAX;

/// Entries that a state has on average at most, if there are as many states as allowed.
const ROW: usize = 32;

/// Bytes that a closing text rather has, best first; all others come after them in their order.
const PLEASANT: &[u8] = b"a0bcdefghijklmnopqrstuvwxyz123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ-_.:/@ ";

/// Why an expression has no table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It is not an expression.
    Malformed(String),
    /// It has too many states, or takes too long to work out.
    TooBig,
}

/// A deterministic automaton over bytes. States are numbers, 0 is where it starts.
#[derive(Debug)]
pub struct Dfa {
    class: [u8; 256],
    classes: usize,
    next: Vec<u32>,
    /// Bytes from each state to the nearest match.
    distance: Vec<u32>,
    /// The first of those bytes.
    toward: Vec<u8>,
}

impl Dfa {
    /// The table of an expression with at most `states` states (and [`ROW`] times as many entries), worked out with
    /// at most `fuel` of derivre's units.
    pub fn new(ast: &RegexAst, states: usize, fuel: u64) -> Result<Self, Refused> {
        let mut builder = RegexBuilder::new();
        let root = builder.mk(ast).map_err(|error| Refused::Malformed(error.to_string()))?;
        let regex = builder.into_regex_limited(root, fuel).map_err(|_| Refused::TooBig)?;
        Table::explore(regex, states, fuel).map(Table::finish)
    }

    /// Where a byte leads, if a match can follow.
    pub fn step(&self, state: u32, byte: u8) -> Option<u32> {
        let next = self.next[state as usize * self.classes + usize::from(self.class[usize::from(byte)])];
        (next != DEAD).then_some(next)
    }

    /// Where several bytes lead.
    pub fn run(&self, bytes: &[u8]) -> Option<u32> {
        bytes.iter().try_fold(0, |state, &byte| self.step(state, byte))
    }

    /// Whether what was read is a match.
    pub fn accepts(&self, state: u32) -> bool {
        self.distance[state as usize] == 0
    }

    /// Whether a longer match can follow.
    pub fn goes_on(&self, state: u32) -> bool {
        let row = state as usize * self.classes;
        self.next[row..row + self.classes].iter().any(|&next| next != DEAD)
    }

    /// Whether nothing matches at all.
    pub fn is_empty(&self) -> bool {
        self.distance[0] == DEAD
    }

    /// Bytes to the nearest match.
    pub fn distance(&self, state: u32) -> u64 {
        u64::from(self.distance[state as usize])
    }

    /// Writes the nearest match's bytes.
    pub fn close(&self, mut state: u32, out: &mut Vec<u8>) {
        while !self.accepts(state) {
            let byte = self.toward[state as usize];
            out.push(byte);
            state = self.next[state as usize * self.classes + usize::from(self.class[usize::from(byte)])];
        }
    }
}

/// An automaton while it is explored.
struct Table {
    class: [u8; 256],
    /// The byte that stands for each class.
    speakers: Vec<u8>,
    next: Vec<u32>,
    accepting: Vec<bool>,
}

impl Table {
    fn explore(mut regex: Regex, states: usize, fuel: u64) -> Result<Self, Refused> {
        let (class, speakers) = alphabet(&regex);
        let mut table = Self { class, speakers, next: Vec::new(), accepting: Vec::new() };
        let mut numbers = FxHashMap::default();
        let mut order = vec![regex.initial_state()];
        numbers.insert(order[0], 0);
        let mut at = 0;
        while at < order.len() {
            table.accepting.push(regex.is_accepting(order[at]));
            table.row(&mut regex, &mut order, &mut numbers, at);
            if order.len() > states || table.next.len() > states * ROW || regex.cost() > fuel {
                return Err(Refused::TooBig);
            }
            at += 1;
        }
        Ok(table)
    }

    fn row(&mut self, regex: &mut Regex, order: &mut Vec<StateID>, numbers: &mut FxHashMap<StateID, u32>, at: usize) {
        for &byte in &self.speakers {
            let next = regex.transition(order[at], byte);
            self.next.push(if next.is_dead() {
                DEAD
            } else {
                *numbers.entry(next).or_insert_with(|| {
                    order.push(next);
                    order.len() as u32 - 1
                })
            });
        }
    }

    /// Distances to a match, backwards; what cannot reach one is dead.
    fn finish(mut self) -> Dfa {
        let (distance, toward) = self.distances();
        for next in &mut self.next {
            if *next != DEAD && distance[*next as usize] == DEAD {
                *next = DEAD;
            }
        }
        Dfa { class: self.class, classes: self.speakers.len(), next: self.next, distance, toward }
    }

    fn distances(&self) -> (Vec<u32>, Vec<u8>) {
        let reversed = self.reversed();
        let mut distance: Vec<u32> = self.accepting.iter().map(|&accepts| if accepts { 0 } else { DEAD }).collect();
        let mut toward = vec![0; distance.len()];
        let mut queue: VecDeque<u32> = (0..distance.len() as u32).filter(|&at| self.accepting[at as usize]).collect();
        while let Some(state) = queue.pop_front() {
            for &(before, byte) in &reversed[state as usize] {
                if distance[before as usize] == DEAD {
                    distance[before as usize] = distance[state as usize] + 1;
                    toward[before as usize] = byte;
                    queue.push_back(before);
                }
            }
        }
        (distance, toward)
    }

    /// For each state, which states lead to it, by which byte; pleasant bytes first.
    fn reversed(&self) -> Vec<Vec<(u32, u8)>> {
        let width = self.speakers.len();
        let mut reversed = vec![Vec::new(); self.accepting.len()];
        for class in self.by_taste() {
            for state in 0..self.accepting.len() {
                let next = self.next[state * width + class];
                if next != DEAD {
                    reversed[next as usize].push((state as u32, self.speakers[class]));
                }
            }
        }
        reversed
    }

    fn by_taste(&self) -> Vec<usize> {
        let mut classes: Vec<usize> = (0..self.speakers.len()).collect();
        classes.sort_by_key(|&class| taste(self.speakers[class]));
        classes
    }
}

/// The place of a byte among those that a closing text may have.
fn taste(byte: u8) -> usize {
    PLEASANT.iter().position(|&other| other == byte).unwrap_or(PLEASANT.len() + usize::from(byte))
}

/// Bytes that no state tells apart share a class; each class is spoken for by its most pleasant byte.
fn alphabet(regex: &Regex) -> ([u8; 256], Vec<u8>) {
    let mut bytes: Vec<u8> = (0..=255).collect();
    bytes.sort_by_key(|&byte| taste(byte));
    let mut class = [0; 256];
    let mut speakers = Vec::new();
    let mut numbers = FxHashMap::default();
    for byte in bytes {
        let number = *numbers.entry(regex.alpha().map(byte)).or_insert_with(|| {
            speakers.push(byte);
            speakers.len() as u8 - 1
        });
        class[usize::from(byte)] = number;
    }
    (class, speakers)
}
