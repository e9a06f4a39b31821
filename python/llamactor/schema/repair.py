"""Values out of what a model says without a grammar: JSON with text around it, or nearly right."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any

from llamactor._checks import check_text
from llamactor.errors import SchemaValidationError
from llamactor.schema.values import schema_of

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_TEXT = 1 << 20
"""Characters of a text that is looked through."""
MAX_REPAIRED = 1 << 14
"""Characters of a part that is repaired: the library takes some 5 µs for each, but the square of
that for texts that lead it back again and again, some seconds for one of this length."""
MAX_BLOCKS = 16
"""Blocks between code fences that are tried."""

_FENCE = re.compile(r"```[ \t]*(?:\w+[ \t]*)?\r?\n(.*?)(?:```|\Z)", re.DOTALL)


def repair(text: str, spec: Any) -> Any:
    """Return the value that a text means, for models that no grammar constrains.

    What is looked for, in this order: the whole text, the first 16 blocks between code fences, all
    from the first bracket to the last one that closes its kind, or to the end; first as they are,
    then repaired (quotes, commas and brackets that are missing or wrong, comments, Python's words),
    the whole last. What fits the schema first is returned. Nothing is invented: values that are
    missing stay missing.

    A repair takes microseconds for each character, but may take the square of that: texts that were
    made to take long keep a thread busy for seconds, so repair those of strangers in one
    (`asyncio.to_thread`). Parts of more than 16 KiB of characters are tried as they are and not
    repaired, nor is what follows the first 32 KiB of all parts.

    Args:
        text: What the model said, at most 1 MiB of characters.
        spec: As for `schema_of`.

    Raises:
        SchemaValidationError: nothing in it fits; the error of the likeliest try.
        ValueError: the text is longer than that.
    """
    schema = schema_of(spec)
    if len(check_text("text", text)) > MAX_TEXT:
        raise ValueError(
            f"text has {len(text)} characters, the limit of a repair is {MAX_TEXT}; "
            "cut out the part with the JSON"
        )
    likeliest: SchemaValidationError | None = None
    for candidate in _candidates(text):
        try:
            return schema.convert(candidate)
        except SchemaValidationError as error:
            # The later one is of the better text, if that is JSON at all.
            if likeliest is None or not _is_no_json(error):
                likeliest = error
    assert likeliest is not None
    if len(text) <= MAX_REPAIRED:
        raise likeliest
    raise SchemaValidationError(
        f"{likeliest.message}; parts of more than {MAX_REPAIRED} characters are not repaired",
        likeliest.path,
        likeliest.value,
    )


def _candidates(text: str) -> Iterator[str]:
    blocks = (block[1] for block in itertools.islice(_FENCE.finditer(text), MAX_BLOCKS))
    parts = list(dict.fromkeys([text, *blocks, *_bracketed(text)]))
    yield from parts
    left = 2 * MAX_REPAIRED
    for part in [*parts[1:], text]:
        if len(part) <= min(MAX_REPAIRED, left):
            left -= len(part)
            yield from _repaired(part)


def _bracketed(text: str) -> Iterator[str]:
    """From the first bracket of a kind to the last that closes one, and to the end."""
    found = [(text.find(opening), text.rfind(closing)) for opening, closing in ("{}", "[]")]
    for start, end in sorted(pair for pair in found if pair[0] >= 0):
        if end > start:
            yield text[start : end + 1]
        yield text[start:]


def _repaired(text: str) -> Iterator[str]:
    import json_repair

    try:
        repaired = str(json_repair.repair_json(text, skip_json_loads=True, ensure_ascii=False))
    except (RecursionError, ValueError):
        return
    if repaired:
        yield repaired


def _is_no_json(error: SchemaValidationError) -> bool:
    return error.message.startswith("this is no JSON")
