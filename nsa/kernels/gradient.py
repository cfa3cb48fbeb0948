"""Backward of every Triton path: one program per (block, some of the rows that chose it), five products at once.

Key and value gradients grow in registers, one partial per item of ``invert`` (popular blocks are split), added in
order afterwards; each pair (row, block) leaves a partial query gradient, added per row afterwards. No atomics on
gradients: the result is the same in every run. ``span`` bounds the partials' memory: spans are worked on one after the
other and key and value gradients then add up in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..rows import tracked
from ..selection import Selection
from ..trace import ParameterValue
from .gradient_products import nsa_gradient_block, nsa_gradient_rows
from .gradient_sums import nsa_gradient_key, nsa_gradient_query
from .invert import Lists, invert
from .launch import Plan, call_key, plans
from .layout import LOG2E, power_of_two, selection_arguments, shape_constants, wide_offsets

WALK_BYTES = 2**25
"""Programs walk the queries and output gradients of so many bytes at a time, half of an H200's second-level cache."""
ELEMENTS = 2048
"""Elements of a query gradient that one program adds up."""
COLUMNS = 32
"""Columns of a key or value gradient that one program adds up."""
RING_REGISTERS = 128
"""Registers a thread of ``gradient_ring`` starts with: two programs of eight warps to a multiprocessor."""

Forward = Callable[[Tensor, Tensor, Tensor, Selection, float, Tensor | None], Tensor]


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    out: Tensor,
    logsum: Tensor,
    grad: Tensor,
    *,
    backward_rows: ParameterValue = 32,
    backward_item_rows: ParameterValue = 4096,
    backward_span: ParameterValue = 16384,
    backward_partial: ParameterValue = "value",
    backward_warps: ParameterValue = 4,
    backward_stages: ParameterValue = 3,
    backward_registers: ParameterValue = 0,
    backward_loads: ParameterValue = "pointer",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; ``out`` (B, S, G, h, Dv) and ``logsum`` (B, S, G, h) are the forward's."""
    batch, queries, groups, heads, width = query.shape
    keys, value_width, device = key.shape[2], value.shape[3], query.device
    constants = shape_constants(query, value, selection)
    padded = int(constants["HP"])
    tokens = max(1, int(backward_rows) // padded)
    span_tokens = int(backward_span) or queries
    walk = max(1, min(span_tokens, WALK_BYTES // (heads * (width + value_width) * query.element_size())))
    item_tokens = max(tokens, int(backward_item_rows) // padded)
    lists = invert(selection, keys, span=walk, item_tokens=item_tokens, placed=True)
    units = min(lists.spans, triton.cdiv(span_tokens, lists.span_tokens))
    held = units * lists.span_tokens
    grad = grad.contiguous()
    known_of_rows = torch.empty(logsum.numel() * 4, dtype=torch.float32, device=device)
    ring = backward_loads == "ring"
    if ring:
        from .gradient_ring import describe, in_bulk  # Gluon, loaded where it can run

        query, grad = in_bulk(query), in_bulk(grad)
    of_rows = describe(query, grad, known_of_rows) if ring else (query, grad, known_of_rows)
    single = lists.spans <= units
    sums = torch.float32
    query_grad = torch.empty(query.shape, dtype=query.dtype, device=device)
    key_grad = torch.empty(key.shape, dtype=key.dtype if single else sums, device=device)
    value_grad = torch.empty(value.shape, dtype=value.dtype if single else sums, device=device)
    part_dtype = sums if backward_partial == "float32" else query.dtype
    pairs = lists.span_tokens * int(constants["N"])
    part_query = torch.empty(batch * groups * units * pairs * heads * width, dtype=part_dtype, device=device)
    part_items = batch * groups * units * lists.item_slots * selection.block_size
    part_keys = torch.empty(part_items * (width + value_width), dtype=sums, device=device)
    length, positions, *position_strides = selection_arguments(selection)
    wide = wide_offsets(pairs * heads * width, query, grad)
    tile = min(lists.tile, max(1, ELEMENTS // (padded * power_of_two(width, 16))))
    name = call_key(
        query, key, value, selection, "gradient", grad.dtype, grad.data_ptr() & 15, out.data_ptr() & 15, tokens,
        lists.span_tokens, single, wide, part_dtype, backward_warps, backward_stages,
        backward_registers, backward_loads,
    )  # fmt: skip
    known = plans(name)
    if not known:
        options = {
            "num_warps": int(backward_warps),
            "num_stages": int(backward_stages),
            "maxnreg": int(backward_registers) or None,
        }
        known.update(_plan({**constants, "WIDE": wide}, tokens, tile, lists, options, ring))
    known["rows"](
        triton.cdiv(logsum.numel(), 32),
        out, grad, logsum, length, positions, known_of_rows, queries, keys, groups * heads, logsum.numel(),
        *position_strides,
    )  # fmt: skip
    columns = triton.cdiv(width, COLUMNS) + triton.cdiv(value_width, COLUMNS)
    for span in range(0, lists.spans, units):
        known["block"](
            batch * groups * units * lists.item_slots,
            of_rows[0], key, value, *of_rows[1:], length, lists.pairs, lists.items, lists.item_count,
            part_query, part_keys, queries, keys, groups, lists.spans, span, units, lists.item_slots, scale * LOG2E,
            *query.stride()[:4], *key.stride()[:3], *value.stride()[:3],
        )  # fmt: skip
        known["query"](
            batch * groups * triton.cdiv(held, tile),
            part_query, lists.places, lists.chosen, query_grad, queries, groups, span * lists.span_tokens, held, scale,
        )  # fmt: skip
        known["key" if span == 0 else "key_add"](
            batch * groups * lists.blocks * columns,
            part_keys, lists.ranges, key_grad, value_grad, keys, lists.spans, span, units, lists.item_slots,
            lists.blocks, scale,
        )  # fmt: skip
    return query_grad, key_grad.to(key.dtype), value_grad.to(value.dtype)


def _plan(
    constants: dict[str, Any],
    tokens: int,
    tile: int,
    lists: Lists,
    options: dict[str, Any],
    ring: bool,
) -> dict[str, Plan]:
    """The launches of one backward."""
    sizes = {name: constants[name] for name in ("H", "HP", "N", "NP", "DK", "DK0", "DK1")}
    adding = {name: constants[name] for name in ("DK", "DV", "BS")}
    of_rows = {name: constants[name] for name in ("DV", "DVP", "TENSOR_LENGTH")}
    few = {"num_warps": 4}
    keys = {
        name: Plan(nsa_gradient_key, {**adding, "TILE": COLUMNS, "ADD": name == "key_add"}, {**few, "num_stages": 4})
        for name in ("key", "key_add")
    }
    paired = ring and constants["H"] % 2 == 0
    if ring:
        from .gradient_ring import nsa_gradient_ring

        names = ("H", "HP", "N", "NP", "DK", "DV", "BS", "TENSOR_LENGTH")
        own = {name: constants[name] for name in names}
        own |= {"TOKENS": tokens, "SPAN": lists.span_tokens, "STAGES": options["num_stages"], "PAIRED": paired}
        block = Plan(nsa_gradient_ring, own, {"num_warps": 4, "maxnreg": RING_REGISTERS})
    else:
        block = Plan(nsa_gradient_block, {**constants, "TOKENS": tokens, "SPAN": lists.span_tokens}, options)
    return {
        "rows": Plan(nsa_gradient_rows, {**of_rows, "TILE": 32}, few),
        "block": block,
        "query": Plan(
            nsa_gradient_query,
            {**sizes, "TILE": tile, "SPAN": lists.span_tokens, "M": tokens * constants["HP"], "PAIRED": paired},
            few,
        ),
        **keys,
    }


class SelectionFunction(torch.autograd.Function):
    """A Triton forward with the backward above. Not differentiable twice."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        selection: Selection,
        scale: float,
        launch: Forward,
        parameters: dict[str, ParameterValue],
    ) -> Tensor:
        """Runs ``launch`` and keeps what backward needs."""
        logsum = torch.empty(query.shape[:4], dtype=torch.float32, device=query.device)
        out = launch(query, key, value, selection, scale, logsum)
        length, positions = selection.context_length, selection.query_positions
        lengths = length if isinstance(length, Tensor) else None
        ctx.save_for_backward(query, key, value, out, logsum, selection.indices, lengths, positions)
        ctx.rest = (selection, scale, parameters)  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, out, logsum, indices, lengths, positions = ctx.saved_tensors
        selection, scale, parameters = ctx.rest
        length = selection.context_length if lengths is None else lengths
        selection = replace(selection, indices=indices, context_length=length, query_positions=positions)
        return *backward(query, key, value, selection, scale, out, logsum, grad, **parameters), None, None, None, None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    launch: Forward,
    parameters: dict[str, ParameterValue],
) -> Tensor:
    """``launch(query, key, value, selection, scale, logsum or None)``, differentiable where gradients are wanted."""
    if tracked(query, key, value):
        out: Tensor = SelectionFunction.apply(query, key, value, selection, scale, launch, parameters)  # type: ignore[no-untyped-call]
        return out
    return launch(query, key, value, selection, scale, None)
