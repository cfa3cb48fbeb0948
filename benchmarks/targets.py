"""The lines of ``benchmarks/selection.py`` against what others reach on an H200, and against the floor, as Markdown.

    python benchmarks/targets.py results/benchmarks/nvidia-h200/selection-COMMIT.jsonl

"Public" is the best public selection kernel, measured on another H200 (2026-11-22). "Beside it" is the fastest line
that is not ours in the same run, with the same host and clocks; shapes without a public figure are held against that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from nsa.paths import PATHS

Line = dict[str, Any]


class Target(NamedTuple):
    """``public`` milliseconds and how many times faster ours is to be, and within how many floors (0: not asked)."""

    public: float | None
    ratio: float
    floors: float = 0.0


TARGETS = {
    ("A-1k-random", "forward"): Target(0.098, 1.3),
    ("A-1k-random", "backward"): Target(0.71, 1.3),
    ("A-4k-random", "forward"): Target(0.576, 1.3),
    ("A-4k-random", "backward"): Target(1.60, 1.3),
    ("A-16k-random", "forward"): Target(3.01, 1.3),
    ("A-16k-random", "backward"): Target(6.99, 1.3),
    ("A-16k-scored", "forward"): Target(3.01, 1.7),
    ("A-16k-scored", "backward"): Target(6.99, 1.4),
    ("A-16k-smooth", "forward"): Target(2.51, 1.7),
    ("A-16k-smooth", "backward"): Target(7.02, 1.4),
    ("A-64k-random", "forward"): Target(13.3, 1.3),
    ("A-64k-random", "backward"): Target(31.4, 1.3),
    ("A-64k-scored", "forward"): Target(13.3, 1.7, 2.5),
    ("A-64k-scored", "backward"): Target(31.4, 1.4, 3.0),
    ("A-64k-smooth", "forward"): Target(13.3, 1.7),
    ("A-64k-smooth", "backward"): Target(31.4, 1.4),
    ("P-16k-random", "forward"): Target(3.92, 1.3),
    ("P-16k-random", "backward"): Target(10.0, 1.3),
    ("G1-16k-random", "forward"): Target(12.3, 8.0),
    ("G1-16k-random", "backward"): Target(10.0, 1.5),
    ("H4-16k-random", "forward"): Target(None, 2.4),
    ("H4-16k-random", "backward"): Target(None, 1.5),
}
"""Of smooth and scored selections at 64k, and scored ones at 16k, the public figure is that of random ones."""
DECODE = {
    ("decode-B1-64k", "warm_us"): 6.0,
    ("decode-B1-1k", "warm_us"): 6.0,
    ("decode-B8-1k", "warm_us"): 9.0,
    ("decode-B8-64k", "warm_us"): 9.0,
    ("decode-B1-64k", "cold_us"): 8.0,
    ("decode-B1-64k", "host_us"): 20.0,
    ("decode-B1-1k", "host_us"): 20.0,
}
"""At most so many microseconds; by graph warm and cold, and eagerly by the host's clock."""
DECODE_FLOORS = {("decode-B64-1k", "cold_us"): 1.25, ("decode-B64-64k", "cold_us"): 1.25}


def verdict(met: bool) -> str:
    """A cell."""
    return "met" if met else "**missed**"


def is_ours(line: Line) -> bool:
    """Whether a line is of the table's choice or of a named path of this project."""
    return line["name"] == "auto" or line["name"] in PATHS


def prefill_rows(lines: Iterable[Line]) -> list[str]:
    """One row of each target that has a line of ours."""
    rows, found = [], list(lines)
    for (shape, kind), target in TARGETS.items():
        here = [one for one in found if (one["shape"], one["kind"]) == (shape, kind)]
        own = [one for one in here if one["name"] == "auto"]
        if not own:
            continue
        if own[-1]["outcome"] != "ok":
            rows.append(f"| {shape} {kind} | {own[-1]['outcome']} | | | | | | | {verdict(False)} |")
            continue
        ours = own[-1]["event_us"] / 1e3
        others = [(one["event_us"] / 1e3, one["name"]) for one in here if one["outcome"] == "ok" and not is_ours(one)]
        beside = min(others, default=None)
        against = target.public or (beside[0] if beside else None)
        floors = ours * 1e3 / own[-1]["floor_us"]
        met = against is not None and against / ours >= target.ratio and floors <= (target.floors or float("inf"))
        rows.append(
            f"| {shape} {kind} | {ours:.3g} | {own[-1]['parameters'].get('path', '')} "
            f"| {f'{target.public:g}' if target.public else ''} | {f'{against / ours:.2f}x' if against else ''} "
            f"| {target.ratio:g}x | {floors:.2f}x{f' of {target.floors:g}' if target.floors else ''} "
            f"| {f'{beside[0]:.3g} {beside[1]}, {beside[0] / ours:.2f}x' if beside else ''} "
            f"| {verdict(met) if against else ''} |"
        )
    return rows


def decode_rows(lines: Iterable[Line]) -> list[str]:
    """One row of each target of decode that has a line of ours."""
    own = {one["shape"]: one for one in lines if one["name"] == "auto" and one["kind"] == "decode"}
    rows = []
    for (shape, clock), limit in (DECODE | DECODE_FLOORS).items():
        if shape not in own:
            continue
        if clock not in own[shape]:
            rows.append(f"| {shape} {clock} | {own[shape]['outcome']} | {limit:g} | {verdict(False)} |")
            continue
        floors = (shape, clock) in DECODE_FLOORS
        found = own[shape][clock] / (own[shape]["floor_us"] if floors else 1)
        said = f"{found:.2f} of the floor" if floors else f"{found:.1f}"
        rows.append(f"| {shape} {clock} | {said} | {limit:g} | {verdict(found <= limit)} |")
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    files = parser.parse_args().files
    lines = [json.loads(text) for file in files for text in file.read_text().splitlines()]
    print("| | ours, ms | path | public, ms | faster | target | floors | beside it, ms | |\n" + "|---" * 9 + "|")
    print(*prefill_rows(lines), sep="\n")
    print("\n| us | ours | target | |\n|---|---|---|---|", *decode_rows(lines), sep="\n")


if __name__ == "__main__":
    main()
