"""The parameters of a function as a schema: what a model must give to call it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import typing
from typing import Any

import msgspec

from llamactor.errors import SchemaValidationError
from llamactor.schema.values import Kind, Schema, parse, schema_of

if typing.TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from llamactor.schema.types import Json

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class FunctionSchema(Schema[dict[str, Any]]):
    """The schema of an object with one property for each parameter of a function.

    Made by `schema_of_function`.
    """

    __slots__ = ("_description", "_name")

    def __init__(self, kind: Kind, name: str, description: str) -> None:
        """Wrap the schema of the parameters."""
        super().__init__(kind)
        self._name = name
        self._description = description

    @property
    def name(self) -> str:
        """The name of the function."""
        return self._name

    @property
    def description(self) -> str:
        """The docstring without the sections about arguments and results; "" if there is none."""
        return self._description

    def convert_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return keyword arguments of the parameters' types; those left out keep their defaults.

        Raises:
            SchemaValidationError: one is missing, unknown or does not fit; `.path` says which.
        """
        return self.convert_value(dict(arguments))


def schema_of_function(function: Callable[..., object]) -> FunctionSchema:
    """Return the schema of a function's parameters, from type hints, defaults and docstring.

    Parameters with a default are optional. The docstring's section about arguments, in Google's,
    NumPy's or Sphinx's form, describes them; `Annotated` with `msgspec.Meta` or `pydantic.Field`
    limits them, and its description goes before the docstring's.

    Args:
        function: A function, method, or another callable with a signature.

    Raises:
        TypeError: a parameter has no type hint, a type without JSON Schema, or cannot be given by
            name; the message names it.
    """
    name = str(getattr(function, "__name__", type(function).__name__))
    doc = _Docstring(function)
    hints = _hints(function, name)
    parameters = [
        _Parameter(name, parameter, hints, doc.parameters)
        for parameter in inspect.signature(function).parameters.values()
    ]
    return FunctionSchema(_Call(name, parameters), name, doc.description)


class _Docstring:
    """What a docstring says of a function and of its parameters."""

    def __init__(self, function: Callable[..., object]) -> None:
        import docstring_parser

        parsed = docstring_parser.parse(inspect.getdoc(function) or "")
        self.description = (parsed.description or "").strip()
        self.parameters = {
            item.arg_name.lstrip("*"): " ".join(item.description.split())
            for item in parsed.params
            if item.description
        }


class _Parameter:
    """One parameter: its schema, and what the JSON Schema says of it besides."""

    def __init__(
        self,
        function: str,
        parameter: inspect.Parameter,
        hints: Mapping[str, Any],
        docs: Mapping[str, str],
    ) -> None:
        self.name = parameter.name
        self.is_required = parameter.default is parameter.empty
        self.schema = _schema_of_parameter(function, parameter, hints)
        self.json = self.schema.json
        if self.name in docs:
            self.json.setdefault("description", docs[self.name])
        if not self.is_required:
            # A default that JSON cannot say is none to tell.
            with contextlib.suppress(TypeError, ValueError):
                self.json["default"] = msgspec.to_builtins(parameter.default, str_keys=True)


def _schema_of_parameter(
    function: str, parameter: inspect.Parameter, hints: Mapping[str, Any]
) -> Schema[Any]:
    if parameter.kind not in _BY_NAME:
        raise TypeError(
            f"{function}: parameter {parameter} cannot be given by name, as a model gives all; "
            "write plain parameters"
        )
    if parameter.name not in hints:
        raise TypeError(
            f"{function}: parameter {parameter.name} has no type hint, such as "
            f"{parameter.name}: str"
        )
    try:
        return schema_of(hints[parameter.name])
    except TypeError as error:
        raise TypeError(f"{function}: parameter {parameter.name}: {error}") from None


def _hints(function: Callable[..., object], name: str) -> dict[str, Any]:
    source: Any = function.func if isinstance(function, functools.partial) else function
    if inspect.isclass(source):
        source = _initialiser(source)
    elif not inspect.isroutine(source):
        source = type(source).__call__
    try:
        return typing.get_type_hints(inspect.unwrap(source), include_extras=True)
    except NameError as error:
        raise TypeError(
            f"a type hint of {name} cannot be found: {error}; define the type at module level"
        ) from None


def _initialiser(cls: type[Any]) -> Any:
    """What has the hints of a class's parameters: its body, if it does not say them elsewhere."""
    plain = inspect.isfunction(cls.__init__) and not hasattr(cls, "__signature__")
    return cls.__init__ if plain else cls


class _Call(Kind):
    """The arguments of a call, each of a type of its own."""

    def __init__(self, name: str, parameters: list[_Parameter]) -> None:
        self._name = name
        self._parameters = {parameter.name: parameter for parameter in parameters}
        self.text = msgspec.json.encode(_object_of(parameters)).decode()
        self.key = (name, self.text, *(parameter.schema for parameter in parameters))

    def __str__(self) -> str:
        return self._name

    def read(self, text: str) -> dict[str, Any]:
        arguments = parse(text)
        if not isinstance(arguments, dict):
            raise SchemaValidationError(
                f"the arguments of {self._name} must be an object", (), arguments
            )
        self._check_names(arguments)
        return {name: self._argument(name, value) for name, value in arguments.items()}

    def _check_names(self, arguments: dict[str, Any]) -> None:
        for name in arguments.keys() - self._parameters.keys():
            names = ", ".join(self._parameters) or "none"
            message = f"{self._name} has no parameter {name!r}; it has: {names}"
            raise SchemaValidationError(message, (), arguments)
        for name, parameter in self._parameters.items():
            if parameter.is_required and name not in arguments:
                message = f"the argument {name!r} of {self._name} is missing"
                raise SchemaValidationError(message, (), arguments)

    def _argument(self, name: str, value: Any) -> Any:
        try:
            return self._parameters[name].schema.convert_value(value)
        except SchemaValidationError as error:
            path = (name, *error.path)
            raise SchemaValidationError(error.message, path, error.value) from error


def _object_of(parameters: list[_Parameter]) -> Json:
    """The JSON Schema of an object with these members; their definitions become its own."""
    definitions: Json = {}
    properties = {item.name: _hoisted(item.json, definitions) for item in parameters}
    schema: Json = {
        "type": "object",
        "properties": properties,
        "required": [item.name for item in parameters if item.is_required],
        "additionalProperties": False,
    }
    return {**schema, "$defs": definitions} if definitions else schema


def _hoisted(schema: Json, definitions: Json) -> Json:
    """Move the definitions of `schema` to `definitions`, renamed where names are taken."""
    own = schema.pop("$defs", {})
    for n in itertools.count(1):
        # All together: what one says, and so whether it is the same, depends on the others.
        names = {name: name if n == 1 else f"{name}_{n}" for name in own}
        renamed = {names[name]: _renamed(item, names) for name, item in own.items()}
        if all(definitions.get(name, item) == item for name, item in renamed.items()):
            break
    definitions |= renamed
    hoisted: Json = _renamed(schema, names)
    return hoisted


def _renamed(schema: Any, names: Mapping[str, str]) -> Any:
    """`schema` with other names of definitions in its references."""
    if isinstance(schema, list):
        return [_renamed(item, names) for item in schema]
    if not isinstance(schema, dict):
        return schema
    renamed = {key: _renamed(value, names) for key, value in schema.items()}
    name = str(schema.get("$ref", "")).removeprefix("#/$defs/")
    return {**renamed, "$ref": f"#/$defs/{names[name]}"} if name in names else renamed
