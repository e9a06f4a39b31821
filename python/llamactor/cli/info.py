"""``llamactor info``: what a model is, before it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from llamactor.cli.flags import Json, LoadFlags, Reference
from llamactor.cli.tables import counted, show_json, show_table, show_values, size
from llamactor.cli.terminal import Status, Work, write
from llamactor.store import ModelStore
from llamactor.store.refs import DEFAULT_MODEL

if TYPE_CHECKING:
    from llamactor.cli.terminal import Interrupts
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
    only: Annotated[Part | None, Parameter(group=Group("Output", sort_key=4))] = None,
    loading: LoadFlags = LoadFlags(),  # noqa: B008 -- frozen
    json: Json = False,
) -> Work:
    """Show what a model is and what it would take, without loading it.

    All of it is said by the header of the file, of which no more is read; of a model on the hub, no
    more is downloaded.

    Parameters
    ----------
    only
        Show this alone, whole: the chat template, the metadata, or the tensors.
    """

    async def work(_: Interrupts) -> int:
        header = await ModelStore().header(ref)
        if only is None:
            show_json(_described(header)) if json else _show(header)
        else:
            _show_part(header, only, json=json)
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
