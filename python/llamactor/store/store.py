"""The store: what models there are, where they came from, whether they still are what they were.

A `ModelStore` holds nothing open. Each call does its blocking work in a thread of its own, so one
store serves any number of tasks and loops, and any number of processes share its folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from llamactor import _checks as check
from llamactor import _core
from llamactor.errors import DownloadError, ModelLoadError, ModelNotFoundError
from llamactor.presets import generation_values, load_values
from llamactor.store import database, discovery, files, hub, packages
from llamactor.store.header import CAPABILITIES, Capability, ModelHeader, read_header
from llamactor.store.records import ModelFile, ReportProgress, StoredModel, Verification
from llamactor.store.refs import (
    DEFAULT_MODEL,
    DEFAULT_PACKAGE,
    HubRef,
    kind_of,
    parse_hub,
    part_names,
    quantization_in,
)
from llamactor.store.rules import (
    absolute,
    check_loadable,
    check_name,
    check_recordable,
    checked_defaults,
    clean_name,
    delete,
    fits,
    forget_if_gone,
    former_copy,
    is_here,
    mentions,
    name_of_found,
    near,
    of_hub,
    suggested_name,
    usable,
)
from llamactor.store.threads import Stop, off_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Inside the class `list` is the method.
Models: TypeAlias = list[StoredModel]
Verifications: TypeAlias = list[Verification]

FOLDER_VARIABLE: Final = "LLAMACTOR_MODELS_DIR"
"""Environment variable that names the folder of the store."""
_IMPORTED: Final = "imported"
"""Folder of copies, inside the store's."""


class ModelStore:
    """Models on this machine: records of them, downloads, and what other programs have.

    Making one touches nothing, and there is nothing to close. Its methods may be awaited in any
    event loop; several processes may use one folder. A `StoreError` means that its database cannot
    be used, a `BusyError` that another process has kept it locked for a minute.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        """Use the folder `path`.

        Args:
            path: Folder of the database and of downloads, made when something is recorded. None is
                ``LLAMACTOR_MODELS_DIR`` where that is set, else ``models`` in the user's data
                folder (`platformdirs.user_data_path`).
        """
        self._folder = default_folder() if path is None else Path(check.check_path("path", path))

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder

    def __repr__(self) -> str:
        """Return the folder in words."""
        return f"<ModelStore {str(self._folder)!r}>"

    # --- looking ----------------------------------------------------------------------------------

    async def list(
        self,
        query: str | None = None,
        *,
        capability: Capability | None = None,
        architecture: str | None = None,
    ) -> Models:
        """Return the recorded models in the order of their names; cancelling changes nothing.

        Call `discover` before to record what other programs have.

        Args:
            query: Text that the name, architecture, quantisation or source contains, in any case.
            capability: What it must be for.
            architecture: What it must be, such as ``llama``.
        """
        if query is not None:
            check.check_text("query", query)
        if capability is not None:
            check.check_choice("capability", capability, CAPABILITIES)
        models = await off_loop(lambda _: database.all_models(self._folder))
        return [
            model
            for model in models
            if (query is None or mentions(model, query.casefold()))
            and (capability is None or capability in model.capabilities)
            and (architecture is None or model.architecture == architecture)
        ]

    async def get(self, name: str) -> StoredModel:
        """Return the record of a name, in any case; cancelling changes nothing.

        Raises:
            ModelNotFoundError: There is none.
        """
        check.check_text("name", name, empty=False)
        return await off_loop(lambda _: self._named(name))

    async def resolve(
        self, ref: str | os.PathLike[str], *, progress: Callable[[float], object] | None = None
    ) -> Path:
        """Return the file that a reference leads to, and download it if it is not here.

        A name of the store comes before a file of that name, and ``hf:`` references mean what is
        here already, if it fits. Cancelling ends a download as with `pull`.

        Args:
            ref: A path, a name of the store, ``"smollm2"``, ``"pkg:name"`` or ``"hf:owner/repo"``
                with ``:quantisation`` or ``/file.gguf`` behind it.
            progress: Called in the loop with the share of a download that is done, 0 to 1.

        Raises:
            ModelNotFoundError: It leads to nothing.
            ChecksumError: It leads to a model in quarantine, or what came is not what it should be.
            DownloadError: The hub cannot be reached or refuses.
        """
        name = check.check_path("ref", ref)
        if isinstance(ref, str) and kind_of(ref) == "hub":
            known = await off_loop(lambda _: self._known_of_hub(parse_hub(ref)))
            report = None if progress is None else lambda state: progress(state.fraction)
            return (known or await self.pull(ref, progress=report)).path
        return await off_loop(lambda _: self._resolve_here(name))

    async def header(self, ref: str | os.PathLike[str]) -> ModelHeader:
        """Return what the file says that a reference leads to, without loading or downloading it.

        Of a file that is still on a hub only the header is read. Cancelling changes nothing.

        Raises:
            ModelNotFoundError: It leads to nothing.
            ModelLoadError: It leads to a file that is no GGUF.
            DownloadError: The hub cannot be reached or refuses.
        """
        name = check.check_path("ref", ref)
        if not isinstance(ref, str) or kind_of(ref) != "hub":
            return await off_loop(lambda _: read_header(self._resolve_here(name)))
        wanted = parse_hub(ref)
        known = await off_loop(lambda _: self._known_of_hub(wanted))
        if known is not None:
            return await off_loop(lambda _: read_header(known.path))
        model = await off_loop(functools.partial(hub.find, wanted), abandon=True)
        return await off_loop(functools.partial(hub.header, model), abandon=True)

    async def defaults(self, ref: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the default load and generation options of a model; empty without a record.

        Cancelling changes nothing.
        """
        name = check.check_path("ref", ref)
        model = await off_loop(lambda _: self._recorded(name))
        options = model.default_options if model else {}
        return load_values(options.get("load", {})), generation_values(
            options.get("generation", {})
        )

    def name_of(self, ref: str | os.PathLike[str], path: Path) -> str:
        """Return what to call a model: the name it was asked for by, else that of its file."""
        name = os.fspath(ref)
        if kind_of(name) == "name" and not Path(name).exists():
            return name
        return DEFAULT_MODEL if name == f"pkg:{DEFAULT_PACKAGE}" else suggested_name(path)

    # --- adding -----------------------------------------------------------------------------------

    async def import_(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        copy: bool = False,
        progress: ReportProgress | None = None,
    ) -> StoredModel:
        """Record a file, after every check that loading it would make, and return its record.

        The file is read to its end for its checksum. What is recorded already is looked at anew.
        Cancelling records nothing and leaves no copy, unless it comes after the last byte.

        Args:
            path: A ``.gguf``; the first part of a split model, whose parts are recorded with it.
            name: What to call it. None is the name of the file, with a number if that is taken.
            copy: Copy it into the store instead of recording where it lies.
            progress: Called in the loop.

        Raises:
            ValueError: The name is taken, or cannot be one; or the path is no UTF-8.
            ModelNotFoundError: There is no such file.
            ModelLoadError: It is no model.
            OSError: It cannot be copied.
        """
        source = absolute(check.check_path("path", path))
        check.check_bool("copy", copy)
        check_name(name)
        loop, imported = asyncio.get_running_loop(), self._folder / _IMPORTED
        check_recordable(imported / source.name if copy else source)

        def work(stop: Stop) -> StoredModel:
            _core.check_model_file(str(source))
            paths = [source.with_name(part) for part in part_names(source.name)]
            reporter = files.Reporter(loop, progress, files.total_size(paths))
            if name is not None:
                models = database.all_models(self._folder)
                place = former_copy(models, name, imported, paths) if copy else source
                database.check_name(models, place, "import", name)
            if not copy:
                found = files.checksums(paths, stop, reporter)
                return self._record(found, "import", owned=False, name=name)

            def copied() -> tuple[ModelFile, ...]:
                return files.copy_in(paths, imported, stop, reporter)

            return self._record_owned(copied, "import", name=name)

        return await off_loop(work)

    async def pull(
        self,
        ref: str,
        *,
        name: str | None = None,
        progress: ReportProgress | None = None,
    ) -> StoredModel:
        """Download a model from the Hugging Face hub, and return its record.

        What is here already is not downloaded again, whatever it came from: its record stays, and
        the reference leads to it from now on. Token, endpoint, cache and offline mode are
        those of `huggingface_hub` and its environment variables; the extra ``llamactor[hub]``
        installs it. Failures that may pass are tried again. The file gets its name when all of it
        has arrived and its length, checksum and header were found right.

        Cancelling stops at once and keeps what has arrived, as a failure does: the next pull goes
        on from there. `prune` removes it.

        Args:
            ref: ``hf:owner/repo``, with ``:quantisation`` (as ``:Q4_K_M``) or ``/file.gguf``, and
                with ``@revision`` behind the repository. Without a file or quantisation a middling
                quantisation is taken.
            name: What to call it. None is the name of the file, with a number if that is taken.
            progress: Called in the loop.

        Raises:
            ValueError: The name is taken, or cannot be one.
            ModelNotFoundError: The hub has no such repository, revision or file.
            DownloadError: The hub cannot be reached, refuses, or sends another length.
            ChecksumError: What came has another checksum; nothing of it was kept.
            ModelLoadError: What came is no model; nothing of it was kept.
            UnsupportedError: A file is too large to be sent over HTTP.
        """
        wanted = parse_hub(check.check_text("ref", ref))
        check_name(name)
        loop = asyncio.get_running_loop()
        try:
            model = await off_loop(functools.partial(hub.find, wanted), abandon=True)
        except DownloadError:
            known = await off_loop(lambda _: self._known_of_hub(wanted))
            if known is None:
                raise
            return known

        def work(stop: Stop) -> StoredModel:
            known = self._known_content(model)
            # Another process may remove it just now.
            with contextlib.suppress(database.VanishedError, ModelNotFoundError):
                if known is not None:
                    return self._record_again(known, model.source, name)
            folder = self._folder / model.folder
            if name is not None:
                models = database.all_models(self._folder)
                database.check_name(models, folder / model.files[0].name, model.source, name)
            reporter = files.Reporter(loop, progress, model.size_bytes)

            def fetched() -> tuple[ModelFile, ...]:
                return hub.fetch(model, folder, stop, reporter)

            return self._record_owned(fetched, model.source, name=name, licence=model.license)

        return await off_loop(work)

    async def discover(self) -> Models:
        """Record what other programs have on this machine, and return those records.

        Looked at are the default model's package, the cache of `huggingface_hub`, and the folders
        of LM Studio and Ollama, where the environment says they are. Nothing is copied and nothing
        of theirs is changed; files that are no models are passed over. Records of what is gone are
        removed. Cancelling leaves what was recorded so far.
        """
        return await off_loop(self._discover)

    # --- changing ---------------------------------------------------------------------------------

    async def update(
        self,
        name: str,
        *,
        rename: str | None = None,
        notes: str | None = None,
        default_options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> StoredModel:
        """Change what a record says, and return it; once cancelled it may have happened or not.

        Args:
            name: The model.
            rename: Its new name.
            notes: Anything.
            default_options: Options for ``"load"`` and ``"generation"``, of what JSON can say.

        Raises:
            ModelNotFoundError: There is no such model.
            TypeError: An option is unknown or has the wrong type.
            ValueError: The new name is taken, or an option is out of range.
        """
        check.check_text("name", name, empty=False)
        check_name(rename)
        if notes is not None:
            check.check_text("notes", notes)
        changes: dict[str, Any] = {"name": rename, "notes": notes}
        if default_options is not None:
            changes["default_options"] = checked_defaults(default_options)
        changes = {field: value for field, value in changes.items() if value is not None}

        def work(_: Stop) -> StoredModel:
            self._change(name, lambda model: msgspec.structs.replace(model, **changes))
            return self._named(rename or name)

        return await off_loop(work)

    async def note_use(
        self, ref: str | os.PathLike[str], *, uses: int = 1, tokens: int = 0
    ) -> None:
        """Count a use of a model; nothing happens to what is not in the store.

        Counts of several processes add up. Once cancelled it may have been counted or not.

        Args:
            ref: Its name, path or ``hf:`` reference.
            uses: Loads to add.
            tokens: Generated tokens to add.
        """
        name = check.check_path("ref", ref)
        check.check_int("uses", uses, 0)
        check.check_int("tokens", tokens, 0)

        def used(model: StoredModel) -> StoredModel:
            return msgspec.structs.replace(
                model,
                usage_count=model.usage_count + uses,
                tokens_generated=model.tokens_generated + tokens,
                last_used=datetime.now(UTC),
            )

        def work(_: Stop) -> None:
            model = self._recorded(name)
            if model is not None:
                database.change(self._folder, model.name, used)

        await off_loop(work)

    async def remove(self, name: str) -> StoredModel:
        """Forget a model, and return what its record was.

        Its files are deleted if they lie in the store; what was only recorded stays where it is.
        A process that has it loaded keeps it. Once cancelled it may have happened or not.

        Raises:
            ModelNotFoundError: There is no such model.
        """
        check.check_text("name", name, empty=False)
        removed: Models = []

        def forget(model: StoredModel) -> None:
            removed[:] = [model]
            if model.owned:
                delete(model, self._folder)

        await off_loop(lambda _: self._change(name, forget))
        return removed[0]

    async def verify(
        self, name: str | None = None, *, progress: ReportProgress | None = None
    ) -> Verifications:
        """Compare a model, or all, with its record: sizes, header and checksum of every byte.

        What differs goes into quarantine: `resolve` refuses it until it was verified again and
        found right. A checksum that was not known is recorded. Cancelling leaves what was found so
        far.

        Args:
            name: The model; None is all of them.
            progress: Called in the loop.

        Raises:
            ModelNotFoundError: There is no such model.
        """
        if name is not None:
            check.check_text("name", name, empty=False)
        loop = asyncio.get_running_loop()

        def work(stop: Stop) -> Verifications:
            models = database.all_models(self._folder) if name is None else [self._named(name)]
            total = sum(model.size_bytes for model in models)
            reporter = files.Reporter(loop, progress, total)
            found = [self._verify(model, stop, reporter) for model in models]
            while name is not None and None in found:  # removed meanwhile; it may have come back
                found = [self._verify(self._named(name), stop, reporter)]
            return [verification for verification in found if verification is not None]

        return await off_loop(work)

    async def prune(self) -> int:
        """Remove what ended downloads and imports have left; returns the bytes that are free now.

        What another process is writing stays. Cancelling leaves the rest.
        """
        return await off_loop(lambda stop: files.prune(self._folder, hub.PARTIAL, stop))

    # --- in a thread ------------------------------------------------------------------------------

    def _named(self, name: str) -> StoredModel:
        models = database.all_models(self._folder)
        for model in models:
            if model.name.casefold() == name.casefold():
                return model
        raise ModelNotFoundError(f"no model {name!r} in the store; {near(name, models)}")

    def _recorded(self, ref: str) -> StoredModel | None:
        """Return the record that a name, a path or a reference to a hub leads to, if any."""
        models = database.all_models(self._folder)
        if kind_of(ref) == "hub":
            return of_hub(models, parse_hub(ref))
        if kind_of(ref) == "package":
            return next((model for model in models if model.source == ref), None)
        path = absolute(ref)
        return next(
            (model for model in models if model.name.casefold() == ref.casefold()),
            next((model for model in models if model.path == path), None),
        )

    def _resolve_here(self, ref: str) -> Path:
        kind = kind_of(ref)
        if kind == "path":
            return Path(ref)
        if kind == "package":
            return packages.package_file(ref.removeprefix("pkg:"))
        models = database.all_models(self._folder)
        model = next((model for model in models if model.name.casefold() == ref.casefold()), None)
        # The package may have been installed elsewhere since it was recorded.
        if ref == DEFAULT_MODEL and (model is None or model.source == f"pkg:{DEFAULT_PACKAGE}"):
            return packages.package_file(DEFAULT_PACKAGE)
        if model is None and os.path.lexists(ref):
            return Path(ref)
        model = model or self._discover_one(
            lambda found: name_of_found(found).casefold() == ref.casefold()
        )
        if model is None:
            raise ModelNotFoundError(
                f"no model {ref!r}: there is no such file, nor a model of that name; "
                f"{near(ref, models)}"
            )
        return usable(model).path

    def _known_of_hub(self, ref: HubRef) -> StoredModel | None:
        """Return the record that fits a reference best, if its file is here and sound."""
        known = of_hub(database.all_models(self._folder), ref) or self._discover_one(
            lambda found: fits(found.source, quantization_in(found.path.name), ref)
        )
        return usable(known) if known is not None and is_here(known) else None

    def _known_content(self, model: hub.HubModel) -> StoredModel | None:
        """Return a record of the very files that a hub has, if they are here and sound."""
        wanted = [file.sha256 for file in model.files]
        found = [
            known
            for known in database.all_models(self._folder)
            if [file.sha256 for file in known.files] == wanted and None not in wanted
            if known.quarantined is None and is_here(known)
        ]
        return min(found, key=lambda known: known.source != model.source, default=None)

    def _record_again(self, known: StoredModel, pulled: str, name: str | None) -> StoredModel:
        return self._record(known.files, known.source, owned=known.owned, name=name, pulled=pulled)

    def _record(
        self,
        found: tuple[ModelFile, ...],
        source: str,
        *,
        owned: bool,
        name: str | None = None,
        suggested: str | None = None,
        licence: str | None = None,
        pulled: str | None = None,
    ) -> StoredModel:
        header = read_header(found[0].path)
        model = StoredModel(
            name=clean_name(suggested or suggested_name(found[0].path)),
            path=found[0].path,
            files=found,
            size_bytes=header.size_bytes,
            architecture=header.architecture,
            quantization=header.quantization,
            train_context_size=header.train_context_size,
            parameters=header.parameters,
            capabilities=header.capabilities,
            chat_template=header.chat_template,
            license=header.license or licence,
            source=source,
            pulled_as=(pulled,) if pulled else (),
            owned=owned,
            created=datetime.now(UTC),
        )
        try:
            return database.add(self._folder, model, name)
        except ValueError:
            if owned and source == "import":  # a download is what the next pull finds
                drop = functools.partial(delete, model, self._folder)
                database.unless_recorded(self._folder, model.path, drop)
            raise

    def _record_owned(
        self,
        bring: Callable[[], tuple[ModelFile, ...]],
        source: str,
        *,
        name: str | None,
        licence: str | None = None,
    ) -> StoredModel:
        """Bring files into the store and record them; again, if they are removed in between."""
        while True:
            found = bring()
            with contextlib.suppress(database.VanishedError, ModelNotFoundError):
                check_loadable(found)
                return self._record(found, source, owned=True, name=name, licence=licence)

    def _discover(self, stop: Stop) -> Models:
        known = {model.path: model for model in database.all_models(self._folder)}
        recorded = {}
        for found in discovery.discover():
            stop.check()
            model = known.get(found.path)
            if model is None or not is_here(model):
                model = self._record_found(found)
            if model is not None:
                recorded[model.name] = model
        for model in known.values():
            if model.source != "import" and not model.owned and not model.path.exists():
                database.change(self._folder, model.name, forget_if_gone)
        return sorted(recorded.values(), key=lambda model: model.name.casefold())

    def _discover_one(self, fits: Callable[[discovery.Found], bool]) -> StoredModel | None:
        """Record the first discovered file that fits, if there is one, and nothing else."""
        found = next(filter(fits, discovery.discover()), None)
        return None if found is None else self._record_found(found)

    def _record_found(self, found: discovery.Found) -> StoredModel | None:
        """Record a file of another program; None if it is no model, or cannot be recorded."""
        try:
            paths = [found.path.with_name(part) for part in part_names(found.path.name)]
            sizes = [path.stat().st_size for path in paths]
            listed = tuple(
                ModelFile(path, size, found.sha256 if path == found.path else None)
                for path, size in zip(paths, sizes, strict=True)
            )
            return self._record(listed, found.source, owned=False, suggested=found.name)
        except (ModelLoadError, ModelNotFoundError, OSError, UnicodeError):
            return None

    def _change(self, name: str, edit: Callable[[StoredModel], StoredModel | None]) -> None:
        while not database.change(self._folder, name, edit):
            self._named(name)  # says what there is instead, unless it has just come

    def _verify(
        self, model: StoredModel, stop: Stop, reporter: files.Reporter
    ) -> Verification | None:
        """Verify a model and note what was found; None if it was removed meanwhile."""
        latest, noted, done = model, False, reporter.done

        def note(current: StoredModel) -> StoredModel:
            nonlocal latest, noted
            latest = current
            noted = _is_same(current, model) and (not problem or files.stamps(model) == before)
            if not noted:
                return current
            return msgspec.structs.replace(current, quarantined=problem, files=found)

        while not noted:  # again, if it has become another while its bytes were read
            stop.check()
            reporter.go_back(done)
            model, before = latest, files.stamps(latest)
            problem, found = files.examine(model, stop, reporter)
            if not database.change(self._folder, model.name, note):
                reporter.go_back(done)
                return None
        return Verification(model.name, problem)


def _is_same(first: StoredModel, second: StoredModel) -> bool:
    """Whether two records are of the same files at the same time."""
    return (first.created, first.files) == (second.created, second.files)


def default_folder() -> Path:
    """Return the folder that a store uses when none is named."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    import platformdirs  # here, since most programs never use it

    return platformdirs.user_data_path("llamactor", appauthor=False) / "models"
