"""``llamactor info``: what a model is, before it is loaded."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from cyclopts import Parameter

from llamactor.cli.flags import OUTPUT, Json, LoadFlags, Preset, Reference
from llamactor.cli.tables import counted, show_json, show_table, show_values, size
from llamactor.cli.terminal import Status, Work, complain, write
from llamactor.errors import ModelLoadError, UnsupportedError
from llamactor.runtime import MemoryPlan, Runtime
from llamactor.store import ModelStore
from llamactor.store.refs import DEFAULT_MODEL

if TYPE_CHECKING:
    from llamactor.cli.terminal import Interrupts
    from llamactor.options import LoadKeywords
    from llamactor.store import ModelHeader

SHAPE = {
    "layers": "block_count",
    "embedding": "embedding_length",
    "attention heads": "attention.head_count",
    "key-value heads": "attention.head_count_kv",
    "sliding window": "attention.sliding_window",
    "experts": "expert_count",
}
"""What is said of an architecture, and the ends of the keys that say it."""

Part = Literal["template", "metadata", "tensors"]


def info(
    ref: Reference = DEFAULT_MODEL,
    /,
    *,
    only: Annotated[Part | None, Parameter(group=OUTPUT)] = None,
    preset: Preset = None,
    loading: LoadFlags = LoadFlags(),  # noqa: B008 -- frozen
    json: Json = False,
) -> Work:
    """Show what a model is and what it would take, without loading it.

    All of it is found in the header of the file; of a model on the hub no more is downloaded, and
    what it would take is not known before it is here.

    Parameters
    ----------
    only
        Show this alone, whole: the chat template, the metadata, or the tensors.
    """
    options = loading.keywords()

    async def work(_: Interrupts) -> int:
        header = await ModelStore().header(ref)
        if only is not None:
            _show_part(header, only, json=json)
            return Status.DONE
        if not json:
            _show(header)
        plan = await _planned(header, ref, preset, options)
        if json:
            show_json(_described(header) | {"memory": plan and _plan_described(plan)})
        elif plan is not None:
            _show_plan(plan)
        return Status.DONE

    return work


def _described(header: ModelHeader) -> dict[str, object]:
    return {
        "source": header.source,
        "name": header.name,
        "architecture": header.architecture,
        "quantization": header.quantization,
        "parameters": header.parameters,
        "size_bytes": header.size_bytes,
        "train_context_size": header.train_context_size,
        "capabilities": header.capabilities,
        "license": header.license,
        "chat_template": header.chat_template,
        "gguf_version": header.version,
        "metadata": header.metadata,
    }


def _show(header: ModelHeader) -> None:
    template = header.chat_template
    shape = {
        name: header.metadata.get(f"{header.architecture}.{key}") for name, key in SHAPE.items()
    }
    show_values(
        {
            "name": header.name,
            "file": header.source,
            "size": f"{size(header.size_bytes)}, GGUF {header.version}",
            "architecture": header.architecture,
            "weights": f"{counted(header.parameters)} ({header.quantization})",
            "trained context": f"{header.train_context_size} tokens",
            "can": ", ".join(header.capabilities),
            "licence": header.license,
            **{name: value for name, value in shape.items() if value is not None},
            "chat template": f"{len(template)} characters" if template else "none",
        }
    )


async def _planned(
    header: ModelHeader, ref: str, preset: str | None, options: LoadKeywords
) -> MemoryPlan | None:
    """Return what loading it would take; None if it is elsewhere, or cannot be loaded.

    Cancelling this leaves nothing behind.
    """
    if not await asyncio.to_thread(Path(header.source).is_file):
        return None
    async with Runtime() as runtime:
        try:
            return await runtime.estimate(ref, preset=preset, **options)
        except (ModelLoadError, UnsupportedError) as error:
            complain(error)
            return None


def _plan_described(plan: MemoryPlan) -> dict[str, object]:
    return msgspec.structs.asdict(plan) | {"total_bytes": plan.total_bytes}


def _show_plan(plan: MemoryPlan) -> None:
    rows = [
        (device, *map(size, (take.weights, take.cache, take.compute, take.overhead, take.total)))
        for device, take in plan.per_device.items()
    ]
    write("\n")
    columns = ("ON", "WEIGHTS", "CACHE", "COMPUTE", "OTHER", "TOTAL")
    show_table(columns, rows, right=columns[1:])
    free = "" if plan.free_bytes is None else f" of {size(plan.free_bytes)} to be had"
    write(
        f"\nWith a context of {plan.context_size} tokens it takes {size(plan.total_bytes)}{free}: "
        f"it {'fits' if plan.fits else 'does not fit'}.\n"
    )
    if plan.suggestion:
        flags = (f"--{name.replace('_', '-')} {value}" for name, value in plan.suggestion.items())
        write(f"It would fit with {' '.join(flags)}.\n")


def _show_part(header: ModelHeader, part: Part, *, json: bool) -> None:
    if part == "template":
        _show_template(header.chat_template, json=json)
    elif part == "metadata":
        show_json(header.metadata) if json else show_values(_shown(header.metadata))
    elif json:
        show_json(header.tensors)
    else:
        rows = [
            (
                tensor.name,
                " x ".join(map(str, tensor.dimensions)),
                tensor.type,
                size(tensor.size_bytes),
            )
            for tensor in header.tensors
        ]
        show_table(("TENSOR", "ELEMENTS", "TYPE", "SIZE"), rows, right=("SIZE",))


def _show_template(template: str | None, *, json: bool) -> None:
    if json:
        show_json(template)
    else:
        write(f"{template}\n" if template else "")


def _shown(metadata: dict[str, object]) -> dict[str, object]:
    return {key: _short(value) for key, value in metadata.items()}


def _short(value: object) -> object:
    if isinstance(value, dict):
        return f"{value['length']} of {value['type']}"
    return " ".join(map(str, value)) if isinstance(value, list) else value
