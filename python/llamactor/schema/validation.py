"""Plain data against JSON Schemas, by the `jsonschema` library: offline and in bounded time.

Bounded are the expressions, which are searched in linear time, and the schemas that are followed to
others for one value: references to references may be exponentially many.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
from typing import TYPE_CHECKING, Any

from llamactor import _core
from llamactor.errors import SchemaValidationError
from llamactor.schema.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import jsonschema

MAX_ERRORS = 100
"""Errors among which the best one is chosen."""
MAX_MESSAGE = 500
"""Characters of a message, which may quote the value."""
MAX_STEPS = 10_000
"""Schemas that are followed to others, besides `STEPS_PER_VALUE`; some 15 µs each."""
STEPS_PER_VALUE = 100
"""The same for each value within the one that is validated."""

_left: contextvars.ContextVar[Iterator[int]] = contextvars.ContextVar("_left")
"""The steps that are left of the validation that is under way."""


_LEADING = frozenset(
    (
        *("$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "not", "if"),
        *("dependentSchemas", "dependencies"),
    )
)
"""Keywords that apply other schemas to the same value, in any draft."""


class _UnusableError(ValueError):
    """A schema says what is not supported."""


class Validator:
    """Validates plain data against one JSON Schema."""

    def __init__(self, schema: Any) -> None:
        """Take a JSON Schema; whether it is one shows when it is used."""
        self._schema = schema

    def validate(self, value: Any) -> None:
        """Raise `SchemaValidationError` for what does not fit, `ValueError` for a bad schema."""
        error = self.first_error(value)
        if error is not None:
            raise error

    def first_error(self, value: Any) -> SchemaValidationError | None:
        """Return the error that says most; None if `value` fits.

        Raises:
            ValueError: the schema itself cannot be used.
        """
        import jsonschema

        _left.set(iter(range(MAX_STEPS + STEPS_PER_VALUE * _size(value))))
        try:
            errors = itertools.islice(self._validator.iter_errors(value), MAX_ERRORS)
            best = jsonschema.exceptions.best_match(errors)
        except RecursionError:
            return SchemaValidationError("this is nested too deep to be validated", (), value)
        except _UnusableError as error:
            raise ValueError(f"this is no usable JSON Schema: {error}") from None
        except Exception as error:
            raise ValueError(f"this is no usable JSON Schema: {self.reason(error)}") from error
        if best is None:
            return None
        return SchemaValidationError(
            best.message[:MAX_MESSAGE], tuple(best.absolute_path), best.instance
        )

    @functools.cached_property
    def _validator(self) -> Any:
        import jsonschema
        import referencing

        base = jsonschema.validators.validator_for(
            self._schema, default=jsonschema.Draft202012Validator
        )
        # An empty registry: what lies elsewhere is not fetched.
        return _bounded(base)(
            self._schema, registry=referencing.Registry(), format_checker=_format_checker()
        )

    def reason(self, error: Exception) -> str:
        """Return what the schema's own schema says of it, or else the error."""
        import jsonschema

        try:
            type(self._validator).check_schema(self._schema)
        except jsonschema.SchemaError as bad:
            pointer = "".join(f"/{part}" for part in bad.absolute_path)
            return f"at #{pointer}: {bad.message[:MAX_MESSAGE]}"
        except Exception:
            return str(error)
        return str(error)


@functools.cache
def _format_checker() -> jsonschema.FormatChecker:
    import jsonschema

    checker = jsonschema.FormatChecker(formats=())
    for name, check in FORMATS.items():
        checker.checks(name)(lambda value, check=check: not isinstance(value, str) or check(value))
    return checker


@functools.cache
def _bounded(base: Any) -> Any:
    """The validators of a draft, with expressions that are searched in linear time."""
    import jsonschema

    leading = base.VALIDATORS.keys() & _LEADING
    return jsonschema.validators.extend(  # type: ignore[no-untyped-call]
        base,
        {
            "pattern": _pattern,
            "patternProperties": _pattern_properties,
            "additionalProperties": _additional_properties,
            "unevaluatedProperties": _unsupported("unevaluatedProperties"),
            "unevaluatedItems": _unsupported("unevaluatedItems"),
            **{name: _counted(base.VALIDATORS[name]) for name in leading},
        },
    )


def _counted(check: Any) -> Any:
    """A keyword that leads to other schemas for the same value: each time is a step."""

    def counted(*arguments: object) -> Any:
        if next(_left.get(), None) is None:
            raise _UnusableError(
                "its references and alternatives lead to too many others "
                f"(more than {MAX_STEPS} and {STEPS_PER_VALUE} for each value)"
            )
        return check(*arguments)

    return counted


def _size(value: object) -> int:
    """The values within a value, itself included."""
    size, todo = 0, [value]
    while todo:
        size, inside = size + 1, todo.pop()
        if isinstance(inside, dict):
            todo += inside.values()
        elif isinstance(inside, list):
            todo += inside
    return size


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> _core.Pattern:
    try:
        return _core.Pattern(pattern)
    except ValueError as error:
        raise _UnusableError(f"the pattern {pattern[:MAX_MESSAGE]!r}: {error}") from None


def _error(message: str) -> jsonschema.ValidationError:
    import jsonschema

    return jsonschema.ValidationError(message)


def _pattern(_: Any, pattern: str, value: object, __: object) -> Iterator[Any]:
    if isinstance(value, str) and not _compiled(pattern).search(value):
        yield _error(f"{value[:MAX_MESSAGE]!r} does not match {pattern!r}")


def _pattern_properties(
    validator: Any, patterns: Mapping[str, Any], value: object, _: object
) -> Iterator[Any]:
    if not isinstance(value, dict):
        return
    for pattern, schema in patterns.items():
        for key in filter(_compiled(pattern).search, value):
            yield from validator.descend(value[key], schema, path=key, schema_path=pattern)


def _additional_properties(
    validator: Any, additional: Any, value: object, schema: Mapping[str, Any]
) -> Iterator[Any]:
    if not isinstance(value, dict):
        return
    known = schema.get("properties", {})
    patterns = [_compiled(pattern) for pattern in schema.get("patternProperties", {})]
    for key in value:
        if key in known or any(pattern.search(key) for pattern in patterns):
            continue
        if additional is False:
            names = ", ".join(map(repr, known)) or "none"
            yield _error(f"{key!r} is no property here; known: {names}")
        elif additional is not True:
            yield from validator.descend(value[key], additional, path=key)


def _unsupported(keyword: str) -> Any:
    def refuse(*_: object) -> Iterator[Any]:
        raise _UnusableError(f"the keyword {keyword} is not supported")

    return refuse
