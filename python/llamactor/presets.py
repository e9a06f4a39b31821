"""Presets: named options for loading and generation, in a TOML file that people may edit.

    [creative]
    notes = "for stories"

    [creative.load]
    context_size = 4096

    [creative.generation]
    temperature = 0.9
    repeat_penalty = { penalty = 1.1, last_tokens = 128 }
    top_k = false

Options have the names and meanings that they have as keywords; a table stands for a value such as
`RepeatPenalty`, and ``false`` for None, which TOML cannot say. Layers: what a call says comes
first, then its preset, then the default options of the model, then those of the library.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import fcntl
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar

import msgspec

from llamactor import _checks as check
from llamactor.errors import PresetNotFoundError
from llamactor.grammar import Grammar
from llamactor.options import (
    ContextOptions,
    Dry,
    DynamicTemperature,
    GenerationOptions,
    LoadOptions,
    Mirostat,
    RepeatPenalty,
    TokenBatching,
    Xtc,
    generation_options,
    load_options,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")

FILE_NAME: Final = "presets.toml"
"""The file, in the user's configuration folder."""

Keep: TypeAlias = Literal["parts", "options", "notes"]
"""What stays of a preset that is set; see `Presets.set`."""

_TABLES: Final[Mapping[str, type[msgspec.Struct]]] = {
    "xtc": Xtc,
    "dry": Dry,
    "mirostat": Mirostat,
    "dynamic_temperature": DynamicTemperature,
    "repeat_penalty": RepeatPenalty,
    "token_batching": TokenBatching,
    "grammar": Grammar,
}
_DEFAULTS: Final = {
    name: value
    for options in (GenerationOptions(), LoadOptions(), ContextOptions())
    for name, value in msgspec.structs.asdict(options).items()
}
_OPTIONS: Final = ("load", "generation")
_SECTIONS: Final = (*_OPTIONS, "notes")


class Preset(msgspec.Struct, frozen=True):
    """Named options, checked and ready to be passed as keywords."""

    name: str
    """What it is called; case matters."""
    load: dict[str, Any] = {}
    """For `load_model` and `Runtime.load`: of `LoadOptions` and `ContextOptions`."""
    generation: dict[str, Any] = {}
    """For predictions: of `GenerationOptions`."""
    notes: str = ""
    """Anything."""


class Presets:
    """The presets of a file, which is read anew by each call.

    Several processes may change one file; comments in it are lost when one does. Errors in the file
    are a `ValueError` or `TypeError` that names the file, the preset and the option.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        """Use the file `path`; None is ``presets.toml`` in the user's configuration folder."""
        self._path = default_path() if path is None else Path(check.check_path("path", path))

    @property
    def path(self) -> Path:
        """The file, which need not exist."""
        return self._path

    async def list(self) -> list[Preset]:
        """Return all presets in the order of their names; cancelling changes nothing."""
        tables = await asyncio.to_thread(self._read)
        return [self._preset(name, tables) for name in sorted(tables)]

    async def get(self, name: str) -> Preset:
        """Return a preset; cancelling changes nothing.

        Raises:
            PresetNotFoundError: There is none of this name.
        """
        check.check_text("name", name, empty=False)
        return self._preset(name, await asyncio.to_thread(self._read))

    async def set(
        self,
        name: str,
        *,
        load: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        notes: str | None = None,
        keep: Keep = "parts",
    ) -> Preset:
        """Make a preset, or change one, and return it; mistakes in others do not matter.

        Once cancelled it may have happened or not; the file is whole in either case.

        Args:
            name: What to call it.
            load: Options by name.
            generation: Options by name.
            notes: Anything.
            keep: What stays of the one that is there: the ``"parts"`` that are not given (an empty
                mapping removes all options of one), all ``"options"`` that are not given, or no
                more than the ``"notes"``, whatever mistakes the rest has.

        Raises:
            TypeError: An option is unknown, has the wrong type, or cannot be written to a file.
            ValueError: An option is out of range.
        """
        check.check_text("name", name, empty=False)
        check.check_choice("keep", keep, ("parts", "options", "notes"))
        given = _given(load, generation, notes)

        def edit(tables: dict[str, Any]) -> Preset:
            with self._naming(name):
                tables[name] = _changed(tables.get(name, {}), given, keep)
            return self._preset(name, tables)

        return await asyncio.to_thread(self._edit, edit)

    async def remove(self, name: str) -> Preset:
        """Remove a preset and return what it was; once cancelled it may have happened or not.

        One that has a mistake in the file is returned without options and notes.

        Raises:
            PresetNotFoundError: There is none of this name.
        """
        check.check_text("name", name, empty=False)

        def edit(tables: dict[str, Any]) -> Preset:
            preset = Preset(name)
            with contextlib.suppress(TypeError, ValueError):
                preset = self._preset(name, tables)
            del tables[name]
            return preset

        return await asyncio.to_thread(self._edit, edit)

    def _preset(self, name: str, tables: Mapping[str, Any]) -> Preset:
        if name not in tables:
            near = difflib.get_close_matches(name, tables, n=3, cutoff=0.6)
            there = f"there are {', '.join(sorted(tables))}" if tables else "there are none"
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else there
            raise PresetNotFoundError(f"no preset {name!r} in {self._path}; {hint}")
        with self._naming(name):
            table = _table(tables[name])
            check.check_known(table, _SECTIONS, "part of a preset")
            return Preset(
                name,
                load_values(table.get("load", {})),
                generation_values(table.get("generation", {})),
                check.check_text("notes", table.get("notes", "")),
            )

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Say of a mistake in the block where it is."""
        try:
            yield
        except (TypeError, ValueError) as error:
            raise type(error)(f"preset {name!r} of {self._path}: {error}") from None

    def _read(self) -> dict[str, Any]:
        import tomllib  # here and below: what most programs never use is imported when it is

        try:
            return tomllib.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:  # of TOML and of UTF-8
            raise ValueError(f"{self._path} is no TOML: {error}") from None

    def _edit(self, edit: Callable[[dict[str, Any]], T]) -> T:
        """Change the file while no other process does."""
        import tomli_w

        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self._path.with_name(f".{self._path.name}.lock")):
            tables = self._read()
            result = edit(tables)
            _replace(self._path, tomli_w.dumps(tables))
        return result


def default_path() -> Path:
    """Return the file that presets are in when none is named."""
    import platformdirs

    return platformdirs.user_config_path("llamactor", appauthor=False) / FILE_NAME


def layered(*layers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return options laid over one another: each option is that of the first layer that has it."""
    options: dict[str, Any] = {}
    for layer in layers:
        options = {**(layer or {}), **options}
    return options


def load_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain options of a load as keywords that `load_model` takes.

    Raises:
        TypeError: An option is unknown or has the wrong type.
        ValueError: An option is out of range.
    """
    values = _with_none(_mapping("load", options), _DEFAULTS)
    if "lora" in values:  # a pair of a path and a scale is a list in a file
        adapters = check.check_items("lora", values["lora"])
        values["lora"] = [tuple(item) if isinstance(item, list) else item for item in adapters]
    load_options(values)
    return values


def generation_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain options of a generation as keywords that predictions take.

    Raises:
        TypeError: An option is unknown or has the wrong type.
        ValueError: An option is out of range.
    """
    values = _with_none(_mapping("generation", options), _DEFAULTS)
    check.check_known(values, GenerationOptions.__struct_fields__, "generation option")
    for name, value in values.items():
        if name in _TABLES and isinstance(value, Mapping):
            values[name] = _value_of_table(name, value)
    generation_options(values)
    return values


def check_bias(generation: Mapping[str, Any]) -> None:
    """Raise `TypeError` for a token that is biased by its id, which a file would make a text of."""
    for token in generation.get("logit_bias") or ():
        if not isinstance(token, str):
            raise TypeError(
                f"logit_bias cannot have the key {check.describe(token)} here: keys in a file are "
                "texts; give the token by its text"
            )


# --- values and files ---------------------------------------------------------------------------


def _value_of_table(name: str, table: Mapping[str, Any]) -> msgspec.Struct:
    kind = _TABLES[name]
    check.check_known(table, kind.__struct_fields__, f"{name} option")
    usual = {field.name: field.default for field in msgspec.structs.fields(kind)}
    return kind(**_with_none(table, usual))


def _with_none(options: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with None for each false but those that are usually true or false."""
    return {
        name: None if value is False and not isinstance(usual.get(name), bool) else value
        for name, value in options.items()
    }


def _mapping(name: str, options: object) -> Mapping[str, Any]:
    if not isinstance(options, Mapping):
        raise TypeError(f"{name} must be a mapping of options, not {check.describe(options)}")
    return options


def _table(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"it must be a table, not {check.describe(value)}")
    return value


def _given(
    load: Mapping[str, Any] | None, generation: Mapping[str, Any] | None, notes: str | None
) -> dict[str, Any]:
    """Return the parts of a preset that are not None, checked, as a file has them."""
    given: dict[str, Any] = {}
    if load is not None:
        load_values(load)
        given["load"] = _plain(load)
    if generation is not None:
        generation_values(generation)
        check_bias(generation)
        given["generation"] = _plain(generation)
    if notes is not None:
        given["notes"] = check.check_text("notes", notes)
    return given


def _changed(table: object, given: Mapping[str, Any], keep: Keep) -> dict[str, Any]:
    """Return the table of a preset with what is given, and of what it has that which stays."""
    if keep == "notes":
        notes = table.get("notes") if isinstance(table, Mapping) else None
        return {**({"notes": notes} if isinstance(notes, str) else {}), **given}
    parts = _table(table)
    if keep == "options":
        given = {
            part: {**_mapping(part, parts.get(part, {})), **value} if part in _OPTIONS else value
            for part, value in given.items()
        }
    return {**parts, **given}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options, or the fields of one, as a file has them."""
    return {name: _plain_option(name, value) for name, value in options.items()}


def _plain_option(name: str, value: Any) -> Any:
    if value is None:
        return False
    if name in _TABLES and isinstance(value, _TABLES[name]):
        return _plain(_unusual(value))
    if name in _TABLES and isinstance(value, Mapping):
        return _plain(value)
    return _plain_value(name, value)


def _unusual(value: msgspec.Struct) -> dict[str, Any]:
    """Return the fields that are not as they are when they are not given."""
    fields = {field.name: field.default for field in msgspec.structs.fields(value)}
    given = msgspec.structs.asdict(value).items()
    return {name: item for name, item in given if item != fields[name]}


def _plain_value(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain_value(name, item) for key, item in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain_value(name, item) for item in value]
    if isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{name} cannot be or have {check.describe(value)} in a preset: a file cannot hold it"
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # goes with the file, or with the process
        yield


def _replace(path: Path, text: str) -> None:
    """Write a file so that it has the old content or the new one, whatever happens."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
