//! Our own format of calls, after that of Hermes, for templates that know no tools.
//!
//! The prompt begins with what the tools are and how they are called, calls are written into answers as the model is
//! told to write them, and results are shown as what a user says. The text is part of what is rendered, so it counts
//! and is cached like the rest. Some templates know how calls are written, and do not say what may be called: there
//! only the tools are added.

use serde_json::{Map, Value, json};

use crate::chat::Turn;

/// A template with the format, for llama.cpp to learn it from.
pub const TEMPLATE: &str = r#"
{%- if tools %}{{ '<|im_start|>system\n<tools>' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"#;

/// Messages in which tools, calls and results are plain text.
pub struct Rewritten {
    /// The messages.
    pub messages: Vec<Value>,
    /// The tokens that a model has written of each.
    pub turns: Vec<Option<Turn>>,
    /// For each message that was given, the one that has its text.
    pub places: Vec<usize>,
}

/// How a call is written.
const SYNTAX: &str = "\n\nTo call a function, answer with:\n<tool_call>\n\
                      {\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>";

/// What is written into messages.
#[derive(Clone, Copy, Debug)]
pub struct Rewriting {
    /// Whether the tools are in the system message, or else in the first one of the user.
    pub in_system: bool,
    /// Whether calls and results are written too: the template knows none.
    pub with_calls: bool,
}

/// Writes tools, and where it is wanted calls and results, into the texts of messages.
pub fn rewrite(tools: &[Value], messages: &[Value], turns: &[Option<Turn>], how: Rewriting) -> Rewritten {
    let mut out = Rewritten { messages: Vec::new(), turns: Vec::new(), places: Vec::new() };
    for (index, message) in messages.iter().enumerate() {
        out.add(message, turns.get(index).cloned().flatten(), how.with_calls);
    }
    if !tools.is_empty() {
        let lines: Vec<String> = tools.iter().map(|tool| spaced(tool.get("function").unwrap_or(tool))).collect();
        let syntax = if how.with_calls { SYNTAX } else { "" };
        let lines = lines.join("\n");
        let text = format!("# Tools\n\nYou may call these functions:\n<tools>\n{lines}\n</tools>{syntax}");
        out.describe(&text, how.in_system);
    }
    out
}

impl Rewritten {
    fn add(&mut self, message: &Value, turn: Option<Turn>, writes_calls: bool) {
        match role(message) {
            "tool" if writes_calls => self.add_result(message),
            "assistant" if writes_calls => self.push(with_calls(message), turn),
            _ => self.push(message.clone(), turn),
        }
        self.places.push(self.messages.len() - 1);
    }

    fn push(&mut self, message: Value, turn: Option<Turn>) {
        self.messages.push(message);
        self.turns.push(turn);
    }

    /// Results of one round go into one message: many templates want users and assistants to take turns.
    fn add_result(&mut self, message: &Value) {
        let result = format!("<tool_response>\n{}\n</tool_response>", content(message));
        let last = self.messages.last_mut().filter(|last| role(last) == "user" && content(last).starts_with(RESULT));
        match last {
            Some(last) => last["content"] = format!("{}\n{result}", content(last)).into(),
            None => self.push(json!({"role": "user", "content": result}), None),
        }
    }

    fn describe(&mut self, description: &str, in_system: bool) {
        let wanted = if in_system { "system" } else { "user" };
        let first = self.messages.iter().position(|message| role(message) == wanted);
        match first.filter(|&first| !in_system || first == 0) {
            Some(first) if in_system => self.extend(first, |text| format!("{text}\n\n{description}")),
            Some(first) => self.extend(first, |text| format!("{description}\n\n{text}")),
            None => {
                self.messages.insert(0, json!({"role": wanted, "content": description}));
                self.turns.insert(0, None);
                self.places.iter_mut().for_each(|place| *place += 1);
            }
        }
    }

    fn extend(&mut self, index: usize, change: impl FnOnce(&str) -> String) {
        let text = change(content(&self.messages[index]));
        self.messages[index]["content"] = text.into();
    }
}

const RESULT: &str = "<tool_response>\n";

fn role(message: &Value) -> &str {
    message.get("role").and_then(Value::as_str).unwrap_or_default()
}

fn content(message: &Value) -> &str {
    message.get("content").and_then(Value::as_str).unwrap_or_default()
}

/// An answer with its calls as text.
fn with_calls(message: &Value) -> Value {
    let Some(calls) = message.get("tool_calls").and_then(Value::as_array) else { return message.clone() };
    let said = Some(content(message)).filter(|text| !text.is_empty()).map(str::to_owned);
    let texts: Vec<String> = said.into_iter().chain(calls.iter().map(call_text)).collect();
    let mut fields: Map<String, Value> = message.as_object().cloned().unwrap_or_default();
    fields.remove("tool_calls");
    fields.insert("content".into(), texts.join("\n").into());
    fields.into()
}

fn call_text(call: &Value) -> String {
    let function = call.get("function").unwrap_or(call);
    let call = json!({"name": function["name"], "arguments": function["arguments"]});
    format!("<tool_call>\n{}\n</tool_call>", spaced(&call))
}

/// JSON with spaces behind commas and colons, as Python writes it and models have learnt it.
fn spaced(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("[{}]", items.iter().map(spaced).collect::<Vec<_>>().join(", ")),
        Value::Object(fields) => {
            let fields = fields.iter().map(|(key, value)| format!("{}: {}", json!(key), spaced(value)));
            format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
        }
        value => value.to_string(),
    }
}
