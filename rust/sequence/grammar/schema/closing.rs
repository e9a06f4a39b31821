//! How a document ends soonest: what it costs, and the text.

use std::ops::RangeFrom;

use rustc_hash::FxHashSet;

use super::program::{Leaf, NEVER, Object, Program};
use super::tracker::{EMPTY_HASH, Head, Keys, Members, Place, Spot, State, hash};

/// Names among which the cheapest is looked for; of more, the first is taken.
const CANDIDATES: usize = 64;
/// What makes keys differ.
const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789";

impl Program {
    /// Bytes from a head to the end of the document.
    pub fn head_cost(&self, head: &Head) -> u64 {
        let around = head.around.as_ref().map_or(0, |around| around.cost);
        self.state_cost(&head.state, head.depth()).saturating_add(around)
    }

    /// Bytes to the end of the value.
    fn state_cost(&self, state: &State, depth: u32) -> u64 {
        match state {
            State::Start => self.cost(self.root),
            State::Term { term, at } => self.terms[*term as usize].dfa.distance(*at),
            State::Text { text, characters, at } => {
                let begun = u32::from(*at != 0);
                let left = self.texts[*text as usize].min.saturating_sub(characters.saturating_add(begun));
                self.character_cost(*at) + u64::from(left) + 1
            }
            State::Array { array, items, spot } => self.array_cost(*array, *items, *spot),
            State::Object(members) => self.object_cost(members, depth),
            State::End => 0,
        }
    }

    /// Bytes to the end of a character that has begun.
    fn character_cost(&self, at: u32) -> u64 {
        if at == 0 { 0 } else { self.character.distance(at) }
    }

    fn array_cost(&self, number: u32, items: u32, spot: Spot) -> u64 {
        let array = &self.arrays[number as usize];
        let min = array.size.min;
        match spot {
            Spot::Open(_) => self.items_ahead(array, 0, min).max(1),
            Spot::After(_) => self.items_ahead(array, items, min).saturating_add(1),
            Spot::Comma(_) => self.items_ahead(array, items, min.max(items.saturating_add(1))),
        }
    }

    fn object_cost(&self, members: &Members, depth: u32) -> u64 {
        let object = &self.objects[members.object as usize];
        let Members { next, count, .. } = *members;
        let with = |place: u32, bytes: u64| bytes.saturating_add(object.cost_after_member(place, count));
        match members.spot {
            Place::Open(_) => object.cost_after(next, count).saturating_sub(1).max(1),
            Place::After(_) => object.cost_after(next, count),
            Place::Comma(_) if object.is_enough(next, count) => {
                let cheapest = self.cheapest(object, members, depth);
                let cost = cheapest.map(|place| object.named[place as usize].cost);
                cost.unwrap_or_else(|| object.others_cost()).saturating_add(1)
            }
            Place::Comma(_) => object.cost_after(next, count) - 1,
            Place::Name(branch) => self.name_choice(object, branch, members, depth).0,
            Place::Key { at, hash } => with(u32::MAX, self.key_rest(object, at, hash, members).len() as u64 + 1)
                .saturating_add(object.others.as_ref().map_or(NEVER, |others| self.cost(others.node))),
            Place::Named(place) => with(place, 1 + self.cost(object.named[place as usize].node)),
            Place::Keyed => with(u32::MAX, 1 + object.others.as_ref().map_or(0, |others| self.cost(others.node))),
            Place::Value { place, .. } => {
                with(place, object.after(place, members).map_or(0, |(node, _)| self.cost(node)))
            }
        }
    }

    /// The cheapest of the names that a branch leads to, and what it costs from there to the end of the object.
    fn name_choice(&self, object: &Object, branch: u32, members: &Members, depth: u32) -> (u64, u32) {
        let Members { next, count, .. } = *members;
        let places = object.names.between(branch, next, object.last(next));
        let allowed = places.iter().copied().filter(|&place| self.takes_named(object, place, members, depth));
        let most = if places.len() > CANDIDATES { 1 } else { CANDIDATES };
        let cost = |place: u32| {
            let left = object.named[place as usize].cost - object.names.depth(branch);
            left.saturating_add(object.cost_after_member(place, count))
        };
        allowed.take(most).map(|place| (cost(place), place)).min().unwrap_or((NEVER, 0))
    }

    /// Completes the document.
    pub fn close_head(&self, head: &Head, out: &mut Vec<u8>) {
        self.close_state(&head.state, head.depth(), out);
        if let Some(around) = &head.around
            && let Some(frame) = around.frames.iter().min_by_key(|frame| self.head_cost(frame))
        {
            self.close_head(frame, out);
        }
    }

    /// Completes the value.
    fn close_state(&self, state: &State, depth: u32, out: &mut Vec<u8>) {
        match state {
            State::Start => self.close_node(self.root, out),
            State::Term { term, at } => self.terms[*term as usize].dfa.close(*at, out),
            State::Text { text, characters, at } => self.close_text(*text, *characters, *at, out),
            State::Array { array, items, spot } => self.close_array(*array, *items, *spot, out),
            State::Object(members) => self.close_object(members, depth, out),
            State::End => {}
        }
    }

    /// Writes the shortest value.
    pub fn close_node(&self, node: u32, out: &mut Vec<u8>) {
        let node = &self.nodes[node as usize];
        match node.leaves[node.best] {
            Leaf::Term(term) => self.terms[term as usize].dfa.close(0, out),
            Leaf::Text(text) => {
                out.push(b'"');
                self.close_text(text, 0, 0, out);
            }
            Leaf::Array(array) => {
                out.push(b'[');
                self.close_array(array, 0, Spot::Open(0), out);
            }
            Leaf::Object(object) => {
                out.push(b'{');
                let (spot, keys) = (Place::Open(0), Keys::default());
                let members = Members { object, next: 0, count: 0, spot, keys };
                self.close_members(&self.objects[object as usize], &members, false, out);
            }
        }
    }

    fn close_text(&self, text: u32, characters: u32, at: u32, out: &mut Vec<u8>) {
        let mut characters = characters;
        if at != 0 {
            self.character.close(at, out);
            characters = characters.saturating_add(1);
        }
        let left = self.texts[text as usize].min.saturating_sub(characters);
        out.resize(out.len() + left as usize, b'a');
        out.push(b'"');
    }

    fn close_array(&self, number: u32, items: u32, spot: Spot, out: &mut Vec<u8>) {
        let due = matches!(spot, Spot::Comma(_));
        let end = self.arrays[number as usize].size.min.max(items + u32::from(due));
        for at in items..end {
            if at > items || matches!(spot, Spot::After(_)) {
                out.push(b',');
            }
            if let Some(node) = self.item(number, at) {
                self.close_node(node, out);
            }
        }
        out.push(b']');
    }

    fn close_object(&self, members: &Members, depth: u32, out: &mut Vec<u8>) {
        let object = &self.objects[members.object as usize];
        match members.spot {
            Place::Open(_) => self.close_members(object, members, false, out),
            Place::After(_) => self.close_members(object, members, true, out),
            Place::Comma(_) if object.is_enough(members.next, members.count) => {
                self.one_more(object, members, depth, out);
            }
            Place::Comma(_) => self.close_members(object, members, false, out),
            Place::Name(branch) => {
                let (_, place) = self.name_choice(object, branch, members, depth);
                let key = object.named[place as usize].key.as_bytes();
                out.extend(&key[object.names.depth(branch) as usize..]);
                self.close_value(object, place, members, out);
            }
            Place::Key { at, hash } => {
                let rest = self.key_rest(object, at, hash, members);
                let keys = members.keys.with(hash_of(&rest, hash));
                out.extend(rest);
                out.push(b':');
                let members = Members { keys, ..members.clone() };
                self.close_value(object, object.named.len() as u32, &members, out);
            }
            Place::Named(place) => {
                out.push(b':');
                self.close_value(object, place, members, out);
            }
            Place::Keyed => {
                out.push(b':');
                self.close_value(object, object.named.len() as u32, members, out);
            }
            Place::Value { place, .. } => self.close_value(object, place, members, out),
        }
    }

    /// Writes the value of the member at a place, and all that the object needs after it.
    fn close_value(&self, object: &Object, place: u32, members: &Members, out: &mut Vec<u8>) {
        if let Some((node, after)) = object.after(place, members) {
            self.close_node(node, out);
            self.close_members(object, &after, true, out);
        }
    }

    /// The cheapest member with a name that may come although none is needed, if no other is cheaper.
    fn cheapest(&self, object: &Object, members: &Members, depth: u32) -> Option<u32> {
        let places = members.next..object.named.len() as u32;
        let cost = |&place: &u32| object.named[place as usize].cost;
        let cheapest = places.filter(|&place| self.takes_named(object, place, members, depth)).min_by_key(cost);
        let others = if self.takes_other(object, members, depth) { object.others_cost() } else { NEVER };
        cheapest.filter(|place| cost(place) <= others)
    }

    /// Writes the cheapest member, although none is needed: a comma was there.
    fn one_more(&self, object: &Object, members: &Members, depth: u32, out: &mut Vec<u8>) {
        match self.cheapest(object, members, depth) {
            Some(place) => {
                out.extend(object.named[place as usize].key.as_bytes());
                self.close_value(object, place, members, out);
            }
            None => {
                let spot = Place::Key { at: 0, hash: EMPTY_HASH };
                self.close_object(&Members { spot, ..members.clone() }, depth, out);
            }
        }
    }

    /// Writes all members that are needed, and the brace.
    fn close_members(&self, object: &Object, members: &Members, mut comma: bool, out: &mut Vec<u8>) {
        let (chosen, others) = object.choice(members.next, members.count);
        for place in members.next..object.named.len() as u32 {
            let member = &object.named[place as usize];
            if member.required || chosen.contains(&place) {
                out.extend(std::mem::replace(&mut comma, true).then_some(b','));
                out.extend(member.key.as_bytes());
                self.close_node(member.node, out);
            }
        }
        let mut taken: FxHashSet<u64> = members.keys.hashes().iter().copied().collect();
        let mut numbers = 0..;
        for _ in 0..others {
            out.extend(std::mem::replace(&mut comma, true).then_some(b','));
            self.close_other(object, &mut taken, &mut numbers, out);
        }
        out.push(b'}');
    }

    /// Writes a member without a name of its own, whose key is new.
    fn close_other(
        &self,
        object: &Object,
        taken: &mut FxHashSet<u64>,
        numbers: &mut RangeFrom<usize>,
        out: &mut Vec<u8>,
    ) {
        let key = self.new_key(object, 0, numbers, |key| !taken.contains(&hash_of(key, EMPTY_HASH)));
        taken.insert(hash_of(&key, EMPTY_HASH));
        out.extend(key);
        out.push(b':');
        if let Some(others) = &object.others {
            self.close_node(others.node, out);
        }
    }

    /// The rest of a key, different from all keys so far where they must differ.
    fn key_rest(&self, object: &Object, at: u32, before: u64, members: &Members) -> Vec<u8> {
        let differs = object.must_differ(members.count);
        self.new_key(object, at, &mut (0..), |rest| !differs || !members.keys.has(hash_of(rest, before)))
    }

    /// The rest of a key: the shortest, or else one that ends with the next suffix that makes it new.
    fn new_key(
        &self,
        object: &Object,
        at: u32,
        numbers: &mut RangeFrom<usize>,
        is_new: impl Fn(&[u8]) -> bool,
    ) -> Vec<u8> {
        let mut plain = Vec::new();
        let Some(others) = &object.others else { return plain };
        let dfa = &self.terms[others.key as usize].dfa;
        dfa.close(at, &mut plain);
        let fits = |key: &[u8]| {
            let end = key.iter().try_fold(at, |state, &byte| dfa.step(state, byte));
            end.is_some_and(|state| dfa.accepts(state)) && is_new(key)
        };
        if fits(&plain) {
            return plain;
        }
        let stem = &plain[..plain.len() - 1];
        let mut keys = numbers.map(|number| [stem, &suffix(number), b"\""].concat());
        keys.find(|key| fits(key)).unwrap_or_default()
    }
}

/// The hash of a text after another one.
fn hash_of(text: &[u8], before: u64) -> u64 {
    text.iter().copied().fold(before, hash)
}

/// Words of letters and digits, short ones first.
fn suffix(mut number: usize) -> Vec<u8> {
    let mut word = vec![LETTERS[number % LETTERS.len()]];
    while number >= LETTERS.len() {
        number = number / LETTERS.len() - 1;
        word.push(LETTERS[number % LETTERS.len()]);
    }
    word
}

impl Object {
    /// What another key may cost more, where keys must differ: each suffix is taken by a name or by one of them.
    pub fn margin(&self) -> u64 {
        let taken = self.named.len() + self.barred.len() + self.size.min as usize;
        if self.must_differ(0) { suffix(taken).len() as u64 } else { 0 }
    }

    /// Bytes of a member without a name of its own.
    fn others_cost(&self) -> u64 {
        self.others.as_ref().map_or(NEVER, |others| others.cost)
    }

    /// Whether nothing more is needed.
    fn is_enough(&self, next: u32, count: u32) -> bool {
        self.required[next as usize] == 0 && self.wanting(next, count) == 0
    }

    /// Bytes to the end of the object after `count` members, the next place being `next`.
    fn cost_after(&self, next: u32, count: u32) -> u64 {
        let (chosen, others) = self.choice(next, count);
        let named = chosen.iter().map(|&place| self.named[place as usize].cost + 1);
        let other = self.others.as_ref().map_or(0, |others| others.cost.saturating_add(1 + self.margin()));
        let all = named.fold(self.ahead[next as usize], u64::saturating_add);
        all.saturating_add(other.saturating_mul(u64::from(others))).saturating_add(1)
    }

    /// The same after one more member, from the place after it.
    fn cost_after_member(&self, place: u32, count: u32) -> u64 {
        self.cost_after(place.saturating_add(1).min(self.named.len() as u32), count.saturating_add(1))
    }

    /// Which members that are not required are needed all the same: the cheapest, be it those without names.
    pub fn choice(&self, next: u32, count: u32) -> (Vec<u32>, u32) {
        let wanting = self.wanting(next, count);
        if wanting == 0 {
            return (Vec::new(), 0);
        }
        let most = self.others_cost().saturating_add(self.margin());
        let optional = |place: &u32| {
            let member = &self.named[*place as usize];
            !member.required && member.cost <= most
        };
        let mut places: Vec<u32> = (next..self.named.len() as u32).filter(optional).collect();
        places.sort_by_key(|&place| self.named[place as usize].cost);
        places.truncate(wanting as usize);
        let others = wanting - places.len() as u32;
        (places, others)
    }
}
