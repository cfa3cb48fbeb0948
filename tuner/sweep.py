"""SweepDefinition: what to measure, read strictly from sweeps/*.toml, with axes overridden by ``--set``.

It expands to families (everything but the context) of problems. It holds data only; ``tuner.search`` walks it.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from nsa.dispatch_entry import Level
from nsa.errors import ArgumentError
from nsa.problem import CacheState, DType, Execution, Mode, Operation, SelectionProblem
from nsa.trace import ParameterValue
from tuner.record import DEFAULT_REGISTRY

Pattern = Literal["scored", "smooth", "random"]
FIXED = "fixed"
"""In a pattern's place where a row's position alone says what it reads, as in the window and compressed branches."""
OVERLAP_OF: dict[str, Literal["low", "high"]] = {"scored": "high", "smooth": "high", "random": "low"}

SWEEPS = Path(__file__).parent / "sweeps"
"""A symlink in a checkout, a folder in a wheel."""

ALL_PATHS = (
    *("dense", "gather", "packed", "varlen", "flex"),
    *("triton_token", "triton_union", "triton_block", "triton_decode", "causal_prefix"),
    *("sdpa_window", "flash_attn_window", "triton_window"),
    *("sdpa_compressed", "flash_attn_compressed", "cudnn_compressed", "triton_compressed"),
)
"""A sweep takes of its paths those of each problem's operation."""
SHAPE_AXES = ("heads", "kv_heads", "head_dim", "value_head_dim")


class SweepError(ValueError):
    """A sweep file or override that cannot be read. Says what, got, expected."""


class Axes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Values to cross. The shape axes (heads, kv_heads, head_dim, value_head_dim) go together, element by element;
    one of length 1 serves all. ``value_head_dim`` [0] means the same as head_dim. Operation selection crosses
    ``block_size``, ``topk``, ``pattern`` and ``complete``; window ``window``; compression ``kernel_size`` and
    ``kernel_stride``. ``complete``: whether selections say that they are, as they are under every pattern; in decode
    they never do, since no path asks for it there."""

    operations: tuple[Operation, ...] = ("selection",)
    modes: tuple[Mode, ...]
    contexts: tuple[int, ...]
    batch: tuple[int, ...] = (1,)
    heads: tuple[int, ...] = (8,)
    kv_heads: tuple[int, ...] = (2,)
    head_dim: tuple[int, ...] = (32,)
    value_head_dim: tuple[int, ...] = (0,)
    block_size: tuple[int, ...] = (64,)
    topk: tuple[int, ...] = (16,)
    window: tuple[int, ...] = (512,)
    kernel_size: tuple[int, ...] = (32,)
    kernel_stride: tuple[int, ...] = (16,)
    dtype: tuple[DType, ...] = ("float32",)
    execution: tuple[Execution, ...] = ("eager",)
    cache: tuple[CacheState | Literal["deployed"], ...] = ("deployed",)
    complete: tuple[bool, ...] = (False,)
    pattern: tuple[Pattern, ...] = ("scored",)

    def __post_init__(self) -> None:
        if empty := [name for name in self.__struct_fields__ if not getattr(self, name)]:
            raise ValueError(f"axes without a value: {', '.join(empty)}")


class SweepDefinition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A sweep. ``budget_s``: wall-clock seconds to aim at. ``ladders``: path -> parameter -> values instead of the
    path's own ladder. ``kind``: "paths" measures candidates, "reserve" call sequences per reserve. ``level``: "layer"
    measures combinations of paths inside NSAAttention, whose dim is heads * head_dim."""

    name: str
    description: str
    axes: Axes
    kind: Literal["paths", "reserve"] = "paths"
    level: Level = "branch"
    paths: tuple[str, ...] = ALL_PATHS
    ladders: dict[str, dict[str, tuple[ParameterValue, ...]]] = {}
    budget_s: float = 600.0
    memory_limit_bytes: int = 0
    seed: int = 0


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """Problems that differ in context only, and the pattern their selections are made by."""

    name: str
    pattern: str
    problems: tuple[SelectionProblem, ...]


def read_sweep(name_or_file: str, overrides: Sequence[str] = ()) -> SweepDefinition:
    """A named sweep of this project or a TOML file, with ``AXIS=VALUE[,VALUE...]`` overrides. Raises SweepError."""
    path = Path(name_or_file) if name_or_file.endswith(".toml") else _packaged(name_or_file)
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise SweepError(f"cannot read sweep {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SweepError(f"{path}: not TOML: {error}") from error
    for override in overrides:
        _override(raw, override)
    try:
        return msgspec.convert(raw, SweepDefinition)
    except msgspec.ValidationError as error:
        raise SweepError(f"{path}: {error}; a sweep has {', '.join(SweepDefinition.__struct_fields__)}") from error


def sweep_command_line(asked: Mapping[str, Any]) -> str:
    """The command that asks for a recorded sweep (``Environment.sweep``): what it has unlike the file of its name now.

    A sweep that is not of this project is named by its file's name alone: its axes stand in the run's environment.
    """
    name = str(asked["name"])
    ours = name in sweep_names()
    words = ["nsa-tune sweep", name if ours else f"{name}.toml"]
    if ours:
        file, ran = read_sweep(name), msgspec.convert(asked["axes"], Axes)
        for axis in Axes.__struct_fields__:
            values: tuple[Any, ...] = getattr(ran, axis)
            if values != getattr(file.axes, axis):
                words.append(f"--set {axis}={','.join(str(value) for value in values).lower()}")
        words += [f"--budget {asked['budget_s']:g}s"] if asked["budget_s"] != file.budget_s else []
    for option, usual in (("effort", "quick"), ("registry", DEFAULT_REGISTRY)):
        words += [f"--{option} {asked[option]}"] if asked.get(option, usual) != usual else []
    return " ".join(words)


def sweep_names() -> list[str]:
    """Names that ``nsa-tune sweep`` takes."""
    return sorted(path.stem for path in SWEEPS.glob("*.toml"))


def _packaged(name: str) -> Path:
    path = SWEEPS / f"{name}.toml"
    if not path.is_file():
        raise SweepError(f"no sweep named {name!r}; expected one of {sweep_names()} or a .toml file")
    return path


def _override(raw: dict[str, Any], override: str) -> None:
    axis, sign, text = override.partition("=")
    axes = raw.setdefault("axes", {})
    if not sign or axis not in Axes.__struct_fields__:
        raise SweepError(
            f"--set {override!r}: expected AXIS=VALUE[,VALUE...] with AXIS of {list(Axes.__struct_fields__)}"
        )
    values = [value.strip() for value in text.split(",") if value.strip()]
    words: dict[str, Any] = {"true": True, "false": False}
    axes[axis] = [int(value) if value.lstrip("-").isdigit() else words.get(value, value) for value in values]


def families(sweep: SweepDefinition, device_kind: str) -> list[Family]:
    """The problems of a sweep for a device kind ("cpu", "cuda"), by family, contexts ascending. Raises SweepError."""
    axes = sweep.axes
    found = []
    for shape, mode, batch, kind, dtype, execution, cache in itertools.product(
        _shapes(axes), axes.modes, axes.batch, list(_kinds(axes)), axes.dtype, axes.execution, axes.cache
    ):
        heads, groups, key_dim, value_dim = shape
        prefix, pattern, fields = kind
        if mode == "decode":
            fields = {**fields, "complete": False}
        state: CacheState = ("cold" if device_kind == "cuda" else "hot") if cache == "deployed" else cache
        try:
            problems = tuple(
                SelectionProblem(
                    mode=mode, dtype=dtype, B=batch, S=1 if mode == "decode" else context, T=context, G=groups,
                    h=heads // groups, Dk=key_dim, Dv=value_dim or key_dim, execution=execution, cache=state, **fields,
                )
                for context in sorted(set(axes.contexts))
            )  # fmt: skip
        except ArgumentError as error:
            raise SweepError(f"sweep {sweep.name!r}: {error}") from error
        if problems[0].keys < 1:
            raise SweepError(f"sweep {sweep.name!r}: no compressed token exists for a context of {problems[0].T}")
        name = (
            f"{prefix}{mode} B{batch} {heads}/{groups} D{key_dim}" + (f",{value_dim}" if value_dim else "")
            + f" {dtype} {execution} {state} {pattern}"
            + (" complete" if problems[0].complete else "")
        )  # fmt: skip
        found.append(Family(name=name, pattern=pattern, problems=problems))
    return found


def _kinds(axes: Axes) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(prefix of a family's name, pattern, fields of the problem) of every operation and of its own axes."""
    ranged: dict[str, Any] = {"block_size": 0, "topk": 1, "form": "ranges"}
    for operation in axes.operations:
        if operation == "selection":
            axes_of = (axes.block_size, axes.topk, axes.complete, axes.pattern)
            for size, topk, complete, pattern in itertools.product(*axes_of):
                overlap = OVERLAP_OF[pattern]
                yield "", pattern, {"block_size": size, "topk": topk, "overlap": overlap, "complete": complete}
        elif operation == "window":
            for window in axes.window:
                yield f"window {window} ", FIXED, {**ranged, "operation": operation, "window": window}
        else:
            for size, stride in itertools.product(axes.kernel_size, axes.kernel_stride):
                if stride < 1 or size % stride:
                    raise SweepError(f"kernel_size {size} is no multiple of kernel_stride {stride}")
                sizes = {"operation": operation, "kernel_size": size, "kernel_stride": stride}
                yield f"compression {size}/{stride} ", FIXED, {**ranged, **sizes}


def _shapes(axes: Axes) -> list[tuple[int, int, int, int]]:
    columns = [getattr(axes, name) for name in SHAPE_AXES]
    length = max(map(len, columns))
    for name, column in zip(SHAPE_AXES, columns, strict=True):
        if len(column) not in (1, length):
            raise SweepError(f"axis {name} has {len(column)} values, expected 1 or {length} as the longest shape axis")
    shapes = [tuple(column[index % len(column)] for column in columns) for index in range(length)]
    for heads, groups, *_ in shapes:
        if groups < 1 or heads % groups:
            raise SweepError(f"heads {heads} is not a multiple of kv_heads {groups}")
    return shapes
