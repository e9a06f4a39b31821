//! Scripted answers of model families, read by llama.cpp's parsers, however they are cut into tokens.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::*;
use crate::chat::calls::{self, CallFormat, ToolChoice, Wanted};
use crate::chat::formats::Source;
use crate::sequence::calling;
use crate::sequence::text::TextOptions;
use crate::sequence::text::segments::{SegmentOptions, Tag};

// ---- families ----------------------------------------------------------------------------------

/// A template, its control tokens, and how its models think.
struct Family {
    name: &'static str,
    eos: &'static str,
    controls: &'static [&'static str],
    reasoning: Option<(&'static str, &'static str)>,
    /// One call, a call of another tool, and what stands between two.
    calls: [&'static str; 2],
    between: &'static str,
    /// Opens and ends what holds all calls.
    section: (&'static str, &'static str),
    /// Opens and ends content that precedes calls.
    content: (&'static str, &'static str),
}

const PLAIN: Family = Family {
    name: "qwen2.5",
    eos: "<|im_end|>",
    controls: &[],
    reasoning: None,
    calls: [
        "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Sã\\n\\\"o\\\" 😀\", \"days\": 2}}\n</tool_call>",
        "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>",
    ],
    between: "\n",
    section: ("", ""),
    content: ("", "\n"),
};

const FAMILIES: [Family; 13] = [
    PLAIN,
    Family { name: "hermes", ..PLAIN },
    Family {
        name: "qwen3-coder",
        calls: [
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nSã\n\"o\" 😀\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
            "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        ],
        ..PLAIN
    },
    Family {
        name: "deepseek-v3.1",
        eos: "<｜end▁of▁sentence｜>",
        controls: &[
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ],
        calls: [
            "<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{\"city\": \"Sã\\n\\\"o\\\" 😀\", \"days\": 2}<｜tool▁call▁end｜>",
            "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
        ],
        between: "",
        section: ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        ..PLAIN
    },
    Family { name: "qwen3", reasoning: Some(("<think>", "</think>")), ..PLAIN },
    Family { name: "tinychat", reasoning: Some(("<think>", "</think>")), ..PLAIN },
    Family {
        name: "llama3",
        eos: "<|eot_id|>",
        calls: [
            "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Sã\\n\\\"o\\\" 😀\", \"days\": 2}}",
            "{\"name\": \"now\", \"parameters\": {}}",
        ],
        ..PLAIN
    },
    Family {
        name: "mistral",
        eos: "</s>",
        controls: &["[TOOL_CALLS]"],
        calls: [
            "{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Sã\\n\\\"o\\\" 😀\", \"days\": 2}, \"id\": \"abcdefgh1\"}",
            "{\"name\": \"now\", \"arguments\": {}, \"id\": \"abcdefgh2\"}",
        ],
        between: ", ",
        section: ("[TOOL_CALLS] [", "]"),
        ..PLAIN
    },
    Family {
        name: "deepseek-r1",
        eos: "<｜end▁of▁sentence｜>",
        controls: &[
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ],
        reasoning: Some(("<think>", "</think>")),
        calls: [
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{\"city\": \"Sã\\n\\\"o\\\" 😀\", \"days\": 2}\n```<｜tool▁call▁end｜>",
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>",
        ],
        between: "\n",
        section: ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        ..PLAIN
    },
    Family {
        name: "gpt-oss",
        eos: "<|return|>",
        controls: &["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>"],
        reasoning: Some(("<|channel|>analysis<|message|>", "<|end|>")),
        calls: [
            "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{\"city\": \"Sã\\n\\\"o\\\" 😀\", \"days\": 2}",
            " to=functions.now<|channel|>commentary json<|message|>{}",
        ],
        between: "<|end|><|start|>assistant",
        content: ("<|channel|>commentary<|message|>", "<|end|><|start|>assistant"),
        ..PLAIN
    },
    Family {
        name: "command-r7b",
        eos: "<|END_OF_TURN_TOKEN|>",
        controls: &[
            "<|START_THINKING|>",
            "<|END_THINKING|>",
            "<|START_ACTION|>",
            "<|END_ACTION|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
        ],
        reasoning: Some(("<|START_THINKING|>", "<|END_THINKING|>")),
        calls: [
            "    {\"tool_call_id\": \"0\", \"tool_name\": \"get_weather\", \"parameters\": {\"city\": \"Sã\\n\\\"o\\\" 😀\", \"days\": 2}}",
            "    {\"tool_call_id\": \"1\", \"tool_name\": \"now\", \"parameters\": {}}",
        ],
        between: ",\n",
        section: ("<|START_ACTION|>[\n", "\n]<|END_ACTION|>"),
        content: ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    },
    Family {
        name: "granite",
        eos: "<|end_of_text|>",
        controls: &["<|tool_call|>"],
        calls: [
            "{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Sã\\n\\\"o\\\" 😀\", \"days\": 2}}",
            "{\"name\": \"now\", \"arguments\": {}}",
        ],
        between: ", ",
        section: ("<|tool_call|>[", "]"),
        ..PLAIN
    },
    Family {
        name: "glm4",
        eos: "<|user|>",
        reasoning: Some(("<think>", "</think>")),
        calls: [
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Sã\n\"o\" 😀</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
            "<tool_call>now\n</tool_call>",
        ],
        ..PLAIN
    },
];

fn tools() -> Vec<Value> {
    let weather = json!({
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    });
    let tool = |name, parameters| json!({"type": "function", "function": {"name": name, "description": "It is.", "parameters": parameters}});
    vec![tool("get_weather", weather), tool("now", json!({"type": "object", "properties": {}}))]
}

fn template(name: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let path = match name {
        "tinychat" => root.join("tinychat/chat_template.jinja"),
        name => root.join(format!("templates/{name}.jinja")),
    };
    fs::read_to_string(path).unwrap().trim_end_matches('\n').into()
}

fn format_of(name: &str, eos: &str, choice: ToolChoice, parallel: bool) -> CallFormat {
    let source = Source { template: template(name).into(), bos: "<s>".into(), eos: eos.into() };
    let wanted = Wanted { tools: &tools(), kwargs: &Map::new(), choice, parallel };
    calls::of_template(&source, &wanted).unwrap_or_else(|| panic!("{name} has no format"))
}

impl Family {
    fn format(&self) -> CallFormat {
        format_of(self.name, self.eos, ToolChoice::Auto, true)
    }

    fn answer(&self, thought: &str, content: &str, calls: &[usize]) -> String {
        let mut text = String::new();
        if let Some((start, end)) = self.reasoning.filter(|_| !thought.is_empty()) {
            text.push_str(&format!("{start}{thought}{end}"));
            // Harmony names who speaks again.
            text.push_str(if self.name == "gpt-oss" { "<|start|>assistant" } else { "" });
        }
        if !content.is_empty() {
            text.push_str(&format!(
                "{}{content}{}",
                self.content.0,
                if calls.is_empty() { "" } else { self.content.1 }
            ));
        }
        if !calls.is_empty() {
            let calls: Vec<&str> = calls.iter().map(|&call| self.calls[call]).collect();
            text.push_str(&format!("{}{}{}", self.section.0, calls.join(self.between), self.section.1));
        }
        text
    }

    /// The units that tokens are made of: control tokens, the names of channels, characters.
    fn units(&self, text: &str) -> Vec<(String, bool)> {
        let (mut units, mut rest) = (Vec::new(), text);
        while let Some(first) = rest.chars().next() {
            let control = self.controls.iter().find(|control| rest.starts_with(**control));
            let is_name = units.last().is_some_and(|(last, _)| last == "<|channel|>");
            let length = match control {
                Some(control) => control.len(),
                None if is_name => rest.find(['<', ' ']).unwrap_or(rest.len()),
                None => first.len_utf8(),
            };
            units.push((rest[..length].to_owned(), control.is_some()));
            rest = &rest[length..];
        }
        units
    }

    fn token(&self, text: &str) -> Token {
        let place = self.controls.iter().position(|control| *control == text);
        let names = ["analysis", "final", "commentary"];
        let name = names.iter().position(|name| *name == text);
        place.map(|place| place as Token).or(name.map(|name| 100 + name as Token)).unwrap_or(1000)
    }

    fn tag(&self, text: &str) -> Tag {
        let units = self.units(text);
        let tokens = if units.iter().any(|unit| unit.1) {
            units.iter().map(|unit| self.token(&unit.0)).collect()
        } else {
            vec![]
        };
        Tag { text: text.into(), tokens }
    }

    fn stream(&self, format: &CallFormat, text: TextOptions) -> Calls {
        let segments = self.reasoning.map(|(start, end)| {
            let (start, end) = (self.tag(start), self.tag(end));
            SegmentOptions { start, end, ..SegmentOptions::default() }
        });
        let inner = Segments::new(segments.unwrap_or_default(), text);
        Calls::new(calling::options(format.reader.clone()).unwrap(), inner)
    }

    /// Tokens with their texts; a control token is as long as its name.
    fn run(&self, format: &CallFormat, pieces: &[(String, bool)]) -> Told {
        let mut stream = self.stream(format, TextOptions::default());
        let (mut told, mut parts) = (Told::default(), Parts::default());
        stream.begin("", &mut parts);
        for (piece, is_control) in pieces {
            let preserved = *is_control && format.reader.preserved.iter().any(|text| text.contains(piece.as_str()));
            let bytes = if *is_control && !preserved { "" } else { piece };
            assert_eq!(stream.push(self.token(piece), bytes.as_bytes(), preserved, 0.0, &mut parts), None);
            told.take(&mut parts);
        }
        assert_eq!(stream.finish(&mut parts), None);
        told.take(&mut parts);
        told
    }
}

// ---- what is told ------------------------------------------------------------------------------

/// Events with what follows each other joined.
#[derive(Clone, Debug, PartialEq)]
enum Item {
    Content(String),
    Reasoning(String),
    Start(usize, Option<String>, String),
    Arguments(usize, String),
    End(usize, String),
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Told {
    items: Vec<Item>,
    inside: bool,
}

impl Told {
    fn take(&mut self, parts: &mut Parts) {
        let mut start = 0;
        for (end, mark) in std::mem::take(&mut parts.marks) {
            self.add(&parts.text[start..end]);
            start = end;
            match mark {
                Mark::Open { .. } => self.inside = true,
                Mark::Close { .. } => self.inside = false,
                Mark::Content { .. } => {}
                Mark::Call(CallEvent::Start { index, id, name }) => {
                    // Ids that are drawn have nine signs.
                    let id = Some(id).filter(|id| id.len() < 9 || id.starts_with("abcdefgh"));
                    self.items.push(Item::Start(index, id, name));
                }
                Mark::Call(CallEvent::Delta { index, text }) => match self.items.last_mut() {
                    Some(Item::Arguments(last, before)) if *last == index => before.push_str(&text),
                    _ => self.items.push(Item::Arguments(index, text)),
                },
                Mark::Call(CallEvent::End { index, arguments }) => self.items.push(Item::End(index, arguments)),
            }
        }
        self.add(&parts.text[start..]);
        parts.clear();
    }

    fn add(&mut self, text: &str) {
        match (self.items.last_mut(), self.inside) {
            _ if text.is_empty() => {}
            (Some(Item::Content(before)), false) | (Some(Item::Reasoning(before)), true) => before.push_str(text),
            (_, true) => self.items.push(Item::Reasoning(text.into())),
            (_, false) => self.items.push(Item::Content(text.into())),
        }
    }

    fn content(&self) -> String {
        let text = |item: &Item| if let Item::Content(text) = item { Some(text.clone()) } else { None };
        self.items.iter().filter_map(text).collect()
    }

    fn reasoning(&self) -> String {
        let text = |item: &Item| if let Item::Reasoning(text) = item { Some(text.clone()) } else { None };
        self.items.iter().filter_map(text).collect()
    }

    /// Whole calls; what was told of each must be one story.
    fn calls(&self) -> Vec<(String, Value)> {
        let mut calls = Vec::new();
        for item in &self.items {
            let Item::End(index, arguments) = item else { continue };
            let name = self.items.iter().find_map(|item| match item {
                Item::Start(start, _, name) if start == index => Some(name.clone()),
                _ => None,
            });
            let deltas: String = self
                .items
                .iter()
                .filter_map(|item| match item {
                    Item::Arguments(of, text) if of == index => Some(text.as_str()),
                    _ => None,
                })
                .collect();
            assert_eq!(&deltas, arguments, "deltas join to the arguments");
            calls.push((name.expect("a call that ends has begun"), serde_json::from_str(arguments).unwrap()));
        }
        calls
    }
}

/// All ways to cut units into two, and some into more; control tokens stay alone.
fn cuts(units: &[(String, bool)]) -> Vec<Vec<(String, bool)>> {
    let joined = |ends: &mut dyn FnMut(usize) -> bool| {
        let mut pieces: Vec<(String, bool)> = Vec::new();
        for (at, (text, is_control)) in units.iter().enumerate() {
            let after_name = at > 0 && units[at - 1].0.chars().count() > 1;
            let alone = *is_control || ends(at) || after_name || text.chars().count() > 1;
            match pieces.last_mut().filter(|_| !alone) {
                Some((last, false)) => last.push_str(text),
                _ => pieces.push((text.clone(), *is_control)),
            }
        }
        pieces
    };
    let mut all: Vec<_> = (0..units.len()).map(|cut| joined(&mut |at| at == cut)).collect();
    all.extend([1, 2, 3, 5, 8].map(|width| joined(&mut |at| at % width == 0)));
    all
}

fn called(name: usize) -> (String, Value) {
    match name {
        0 => ("get_weather".into(), json!({"city": "Sã\n\"o\" 😀", "days": 2})),
        _ => ("now".into(), json!({})),
    }
}

/// Reads an answer cut in every way; every way must tell the same.
fn read_all(family: &Family, answer: &str) -> Told {
    let format = family.format();
    let units = family.units(answer);
    let cuts = cuts(&units);
    let first = family.run(&format, cuts.last().unwrap());
    for pieces in &cuts {
        assert_eq!(family.run(&format, pieces), first, "{}: {pieces:?}", family.name);
    }
    first
}

fn check(thought: &str, content: &str, calls: &[usize]) {
    for family in &FAMILIES {
        let thought = if family.reasoning.is_some() { thought } else { "" };
        let answer = family.answer(thought, content, calls);
        let told = read_all(family, &answer);
        let wanted: Vec<_> = calls.iter().map(|&call| called(call)).collect();
        assert_eq!(told.calls(), wanted, "{}: {answer:?} told {:?}", family.name, told.items);
        assert_eq!((told.content().as_str(), told.reasoning().as_str()), (content, thought), "{}", family.name);
        let starts = told.items.iter().filter(|item| matches!(item, Item::Start(..))).count();
        assert_eq!(starts, calls.len());
    }
}

#[test]
fn one_call_is_read_however_it_is_cut() {
    check("", "", &[0]);
}

#[test]
fn two_calls_are_read_however_they_are_cut() {
    check("", "", &[0, 1]);
    check("", "", &[1, 0]);
}

#[test]
fn text_before_a_call_is_content_however_it_is_cut() {
    check("", "Let me < look [at] it. 😀", &[0]);
}

#[test]
fn thoughts_before_a_call_are_reasoning_however_they_are_cut() {
    check("I <tool_call> should {\"name\": \"look\"}", "", &[1]);
    check("hm", "So.", &[0, 1]);
}

#[test]
fn an_answer_without_calls_is_content_however_it_is_cut() {
    check("", "Nothing to {call} [here], \n <tool or> so.", &[]);
}

// ---- what is no call ---------------------------------------------------------------------------

fn hermes(answer: &str) -> Told {
    read_all(&PLAIN, answer)
}

const NOW: &str = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";

#[test]
fn text_after_a_call_is_content_and_may_call_again() {
    let told = hermes(&format!("One. {NOW}\n Two <{NOW} three"));
    assert_eq!(told.calls(), [called(1), called(1)]);
    let contents: Vec<_> = told.items.iter().filter(|item| matches!(item, Item::Content(_))).collect();
    assert_eq!(
        contents,
        [&Item::Content("One.".into()), &Item::Content("Two <".into()), &Item::Content("three".into())]
    );
}

#[test]
fn a_call_with_another_closing_is_a_call_and_the_rest_is_text() {
    let told = hermes("<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_cal> hm");
    assert_eq!((told.calls(), told.content().as_str()), (vec![called(1)], "> hm"));
}

#[test]
fn what_only_begins_like_a_call_is_content() {
    for text in [
        "<tool_call>",
        "a <tool_call>\n{\"name",
        " <tool_call> is a tag",
        "<tool_call>\n{\"name\": \"nothing\", \"arguments\": {}}\n</tool_call>",
        "<tool_call>{\"arguments\": {}, \"name\": \"now\"}</tool_call>",
        "<tool_call><tool_call>\n",
    ] {
        let told = hermes(text);
        assert_eq!(told.items, [Item::Content(text.into())]);
    }
}

#[test]
fn a_call_that_goes_wrong_never_ends_and_its_text_is_content() {
    let wrong = "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\": oops}}\n</tool_call>";
    let told = hermes(&format!("So. {wrong}{NOW}"));
    assert_eq!((told.calls(), told.content()), (vec![called(1)], format!("So.{wrong}")));
    let starts = told.items.iter().filter(|item| matches!(item, Item::Start(..))).count();
    assert_eq!(starts, 2);
}

#[test]
fn a_call_that_is_cut_short_has_no_end_and_is_no_content() {
    for family in &FAMILIES {
        let answer = family.answer("", "So.", &[0]);
        let format = family.format();
        let units = family.units(&answer);
        for end in (0..units.len()).step_by(7) {
            let told = family.run(&format, &units[..end]);
            let is_told = told.items.iter().any(|item| matches!(item, Item::Start(..)));
            assert!(!is_told || told.content() == "So.", "{}: {:?}", family.name, told.items);
            assert!(told.content().len() <= answer.len());
        }
    }
}

#[test]
fn braces_in_text_are_no_calls_where_calls_have_no_tag() {
    let llama = FAMILIES.iter().find(|family| family.name == "llama3").unwrap();
    let text = "Sets {1, {2}}; {\"name\": \"x\"} and {";
    assert_eq!(read_all(llama, text).items, [Item::Content(text.into())]);
    let told = read_all(llama, "Use {x}: {\"name\": \"now\", \"parameters\": {}}");
    assert_eq!((told.content().as_str(), told.calls()), ("Use {x}:", vec![called(1)]));
}

#[test]
fn what_nests_too_deeply_is_content() {
    let deep = format!("<tool_call>{{\"name\": \"now\", \"arguments\": {}", "{\"a\":".repeat(100_000));
    let format = PLAIN.format();
    let told = PLAIN.run(&format, &[(deep.clone(), false)]);
    assert_eq!((told.calls(), told.content()), (vec![], deep));
}

#[test]
fn bytes_that_are_no_text_end_a_call_and_are_not_lost() {
    let mut stream = PLAIN.stream(&PLAIN.format(), TextOptions::default());
    let (mut told, mut parts) = (Told::default(), Parts::default());
    for piece in
        [&b"<tool_call>{\"name\": \"now\", \"ar"[..], b"gu\xff", b"ments\": {}}", b" \xf0\x9f", b"\x98\x80 \xf0"]
    {
        assert_eq!(stream.push(1000, piece, false, 0.0, &mut parts), None);
        told.take(&mut parts);
    }
    assert_eq!(stream.finish(&mut parts), None);
    told.take(&mut parts);
    let text = "<tool_call>{\"name\": \"now\", \"argu\u{fffd}ments\": {}} 😀 \u{fffd}";
    assert_eq!((told.calls(), told.content().as_str()), (vec![], text));
}

// ---- stops, prefixes, costs --------------------------------------------------------------------

#[test]
fn a_stop_ends_content_and_no_call() {
    let options = || TextOptions { stop_strings: vec!["}".into(), "\n".into()], ..TextOptions::default() };
    let format = PLAIN.format();
    let mut stream = PLAIN.stream(&format, options());
    let mut parts = Parts::default();
    assert_eq!(stream.push(0, NOW.as_bytes(), false, 0.0, &mut parts), None);
    assert_eq!(stream.n_whole(), 1);
    let stop = stream.push(0, b" more }", false, 0.0, &mut parts);
    assert_eq!(stop.map(|stop| stop.stop).as_deref(), Some("}"));
    assert_eq!(parts.text, "more ");
    let mut stream = PLAIN.stream(&format, options());
    let stop = stream.push(0, format!("a}}b{NOW}").as_bytes(), false, 0.0, &mut parts);
    assert_eq!((stop.map(|stop| stop.stop).as_deref(), stream.n_whole()), (Some("}"), 0));
}

#[test]
fn white_space_before_a_call_is_nothing_and_elsewhere_it_is_content() {
    assert_eq!(hermes(&format!(" a \n\n{NOW}\n")).content(), " a");
    assert_eq!(hermes(&format!("\n\n{NOW}")).content(), "");
    assert_eq!(hermes(" a \n\n b \n").content(), " a \n\n b \n");
}

#[test]
fn a_response_prefix_may_open_a_call() {
    let mut stream = PLAIN.stream(&PLAIN.format(), TextOptions::default());
    let (mut told, mut parts) = (Told::default(), Parts::default());
    stream.begin("Well. <tool_call>{\"name\": \"now\", ", &mut parts);
    assert_eq!(stream.push(0, b"\"arguments\": {}}</tool_call>", false, 0.0, &mut parts), None);
    assert_eq!(stream.finish(&mut parts), None);
    told.take(&mut parts);
    assert_eq!((told.calls(), told.content().as_str()), (vec![called(1)], "Well."));
}

#[test]
fn a_long_call_is_read_a_bounded_number_of_times_per_byte() {
    let mut stream = PLAIN.stream(&PLAIN.format(), TextOptions::default());
    let mut parts = Parts::default();
    let begin = "<tool_call>{\"name\": \"get_weather\", \"arguments\": {\"city\": \"";
    let _ = stream.push(0, begin.as_bytes(), false, 0.0, &mut parts);
    for _ in 0..20_000 {
        let _ = stream.push(0, b"}", false, 0.0, &mut parts);
    }
    let unit = stream.unit.as_ref().expect("the call is open");
    assert!(unit.n_read <= FREE_BYTES + 2 * READ_PER_BYTE * unit.text.len());
    let told: usize =
        parts.marks.iter().filter(|(_, mark)| matches!(mark, Mark::Call(CallEvent::Delta { .. }))).count();
    assert!(told > 100, "it goes on being told: {told}");
    let _ = stream.push(0, b"\"}}</tool_call>", false, 0.0, &mut parts);
    assert_eq!(stream.finish(&mut parts), None);
    assert_eq!(stream.n_whole(), 1);
}

#[test]
fn tokens_of_reasoning_and_content_are_counted_as_without_calls() {
    let family = FAMILIES.iter().find(|family| family.name == "qwen3").unwrap();
    let mut stream = family.stream(&family.format(), TextOptions::default());
    let mut parts = Parts::default();
    for piece in ["<think>", "hm", "</think>", "\n\n", "So", ".", "\n", "<tool", "_call>{", "x"] {
        assert_eq!(stream.push(1000, piece.as_bytes(), false, 0.0, &mut parts), None);
    }
    let marks: Vec<_> = parts.marks.iter().map(|(_, mark)| mark.clone()).collect();
    let expected = [Mark::Open { token: 0 }, Mark::Close { token: 3, forced: false }, Mark::Content { token: 4 }];
    assert_eq!((marks.as_slice(), parts.text.as_str()), (&expected[..], "hmSo.\n<tool_call>{x"));
}

// ---- constraints -------------------------------------------------------------------------------

fn required(name: &str, parallel: bool) -> String {
    let family = FAMILIES.iter().find(|family| family.name == name).unwrap();
    let constraint = format_of(family.name, family.eos, ToolChoice::Required, parallel).constraint;
    assert_eq!(constraint["kind"], "gbnf", "{name}");
    constraint["text"].as_str().unwrap().into()
}

#[test]
fn a_required_call_is_a_grammar_that_begins_with_the_call() {
    for family in &FAMILIES {
        let text = required(family.name, true);
        let root = text.lines().next().unwrap();
        let name = root.trim_start_matches("root ::= ").trim_start_matches("(\"<|start|>assistant\")? ");
        assert!(text.contains(&format!("\n{name} ::= ")), "{}: {root}", family.name);
        assert_eq!(text.lines().filter(|line| line.starts_with("root ::= ")).count(), 1);
    }
    assert!(required("qwen2.5", true).starts_with("root ::= tool-calls\n"));
    assert!(required("qwen2.5", false).starts_with("root ::= tool-call\n"));
}

#[test]
fn a_free_call_is_a_lazy_grammar_with_its_triggers() {
    for family in &FAMILIES {
        let constraint = family.format().constraint;
        assert_eq!(constraint["kind"], "lazy", "{}", family.name);
        assert_eq!(constraint["of"]["kind"], "gbnf");
        assert!(!constraint["triggers"].as_array().unwrap().is_empty());
    }
}

#[test]
fn templates_without_tools_have_no_format_and_get_ours() {
    for name in ["chatml", "llama2", "gemma2", "gemma3", "phi3", "phi4", "command-r", "smollm3", "zephyr", "vicuna"] {
        let source = Source { template: template(name).into(), bos: "<s>".into(), eos: "</s>".into() };
        let wanted = Wanted { tools: &tools(), kwargs: &Map::new(), choice: ToolChoice::Required, parallel: true };
        assert!(calls::of_template(&source, &wanted).is_none(), "{name}");
    }
    let wanted = Wanted { tools: &tools(), kwargs: &Map::new(), choice: ToolChoice::Required, parallel: true };
    let ours = calls::described(&wanted).expect("ours is always there");
    assert_eq!(
        (ours.name.as_str(), ours.described, ours.reader.triggers.as_slice()),
        ("hermes", true, &["<tool_call>".to_owned()][..])
    );
    for text in [NOW, &NOW.replace('\n', "")] {
        assert_eq!(PLAIN.run(&ours, &[(text.into(), false)]).calls(), [called(1)]);
    }
}
