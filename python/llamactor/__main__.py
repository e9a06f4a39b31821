"""``python -m llamactor "prompt"``: stream a completion of a local model and print what it took."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

import anyio
import msgspec

import llamactor
from llamactor.loading import DEFAULT_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CANCELLED = 130  # what shells report for a process ended by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return anyio.run(_complete, options)
    except BrokenPipeError:
        # The reader went away; keep the interpreter's own flush at exit from failing too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return CANCELLED
    except (llamactor.LlamactorError, ValueError) as error:
        _say(f"llamactor: {error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llamactor", description=__doc__)
    parser.add_argument("prompt", help="text to continue; special tokens in it are parsed")
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help='path of a .gguf, "smollm2" or "pkg:name" (%(default)s)',
    )
    parser.add_argument(
        "--chatml", action="store_true", help="wrap the prompt as a user's turn in ChatML"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="most tokens (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="seed of the draw")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="compute threads")
    return parser


async def _complete(options: argparse.Namespace) -> int:
    wanted = llamactor.GenerationOptions(
        max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed
    )
    loading = llamactor.load_model(options.model, threads=options.threads)
    _on_interrupt(loading.cancel)
    try:
        await _show_progress(loading)
        model = await loading
    except llamactor.LoadCancelledError:
        _say("cancelled\n")
        return CANCELLED
    async with model:
        return await _answer(model, _prompt(options), wanted)


async def _show_progress(loading: llamactor.Loading) -> None:
    shown = sys.stderr.isatty()
    try:
        async for progress in loading:
            if shown:
                _say(f"\rloading {progress.fraction:4.0%} {progress.stage:<10}")
    finally:
        if shown:
            _say("\r" + " " * 40 + "\r")


async def _answer(model: llamactor.Model, prompt: str, wanted: llamactor.GenerationOptions) -> int:
    prediction = model.complete(prompt, options=wanted)
    _on_interrupt(prediction.cancel)
    async with prediction:
        async for text in prediction:
            sys.stdout.write(text)
            sys.stdout.flush()
    result = await prediction
    sys.stdout.write("\n")
    sys.stdout.flush()
    _say(_statistics(result))
    return CANCELLED if result.stop_reason == "cancelled" else 0


def _prompt(options: argparse.Namespace) -> str:
    text: str = options.prompt
    return (
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" if options.chatml else text
    )


def _statistics(result: llamactor.PredictionResult) -> str:
    values = {
        "stop_reason": result.stop_reason,
        "seed": result.seed,
        **msgspec.structs.asdict(result.stats),
    }
    return "\n" + "".join(f"{name:>26}  {_shown(value)}\n" for name, value in values.items())


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _on_interrupt(action: Callable[[], None]) -> None:
    """Let Ctrl-C do `action`, where the loop can watch signals; else `KeyboardInterrupt`."""
    try:
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, action)
    except NotImplementedError:
        return


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
