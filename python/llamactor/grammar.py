"""Grammars: what an answer may be.

A `Grammar` is a value: making one checks its type and nothing else. It is compiled where it is
first used, off the loop and within bounds, and kept with the model.
"""

from __future__ import annotations

import json
from typing import Any, Literal, TypeAlias

import msgspec

from llamactor import _checks as check
from llamactor import _core
from llamactor.errors import GrammarError
from llamactor.schema import schema_of

__all__ = ("Grammar",)

GrammarKind: TypeAlias = Literal["json_schema", "regex", "lark", "gbnf"]
KINDS = ("json_schema", "regex", "lark", "gbnf")
"""What a grammar is written in."""

_ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] ws term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t]*
"""

_CHESS = r"""
root   ::= "1. " move " " move "\n" ([1-9] [0-9]? ". " move " " move "\n")+
move   ::= (pawn | piece | castle) [+#]?
piece  ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
pawn   ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
castle ::= "O-O" "-O"?
"""

_KANA_AND_KANJI = r"[\u3000-\u303f\u3040-\u309f\u30a0-\u30ff\u4e00-\u9fff]+"

_BUILTIN: dict[str, tuple[GrammarKind, str]] = {
    "json": ("json_schema", '{"type":"object"}'),
    "json_array": ("json_schema", '{"type":"array"}'),
    "list": ("regex", r"(- [^\r\n]+\n)+"),
    "arithmetic": ("gbnf", _ARITHMETIC),
    "chess": ("gbnf", _CHESS),
    "english": ("regex", r"[!-~]+([ \t\n][!-~]+)*"),
    "japanese": ("regex", rf"{_KANA_AND_KANJI}([ \t\n]{_KANA_AND_KANJI})*"),
}


class Grammar(msgspec.Struct, frozen=True):
    """What an answer may be: the `grammar` of every prediction.

    Use `json_schema`, `regex`, `lark`, `gbnf` or `builtin` to make one. Equal grammars compile once
    per model.
    """

    kind: GrammarKind
    """What it is written in."""
    text: str
    """The JSON Schema as JSON, the regular expression, Lark or GBNF."""
    root: str = "root"
    """The rule that GBNF begins with."""

    def __post_init__(self) -> None:
        """Check the types."""
        check.check_choice("kind", self.kind, KINDS)
        check.check_text("text", self.text)
        check.check_text("root", self.root, empty=False)

    @classmethod
    def json_schema(cls, schema: Any) -> Grammar:
        """Return the grammar of the JSON values that fit a JSON Schema or a type.

        Properties come in the order of the schema, additional ones after them.

        Args:
            schema: As for `schema_of`: a dictionary with the keywords of Draft 2020-12, or a type.

        Raises:
            TypeError: If it is neither, or a type that JSON cannot say.
            ValueError: If a dictionary has what JSON does not.
        """
        return cls("json_schema", schema_of(schema).text)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        r"""Return the grammar of the texts that a regular expression matches as a whole.

        It has the syntax of Rust's `regex` crate: classes, groups, repetitions and alternatives,
        ``\d``, ``\w``, ``\p{...}``, but neither references nor lookaround.
        """
        return cls("regex", check.check_text("pattern", pattern))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Return a grammar in llguidance's dialect of Lark, whose first rule is ``start``."""
        return cls("lark", check.check_text("text", text, empty=False))

    @classmethod
    def gbnf(cls, text: str, root: str = "root") -> Grammar:
        """Return a grammar in GBNF, llama.cpp's notation.

        A rule may begin with itself here. Control tokens are allowed where the grammar names them
        (``<|tool|>``, or ``<[5]>`` by its number), and never by their text. Those that end a
        generation come where the text may end, and cannot be named.

        Args:
            text: The rules.
            root: The rule to begin with.
        """
        return cls("gbnf", check.check_text("text", text, empty=False), root)

    @classmethod
    def builtin(cls, name: str) -> Grammar:
        """Return a grammar that comes with the package.

        Args:
            name: "json" (an object), "json_array", "list" (lines that begin with a dash),
                "arithmetic", "chess", "english" or "japanese".

        Raises:
            ValueError: If there is none of that name.
        """
        return cls(*_BUILTIN[check.check_choice("name", name, tuple(_BUILTIN))])

    def accepts(self, text: str) -> bool:
        """Return whether `text` as a whole is what the grammar describes. Needs no model.

        Never waits for a model; compiles the grammar, which takes some milliseconds the first time
        and 2 seconds at most.

        Raises:
            GrammarError: If the grammar is malformed, too large, or names tokens of a model.
        """
        return _core.grammar_accepts(self.native(), check.check_text("text", text))

    def parse(self, text: str) -> Any:
        """Return the value that `text` stands for: of JSON the value, else the text itself.

        Raises:
            GrammarError: If the grammar does not describe `text`, or is malformed.
        """
        if not self.accepts(text):
            start = text if len(text) <= 60 else text[:60] + "…"
            raise GrammarError(f"the text is not what the {self.kind} grammar describes: {start!r}")
        return json.loads(text) if self.kind == "json_schema" else text

    def native(self) -> dict[str, object]:
        """Return the form the native core takes."""
        return {"kind": self.kind, "text": self.text, "root": self.root}
