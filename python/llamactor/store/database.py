"""The records, in SQLite. Everything here blocks, and each function is one transaction.

Theory of operation. Each transaction has a connection of its own, so that a store holds nothing
open, belongs to no loop or thread, and survives a fork. Several processes may use one database: it
is in WAL mode, writers begin with the lock that they will need, and whatever else SQLite calls busy
is tried again. A process that is killed leaves at most a log that the next one reads.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from llamactor.errors import BusyError, StoreError
from llamactor.store.records import StoredModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

FILE_NAME = "store.sqlite3"
"""The database, in the folder of the store."""
PATIENCE = 60.0
"""Seconds after which a lock that another process holds is an error."""


class VanishedError(Exception):
    """Files were removed between being put in place and being recorded."""


_STEPS = (
    """
CREATE TABLE models (
    name TEXT NOT NULL PRIMARY KEY COLLATE NOCASE,
    path TEXT NOT NULL UNIQUE,
    files TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    architecture TEXT NOT NULL,
    quantization TEXT NOT NULL,
    train_context_size INTEGER NOT NULL,
    parameters INTEGER NOT NULL,
    capabilities TEXT NOT NULL,
    chat_template TEXT,
    license TEXT,
    source TEXT NOT NULL,
    owned INTEGER NOT NULL,
    created REAL NOT NULL,
    last_used REAL,
    usage_count INTEGER NOT NULL,
    tokens_generated INTEGER NOT NULL,
    default_options TEXT NOT NULL,
    notes TEXT NOT NULL,
    quarantined TEXT
) STRICT
""",
    "ALTER TABLE models ADD COLUMN pulled_as TEXT NOT NULL DEFAULT '[]'",
)
"""What makes each version of the schema from the one before."""
VERSION = len(_STEPS)
"""Of the schema; kept in `user_version`."""
_JSON = ("files", "capabilities", "default_options", "pulled_as")
_FIELDS = StoredModel.__struct_fields__


def all_models(folder: Path) -> list[StoredModel]:
    """Return all records in the order of their names; none where there is no database."""
    if not (folder / FILE_NAME).exists():
        return []
    return _transact(folder, "DEFERRED", _select_all)


def add(folder: Path, model: StoredModel, name: str | None) -> StoredModel:
    """Record a model and return its record: the one that its path already has, if any.

    Without `name` the record's own is taken, with a number behind it where it belongs to another.
    Raises `VanishedError` if its files were in the store, and another process has removed them.

    Raises:
        ValueError: `name` belongs to another model, or the path is recorded under another name.
    """

    def work(connection: sqlite3.Connection) -> StoredModel:
        # Whoever removes a model deletes its files in a transaction as well.
        if model.owned and not all(file.path.exists() for file in model.files):
            raise VanishedError(model.path)
        models = _select_all(connection)
        _move_references(connection, models, model)
        known = _same(models, model.path, model.source)
        if known is None:
            added = msgspec.structs.replace(model, name=_free_name(models, name, model.name))
            _insert(connection, added)
            return added
        _check_own_name(known, name)
        if known.owned and not model.owned and known.path != model.path:
            return known  # another program has the same
        renewed = _renewed(known, model)
        _write(connection, known.name, renewed)
        return renewed

    return _transact(folder, "IMMEDIATE", work)


def check_name(models: list[StoredModel], path: Path, source: str, name: str) -> None:
    """Refuse a name that `add` would refuse while these are all models.

    Raises:
        ValueError: It belongs to another model, or the path is recorded under another name.
    """
    known = _same(models, path, source)
    if known is None:
        _free_name(models, name, name)
    else:
        _check_own_name(known, name)


def unless_recorded(folder: Path, path: Path, act: Callable[[], object]) -> None:
    """Do something if no record has a path, and let nobody record it meanwhile."""

    def work(connection: sqlite3.Connection) -> None:
        if all(model.path != path for model in _select_all(connection)):
            act()

    _transact(folder, "IMMEDIATE", work)


def change(folder: Path, name: str, edit: Callable[[StoredModel], StoredModel | None]) -> bool:
    """Replace a record by what `edit` makes of it, or delete it for None; False if there is none.

    `edit` may run several times, each time with the record as it is then.

    Raises:
        ValueError: The new name belongs to another model.
    """

    def work(connection: sqlite3.Connection) -> bool:
        models = _select_all(connection)
        found = next((model for model in models if model.name.casefold() == name.casefold()), None)
        if found is None:
            return False
        edited = edit(found)
        if edited is None:
            connection.execute("DELETE FROM models WHERE name = ?", (found.name,))
        elif edited != found:
            if edited.name.casefold() != found.name.casefold():
                _free_name(models, edited.name, edited.name)
            _write(connection, found.name, edited)
        return True

    if not (folder / FILE_NAME).exists():
        return False
    return _transact(folder, "IMMEDIATE", work)


def _same(models: list[StoredModel], path: Path, source: str) -> StoredModel | None:
    """Return the record of a path, else of the one thing that a source names."""
    found = next((model for model in models if model.path == path), None)
    if found is not None or not source.startswith(("hf:", "pkg:", "ollama:")):
        return found
    return next((model for model in models if model.source == source), None)


def _check_own_name(known: StoredModel, name: str | None) -> None:
    if name is not None and name.casefold() != known.name.casefold():
        raise ValueError(
            f"{known.path} is in the store as {known.name!r}; "
            f"rename it with: store.update({known.name!r}, rename={name!r})"
        )


def _move_references(
    connection: sqlite3.Connection, models: list[StoredModel], pulled: StoredModel
) -> None:
    """Take from others the references that have just been found to mean this model."""
    moved = {*pulled.pulled_as, pulled.source} if pulled.owned else {*pulled.pulled_as}
    for model in models:
        kept = tuple(reference for reference in model.pulled_as if reference not in moved)
        if model.path != pulled.path and kept != model.pulled_as:
            _write(connection, model.name, msgspec.structs.replace(model, pulled_as=kept))


def _references(known: StoredModel, found: StoredModel, source: str) -> tuple[str, ...]:
    """Return what a record was pulled as besides its source, as long as it is the same model."""
    same = [file.sha256 for file in known.files] == [file.sha256 for file in found.files]
    references = (*(known.pulled_as if same else ()), *found.pulled_as)
    return tuple(dict.fromkeys(each for each in references if each != source))


def _renewed(known: StoredModel, found: StoredModel) -> StoredModel:
    """Return a record with what its file says now; what people and use have added stays."""
    if [file.size_bytes for file in known.files] == [file.size_bytes for file in found.files]:
        checksums = {file.path: file.sha256 for file in known.files}
        files = tuple(
            msgspec.structs.replace(file, sha256=file.sha256 or checksums.get(file.path))
            for file in found.files
        )
    else:
        files = found.files
    kept = {
        field: getattr(known, field)
        for field in ("name", "created", "last_used", "usage_count", "tokens_generated")
    }
    source = known.source if found.source == "import" else found.source
    return msgspec.structs.replace(
        found,
        **kept,
        files=files,
        license=found.license or known.license,
        source=source,
        pulled_as=_references(known, found, source),
        default_options=known.default_options,
        notes=known.notes,
        owned=known.owned or found.owned,
    )


def _free_name(models: list[StoredModel], wanted: str | None, suggested: str) -> str:
    taken = {model.name.casefold() for model in models}
    if wanted is not None:
        if wanted.casefold() in taken:
            raise ValueError(f"the name {wanted!r} belongs to another model of the store")
        return wanted
    name, number = suggested, 2
    while name.casefold() in taken:
        name, number = f"{suggested}-{number}", number + 1
    return name


def _select_all(connection: sqlite3.Connection) -> list[StoredModel]:
    rows = connection.execute(f"SELECT {', '.join(_FIELDS)} FROM models ORDER BY name")
    return [_from_row(row) for row in rows]


def _insert(connection: sqlite3.Connection, model: StoredModel) -> None:
    marks = ", ".join(f":{field}" for field in _FIELDS)
    connection.execute(
        f"INSERT INTO models ({', '.join(_FIELDS)}) VALUES ({marks})", _to_row(model)
    )


def _write(connection: sqlite3.Connection, name: str, model: StoredModel) -> None:
    marks = ", ".join(f"{field} = :{field}" for field in _FIELDS)
    connection.execute(
        f"UPDATE models SET {marks} WHERE name = :old", {**_to_row(model), "old": name}
    )


def _to_row(model: StoredModel) -> dict[str, Any]:
    row: dict[str, Any] = {field: getattr(model, field) for field in _FIELDS}
    row |= {field: msgspec.json.encode(row[field], enc_hook=str).decode() for field in _JSON}
    row["path"] = str(model.path)
    row["created"] = model.created.timestamp()
    row["last_used"] = model.last_used.timestamp() if model.last_used else None
    return row


def _from_row(row: tuple[Any, ...]) -> StoredModel:
    values = dict(zip(_FIELDS, row, strict=True))
    values |= {field: msgspec.json.decode(values[field]) for field in _JSON}
    values["owned"] = bool(values["owned"])
    return msgspec.convert(values, StoredModel, strict=False, dec_hook=_path)


def _path(kind: type, value: object) -> object:
    return Path(str(value)) if kind is Path else value


# --- connections --------------------------------------------------------------------------------


def _transact(folder: Path, mode: str, work: Callable[[sqlite3.Connection], T]) -> T:
    """Run `work` in a transaction, again and again while another process is in the way."""
    path = folder / FILE_NAME
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with _connection(path) as connection, _transaction(connection, mode):
                return work(connection)
        except sqlite3.Error as error:
            if not _is_busy(error):
                raise StoreError(
                    f"the store's database {path} cannot be used: {error}; if it is damaged, move "
                    "it away: the files beside it stay, and discover() finds them again"
                ) from error
            if time.monotonic() > deadline:
                raise BusyError(
                    f"another process has kept {path} locked for {PATIENCE:.0f} seconds"
                ) from error
        time.sleep(random.uniform(0.005, 0.05))


def _is_busy(error: sqlite3.Error) -> bool:
    """Whether it was about a lock: the primary code is in the low byte."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}


@contextlib.contextmanager
def _connection(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the database, which is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
    with contextlib.closing(connection):
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version < VERSION:
            connection.execute("PRAGMA journal_mode = WAL")
            with _transaction(connection, "IMMEDIATE"):
                _take_steps(connection)
        elif version > VERSION:
            raise StoreError(
                f"the store's database {path} has version {version}, this llamactor knows up to "
                f"{VERSION}; update llamactor, or use another folder (LLAMACTOR_MODELS_DIR)"
            )
        connection.execute("PRAGMA synchronous = NORMAL")  # with WAL nothing can be torn
        yield connection


def _take_steps(connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version < VERSION:  # else another process was first
        for step in _STEPS[version:]:
            connection.execute(step)
        connection.execute(f"PRAGMA user_version = {VERSION}")


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, mode: str) -> Iterator[None]:
    connection.execute(f"BEGIN {mode}")
    try:
        yield
    except BaseException:
        connection.rollback()
        raise
    connection.commit()
