"""``llamactor ls``, ``pull``, ``import``, ``rm``, ``prune``, ``verify``: the store."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from llamactor.cli.flags import Json, StoredName
from llamactor.cli.tables import counted, show_json, show_table, size
from llamactor.cli.terminal import Status, Work, complain, progress, say, write
from llamactor.store import Capability, ModelStore

if TYPE_CHECKING:
    from llamactor.cli.terminal import Interrupts, Progress
    from llamactor.store import DownloadProgress, StoredModel, Verification
    from llamactor.store.records import ReportProgress

Name = Annotated[
    str | None, Parameter(metavar="NAME", help="What to call it (a name made of the file's).")
]

NO_MODELS = """\
There are none yet: llamactor pull downloads one, llamactor ls --discover finds those of others.
"""


def ls(
    query: str | None = None,
    /,
    *,
    capability: Capability | None = None,
    discover: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    json: Json = False,
) -> Work:
    """Show the models that can be loaded by name.

    Parameters
    ----------
    query
        Only those that have this in their name, architecture or quantisation.
    capability
        Only those that can do this.
    discover
        First look into the folders of the Hugging Face cache, LM Studio and Ollama; what lies there
        is recorded where it is, not copied.
    """

    async def work(_: Interrupts) -> int:
        store = ModelStore()
        if discover:
            with progress("looking for models", total=None):
                await store.discover()
        models = await store.list(query, capability=capability)
        if json:
            show_json(models)
        else:
            _show_models(models)
            if not (models or query or capability):
                say(NO_MODELS)
        return Status.DONE

    return work


def _show_models(models: list[StoredModel]) -> None:
    rows = [
        (
            model.name,
            size(model.size_bytes),
            counted(model.parameters),
            model.quantization,
            model.train_context_size,
            ", ".join(model.capabilities),
            "quarantined" if model.quarantined else _ago(model.last_used),
        )
        for model in models
    ]
    columns = ("NAME", "SIZE", "WEIGHTS", "QUANT", "CONTEXT", "CAN", "USED")
    show_table(columns, rows, right=("SIZE", "WEIGHTS", "CONTEXT"))


def _ago(moment: datetime | None) -> str | None:
    """Return how long ago that was, in the unit that fits."""
    if moment is None:
        return None
    seconds = (datetime.now(UTC) - moment).total_seconds()
    for name, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            number = int(seconds / length)
            return f"{number} {name}{'' if number == 1 else 's'} ago"
    return "now"


def pull(
    ref: Annotated[str, Parameter(name="HF-REF")],
    /,
    *,
    name: Name = None,
    json: Json = False,
) -> Work:
    """Download a model from the Hugging Face hub into the store.

    What was interrupted goes on where it ended when it is pulled again. HF_TOKEN, HF_ENDPOINT and
    the other variables of huggingface_hub count; it is an extra: pip install "llamactor[hub]".

    Parameters
    ----------
    ref
        "hf:owner/repo", "hf:owner/repo:Q4_K_M" or "hf:owner/repo/file.gguf".
    """

    async def work(_: Interrupts) -> int:
        with progress(f"pulling {ref}", total=None, in_bytes=True) as bar:
            model = await ModelStore().pull(ref, name=name, progress=_reporting(bar))
        _tell(model, json=json)
        return Status.DONE

    return work


def import_(path: Path, /, *, name: Name = None, copy: bool = False, json: Json = False) -> Work:
    """Record a model file in the store, so that it can be loaded by name.

    Parameters
    ----------
    path
        The .gguf; of a split model the first part.
    copy
        Copy it into the store instead of remembering where it is.
    """

    async def work(_: Interrupts) -> int:
        with progress(f"importing {path.name}", total=None, in_bytes=True) as bar:
            model = await ModelStore().import_(path, name=name, copy=copy, progress=_reporting(bar))
        _tell(model, json=json)
        return Status.DONE

    return work


def _reporting(bar: Progress) -> ReportProgress:
    def report(done: DownloadProgress) -> None:
        bar.at(done.done_bytes, total=done.total_bytes, what=done.file)

    return report


def _tell(model: StoredModel, *, json: bool) -> None:
    if json:
        show_json(model)
    else:
        write(f"{model.name}\n")


def rm(*names: StoredName) -> Work:
    """Remove models from the store.

    Files that the store has downloaded or copied are deleted; files that it only knows stay.
    """
    if not names:
        raise ValueError("no name was given: there is nothing to remove")

    async def work(_: Interrupts) -> int:
        store = ModelStore()
        for name in names:
            await store.remove(name)
        return Status.DONE

    return work


def prune() -> Work:
    """Remove what interrupted downloads and imports have left.

    A pull of the same model would have gone on from there.
    """

    async def work(_: Interrupts) -> int:
        write(f"{size(await ModelStore().prune())} are free now\n")
        return Status.DONE

    return work


def verify(*names: StoredName, json: Json = False) -> Work:
    """Compare the files of models with what was recorded of them: header, size and checksum.

    Without names all models. One that differs is quarantined: it is not loaded until its file is as
    recorded and this has seen it, or until it is pulled or imported again. The exit status is 1 if
    there is any.
    """

    async def work(_: Interrupts) -> int:
        found = await _verified(names)
        if json:
            show_json(found)
        else:
            show_table(("NAME", "STATE"), [(each.name, each.problem or "ok") for each in found])
        wrong = sum(not each.ok for each in found)
        if wrong:
            complain(f"{wrong} of {len(found)} models are not as recorded")
        return Status.FAILED if wrong else Status.DONE

    return work


async def _verified(names: tuple[str, ...]) -> list[Verification]:
    """Check these models, or all. Cancelling this stops; what was found stays recorded."""
    store = ModelStore()
    found: list[Verification] = []
    for name in names or (None,):
        with progress(f"verifying {name or 'all'}", total=None, in_bytes=True) as bar:
            found += await store.verify(name, progress=_reporting(bar))
    return found
