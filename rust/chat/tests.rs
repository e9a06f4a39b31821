//! Properties of rendering and alignment, over random contents, templates and control tokens.

use std::ops::Range;
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::spans::{Alphabet, Layout, Owner};
use super::template::{self, FUEL};
use super::text::Text;
use super::turns::{Shader, Shading};

const CONTROLS: [&str; 5] = ["<|im_start|>", "<|im_end|>", "<|e|>", "[INST]", "<s>"];

fn controls() -> Vec<String> {
    CONTROLS.map(str::to_owned).into()
}

/// Words, parts of control tokens, quotes, white space, characters of every length, private ones among them.
fn content() -> impl Strategy<Value = String> {
    let parts = prop_oneof![
        prop::sample::select(&CONTROLS[..]).prop_map(str::to_owned),
        prop::sample::select(vec!["<|", "|>", "im_", "end", "<", "[IN", "ST]", "#", "</think>", "\"", "\\", "'"])
            .prop_map(str::to_owned),
        "[ \\n\\t\u{a0}\u{2003}]{0,3}",
        "[a-zé世🦙\u{f0000}\u{10fffd}\u{1c}]{0,4}",
    ];
    prop::collection::vec(parts, 0..8).prop_map(|parts| parts.concat())
}

/// What templates do with a content.
const USES: [&str; 16] = [
    "{{ c }}",
    "{{ c | trim }}",
    "{{ c.strip() }}!",
    "{{ c.lstrip('#<') }}",
    "{{ c | tojson }}",
    "{{ [c, c] | tojson(indent=2) }}",
    "{{ c.split('#')[-1] }}",
    "{{ c.split() | join('-') }}",
    "{{ c.replace('<', '[') }}",
    "{{ c | upper }}",
    "{{ c.rsplit('|', 1)[0] }}",
    "{{ c.partition('|>')[2] }}",
    "{% for line in c.splitlines() %}{{ line }}\n{% endfor %}",
    "{{ c[1:] }}{{ c | length }}",
    "{% if c.startswith('<') or c.endswith('>') %}A{% else %}B{% endif %}{{ c }}",
    "{{ c | e }}{{ c.removeprefix('<|').removesuffix('|>') }}",
];

fn template() -> impl Strategy<Value = String> {
    let used = prop::sample::select(&USES[..]);
    (prop::collection::vec(used, 1..4), prop::sample::select(&CONTROLS[..])).prop_map(|(uses, control)| {
        let uses = uses.concat();
        format!("{{% for m in messages %}}{{% set c = m.content %}}<|im_start|>{{{{ m.role }}}}\n{uses}{control}{{% endfor %}}")
    })
}

fn messages(contents: &[String]) -> Vec<Value> {
    let roles = ["user", "assistant"].iter().cycle();
    contents.iter().zip(roles).map(|(content, role)| json!({"role": role, "content": content})).collect()
}

fn rendered(template: &str, messages: &[Value], alphabet: &Arc<Alphabet>) -> String {
    template::render(&template.into(), &json!({ "messages": messages }), alphabet, FUEL).unwrap()
}

fn shaded(template: &str, messages: &[Value], shading: Shading) -> Layout {
    let controls = controls();
    let texts: Vec<String> = messages.iter().map(Value::to_string).collect();
    let alphabet = Arc::new(Alphabet::avoiding(texts.iter().map(String::as_str)));
    let shader = Shader { alphabet: &alphabet, controls: &controls, shading };
    let shaded: Vec<Value> =
        messages.iter().enumerate().map(|(index, message)| shader.message(message, index)).collect();
    alphabet.read(&rendered(template, &shaded, &alphabet), messages.len())
}

/// The control tokens that a prompt names outside of what is protected.
fn named(layout: &Layout) -> Vec<&'static str> {
    let mut found: Vec<_> = CONTROLS
        .iter()
        .flat_map(|control| layout.text.match_indices(control))
        .filter(|(at, control)| !layout.protected.iter().any(|range| overlap(range, &(*at..at + control.len()))))
        .collect();
    found.sort_unstable();
    found
        .into_iter()
        .map(|(_, control)| CONTROLS[CONTROLS.iter().position(|known| *known == control).unwrap()])
        .collect()
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_shaded_rendering_is_the_real_one_shaded(
        contents in prop::collection::vec(content(), 1..4),
        template in template(),
    ) {
        let messages = messages(&contents);
        let real = rendered(&template, &messages, &Arc::default());
        prop_assert_eq!(&shaded(&template, &messages, Shading::Full).text, &real);
    }

    #[test]
    fn what_contents_say_changes_no_control_token(
        contents in prop::collection::vec(content(), 1..4),
    ) {
        let template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<s>";
        let turns = contents.iter().flat_map(|_| ["<|im_start|>", "<|im_end|>"]);
        let expected: Vec<_> = turns.chain(["<s>"]).collect();
        for shading in [Shading::Full, Shading::Controls] {
            let mut layout = shaded(template, &messages(&contents), shading);
            prop_assert_eq!(named(&layout), expected.as_slice());
            layout.protect_messages();
            prop_assert_eq!(named(&layout), expected.as_slice());
        }
    }

    #[test]
    fn whatever_a_template_does_with_contents_they_name_no_control_token(
        contents in prop::collection::vec(content(), 1..4),
        template in template(),
    ) {
        let quiet = messages(&contents.iter().map(|_| "x".to_owned()).collect::<Vec<_>>());
        let count = named(&shaded(&template, &quiet, Shading::Full)).len();
        let mut layout = shaded(&template, &messages(&contents), Shading::Full);
        prop_assert_eq!(named(&layout).len(), count);
        layout.protect_messages();
        prop_assert!(named(&layout).len() <= count);
    }

    #[test]
    fn a_renderer_that_does_not_know_shades_is_understood(text in content()) {
        let alphabet = Alphabet::avoiding([text.as_str()]);
        let shaded = alphabet.shade(&text, Owner { message: 0, is_content: true });
        for ascii in [false, true] {
            let escaped: String =
                text.chars().map(|c| super::json::escape(c, ascii).unwrap_or_else(|| c.into())).collect();
            // White space is not shaded: such a renderer escapes it all the same.
            let space: String = shaded
                .chars()
                .map(|c| match super::spans::is_space(c) {
                    true => super::json::escape(c, ascii).unwrap_or_else(|| c.into()),
                    false => c.into(),
                })
                .collect();
            let layout = alphabet.align(&format!("<s>{space}<s>"), &format!("<s>{escaped}<s>"), 1);
            let layout = layout.expect("the two renderings are one");
            prop_assert_eq!(&layout.text, &format!("<s>{escaped}<s>"));
            prop_assert_eq!(named(&layout), ["<s>", "<s>"]);
            let longer = format!("{escaped}x");
            prop_assert!(alphabet.align(&space, &longer, 1).is_none());
        }
    }

    #[test]
    fn protected_ranges_are_in_order_and_apart(
        contents in prop::collection::vec(content(), 1..4),
        template in template(),
    ) {
        for shading in [Shading::Full, Shading::Controls] {
            let mut layout = shaded(&template, &messages(&contents), shading);
            layout.protect_messages();
            prop_assert!(layout.protected.iter().all(|range| range.start < range.end));
            prop_assert!(layout.protected.windows(2).all(|pair| pair[0].end <= pair[1].start));
            prop_assert!(layout.protected.last().is_none_or(|range| range.end <= layout.text.len()));
        }
    }

    #[test]
    fn a_shaded_text_stands_for_the_text(text in content()) {
        let alphabet = Alphabet::avoiding([text.as_str()]);
        let owner = Owner { message: 0, is_content: true };
        let shaded = alphabet.shade(&text, owner);
        prop_assert_eq!(shaded.chars().count(), text.chars().count());
        prop_assert_eq!(alphabet.plain(&shaded), text.as_str());
        let named = alphabet.shade_controls(&text, owner, &controls());
        prop_assert_eq!(alphabet.plain(&named), text.as_str());
        let hidden = alphabet.hide_controls(&text, &controls());
        prop_assert_eq!(alphabet.plain(&hidden), text.as_str());
        let layout = alphabet.read(&shaded, 1);
        let visible = text.trim_matches(super::spans::is_space);
        prop_assert_eq!(layout.contents[0].clone().map(|range| &layout.text[range]).unwrap_or_default(), visible);
    }

    #[test]
    fn methods_of_a_plain_text_are_those_of_the_standard_library(text in content(), part in "[<|#a]{1,2}") {
        let alphabet = Alphabet::default();
        let plain = Text::new(&text, &alphabet);
        let split: Vec<&str> = text.split(&part).collect();
        prop_assert_eq!(plain.split(&part, None), split);
        let split: Vec<&str> = text.splitn(2, &part).collect();
        prop_assert_eq!(plain.split(&part, Some(1)), split);
        let mut split: Vec<&str> = text.rsplitn(2, &part).collect();
        split.reverse();
        prop_assert_eq!(plain.split_right(&part, Some(1)), split);
        prop_assert_eq!(plain.replace(&part, "xy", None), text.replace(&part, "xy"));
        prop_assert_eq!(plain.replace(&part, "xy", Some(1)), text.replacen(&part, "xy", 1));
        prop_assert_eq!(plain.without_prefix(&part), text.strip_prefix(&part).unwrap_or(&text));
        prop_assert_eq!(plain.without_suffix(&part), text.strip_suffix(&part).unwrap_or(&text));
    }
}

#[test]
fn a_text_with_more_characters_than_the_private_planes_exhausts_the_alphabet() {
    let alphabet = Alphabet::default();
    let text: String = ('\u{100}'..='\u{10ffff}').filter(|c| !super::spans::is_space(*c)).take(140_000).collect();
    let _ = alphabet.shade(&text, Owner { message: 0, is_content: true });
    assert!(alphabet.is_exhausted());
}

#[test]
fn blocks_of_hugging_face_s_own_change_nothing() {
    let template = "{% generation %}\n{{ messages[0].content }}{%- endgeneration -%} generation";
    assert_eq!(rendered(template, &messages(&["x".into()]), &Arc::default()), "xgeneration");
}
