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
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from llamactor import _checks as check
from llamactor.errors import PresetNotFoundError
from llamactor.options import (
    Dry,
    DynamicTemperature,
    GenerationOptions,
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

_TABLES: Final[dict[str, Callable[..., Any]]] = {
    "xtc": Xtc,
    "dry": Dry,
    "mirostat": Mirostat,
    "dynamic_temperature": DynamicTemperature,
    "repeat_penalty": RepeatPenalty,
    "token_batching": TokenBatching,
}
_SECTIONS: Final = ("load", "generation", "notes")


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
    ) -> Preset:
        """Make a preset, or replace these parts of one, and return it.

        Once cancelled it may have happened or not; the file is whole in either case.

        Args:
            name: What to call it.
            load: Options by name; an empty mapping removes them.
            generation: Options by name; an empty mapping removes them.
            notes: Anything.

        Raises:
            TypeError: An option is unknown, has the wrong type, or cannot be written to a file.
            ValueError: An option is out of range.
        """
        check.check_text("name", name, empty=False)
        given: dict[str, Any] = {}
        if load is not None:
            load_values(load)
            given["load"] = _plain("load", load)
        if generation is not None:
            generation_values(generation)
            given["generation"] = _plain("generation", generation)
        if notes is not None:
            given["notes"] = check.check_text("notes", notes)

        def edit(tables: dict[str, Any]) -> Preset:
            tables[name] = {**tables.get(name, {}), **given}
            return self._preset(name, tables)

        return await asyncio.to_thread(self._edit, edit)

    async def remove(self, name: str) -> Preset:
        """Remove a preset and return what it was; once cancelled it may have happened or not.

        Raises:
            PresetNotFoundError: There is none of this name.
        """
        check.check_text("name", name, empty=False)

        def edit(tables: dict[str, Any]) -> Preset:
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
        table = tables[name]
        try:
            if not isinstance(table, Mapping):
                raise TypeError(f"it must be a table, not {check.describe(table)}")
            check.check_known(table, _SECTIONS, "part of a preset")
            return Preset(
                name,
                load_values(table.get("load", {})),
                generation_values(table.get("generation", {})),
                check.check_text("notes", table.get("notes", "")),
            )
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
    values = dict(_mapping("load", options))
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
    check.check_known(
        _mapping("generation", options), GenerationOptions.__struct_fields__, "generation option"
    )
    values = {name: _generation_value(name, value) for name, value in options.items()}
    generation_options(values)
    return values


_DEFAULTS: Final = msgspec.structs.asdict(GenerationOptions())


def _generation_value(name: str, value: Any) -> Any:
    if value is False and not isinstance(_DEFAULTS[name], bool):
        return None
    if name not in _TABLES or not isinstance(value, Mapping):
        return value
    kind = _TABLES[name]
    check.check_known(value, kind.__struct_fields__, f"{name} option")  # type: ignore[attr-defined]
    return kind(
        **{
            key: None if item is False and key == "last_tokens" else item
            for key, item in value.items()
        }
    )


def _mapping(name: str, options: object) -> Mapping[str, Any]:
    if not isinstance(options, Mapping):
        raise TypeError(f"{name} must be a mapping of options, not {check.describe(options)}")
    return options


def _plain(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as a file has them."""
    return {key: _plain_value(key, value) for key, value in _mapping(name, options).items()}


def _plain_value(name: str, value: Any) -> Any:
    if value is None:
        return False
    if isinstance(value, msgspec.Struct):
        usual = type(value)()
        given = msgspec.structs.asdict(value).items()
        return _plain(name, {key: item for key, item in given if item != getattr(usual, key)})
    if isinstance(value, Mapping):
        return _plain(name, value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain_value(name, item) for item in value]
    if isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name} cannot be {check.describe(value)} in a preset: a file cannot hold it")


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
