"""JSON Schemas of pydantic's types, where pydantic's own allow more than it reads."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from llamactor.schema.types import DECIMAL, INTEGER_KEY, NAIVE_DATE_TIME, Json

_TEXT = {"type": "string"}
_MOST_DIGITS = 15

_KEYS = {
    "int": INTEGER_KEY,
    "float": DECIMAL,
    "decimal": DECIMAL,
    "bool": "^(true|false)$",
}
"""What keys look like that are no texts, by the kind of their schema."""

_HOST = r"[a-z][a-z0-9]{0,30}(\.[a-z][a-z0-9]{0,30}){0,3}(:[0-9]{1,4})?"
_PATH = "(/[!#$&-;=?-Z_a-z~]{0,400})?"
_LONG_URL = 600
"""More characters than those have, or anybody writes: a grammar would have to count them."""


@functools.cache
def model_schemas() -> Any:
    """Return pydantic's writer of JSON Schemas with ours before it; imports pydantic."""
    theirs = importlib.import_module("pydantic.json_schema").GenerateJsonSchema
    return type("ModelSchemas", (ModelSchemas, theirs), {})


class ModelSchemas:
    """What differs from pydantic's: every value is one that it reads."""

    def decimal_schema(self, schema: Json) -> Json:
        """Return a number where there are bounds, else a text of so many digits; never both."""
        inherited: Any = super()
        asked = {key: value for key, value in schema.items() if value is not None}
        positive = not asked.get("ge", 1) or not asked.get("gt", 1)
        bounds = asked.keys() & {"ge", "gt", "le", "lt", "multiple_of"}
        digits = asked.keys() & {"max_digits", "decimal_places"}
        if not bounds or (positive and len(bounds) == 1):
            return {**_TEXT, "pattern": _decimal(asked, positive=positive)}
        if digits:
            inherited.handle_invalid_for_json_schema(
                schema, "a Decimal with digits that are counted and bounds other than 0; give one"
            )
        number: Json = inherited.decimal_schema(schema)["anyOf"][0]
        return number

    def datetime_schema(self, schema: Json) -> Json:
        """Return pydantic's, but for times without a zone, of which that knows nothing."""
        inherited: Any = super()
        naive = {**_TEXT, "pattern": NAIVE_DATE_TIME}
        written: Json = inherited.datetime_schema(schema)
        return naive if schema.get("tz_constraint") == "naive" else written

    def dict_schema(self, schema: Json) -> Json:
        """Return pydantic's, with what keys look like that stand for something else."""
        inherited: Any = super()
        written: Json = inherited.dict_schema(schema)
        keys = _KEYS.get(schema.get("keys_schema", {}).get("type", ""))
        return {**written, "propertyNames": {"pattern": keys}} if keys else written

    def url_schema(self, schema: Json) -> Json:
        """Return pydantic's, or addresses of the schemes that are allowed: a grammar knows all."""
        inherited: Any = super()
        written: Json = inherited.url_schema(schema)
        schemes = "|".join(schema.get("allowed_schemes") or ())
        if written.get("maxLength", 0) > _LONG_URL:
            del written["maxLength"]
        if schemes:
            del written["format"]
            written["pattern"] = f"^({schemes})://{_HOST}{_PATH}$"
        return written


def _decimal(asked: Json, *, positive: bool) -> str:
    """The decimals with so many digits in all and after the point."""
    if not positive and not asked.keys() & {"max_digits", "decimal_places"}:
        return DECIMAL
    most = asked.get("max_digits", 2 * _MOST_DIGITS)
    places = min(asked.get("decimal_places", _MOST_DIGITS), most, _MOST_DIGITS)
    whole = min(most - asked.get("decimal_places", 0), _MOST_DIGITS)
    ways = [
        f"[1-9][0-9]{{{count - 1}}}{_fraction(min(places, most - count))}"
        for count in range(1, whole + 1)
    ]
    if "gt" in asked:
        ways += [rf"0\.[0-9]{{0,{places - 1}}}[1-9]"] if places else []
    else:
        ways += [f"0{_fraction(places)}"] if whole > 0 else [rf"0\.[0-9]{{1,{places}}}"]
    return f"^{'' if positive else '-?'}({'|'.join(ways)})$"


def _fraction(places: int) -> str:
    return rf"(\.[0-9]{{1,{places}}})?" if places > 0 else ""
