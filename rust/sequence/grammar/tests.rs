//! Compiled grammars are shared by those who want the same.

use std::sync::Barrier;
use std::thread;

use super::*;

fn grammars() -> Grammars {
    Grammars { words: Arc::new(Words::bytes().unwrap()), llama: None, kept: Mutex::default() }
}

/// What eight threads get that want the same at once.
fn at_once(grammars: &Grammars, spec: &Spec) -> Vec<Result<State>> {
    let start = Barrier::new(8);
    thread::scope(|scope| {
        let wanted = || {
            start.wait();
            grammars.state(spec)
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(wanted)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn who_wants_a_grammar_that_is_being_compiled_waits_for_it() {
    let grammars = grammars();
    let properties: Vec<_> = (0..500).map(|n| format!("\"p{n}\": {{\"type\": \"integer\"}}")).collect();
    let spec = Spec::JsonSchema(format!("{{\"type\": \"object\", \"properties\": {{{}}}}}", properties.join(",")));
    assert!(at_once(&grammars, &spec).iter().all(Result::is_ok));
    assert_eq!(lock(&grammars.kept).len(), 1);
}

#[test]
fn who_has_waited_for_a_grammar_that_fails_gets_its_error_and_nothing_is_kept() {
    let grammars = grammars();
    for outcome in at_once(&grammars, &Spec::Regex("(a".into())) {
        let error = outcome.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("unclosed group"), "{error}");
    }
    assert!(lock(&grammars.kept).is_empty());
}

#[test]
fn the_grammars_that_were_wanted_last_are_kept() {
    let grammars = grammars();
    let wanted = |n: usize| grammars.state(&Spec::Regex(format!("a{{{n}}}"))).unwrap();
    wanted(0);
    for n in 1..=MAX_KEPT {
        wanted(n);
        wanted(0);
    }
    let kept: Vec<_> = lock(&grammars.kept).iter().map(|(spec, _)| spec.clone()).collect();
    assert_eq!(kept.len(), MAX_KEPT);
    assert!(kept.contains(&Spec::Regex("a{0}".into())) && !kept.contains(&Spec::Regex("a{1}".into())));
}

#[test]
fn a_long_text_is_followed_in_gbnf_as_well() {
    let letters =
        Spec::Gbnf { text: "root ::= [a-z]*".into(), root: "root".into(), preserved: vec![], prefix: "".into() };
    assert!(accepts(&letters, &"a".repeat(3_000_000)).unwrap());
    assert!(!accepts(&letters, &format!("{}A", "a".repeat(3_000))).unwrap());
}
