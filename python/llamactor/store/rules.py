"""Small decisions of the store."""

from __future__ import annotations

import difflib
import json
import operator
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llamactor import _checks as check
from llamactor import _core
from llamactor.errors import ChecksumError, ModelLoadError, ModelNotFoundError
from llamactor.presets import check_bias, generation_values, load_values
from llamactor.store.refs import (
    UNDERSTOOD,
    HubRef,
    parse_hub,
    quantization_in,
    rank,
    split_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamactor.store.discovery import Found
    from llamactor.store.records import ModelFile, StoredModel

_FORBIDDEN_IN_NAMES = re.compile(r"[/\\:\x00-\x1f]")
_LONGEST_NAME: Final = 200


# --- names --------------------------------------------------------------------------------------


def check_name(name: str | None) -> None:
    """Raise if a model cannot be called that: it could be taken for a path or a reference."""
    if name is None:
        return
    check.check_text("name", name, empty=False)
    if name != clean_name(name) or name.endswith(".gguf"):
        raise ValueError(
            f"name {name[:60]!r} cannot name a model: at most {_LONGEST_NAME} characters, no "
            "slash, colon or control character, no space at either end, and not .gguf at the end"
        )


def check_recordable(path: Path) -> None:
    """Raise if a path cannot be recorded, since no text can say it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(path)!r} cannot be recorded: it is no UTF-8; rename it") from None


def clean_name(name: str) -> str:
    """Return a name without what names cannot have."""
    return _FORBIDDEN_IN_NAMES.sub("-", name).strip()[:_LONGEST_NAME] or "model"


def suggested_name(path: Path) -> str:
    """Return what to call a model that nobody has named."""
    return clean_name(split_of(path.name.removesuffix(".gguf"))[0])


def name_of_found(found: Found) -> str:
    """Return what a discovered file would be called."""
    return clean_name(found.name or suggested_name(found.path))


def near(name: str, models: list[StoredModel]) -> str:
    """Return a hint of what might have been meant."""
    names = {model.name.casefold(): model.name for model in models}
    close = difflib.get_close_matches(name.casefold(), names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(repr(names[found]) for found in close)}?"
    return UNDERSTOOD


def mentions(model: StoredModel, text: str) -> bool:
    """Return whether a record contains a text, which is in lower case."""
    fields = (
        *(model.name, model.architecture, model.quantization),
        *(model.source, *model.pulled_as),
    )
    return any(text in field.casefold() for field in fields)


# --- what fits a reference ----------------------------------------------------------------------


def fits(source: str, quantization: str | None, ref: HubRef) -> bool:
    """Return whether what came from `source` is what a reference means."""
    if not source.startswith("hf:"):
        return False
    found = parse_hub(source)
    if (found.repo.casefold(), found.revision) != (ref.repo.casefold(), ref.revision):
        return False
    if ref.file is not None:
        return found.file == ref.file
    return ref.quantization is None or (quantization or "").upper() == ref.quantization.upper()


def of_hub(models: list[StoredModel], ref: HubRef) -> StoredModel | None:
    """Return the record that fits a reference best, those before others whose files are here."""
    found = [
        # What it was pulled as is newer than what a source has been.
        (not is_here(model), rank(model.quantization), source == model.source, model.name, model)
        for model in models
        for source in (model.source, *model.pulled_as)
        if fits(source, quantization_in(source) or model.quantization, ref)
    ]
    return min(found, key=operator.itemgetter(slice(4)))[-1] if found else None


# --- files --------------------------------------------------------------------------------------


def absolute(path: str) -> Path:
    """Return an absolute path without ``..``; links are kept, since their names say more."""
    return Path(os.path.abspath(path))  # noqa: PTH100 -- resolve() follows links


def is_here(model: StoredModel) -> bool:
    """Return whether all files of a model exist with the sizes that are recorded."""
    return all(
        file.path.is_file() and file.path.stat().st_size == file.size_bytes for file in model.files
    )


def usable(model: StoredModel) -> StoredModel:
    """Return a model that may be loaded.

    Raises:
        ChecksumError: It is in quarantine.
        ModelNotFoundError: Its file is gone.
    """
    if model.quarantined is not None:
        raise ChecksumError(
            f"{model.name!r} is in quarantine: {model.quarantined}; pull or import it again, or "
            "put the right file back and call verify()"
        )
    if not model.path.exists():
        raise ModelNotFoundError(
            f"the file of {model.name!r} is gone: {model.path}; remove() the record, or import_() "
            "the file from where it is now"
        )
    return model


def check_loadable(files: tuple[ModelFile, ...]) -> None:
    """Delete files of the store that could not be loaded, and say why.

    Raises:
        ModelLoadError: A rule of loading is broken.
        ModelNotFoundError: They are gone.
    """
    try:
        _core.check_model_file(str(files[0].path))
    except ModelLoadError:
        for file in files:
            file.path.unlink(missing_ok=True)
        raise


def former_copy(models: list[StoredModel], name: str, folder: Path, paths: Sequence[Path]) -> Path:
    """Return the path of the model in `folder` that has a name and may be a copy of some files.

    Returns:
        `folder`, which is no model's path, if there is none.
    """
    wanted = [(path.name, path.stat().st_size) for path in paths]
    for model in models:
        found = [(file.path.name, file.size_bytes) for file in model.files]
        named = model.name.casefold() == name.casefold()
        if named and folder in model.path.parents and found == wanted:
            return model.path
    return folder


def delete(model: StoredModel, folder: Path) -> None:
    """Delete the files of a model, and the folders that are empty then, inside the store's."""
    for file in model.files:
        file.path.unlink(missing_ok=True)
    for parent in model.path.parents:
        if folder not in parent.parents:
            return
        try:
            parent.rmdir()
        except OSError:  # something else is in it, or another process was first
            return


def forget_if_gone(model: StoredModel) -> StoredModel | None:
    """Return the record of a file that is here, and None of one that is not."""
    return model if model.path.exists() else None


# --- options ------------------------------------------------------------------------------------


def checked_defaults(options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return default options that are known, in range, and of what JSON can say."""
    if not isinstance(options, Mapping):
        raise TypeError(f"default_options must be a mapping, not {check.describe(options)}")
    check.check_known(options, ("load", "generation"), "kind of default options")
    load_values(options.get("load", {}))
    generation_values(options.get("generation", {}))
    check_bias(options.get("generation", {}))
    try:
        plain: dict[str, dict[str, Any]] = json.loads(json.dumps(options))
    except (TypeError, ValueError) as error:
        raise TypeError(f"default_options must be of what JSON can say: {error}") from None
    return plain
