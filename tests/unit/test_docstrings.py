"""Public docstrings: there is one for everything, and an awaitable's says what cancelling does."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import llamactor

if TYPE_CHECKING:
    from collections.abc import Iterator

    Function = ast.FunctionDef | ast.AsyncFunctionDef

PACKAGE = Path(llamactor.__file__).parent
NOT_PUBLIC = {
    *("_core.pyi", "_bare.py", "_checks.py", "_home.py", "_hub.py", "_work.py", "__main__.py"),
}
OPERATIONS = ("Coroutine", "Loading", "Opening", "Prediction", "PredictionIterator")
"""What a function returns that is to be awaited or iterated."""

WITHOUT_WAITING = re.compile(r"[Nn]ever\s+(?:suspends|waits)")
ABOUT_CANCELLING = re.compile(r"\b(?:[Cc]ancelling|[Cc]ancelled|[Cc]ancels)\b")


def is_public(name: str) -> bool:
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def members(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """The public classes and functions of a module or class, with their dotted names."""
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        name = f"{prefix}.{node.name}"
        if is_public(node.name):
            yield name, node
        if isinstance(node, ast.ClassDef) and is_public(node.name):
            yield from members(node.body, name)


MODULES = {
    path.stem: ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name not in NOT_PUBLIC and path.parent.name != "cli"
}
PUBLIC = dict(item for stem, tree in MODULES.items() for item in members(tree.body, stem))
FUNCTIONS = {name: node for name, node in PUBLIC.items() if not isinstance(node, ast.ClassDef)}
CLASSES = {name: node for name, node in PUBLIC.items() if isinstance(node, ast.ClassDef)}
VALUES = {name for name in CLASSES if not name.endswith("Keywords")}  # they repeat other fields


def returns(node: Function) -> str:
    """The outermost name of the annotation of what it returns."""
    return re.split(r"\W", ast.unparse(node.returns))[0] if node.returns else ""


def is_awaitable(node: Function) -> bool:
    """Whether what a call gives is awaited, iterated or entered."""
    protocol = node.name in {"__await__", "__aiter__", "__anext__", "__aenter__", "__aexit__"}
    made_here = node.name != "__init__" and returns(node) in OPERATIONS
    return isinstance(node, ast.AsyncFunctionDef) or protocol or made_here


def text_of(node: ast.AST) -> str:
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    return ast.get_docstring(node) or ""


REACHABLE = {*llamactor.__all__, "Opening", "PredictionIterator"}
"""What users name, and what the functions among it give them."""

AWAITABLES = {
    name: node
    for name, node in FUNCTIONS.items()
    if is_awaitable(node) and name.split(".")[1] in REACHABLE
}


def test_everything_exported_is_looked_at() -> None:
    defined = {name.rpartition(".")[2] for name in PUBLIC}
    objects = {
        name
        for name in llamactor.__all__
        if inspect.isclass(getattr(llamactor, name)) or inspect.isfunction(getattr(llamactor, name))
    }
    assert objects - {"ContextSequence"} <= defined  # another name of Sequence
    assert {"loading.Loading.result", "_opening.Opening.__aenter__"} <= set(AWAITABLES)
    assert {"context.Context.sequence", "model.Model.complete"} <= set(AWAITABLES)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_everything_public_has_a_docstring(name: str) -> None:
    """It begins with a sentence that stands on a line of its own."""
    first = text_of(PUBLIC[name]).split("\n")[0]
    assert first.endswith((".", ":"))
    assert len(first.split()) > 1


@pytest.mark.parametrize("name", sorted(AWAITABLES))
def test_every_public_awaitable_says_what_cancelling_does(name: str) -> None:
    """Or that it never suspends, so that there is nothing to cancel."""
    text = text_of(AWAITABLES[name])
    assert ABOUT_CANCELLING.search(text) or WITHOUT_WAITING.search(text), text


@pytest.mark.parametrize("name", sorted(VALUES))
def test_every_field_of_a_public_value_has_a_line(name: str) -> None:
    """A string under the annotation, as in the other values."""
    body = CLASSES[name].body
    undocumented = [
        ast.unparse(node.target)
        for node, after in zip(body, [*body[1:], ast.Pass()], strict=True)
        if isinstance(node, ast.AnnAssign)
        and is_public(ast.unparse(node.target))
        and not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant))
    ]
    assert undocumented == []


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_documented_arguments_and_errors_are_spelt_right(name: str) -> None:
    """Names under Args are parameters, those under Raises exceptions."""
    node = FUNCTIONS[name]
    arguments = node.args
    known = {item.arg for item in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}
    known |= {f"*{item.arg}" for item in [arguments.vararg] if item}
    known |= {f"**{item.arg}" for item in [arguments.kwarg] if item}
    assert section(text_of(node), "Args") <= known
    exceptions = {*vars(llamactor), *vars(builtins)}
    assert section(text_of(node), "Raises") <= exceptions


def section(text: str, title: str) -> set[str]:
    """The names that a section of a docstring in Google's form describes."""
    found = re.search(rf"^{title}:\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
    return set(re.findall(r"^ {4}(\**\w+):", found[1], re.MULTILINE)) if found else set()
