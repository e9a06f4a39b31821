"""A JSON document read as it grows, and the value that so much of it gives.

Theory of operation. `PartialReader` keeps a stack of the containers that are open; everything that
is closed is kept as it was shown and never looked at again. So a piece costs what it adds, and a
value costs a shallow copy of the containers that are open (values that were given out never
change). A `Shape` says how what stands at one place is shown: text as it grows or only when it is
whole, an object as a partial value or as one of its class.

What is shown is a promise as far as it goes: numbers, words like ``true``, and texts that stand for
something else (an enum, a date) appear when they are whole.
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeAlias

import msgspec

Plain: TypeAlias = Any
"""What a JSON document says, in dicts, lists, texts and numbers."""

_MISSING: Final = msgspec.UNSET


class Shape:
    """How what stands at one place of a document is shown; this one shows it as it is."""

    grows = True
    """Whether a text is shown before it is whole."""

    def member(self, key: str) -> Shape:
        """Return the shape of a member of an object."""
        return self

    def item(self, index: int) -> Shape:
        """Return the shape of an item of an array."""
        return self

    def told(self, key: str, value: Plain) -> Shape:
        """Return the shape of the object once it is known to have a member of that value."""
        return self

    def scalar(self, value: Plain) -> Any:
        """Return how a whole text, number or word is shown."""
        return value

    def open_object(self, members: dict[str, Any]) -> Any:
        """Return how an object is shown that has these members so far, which are shown already."""
        return members

    def open_array(self, items: list[Any]) -> Any:
        """Return how an array is shown that has these items so far."""
        return items

    def whole_object(self, plain: Plain, members: dict[str, Any]) -> Any:
        """Return how a closed object is shown."""
        return self.open_object(members)

    def whole_array(self, plain: Plain, items: list[Any]) -> Any:
        """Return how a closed array is shown."""
        return self.open_array(items)


ANYTHING = Shape()


class _Frame:
    """A container that is open."""

    __slots__ = ("is_object", "key", "plain", "shape", "shown")

    def __init__(self, shape: Shape, *, is_object: bool) -> None:
        self.shape = shape
        self.is_object = is_object
        self.key = ""
        self.plain: Any = {} if is_object else []
        self.shown: Any = {} if is_object else []

    def next_shape(self) -> Shape:
        shape = self.shape
        return shape.member(self.key) if self.is_object else shape.item(len(self.plain))

    def add(self, plain: Plain, shown: Any) -> None:
        if self.is_object:
            self.plain[self.key] = plain
            self.shown[self.key] = shown
            self.shape = self.shape.told(self.key, plain)
        else:
            self.plain.append(plain)
            self.shown.append(shown)

    def show(self, child: Any) -> Any:
        """Show what there is, and `child`, which is open, as its last."""
        if self.is_object:
            members = dict(self.shown)
            if child is not _MISSING:
                members[self.key] = child
            return self.shape.open_object(members)
        return self.shape.open_array([*self.shown, *(() if child is _MISSING else (child,))])

    def whole(self) -> Any:
        if self.is_object:
            return self.shape.whole_object(self.plain, self.shown)
        return self.shape.whole_array(self.plain, self.shown)


_SPACE = re.compile(r"[ \t\n\r]*")
_RUN = re.compile(r'[^"\\]+')
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|u[0-9a-fA-F]{4}|[^u])")
_HALF = re.compile(
    r"\\(?:u(?:[0-9a-fA-F]{0,3}|[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?))?\Z"
)
_WORD = re.compile(r"[^ \t\n\r,:\[\]{}\"]+")


_MAY_CLOSE = frozenset({"next", "member", "first"})


class PartialReader:
    """Reads a document piece by piece; what is no JSON ends it, and its value stays."""

    __slots__ = (
        "_at",
        "_changed",
        "_frames",
        "_is_key",
        "_root",
        "_shape",
        "_text",
        "_texts",
        "_wants",
    )

    def __init__(self, shape: Shape = ANYTHING) -> None:
        """Begin a document whose root is shown as `shape` says."""
        self._root: Any = _MISSING
        self._shape = shape
        """That of the value that comes or is being read."""
        self._frames: list[_Frame] = []
        self._wants = "value"
        """value, first (a value or the end), key, member (a key or the end), colon, next, end."""
        self._texts: list[str] | None = None
        """The parts of the text that is open."""
        self._is_key = False
        self._text = ""
        self._at = 0
        self._changed = False

    @property
    def value(self) -> Any:
        """What has been read so far; `msgspec.UNSET` as long as that is nothing."""
        child = self._open_text()
        if not self._frames:
            return self._root if child is _MISSING else child
        for frame in reversed(self._frames):
            child = frame.show(child)
        return child

    def feed(self, text: str) -> bool:
        """Read `text` and return whether that changed the value."""
        self._changed = False
        self._text, self._at = self._text[self._at :] + text, 0
        while self._wants != "end" and self._step():
            pass
        if self._wants == "end":
            self._text, self._at = "", 0
        return self._changed

    def _open_text(self) -> Any:
        if self._texts is None or self._is_key or not self._shape.grows:
            return _MISSING
        self._texts[:] = ["".join(self._texts)]
        return self._texts[0]

    def _step(self) -> bool:
        """Read one token, or a part of a text; return False if it is not all there."""
        if self._texts is not None:
            return self._read_text(self._texts)
        self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
        char = self._text[self._at : self._at + 1]
        if not char:
            return False
        if char in '"{[':
            self._at += 1
            self._open(char)
        elif char in "}],:":
            self._at += 1
            self._punctuate(char)
        else:
            return self._read_word()
        return True

    # --- texts ------------------------------------------------------------------------------------

    def _read_text(self, parts: list[str]) -> bool:
        run = _RUN.match(self._text, self._at)
        if run is not None:
            self._at = run.end()
            self._extend(parts, run.group())
        char = self._text[self._at : self._at + 1]
        if char == '"':
            self._at += 1
            self._close_text("".join(parts))
            return True
        return bool(char) and self._read_escape(parts)

    def _read_escape(self, parts: list[str]) -> bool:
        if _HALF.match(self._text, self._at):
            return False
        escape = _ESCAPE.match(self._text, self._at)
        try:
            said = msgspec.json.decode(f'"{escape.group()}"', type=str) if escape else None
        except msgspec.DecodeError:
            said = None
        if escape is None or said is None:
            return self._refuse()
        self._at = escape.end()
        self._extend(parts, said)
        return True

    def _extend(self, parts: list[str], text: str) -> None:
        parts.append(text)
        self._changed |= self._shape.grows and not self._is_key

    def _close_text(self, text: str) -> None:
        self._texts = None
        if self._is_key:
            self._frames[-1].key = text
            self._wants = "colon"
        else:
            self._changed |= not self._shape.grows
            self._complete(text, self._shape.scalar(text))

    # --- everything else --------------------------------------------------------------------------

    def _open(self, char: str) -> None:
        is_key = self._wants in {"key", "member"}
        if not (is_key and char == '"') and self._wants not in {"value", "first"}:
            self._refuse()
        elif char == '"':
            self._texts, self._is_key = [], is_key
            self._changed |= not is_key and self._shape.grows
        else:
            self._frames.append(_Frame(self._shape, is_object=char == "{"))
            self._changed = True
            self._expect("member" if char == "{" else "first")

    def _punctuate(self, char: str) -> None:
        frame = self._frames[-1] if self._frames else None
        if char == ":" and self._wants == "colon":
            self._expect("value")
        elif frame is None:
            self._refuse()
        elif char == "," and self._wants == "next":
            self._expect("key" if frame.is_object else "value")
        elif char == ("}" if frame.is_object else "]") and self._wants in _MAY_CLOSE:
            self._frames.pop()
            shown = frame.whole()
            self._changed |= shown is not frame.shown
            self._complete(frame.plain, shown)
        else:
            self._refuse()

    def _expect(self, what: str) -> None:
        self._wants = what
        if what in {"value", "first"}:
            self._shape = self._frames[-1].next_shape()

    def _read_word(self) -> bool:
        word = _WORD.match(self._text, self._at)
        if word is None or self._wants not in {"value", "first"}:
            return self._refuse()
        # A number may go on, unless this is the last letter of a word.
        if word.end() == len(self._text) and word.group() not in {"true", "false", "null"}:
            return False
        self._at = word.end()
        try:
            plain = msgspec.json.decode(word.group())
        except (msgspec.MsgspecError, ValueError):
            return self._refuse()
        self._changed = True
        self._complete(plain, self._shape.scalar(plain))
        return True

    def _complete(self, plain: Plain, shown: Any) -> None:
        """A value is whole."""
        if self._frames:
            self._frames[-1].add(plain, shown)
            self._wants = "next"
        else:
            self._root = shown
            self._wants = "end"

    def _refuse(self) -> bool:
        """This is no JSON: stay as it is."""
        self._wants = "end"
        return False
