"""Tries a chat template with llama.cpp's own renderer: ``python -m llamactor.chat._trial``.

That renderer has no bounds, so this process has: whoever starts it kills it when it takes too long.
Reads a conversation as JSON; ends with 0 when the template rendered it.
"""

from __future__ import annotations

import resource
import sys

from llamactor import _core

_MEMORY_BYTES = 4 * 2**30
_CPU_SECONDS = 20


def main() -> None:
    """Render what standard input says, and say by the exit status whether that went well."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _core.try_chat_template(sys.stdin.buffer.read())


if __name__ == "__main__":
    main()
