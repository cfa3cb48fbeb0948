"""What commands share: where results go, which device, paths and time are meant."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import msgspec
import torch
from rich.console import Console

from nsa.paths import SelectionPath
from tuner.sweep import SweepError


def plain_console(*, stderr: bool = False, soft_wrap: bool = True, width: int | None = None) -> Console:
    """A console that prints what it is given: brackets in a reason or a path are no markup."""
    return Console(markup=False, highlight=False, soft_wrap=soft_wrap, stderr=stderr, width=width)


def results_console() -> Console:
    """Stdout; not narrower than the tables where it is a file or a pipe."""
    console = plain_console(soft_wrap=False)
    return console if console.is_terminal else plain_console(soft_wrap=False, width=130)


def read_registry(registry: str) -> dict[str, SelectionPath]:
    """The PATHS at ``module:NAME``; the module may lie in the folder that one is in. Raises SweepError."""
    module, _, name = registry.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # workers inherit it
    try:
        found: dict[str, SelectionPath] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SweepError(f"--registry {registry!r}: {error}; expected module:NAME of a dict of paths") from error
    if not isinstance(found, dict):
        raise SweepError(f"--registry {registry!r} is a {type(found).__name__}, expected a dict of paths")
    if foreign := [key for key, path in found.items() if not isinstance(path, SelectionPath)]:
        raise SweepError(f"--registry {registry!r}: {foreign} are no SelectionPath, as PATHS of nsa.paths holds them")
    return found


def choose_device(asked: str) -> str:
    """``auto`` is the GPU where there is one. Raises SweepError for a GPU that is not there."""
    if asked not in ("auto", "cpu", "cuda"):
        raise SweepError(f"--device {asked!r}: expected auto, cpu or cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        raise SweepError("--device cuda: torch sees no GPU here; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def seconds(text: str) -> float:
    """``90s``, ``10m``, ``1h`` or plain seconds. Raises SweepError."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:])
    number = text[:-1] if unit else text
    try:
        value = float(number) * (unit or 1.0)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise SweepError(f"--budget {text!r}: expected a time such as 90s, 10m or 1h")
    return value


def emit(value: Any) -> None:
    """JSON on stdout."""
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
