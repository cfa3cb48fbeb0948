"""PATHS: every way to run selection, by name. A literal; a new path is a new file and a new entry."""

from . import dense, flex, gather, packed, reference, triton_block, triton_decode, triton_token, triton_union, varlen
from .base import Candidate, Evidence, Parameter, SelectionPath

__all__ = ["PATHS", "Candidate", "Evidence", "Parameter", "SelectionPath"]

PATHS: dict[str, SelectionPath] = {
    "reference": SelectionPath(
        name="reference",
        target=".reference:run",
        summary="the float64 oracle",
        modes=("decode", "prefill", "train"),
        deterministic=True,
        dispatchable=False,
        tunables=reference.tunables,
        unsupported=reference.unsupported,
        evidence=reference.evidence,
    ),
    "dense": SelectionPath(
        name="dense",
        target=".dense:run",
        summary="all keys under the selection mask through SDPA, in query chunks",
        modes=("decode", "prefill", "train"),
        deterministic=True,
        tunables=dense.tunables,
        unsupported=dense.unsupported,
        evidence=dense.evidence,
    ),
    "gather": SelectionPath(
        name="gather",
        target=".gather:run",
        summary="each row's keys gathered and padded to the longest row, SDPA with a length mask",
        modes=("decode", "prefill", "train"),
        deterministic=False,  # gradients of shared keys add up in any order
        tunables=gather.tunables,
        unsupported=gather.unsupported,
        evidence=gather.evidence,
    ),
    "packed": SelectionPath(
        name="packed",
        target=".packed:run",
        summary="rows bucketed by length, one SDPA per bucket",
        modes=("decode", "prefill", "train"),
        deterministic=False,  # as gather
        tunables=packed.tunables,
        unsupported=packed.unsupported,
        evidence=packed.evidence,
    ),
    "varlen": SelectionPath(
        name="varlen",
        target=".varlen:run",
        summary="all rows packed flat with cu_seqlens; flash_attn, torch or segment backend",
        modes=("decode", "prefill", "train"),
        deterministic=False,  # as gather; the segment backend adds with atomics on a GPU
        tunables=varlen.tunables,
        unsupported=varlen.unsupported,
        evidence=varlen.evidence,
    ),
    "flex": SelectionPath(
        name="flex",
        target=".flex:run",
        summary="flex_attention under a block mask, compiled",
        modes=("decode", "prefill", "train"),
        deterministic=True,
        slow_to_build=True,
        tunables=flex.tunables,
        unsupported=flex.unsupported,
        evidence=flex.evidence,
    ),
    "triton_token": SelectionPath(
        name="triton_token",
        target=".triton_token:run",
        summary="one Triton program per token and group",
        modes=("decode", "prefill", "train"),
        deterministic=True,
        tunables=triton_token.tunables,
        unsupported=triton_token.unsupported,
        evidence=triton_token.evidence,
    ),
    "triton_union": SelectionPath(
        name="triton_union",
        target=".triton_union:run",
        summary="one Triton program per tile of neighbouring tokens, against the union of their blocks",
        modes=("prefill", "train"),
        deterministic=True,
        tunables=triton_union.tunables,
        unsupported=triton_union.unsupported,
        evidence=triton_union.evidence,
    ),
    "triton_block": SelectionPath(
        name="triton_block",
        target=".triton_block:run",
        summary="one Triton program per block and rows that chose it, partials merged per row",
        modes=("prefill", "train"),
        deterministic=True,
        tunables=triton_block.tunables,
        unsupported=triton_block.unsupported,
        evidence=triton_block.evidence,
    ),
    "triton_decode": SelectionPath(
        name="triton_decode",
        target=".triton_decode:run",
        summary="split-K in Triton, combined by the last program of a row",
        modes=("decode", "prefill", "train"),
        deterministic=True,
        tunables=triton_decode.tunables,
        unsupported=triton_decode.unsupported,
        evidence=triton_decode.evidence,
    ),
}
