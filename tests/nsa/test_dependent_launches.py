"""What follows a decode call by a dependent launch starts once the call's last kernel has loaded all, and not before:
programs that wait in a multiprocessor keep shared memory that the running ones want. Compiled for compute capability
9.0, which needs no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nsa.kernels import decode

TYPES = {"Q": "*bf16", "K0": "*bf16", "K1": "*bf16", "V": "*bf16", "OUT": "*bf16", "X": "*i32", "COUNTER": "*i32",
         "PART": "*fp32", "scale2": "fp32"}
SIZES = dict(H=16, HP=16, N=16, NP=16, DK=128, DK0=128, DK1=0, DV=128, DVP=128, BS=64, STEP=64, TENSOR_LENGTH=False,
             DESCRIPTOR=False, LSE=None, POSITION=None)

def ptx(kernel, **changes):
    known = {name: value for name, value in {**SIZES, **changes}.items() if name in kernel.arg_names}
    types = {name: "constexpr" if name in known else TYPES.get(name, "i32") for name in kernel.arg_names}
    options = {"num_warps": 4, "num_stages": 3, "launch_pdl": changes["DEPENDENT"]}
    source = ASTSource(kernel, types, constexprs=known)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

kernel, splits, inside, dependent = sys.argv[1:]
print(ptx(getattr(decode, kernel), SPLITS=int(splits), INSIDE=inside == "inside", DEPENDENT=dependent == "dependent"))
"""
WORDS = {
    "griddepcontrol.wait": "wait",
    "griddepcontrol.launch_dependents": "let go",
    "cp.async.c": "load",
    "cp.async.bulk": "load",
    "ld.global": "load",
    "st.global": "store",
}


def order(*arguments: str) -> list[str]:
    """What a compiled kernel does, in order of its instructions, repeats left out; ``loop``: back to earlier ones."""
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *arguments],
        cwd=root, env={**environment, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[str] = []
    labels: set[str] = set()
    for line in done.stdout.splitlines():
        if label := re.match(r"(\$\w+):", line):
            labels.add(label[1])
        back = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)
        named = ["loop"] if back and back[1] in labels else [WORDS[word] for word in WORDS if word in line]
        found += [word for word in named if found[-1:] != [word]]
    return found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nsa_decode_forward", "4", "launch", "dependent"), ["let go", "wait", "load", "loop", "store"]),
        (("nsa_decode_combine", "4", "launch", "dependent"), ["wait", "load", "let go", "store"]),
        (("nsa_decode_forward", "1", "launch", "dependent"), ["wait", "load", "loop", "let go", "store"]),
        (("nsa_decode_forward", "1", "launch", "plain"), ["load", "loop", "store"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_may_follow_starts_where_it_takes_no_room_that_is_wanted(
    arguments: tuple[str, ...], expected: list[str]
) -> None:
    assert order(*arguments) == expected


def test_a_row_that_its_last_program_combines_lets_go_before_the_combination() -> None:
    found = order("nsa_decode_forward", "4", "inside", "dependent")
    assert found[:5] == ["wait", "load", "loop", "let go", "store"]
