"""A context length is no constant of a kernel: launch keys leave it out, so no kernel may be compiled for one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).parents[2] / "nsa" / "kernels").glob("*.py"))


def kernels(file: Path) -> dict[str, str]:
    """Launched kernels that take a length or a tensor of lengths, by name, and how they are decorated."""
    functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
    return {
        node.name: ast.unparse(node.decorator_list[0])
        for node in functions
        if node.name.startswith("nsa_") and "TENSOR_LENGTH" in (item.arg for item in node.args.args)
    }


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: file.stem)
def test_no_kernel_is_compiled_for_a_context_length(file: Path) -> None:
    for name, decorator in kernels(file).items():
        assert "do_not_specialize=['LENGTH'" in decorator, name


def test_kernels_that_take_a_length_are_found() -> None:
    found = {name for file in KERNELS for name in kernels(file)}
    assert {"nsa_gradient_block", "nsa_gradient_ring", "nsa_invert_mark", "nsa_token_forward"} <= found
