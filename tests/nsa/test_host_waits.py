"""On a GPU no selection path waits for the device, forward or backward; ``packed`` does once a call, and says so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import nsa
from nsa.selection import Selection
from tests.nsa.cases import tensors

pytestmark = pytest.mark.gpu
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    ("gather", {}),
    ("varlen", {"backend": "flash_attn"}),
    ("varlen", {"backend": "torch"}),
    ("varlen", {"backend": "segment"}),
    ("causal_prefix", {"prefix": "flash", "inner": "triton_union"}),
    ("triton_token", {}),
    ("triton_union", {}),
    ("triton_block", {}),
]


def host_waits(path: str, parameters: dict[str, Any]) -> list[str]:
    """What torch says of each synchronisation of a second call, forward and backward."""
    queries, slots, size = 300, 4, 64
    own = torch.arange(queries)[:, None] // size
    blocks = torch.where(own >= torch.arange(slots), own - torch.arange(slots), -1).to(torch.int32)
    selection = Selection.from_blocks(
        blocks[None, :, None].expand(1, queries, 2, slots).contiguous().cuda(),
        block_size=size,
        context_length=queries,
        complete=True,
    )
    leaves = tensors(selection, queries, 4, 64, 64, torch.bfloat16)
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in leaves]

    def call() -> None:
        out = nsa.selection_attention(*leaves, selection, path=path, parameters=parameters)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    call()
    torch.cuda.set_sync_debug_mode("warn")
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_warn_always(False)
    return [str(item.message) for item in caught if "synchroniz" in str(item.message)]


@pytest.mark.parametrize(("path", "parameters"), ROUTES, ids=lambda item: str(item))
def test_a_path_does_not_wait_for_the_device(path: str, parameters: dict[str, Any]) -> None:
    assert host_waits(path, parameters) == []


def test_packed_waits_once_a_call() -> None:
    assert len(host_waits("packed", {})) == 1
