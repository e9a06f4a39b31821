//! What llama.cpp is given of parameters, and what is refused.

use serde_json::{Value, json};

use super::{pattern, readable};

fn read(parameters: Value) -> Result<Value, String> {
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": parameters}});
    let tools = readable(&[tool]).map_err(|error| error.to_string())?;
    Ok(tools[0]["function"]["parameters"].clone())
}

/// What is read of the schema of a property, and the definitions that it uses.
fn read_property(schema: Value, definitions: Value) -> Value {
    let given = json!({"type": "object", "properties": {"x": schema}, "$defs": definitions});
    let read = read(given).expect("it can be read");
    json!([read["properties"]["x"], read["$defs"]])
}

#[test]
fn schemas_say_no_more_than_grammars_can_hold() {
    let (text, number) = (json!({"type": "string"}), json!({"type": "number"}));
    for (given, expected) in [
        (json!(true), json!({})),
        (json!({"title": "t", "default": 5}), json!({"title": "t", "default": 5})),
        (json!({"type": ["string", "null", "string"]}), json!({"anyOf": [{"type": "null"}, text]})),
        (json!({"type": ["string"]}), text.clone()),
        (json!({"prefixItems": [number], "items": false}), json!({"type": "array", "prefixItems": [number]})),
        (json!({"prefixItems": [number], "items": text}), json!({"type": "array"})),
        (json!({"items": [number, text]}), json!({"type": "array", "prefixItems": [number, text]})),
        (json!({"items": text, "minItems": 1.0}), json!({"type": "array", "items": text, "minItems": 1})),
        (json!({"type": "string", "minLength": -1, "maxLength": 1e300}), text.clone()),
        (json!({"type": "string", "pattern": "[a-z]+"}), text.clone()),
        (json!({"pattern": "^[a-z]+$"}), json!({"type": "string", "pattern": "^[a-z]+$"})),
        (
            json!({"type": "integer", "exclusiveMinimum": 1.5, "maximum": 9}),
            json!({"type": "integer", "minimum": 2, "maximum": 9}),
        ),
        (json!({"type": "integer", "minimum": 3, "maximum": 2}), json!({"type": "integer"})),
        (json!({"type": "integer", "exclusiveMinimum": true, "maximum": 1e300}), json!({"type": "integer"})),
        (json!({"oneOf": [text, true]}), json!({"anyOf": [text, {}]})),
        (json!({"allOf": [text], "title": "t"}), json!({"type": "string", "title": "t"})),
        (json!({"allOf": [text, {"minLength": 1}]}), json!({})),
        (json!({"not": {"type": "string"}}), json!({"not": {"type": "string"}})),
    ] {
        assert_eq!(read_property(given.clone(), json!({}))[0], expected, "{given}");
    }
}

#[test]
fn objects_that_must_all_hold_become_one() {
    let person = json!({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]});
    let given = json!({"allOf": [{"$ref": "#/$defs/person"}, {"properties": {"age": {"type": "integer"}}}]});
    let expected = json!({
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name"],
    });
    assert_eq!(read_property(given, json!({"person": person}))[0], expected);
}

#[test]
fn beside_properties_alternatives_say_nothing() {
    let given = json!({"properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]});
    assert_eq!(read_property(given, json!({}))[0], json!({"type": "object", "properties": {"a": {}}, "required": []}));
}

#[test]
fn references_lead_to_definitions_with_plain_names() {
    let node = json!({"type": "object", "properties": {"next": {"$ref": "#/$defs/a~1node"}}});
    let read = read_property(json!({"$ref": "#/$defs/a~1node"}), json!({"a/node": node, "unused": true}));
    let reference = json!({"$ref": "#/$defs/a1node00000"});
    let definition = json!({"type": "object", "properties": {"next": reference}, "required": []});
    assert_eq!(read, json!([reference, {"a1node00000": definition}]));
    assert!(self::read(json!({"properties": {"whole": {"$ref": "#"}}})).is_ok());
}

#[test]
fn whatever_is_given_the_parameters_are_of_an_object() {
    for given in [json!(null), json!({}), json!({"description": "none"})] {
        assert_eq!(read(given).unwrap()["type"], "object");
    }
}

#[test]
fn what_no_grammar_can_be_made_of_is_refused_by_name() {
    let properties = |count: usize| (0..count).map(|i| (format!("p{i}"), json!({}))).collect::<Value>();
    let defined = |definitions: Value| json!({"properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": definitions});
    let doubled =
        |i: usize| json!({"anyOf": [{"$ref": format!("#/$defs/a{}", i + 1)}, {"$ref": format!("#/$defs/a{}", i + 1)}]});
    let mut doubling: serde_json::Map<String, Value> = (0..40).map(|i| (format!("a{i}"), doubled(i))).collect();
    doubling.insert("a40".into(), json!({}));
    doubling.insert("a".into(), doubled(0));
    let again = json!({"allOf": [{"$ref": "#/$defs/a"}, {"properties": {"y": {}}}]});
    for (given, reason) in [
        (json!({"properties": {"x": 5}}), "not 5 at #/properties/x"),
        (json!({"properties": []}), "properties cannot be [] at #"),
        (json!({"properties": {"x": {"type": "any"}}}), r#"type cannot be "any" at #/properties/x"#),
        (json!({"properties": {"x": {"type": []}}}), "type cannot be []"),
        (json!({"properties": {"x": {"enum": []}}}), "enum cannot be []"),
        (json!({"properties": {"x": {"anyOf": {}}}}), "must be a list of schemas"),
        (json!({"properties": {"x": {"$ref": 5}}}), "$ref cannot be 5"),
        (json!({"properties": {"x": {"$ref": "other.json"}}}), r#""other.json" leads nowhere"#),
        (json!({"$ref": "#"}), "leads back to the same schema"),
        (defined(json!({"a": {"$ref": "#/$defs/a"}})), "leads back to the same schema"),
        (defined(json!({"a": {"allOf": [{"$ref": "#/$defs/a"}]}})), "leads back to the same schema"),
        (defined(json!({"a": {"anyOf": [{"$ref": "#/$defs/b"}, {}]}, "b": {"$ref": "#/$defs/a"}})), "leads back"),
        (defined(json!({"a": {"properties": {"x": again}}})), "too large"),
        (defined(doubling.into()), "more than 1000 alternatives"),
        (json!({"properties": properties(10_000)}), "10000 properties at # are too many"),
        (json!({"properties": {"x".repeat(300): {}}}), "300 bytes"),
    ] {
        let refused = read(given).expect_err(reason);
        assert!(refused.contains(reason) && refused.contains(r#"the tool "f""#), "{refused}");
    }
}

#[test]
fn patterns_that_are_read_mean_the_same() {
    for (given, expected) in [
        ("^[a-z]{2,3}$", "^[a-z]{2,3}$"),
        (r"^\d{4}-\d\d$", "^[0-9]{4}-[0-9][0-9]$"),
        (r"^(?:a|b)+\.x?$", "^(a|b)+[.]x?$"),
        (r"^[\w-]+@[a-z.]*$", "^([0-9A-Za-z_]|[-])+@[a-z.]*$"),
    ] {
        assert_eq!(pattern::plain(given).as_deref(), Some(expected), "{given}");
    }
    let others = [
        "",
        "^$",
        "a",
        "^a",
        "a$",
        "^.$",
        "^a|$",
        "^(|a)$",
        "^()$",
        "^(a$",
        "^a)$",
        "^a**$",
        "^a+?$",
        "^+$",
        "^{2}$",
        "^a{3,2}$",
        "^a{0}$",
        "^a{1,99999}$",
        "^a{,2}$",
        "^a{2$",
        r"^\s$",
        r"^a\$",
        "^[^a]$",
        "^[z-a]$",
        "^[ -~]$",
        "^[]$",
        "^[-]$",
        "^[a$",
        "^(?=a)b$",
        "^é$",
        "^\"$",
        "^a^b$",
        "^]$",
    ];
    for given in others {
        assert_eq!(pattern::plain(given), None, "{given}");
    }
    assert_eq!(pattern::plain(&format!("^{}a{}$", "(".repeat(60), ")".repeat(60))), None);
}
