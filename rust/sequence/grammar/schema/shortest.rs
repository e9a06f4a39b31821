//! The shortest text of every place, and what follows from it: parts that no text ends are taken out.

use super::program::{Array, Leaf, NEVER, Names, Object, Program};

/// Works out all costs, and takes out what has none.
pub fn settle(program: &mut Program) {
    costs(program);
    prune(program);
    arrays(program);
    objects(program);
    heights(program);
}

/// Every node costs as much as its cheapest leaf: repeated until nothing changes, since schemas refer to themselves.
fn costs(program: &mut Program) {
    for node in &mut program.nodes {
        node.cost = NEVER;
    }
    let mut changed = true;
    while changed {
        changed = false;
        for at in (0..program.nodes.len()).rev() {
            changed |= improve(program, at);
        }
    }
}

fn improve(program: &mut Program, at: usize) -> bool {
    let leaves = program.nodes[at].leaves.iter().enumerate();
    let Some((cost, best)) = leaves.map(|(number, &leaf)| (leaf_cost(program, leaf), number)).min() else {
        return false;
    };
    let better = cost < program.nodes[at].cost;
    if better {
        (program.nodes[at].cost, program.nodes[at].best) = (cost, best);
    }
    better
}

/// Bytes of a leaf's shortest text.
pub fn leaf_cost(program: &Program, leaf: Leaf) -> u64 {
    match leaf {
        Leaf::Term(term) => {
            let dfa = &program.terms[term as usize].dfa;
            if dfa.is_empty() { NEVER } else { dfa.distance(0) }
        }
        Leaf::Text(text) => u64::from(program.texts[text as usize].min) + 2,
        Leaf::Array(array) => array_cost(program, &program.arrays[array as usize]),
        Leaf::Object(object) => object_cost(program, &program.objects[object as usize]),
    }
}

fn array_cost(program: &Program, array: &Array) -> u64 {
    let min = array.size.min;
    if array.size.is_empty() {
        return NEVER;
    }
    let listed = array.prefix.iter().take(min as usize).map(|&node| program.cost(node));
    let others = u64::from(min.saturating_sub(array.prefix.len() as u32));
    let rest = if others == 0 { 0 } else { array.rest.map_or(NEVER, |node| program.cost(node)).saturating_mul(others) };
    let items = listed.fold(rest, u64::saturating_add);
    items.saturating_add(2 + u64::from(min.saturating_sub(1)))
}

fn object_cost(program: &Program, object: &Object) -> u64 {
    let cost = |node: u32, key: u64| program.cost(node).saturating_add(key);
    let member = |required: bool| {
        let chosen = object.named.iter().filter(move |member| member.required == required);
        chosen.map(|member| cost(member.node, member.key.len() as u64))
    };
    let count = object.named.iter().filter(|member| member.required).count();
    if object.size.max.is_some_and(|max| (max as usize) < count.max(object.size.min as usize)) {
        return NEVER;
    }
    let wanting = (object.size.min as usize).saturating_sub(count);
    let mut choice: Vec<u64> = member(false).collect();
    choice.sort_unstable();
    let other = object.others.as_ref().map_or(NEVER, |others| cost(others.node, others.key_cost + 1));
    let other = other.saturating_add(object.margin());
    let more = (0..wanting).map(|at| choice.get(at).map_or(other, |&cost| cost.min(other)));
    let members = member(true).chain(more).fold(0, u64::saturating_add);
    members.saturating_add(2 + (count + wanting).saturating_sub(1) as u64)
}

/// Takes out leaves, items and members that no text ends.
fn prune(program: &mut Program) {
    for at in 0..program.nodes.len() {
        let mut leaves = std::mem::take(&mut program.nodes[at].leaves);
        leaves.retain(|&leaf| leaf_cost(program, leaf) != NEVER);
        let cheapest = leaves.iter().enumerate().min_by_key(|(_, leaf)| leaf_cost(program, **leaf));
        program.nodes[at].best = cheapest.map_or(0, |(number, _)| number);
        program.nodes[at].leaves = leaves;
    }
    let possible: Vec<bool> = program.nodes.iter().map(|node| node.cost != NEVER).collect();
    program.arrays.iter_mut().for_each(|array| prune_array(array, &possible));
    program.objects.iter_mut().for_each(|object| prune_object(object, &possible));
}

fn prune_array(array: &mut Array, possible: &[bool]) {
    array.rest = array.rest.filter(|&node| possible[node as usize]);
    if let Some(first) = array.prefix.iter().position(|&node| !possible[node as usize]) {
        array.prefix.truncate(first);
        array.rest = None;
    }
    if array.rest.is_none() {
        let most = array.prefix.len() as u32;
        array.size.max = Some(array.size.max.map_or(most, |max| max.min(most)));
    }
    let most = array.size.max.map_or(usize::MAX, |max| max as usize);
    array.prefix.truncate(most);
    if array.prefix.len() == most {
        array.rest = None;
    }
}

fn prune_object(object: &mut Object, possible: &[bool]) {
    object.others.take_if(|others| !possible[others.node as usize]);
    let (named, barred) = std::mem::take(&mut object.named)
        .into_iter()
        .partition(|member| member.required || possible[member.node as usize]);
    object.named = named;
    object.barred.extend(barred.into_iter().map(|member: super::program::Member| member.name().to_owned()));
}

/// How deep the shortest texts go: what is inside them costs less than they do.
fn heights(program: &mut Program) {
    let mut order: Vec<usize> = (0..program.nodes.len()).filter(|&at| program.nodes[at].cost != NEVER).collect();
    order.sort_unstable_by_key(|&at| program.nodes[at].cost);
    for at in order {
        let node = &program.nodes[at];
        program.nodes[at].height = node.leaves.get(node.best).map_or(0, |&leaf| leaf_height(program, leaf));
    }
}

/// How deep the arrays and objects of a leaf's shortest text go.
pub fn leaf_height(program: &Program, leaf: Leaf) -> u32 {
    let deepest = |nodes: &mut dyn Iterator<Item = u32>| nodes.map(|node| program.nodes[node as usize].height).max();
    match leaf {
        Leaf::Term(_) | Leaf::Text(_) => 0,
        Leaf::Array(array) => {
            let array = &program.arrays[array as usize];
            let min = array.size.min as usize;
            let rest = array.rest.filter(|_| min > array.prefix.len());
            1 + deepest(&mut array.prefix.iter().copied().take(min).chain(rest)).unwrap_or(0)
        }
        Leaf::Object(object) => {
            let object = &program.objects[object as usize];
            let (chosen, others) = object.choice(0, 0);
            let required = object.named.iter().filter(|member| member.required);
            let chosen = chosen.iter().map(|&place| &object.named[place as usize]);
            let others = object.others.iter().filter(|_| others > 0).map(|others| others.node);
            1 + deepest(&mut required.chain(chosen).map(|member| member.node).chain(others)).unwrap_or(0)
        }
    }
}

fn arrays(program: &mut Program) {
    for at in 0..program.arrays.len() {
        let mut sum = 0u64;
        let mut ahead = vec![0];
        for &node in &program.arrays[at].prefix {
            sum = sum.saturating_add(program.cost(node));
            ahead.push(sum);
        }
        program.arrays[at].ahead = ahead;
    }
}

fn objects(program: &mut Program) {
    let costs: Vec<u64> = program.nodes.iter().map(|node| node.cost).collect();
    for object in &mut program.objects {
        for member in &mut object.named {
            member.cost = costs[member.node as usize].saturating_add(member.key.len() as u64);
        }
        if let Some(others) = &mut object.others {
            others.cost = costs[others.node as usize].saturating_add(others.key_cost + 1);
        }
        object.names = Names::new(object.named.iter().map(super::program::Member::name));
        tails(object);
    }
}

/// What is left from each place on.
fn tails(object: &mut Object) {
    let count = object.named.len();
    object.reach = vec![count as u32; count + 1];
    object.required = vec![0; count + 1];
    object.ahead = vec![0; count + 1];
    for at in (0..count).rev() {
        let member = &object.named[at];
        let required = member.required;
        object.reach[at] = if required { at as u32 } else { object.reach[at + 1] };
        object.required[at] = object.required[at + 1] + u32::from(required);
        object.ahead[at] =
            object.ahead[at + 1].saturating_add(if required { member.cost.saturating_add(1) } else { 0 });
    }
}
