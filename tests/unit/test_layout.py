"""The shape of the project: what may use what, and what may lie where."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

import llamactor

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
RUST = ROOT / "rust"
PYTHON = ROOT / "python" / "llamactor"

# Which rooms of the crate a room may name: only what stands before it in the flow of the data.
FLOW = ("error", "llama", "model", "chat", "context", "sequence", "prediction", "python")
RUST_ROOMS = {room: set(FLOW[: index + 1]) for index, room in enumerate(FLOW)}

# Which modules of the package a module may import when it runs; names only for types are free.
PYTHON_MODULES = {
    "_core": set[str](),
    "errors": set[str](),
    "_checks": set[str](),
    "_home": set[str](),
    "_opening": set[str](),
    "_work": set[str](),
    "schema": {"_checks", "_core", "errors"},
    "grammar": {"_checks", "_core", "errors", "schema"},
    "options": {"_checks", "grammar", "schema"},
    "_hub": {"_core", "errors"},
    "calls": {"_checks"},
    "prediction": {"_hub", "_work", "calls", "errors", "options", "schema"},
    "sequence": {"_checks", "_hub", "errors", "options", "prediction"},
    "context": {"_checks", "_home", "_hub", "_opening", "sequence"},
    "chat": {
        *("_checks", "_core", "_home", "_hub", "_opening", "_work", "calls"),
        *("errors", "options", "prediction", "schema"),
    },
    "context_shift": {"chat"},
    "model": {
        *("_checks", "_home", "_hub", "_opening", "_work", "chat"),
        *("context", "errors", "options", "prediction"),
    },
    "_bare": {"_hub", "_opening", "options"},
    "system": {"_checks", "_core"},
    "presets": {"_checks", "errors", "grammar", "options"},
    "store": {"_checks", "_core", "errors", "presets"},
    "loading": {"_checks", "_core", "_hub", "errors", "model", "options", "prediction", "store"},
    "runtime": {
        *("_checks", "_core", "_hub", "chat", "errors", "loading", "model"),
        *("options", "prediction", "presets", "store", "system"),
    },
    "cli": {
        *("_bare", "chat", "errors", "grammar", "loading", "options"),
        *("prediction", "presets", "runtime", "store", "system"),
    },
}

TOP_LEVEL = {
    *("Cargo.toml", "Cargo.lock", "pyproject.toml", "Makefile", "LICENSE"),
    *("README.md", "ARCHITECTURE.md"),
    *("docs", "rust", "python", "tests", "benches"),
    *(".cargo", ".ci", ".editorconfig", ".gitignore", "rustfmt.toml"),
}


def files_of_the_project() -> list[Path]:
    """Every file that git tracks or would track."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- Rust ---------------------------------------------------------------------------------------


def rust_files() -> list[Path]:
    return sorted(RUST.rglob("*.rs"))


def room_of(path: Path) -> str:
    """The first part of the path inside rust/: `llama` for rust/llama/model.rs."""
    return path.relative_to(RUST).parts[0].removesuffix(".rs")


def code_of(path: Path) -> str:
    """The file without its line comments, doc comments among them."""
    return re.sub(r"//.*", "", path.read_text(encoding="utf-8"))


def lines_with(word: str, paths: list[Path]) -> list[str]:
    pattern = re.compile(rf"\b{word}\b")
    return [
        f"{named(path)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(code_of(path).splitlines(), start=1)
        if pattern.search(line)
    ]


def names_in_braces(text: str) -> Iterator[str]:
    """The first name of each entry of a use list: `a`, `b` for `{a::{x, y}, b::z}`."""
    depth, entry = 0, ""
    for char in text:
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0 or (depth == 1 and char == ","):
            yield entry
            entry = ""
            if depth == 0:
                return
        elif depth > 1 or char != "{":
            entry += char


def crate_names(code: str) -> set[str]:
    """What follows `crate::` anywhere in the code, lists in braces included."""
    names = set(re.findall(r"\bcrate::(\w+)", code))
    for match in re.finditer(r"\bcrate::(?=\{)", code):
        entries = names_in_braces(code[match.end() :])
        names.update(
            found.group() for entry in entries if (found := re.match(r"\w+", entry.strip()))
        )
    return names


def test_crate_names_reads_nested_use_lists() -> None:
    code = "use crate::{llama::{Token, vocab::Vocab}, error::Error,\n model}; crate::context::Job"
    assert crate_names(code) == {"llama", "error", "model", "context"}


def test_unsafe_rust_lies_only_under_llama() -> None:
    elsewhere = [path for path in rust_files() if room_of(path) != "llama"]
    assert lines_with("unsafe", elsewhere) == []


def test_only_the_llama_room_names_the_bindings() -> None:
    elsewhere = [path for path in rust_files() if room_of(path) != "llama"]
    assert lines_with(r"llama_cpp(_sys)?_2", elsewhere) == []


def test_only_the_python_room_and_the_entry_file_name_pyo3() -> None:
    elsewhere = [path for path in rust_files() if room_of(path) not in {"python", "lib"}]
    assert lines_with("pyo3", elsewhere) == []


def test_every_rust_file_belongs_to_a_known_room() -> None:
    assert {room_of(path) for path in rust_files()} <= {*RUST_ROOMS, "lib", "build"}


def test_a_rust_room_names_only_what_it_may() -> None:
    assert [
        f"{named(path)} names crate::{name}"
        for path in rust_files()
        if (room := room_of(path)) in RUST_ROOMS
        for name in sorted(crate_names(code_of(path)) - RUST_ROOMS[room])
    ] == []


# --- Python -------------------------------------------------------------------------------------


def python_files() -> list[Path]:
    return sorted(PYTHON.rglob("*.py"))


def room_of_module(path: Path) -> str:
    return path.relative_to(PYTHON).parts[0].removesuffix(".py")


def is_for_types_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(node: ast.AST) -> Iterator[str]:
    """The dotted names that the code imports when it runs, `.` first for the package's own."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            if module in {".", "llamactor"}:  # from llamactor import _core
                yield from (f"{module.rstrip('.')}.{alias.name}" for alias in child.names)
            else:
                yield module
        elif isinstance(child, ast.stmt) and is_for_types_only(child):
            continue
        else:
            yield from imports(child)


def imported_rooms(path: Path) -> set[str]:
    """The modules of this package that the file imports when it runs."""
    names = imports(ast.parse(path.read_text(encoding="utf-8")))
    inside = (re.fullmatch(r"(?:\.+|llamactor\.)(\w+).*", name) for name in names)
    return {match.group(1) for match in inside if match}


def test_a_python_module_imports_only_what_it_may() -> None:
    introducing = {"__init__", "__main__"}
    modules = [path for path in python_files() if room_of_module(path) not in introducing]
    assert {room_of_module(path) for path in modules} <= set(PYTHON_MODULES)
    assert [
        f"{named(path)} imports {name}"
        for path in modules
        if (room := room_of_module(path)) in PYTHON_MODULES
        for name in sorted(imported_rooms(path) - PYTHON_MODULES[room] - {room})
    ] == []


def test_the_package_imports_only_its_dependencies_and_the_standard_library() -> None:
    import sys

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    wanted = [*project["dependencies"], *extras]
    declared = {re.match(r"[\w-]+", name).group().replace("-", "_") for name in wanted}  # type: ignore[union-attr]
    allowed = declared | sys.stdlib_module_names | {"llamactor"}
    assert [
        f"{named(path)} imports {name}"
        for path in python_files()
        for name in imports(ast.parse(path.read_text(encoding="utf-8")))
        if not name.startswith(".") and name.partition(".")[0] not in allowed
    ] == []


def test_all_names_what_is_public() -> None:
    public = {
        name
        for name, value in vars(llamactor).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }
    exported = [name for name in llamactor.__all__ if not name.startswith("__")]
    assert public == set(exported)
    assert len(exported) == len(set(exported))


# --- files --------------------------------------------------------------------------------------


def test_the_top_level_holds_only_what_belongs_there() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in files_of_the_project()} <= TOP_LEVEL


def test_no_file_names_a_place_on_somebody_s_machine() -> None:
    place = re.compile(rb"(?<![\w.~$}\-])/(?:work|home|root|tmp|farm|Users)/\w")
    assert [named(path) for path in files_of_the_project() if place.search(path.read_bytes())] == []


def test_lock_files_record_no_address_but_one_registry_s() -> None:
    names = {path.name for path in files_of_the_project()}
    assert names.isdisjoint({"uv.lock", "poetry.lock", "Pipfile.lock", "package-lock.json"})
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text(encoding="utf-8"))
    sources = {package["source"] for package in lock["package"] if "source" in package}
    assert len(sources) == 1  # neither a git repository nor a registry of somebody's own beside it
    assert sources.pop().startswith("registry+")


@pytest.mark.parametrize("name", ["rust", "python", "tests", "benches"])
def test_no_file_is_large(name: str) -> None:
    inside = [path for path in files_of_the_project() if (ROOT / name) in path.parents]
    large = [named(path) for path in inside if path.stat().st_size > largest(path)]
    assert large == []


def largest(path: Path) -> int:
    """Bytes that a file may have; only the weights of the tests' chat model may have many."""
    return 4_000_000 if path.suffix == ".gguf" else 1_000_000
