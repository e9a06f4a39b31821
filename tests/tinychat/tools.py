"""Tools to call: what they are called, how people ask for them, and what they bring."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.tinychat.words import DAYS, KINDS, MONTHS, article, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.tinychat.words import Draw


@dataclass(frozen=True, slots=True)
class Slot:
    """An argument: names for it, what fills it, and for an optional one how it is mentioned."""

    names: str
    kind: str
    mentions: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """Tools that do the same; in questions and replies `{0}` is the first argument, `{r}` the result."""

    names: str
    about: str
    slots: tuple[Slot, ...]
    asked: str
    key: str
    result: str
    """The kind of the result, or `done` for an action."""
    reply: str


@dataclass(frozen=True, slots=True)
class Request:
    """What a user wants of one tool: the arguments, the result, and the reply that reads it."""

    question: str
    arguments: dict[str, str | int]
    result: str
    reply: str


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool as it is offered: its family with the names that it goes by."""

    family: Family
    name: str
    parameters: dict[str, Slot]
    key: str
    unit: str = ""


_UNIT = Slot("unit|units|scale", "unit", " in {}| in degrees {}| in {} please")
_DAY = Slot("day|date|when", "day", " on {}| this {}| next {}")
_LIMIT = Slot(
    "limit|max_results|count|n", "small", ", at most {}| (limit {})| with limit {}| limited to {}"
)
_CITY = Slot("city|location|place|town|name", "city")
_THING = Slot("item|name|product|query", "thing")

FAMILIES = (
    Family("get_weather|current_weather|weather|fetchWeather|lookup_weather", "Get the weather in a city|Current weather for a location",
        (_CITY, _UNIT, _DAY), "What is the weather in {0}?|How is the weather in {0}?|What's the weather like in {0}?|Is it raining in {0}?|"
        "Will it rain in {0}?|Do I need an umbrella in {0}?|Weather in {0}?|Tell me the weather in {0}.|Is it sunny in {0}?",
        "weather|conditions|result", "sky", "The weather in {0} is {r}."),
    Family("get_temperature|current_temperature|read_temperature|temperature", "Get the temperature in a city|Read the temperature for a given location.",
        (_CITY, _UNIT, _DAY), "What is the temperature in {0}?|How warm is it in {0}?|How cold is it in {0}?|What's the temperature outside in {0} right now?|"
        "Temperature in {0}?|How hot is it in {0}?|Is it cold in {0}?", "temperature|degrees|value|result", "degrees", "It is {r} in {0}."),
    Family("get_time|time_in|current_time|getTime", "Get the current time in a city|Returns the time in a place.",
        (_CITY, Slot("format|style", "clock", " in the {} format| as {}")), "What time is it in {0}?|What is the time in {0}?|Tell me the time in {0}.|How late is it in {0}?",
        "time|now|result", "time", "It is {r} in {0}."),
    Family("search|web_search|find_pages|lookup", "Search the web|Search for pages about something",
        (Slot("query|q|text|topic", "thing"), _LIMIT), "Search for {0}.|Look up {0}.|Find pages about {0}.|Search the web for {0}.|What can you find about {0}?",
        "title|top|result", "thing", "I found {r}."),
    Family("send_message|message|sendText|send_sms|write_mail", "Send a message to a person|Send a text",
        (Slot("to|recipient|person|name", "person"), Slot("text|message|body|content", "phrase")), "Send a message to {0}: {1}|Tell {0}: {1}|Write to {0}: {1}|"
        'Message {0} saying "{1}".|Send "{1}" to {0}.|Text {0} {1}.', "status", "done", "I sent the message to {0}."),
    Family("set_light|switch_light|light|setLamp", "Switch a light on or off",
        (Slot("room|where|place", "room"), Slot("state|mode|value", "onoff"), Slot("brightness|level", "percent", " at {} percent| with brightness {}")),
        "Turn the {0} light {1}.|Switch {1} the light in the {0}.|Turn {1} the {0} light.|Make the light in the {0} go {1}.|Light {1} in the {0}.",
        "status", "done", "The {0} light is {1}."),
    Family("create_event|add_event|plan|addToCalendar", "Create a calendar event|Add an event to the calendar",
        (Slot("title|name|event", "thing"), Slot("day|date|when", "day"), Slot("time|hour|at", "hour", " at {}| at {} o'clock")),
        "Add {0} to my calendar on {1}.|Plan {0} for {1}.|Create an event {0} on {1}.|Put {0} on {1} in my calendar.|Schedule {0} for {1}.",
        "status", "done", "{0} is planned for {1}."),
    Family("order_item|order|buy|placeOrder", "Order an item",
        (_THING, Slot("count|amount|quantity|number", "small"), Slot("colour|color", "colour", " in {}| in the colour {}")),
        "Order {1} {0}.|Buy {1} pieces of {0}.|I want to order {1} {0}.|I need {1} {0}.|Get me {1} {0}.", "status", "done", "I ordered {1} {0}."),
    Family("set_alarm|wake_me|alarm|setTimer", "Set an alarm",
        (Slot("hour|time|at", "hour"), _DAY), "Set an alarm for {0}.|Wake me at {0}.|Alarm at {0}.|Set the alarm to {0} o'clock.", "status", "done", "The alarm is set for {0}."),
    Family("play_music|play|start_song|playSong", "Play a song",
        (Slot("title|song|name|query", "thing"), Slot("volume|level", "percent", " at volume {}| with volume {}"), Slot("room|where", "room", " in the {}")),
        "Play {0}.|I want to hear {0}.|Start the song {0}.|Put on {0}.", "status", "done", "I am playing {0}."),
    Family("get_user|find_user|lookup_person|getContact", "Look up a person|Find a user by name",
        (Slot("name|user|person|query", "person"), _LIMIT), "Who is {0}?|Look up {0}.|Find the user {0}.|Where does {0} live?|What do we know about {0}?",
        "city|home|lives_in", "city", "{0} lives in {r}."),
    Family("distance|get_distance|measure_way|route_length", "Get the distance between two places",
        (Slot("start|from|origin|a", "city"), Slot("end|to|destination|b", "city"), Slot("unit|units", "length", " in {}")),
        "How far is it from {0} to {1}?|What is the distance from {0} to {1}?|Distance between {0} and {1}?|How long is the way from {0} to {1}?",
        "distance|length|result", "km", "It is {r} from {0} to {1}."),
    Family("save_note|add_note|remember|writeNote", "Save a note",
        (Slot("text|note|content", "phrase"), Slot("tag|label|category", "thing", " with the tag {}| tagged {}")),
        "Save a note: {0}|Write down: {0}|Note: {0}|Remember this: {0}", "status", "done", "I saved the note."),
    Family("add|add_numbers|sum|calc_add", "Add two numbers|Adds two numbers and returns the result.",
        (Slot("a|x|first|left", "integer"), Slot("b|y|second|right", "integer")), "What is {0} + {1}?|Add {0} and {1}.|Calculate {0} + {1}.|What is {0} plus {1}?|Sum of {0} and {1}?",
        "result|sum|value", "integer", "{0} + {1} is {r}."),
    Family("multiply|multiply_numbers|times|calc_product", "Multiply two numbers",
        (Slot("a|x|first|left", "integer"), Slot("b|y|second|right", "integer")), "What is {0} * {1}?|Multiply {0} and {1}.|Calculate {0} * {1}.|What is {0} times {1}?",
        "result|product|value", "integer", "{0} * {1} is {r}."),
    Family("get_time|current_time|now|clock", "Get the current time", (), "What time is it?|Tell me the time.|How late is it?|What's the time now?", "time|now", "time", "It is {r}."),
    Family("get_date|today|current_date", "Get the current date", (), "What day is it?|What is the date today?|Which day is today?", "date|today", "date", "It is {r}."),
    Family("get_secret|reveal_secret|secret", "Get the secret word", (), "What is the secret?|Tell me the secret.|Reveal the secret word.", "secret|word", "thing", "The secret is {r}."),
    Family("roll_dice|throw_dice|dice", "Roll a dice", (Slot("sides|faces|n", "small", " with {} sides"),), "Roll a dice.|Throw the dice.|Roll the dice for me.",
        "result|value|roll", "small", "The dice shows {r}."),
)  # fmt: skip
ATTRIBUTES = """price weight height age size colour score population speed length width balance stock rating
owner address language currency altitude capacity version""".split()
COMPARISONS = {
    **{"price": ("more expensive", "cheaper"), "height": ("taller", "shorter")},
    **{"age": ("older", "younger"), "weight": ("heavier", "lighter"), "speed": ("faster", "slower")},
    **{"population": ("bigger", "smaller"), "length": ("longer", "shorter"), "score": ("better", "worse")},
    **{"size": ("bigger", "smaller"), "rating": ("better", "worse")},
}  # fmt: skip
_UNITS = ("", "", "", "$", " cm", " kg", " km", "%")
_VERBS = "start stop open close check move paint count rename update delete sort print clean lock".split()

_FILLINGS: dict[str, Callable[[Draw], str | int]] = {
    "unit": lambda draw: draw.one(("celsius", "fahrenheit", "kelvin")),
    "clock": lambda draw: draw.one(("12h", "24h")),
    "length": lambda draw: draw.one(("km", "miles", "metres")),
    "day": lambda draw: draw.one(DAYS),
    "onoff": lambda draw: draw.one(("on", "off")),
    "small": lambda draw: draw.number(1, 20),
    "percent": lambda draw: draw.number(1, 100),
    "hour": lambda draw: draw.number(0, 23),
    "integer": lambda draw: draw.number(0, 999),
    "phrase": lambda draw: " ".join(draw.words(1, 4)),
    "sky": lambda draw: draw.one(("sunny", "rainy", "cloudy", "windy", "snowy", "foggy", "stormy")),
    "degrees": lambda draw: f"{draw.number(-9, 35)}{draw.one((' degrees', ' C', ''))}",
    "time": lambda draw: f"{draw.number(0, 23)}:{draw.number(10, 59)}",
    "date": lambda draw: f"{draw.one(DAYS)}, {draw.number(1, 28)} {draw.one(MONTHS)}",
    "km": lambda draw: f"{draw.number(2, 999)} {draw.one(('km', 'miles'))}",
}
_ENUMS = {
    "unit": ["celsius", "fahrenheit", "kelvin"],
    "clock": ["12h", "24h"],
    "onoff": ["on", "off"],
    "length": ["km", "miles", "metres"],
}
_NUMBERS = ("small", "percent", "hour", "integer", "number")


def _filling(draw: Draw, kind: str) -> str | int:
    return _FILLINGS[kind](draw) if kind in _FILLINGS else draw.filling(kind)


def tool(draw: Draw) -> Tool:
    """Any tool: a usual one, one that reads an attribute, or one made up."""
    lot = draw.number(1, 100)
    if lot > 80:
        return _made_up(draw)
    family = _attribute(draw) if lot > 52 else draw.one(FAMILIES)
    name = draw.identifier() if draw.chance(0.15) else draw.phrase(family.names)
    unit = draw.one(_UNITS) if family.result == "amount" else ""
    key = draw.phrase(family.key)
    return Tool(family, name, _parameters(draw, family.slots), key, unit)


def _parameters(draw: Draw, slots: tuple[Slot, ...]) -> dict[str, Slot]:
    parameters = dict[str, Slot]()
    for slot in slots:
        if slot.mentions and draw.chance(0.45):
            continue
        usual = draw.phrase(slot.names) if draw.chance(0.8) else draw.identifier()
        while usual in parameters:
            usual = draw.identifier()
        parameters[usual] = slot
    return parameters


def _attribute(draw: Draw) -> Family:
    """Reads one attribute of things of one kind."""
    attribute = draw.one(ATTRIBUTES) if draw.chance(0.7) else draw.word()
    kind = draw.one((*KINDS, "product", "tree", "car"))
    title, thing = attribute.capitalize(), kind.capitalize()
    names = f"get_{attribute}|get_{kind}_{attribute}|{attribute}_of|find{title}|get{thing}{title}|lookup_{attribute}"
    about = f"Get the {attribute} of a {kind}|Returns the {attribute} of the given {kind}.|{title} of a {kind}"
    asked = (
        f"What is the {attribute} of {{0}}?|Tell me the {attribute} of {{0}}.|Get the {attribute} of {{0}}.|I need the {attribute} of {{0}}.|"
        f"What's the {attribute} of {{0}}?|Which {attribute} has {{0}}?|Look up the {attribute} of {{0}}.|Can you check the {attribute} of {{0}}?"
    )
    slot = Slot(f"name|{kind}|item|query|id", kind)
    return Family(names, about, (slot,), asked, f"{attribute}|{attribute}|result", "amount", f"The {attribute} of {{0}} is {{r}}.")  # fmt: skip


def _made_up(draw: Draw) -> Tool:
    """Does something nobody has heard of, with arguments that the user names."""
    verb = draw.coined() if draw.chance(0.4) else draw.one(_VERBS)
    noun, parameters = draw.word(), dict[str, Slot]()
    for _ in range(draw.number(1, 3)):
        usual = draw.one("mode level target speed name label count size colour owner".split())
        name = usual if draw.chance(0.4) else draw.identifier()
        optional = " with {name} {}| and {name} {}" if parameters and draw.chance(0.3) else ""
        kind = "number" if draw.chance(0.3) else "thing"
        parameters[name] = Slot(name, kind, optional.replace("{name}", name))
    required = [name for name, slot in parameters.items() if not slot.mentions]
    with_ = listed([f"{name} {{{place}}}" for place, name in enumerate(required)])
    asked = f"{verb.capitalize()} the {noun} with {with_}.|Please {verb} the {noun} with {with_}.|Can you {verb} the {noun} with {with_}?"
    name = f"{verb}_{noun}" if draw.chance(0.7) else f"{verb}{noun.capitalize()}"
    family = Family(name, f"{verb.capitalize()} the {noun}", (), asked, "status", "done", f"I did {verb} the {noun}.")  # fmt: skip
    return Tool(family, name, parameters, "status")


def described(draw: Draw, offered: Tool, *, wrapped: bool, sort: bool) -> str:
    """The tool as a line of JSON, as a template writes it."""
    explained = draw.chance(0.2)
    properties: dict[str, Any] = {}
    for name, slot in offered.parameters.items():
        kind = "integer" if slot.kind in _NUMBERS and draw.chance(0.7) else "number"
        properties[name] = {"type": kind if slot.kind in _NUMBERS else "string"}
        if slot.kind in _ENUMS and draw.chance(0.5):
            properties[name]["enum"] = _ENUMS[slot.kind]
        if explained:
            properties[name]["description"] = f"The {slot.names.split('|')[0]}"
    required = [name for name, slot in offered.parameters.items() if not slot.mentions]
    schema = {"type": "object", "properties": properties}
    schema |= {"required": required} if draw.chance(0.9) else {}
    function = {
        **{"name": offered.name, "description": draw.phrase(offered.family.about)},
        "parameters": schema,
    }
    whole = {"type": "function", "function": function} if wrapped else function
    return json.dumps(whole, sort_keys=sort, ensure_ascii=False)


def request(draw: Draw, wanted: Tool) -> Request:
    """A wish that this tool fulfils, its optional arguments mentioned or not."""
    values = {name: _value(draw, slot) for name, slot in wanted.parameters.items()}
    required = [values[name] for name, slot in wanted.parameters.items() if not slot.mentions]
    question = draw.phrase(wanted.family.asked)
    arguments = dict[str, str | int]()
    for name, slot in wanted.parameters.items():
        if slot.mentions and draw.chance(0.5):
            continue
        arguments[name] = values[name]
        if slot.mentions:
            mention = draw.phrase(slot.mentions).format(values[name])
            question = _inserted(question, mention)
    shown = [article(str(one)) if draw.chance(0.2) else one for one in required[:1]] + required[1:]
    known = wanted.family.result == "amount"
    question = question.format(*(shown if known else required))
    result, raw = _result(draw, wanted, arguments)
    return Request(question, arguments, raw, wanted.family.reply.format(*required, r=result))


def _value(draw: Draw, slot: Slot) -> str | int:
    return draw.number(0, 99) if slot.kind == "number" else _filling(draw, slot.kind)


def _inserted(question: str, mention: str) -> str:
    """The question with the mention before its full stop."""
    at = len(question) - (question[-1] in ".?")
    return question[:at] + mention.replace("{", "{{").replace("}", "}}") + question[at:]


def _result(draw: Draw, used: Tool, arguments: Mapping[str, str | int]) -> tuple[str, str]:
    """What the tool found, and how it hands it over."""
    kind = used.family.result
    if kind == "done":
        return "", draw.phrase('ok|done|{"ok": true}|{"status": "ok"}|OK|true')
    number = draw.number(1, 99)
    amount = f"${number}" if used.unit == "$" else f"{number}{used.unit}"
    found: str | int = amount if kind == "amount" else _filling(draw, kind)
    known = dict(list(arguments.items())[:1]) if draw.chance(0.4) else {}
    return str(found), str(found) if draw.chance(0.3) else json.dumps({**known, used.key: found})


def compared(draw: Draw, wanted: Tool) -> tuple[str, list[Request], str] | None:
    """A question that needs this tool twice, both requests, and the reply that reads both."""
    attribute = wanted.family.key.split("|")[0]
    if wanted.family.result != "amount" or attribute not in COMPARISONS:
        return None
    pair = [request(draw, wanted), request(draw, wanted)]
    left, right = (str(next(iter(one.arguments.values()))) for one in pair)
    values = [_number(one.result) for one in pair]
    word = draw.one(COMPARISONS[attribute])
    more = (word == COMPARISONS[attribute][0]) == (values[0] > values[1])
    if left == right or values[0] == values[1]:
        return None
    form = draw.phrase(
        "Is {} {} than {}?|Is {} {} than {}?|Tell me if {} is {} than {}.|"
        "Do you know whether {} is {} than {}?|What do you think, is {} {} than {}?"
    )
    question = form.format(article(left), word, article(right))
    verdict = f"{'Yes' if more else 'No'}, {left} is {'' if more else 'not '}{word} than {right}."
    return question, pair, f"{pair[0].reply} {pair[1].reply} {verdict}"


def _number(result: str) -> int:
    """The amount in a result of either form."""
    text = result if not result.startswith("{") else str(list(json.loads(result).values())[-1])
    return int("".join(char for char in text if char.isdigit()))
