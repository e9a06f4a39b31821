"""``llamactor presets``: named options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from llamactor.cli.flags import ChatFlags, Json, LoadFlags, PresetName
from llamactor.cli.tables import show_json, show_table, show_values
from llamactor.cli.terminal import Status, Work
from llamactor.presets import Keep, Presets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llamactor.cli.terminal import Interrupts

presets = App(
    name="presets",
    help="Show and change named options, which --preset takes.\n\nThey are in presets.toml in your "
    "configuration folder, and may be edited there.",
    help_epilogue="",
)


@presets.default
def show_all(*, json: Json = False) -> Work:
    """Show all of them."""

    async def work(_: Interrupts) -> int:
        found = await Presets().list()
        if json:
            show_json(found)
        else:
            rows = [(each.name, _said(each.load), _said(each.generation)) for each in found]
            show_table(("NAME", "LOAD", "GENERATION"), rows)
        return Status.DONE

    return work


@presets.command
def show(name: PresetName, /, *, json: Json = False) -> Work:
    """Show one preset."""

    async def work(_: Interrupts) -> int:
        found = await Presets().get(name)
        if json:
            show_json(found)
        else:
            notes = {"notes": found.notes} if found.notes else {}
            show_values({**notes, **_words(found.load), **_words(found.generation)})
        return Status.DONE

    return work


@presets.command(name="set")
def set_(
    name: PresetName,
    /,
    *,
    answer: ChatFlags = ChatFlags(),  # noqa: B008 -- frozen
    loading: LoadFlags = LoadFlags(),  # noqa: B008 -- frozen
    notes: Annotated[str | None, Parameter(metavar="TEXT", help="Anything.")] = None,
    anew: Annotated[
        bool,
        Parameter(negative=(), show_default=False, help="Forget the options that it has."),
    ] = False,
) -> Work:
    """Make a preset of these options, or change them in the one of that name."""
    generation, load = answer.keywords(), loading.keywords()

    async def work(_: Interrupts) -> int:
        keep: Keep = "notes" if anew else "options"
        await Presets().set(name, load=load, generation=generation, notes=notes, keep=keep)
        return Status.DONE

    return work


@presets.command
def rm(*names: PresetName) -> Work:
    """Remove presets."""
    if not names:
        raise ValueError("no name was given: there is nothing to remove")

    async def work(_: Interrupts) -> int:
        for name in names:
            await Presets().remove(name)
        return Status.DONE

    return work


def _words(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "none" if value is None else value for name, value in options.items()}


def _said(options: Mapping[str, Any]) -> str | None:
    return " ".join(f"{name}={value}" for name, value in _words(options).items()) or None
