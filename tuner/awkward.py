"""Awkward: small calls that break careless kernels, of every operation, with a problem's own heads, dims and sizes.

``tuner.check`` holds candidates against the oracle on them, and on other contents of the problem's own tensors. Worker
side; it runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import torch
from torch import Tensor

from nsa.problem import TORCH_DTYPES, SelectionProblem
from nsa.selection import Selection
from tuner.inputs import Inputs, drawn_blocks, structured_selection

LARGEST_TILE = 64
"""Of query tokens that a kernel handles at once."""
WITH_GRADIENTS = ("an odd ragged context at once", "an odd context at once, declared complete")
"""In ``train``. The small ones have too few elements for a bound from the usual error."""
CODE_RUN = 16
"""Neighbouring keys that share their values in ``other_contents``, where no block size says how many."""


@contextmanager
def other_contents(problem: SelectionProblem, inputs: Inputs) -> Iterator[None]:
    """Inside, the very tensors of ``inputs`` hold another call: what was kept of their contents is stale.

    Every other component of queries and keys changes sign and rows select other blocks, complete as before. Values are
    signs that a block shares: in bfloat16 one block of 16 more or less moves outputs of such by four times the bound,
    those of random values, which average out, by less than it.
    """
    query, key, value, blocks = inputs.query, inputs.key, inputs.value, inputs.selection.indices
    generator = torch.Generator(device=value.device).manual_seed(1)
    run = problem.block_size or CODE_RUN
    _, groups, keys, width = value.shape
    signs = torch.randint(0, 2, (1, groups, -(-keys // run), width), generator=generator, device=value.device) * 2 - 1
    values = value.clone()
    chosen = blocks.clone() if problem.block_size else None

    def turn() -> None:
        query[..., ::2].neg_()
        key[..., 1::2].neg_()

    turn()
    value.copy_(signs.to(value.dtype).repeat_interleave(run, 2)[:, :, :keys])
    if chosen is not None:
        blocks.copy_(drawn_blocks(problem, 1, generator, blocks.device))
    try:
        yield
    finally:
        turn()
        value.copy_(values)
        if chosen is not None:
            blocks.copy_(chosen)


def awkward_inputs(problem: SelectionProblem, device: torch.device) -> Iterator[tuple[str, Inputs]]:
    """Small calls that break careless kernels, with the problem's heads, head dims, dtype, block size and topk."""
    if problem.operation != "selection":
        yield from awkward_branch_inputs(problem, device)
        return
    p = problem
    dtype = TORCH_DTYPES[p.dtype]
    batch, groups, size = 2, 2, p.block_size or 8
    context = 3 * size + size // 2 + 1  # a tail block that is not full
    generator = torch.Generator().manual_seed(7)
    queries = 1 if p.mode == "decode" else 5

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, k, v = (
        normal(batch, queries, groups, p.h, p.Dk),
        normal(batch, groups, context, p.Dk),
        normal(batch, context, groups, p.Dv).transpose(1, 2),  # a strided view, as (B, T, H, D) models pass
    )
    k = torch.cat((k, k), -1)[..., : p.Dk]  # strided too
    count = -(-context // size)
    ragged = torch.randint(-1, count, (batch, queries, groups, p.topk), generator=generator, dtype=torch.int32)
    ragged[0, 0, 0] = -1  # an empty row
    ragged[-1, -1, -1] = count - 1  # duplicates, of the tail block
    if p.topk > 1:
        ragged[0, -1, 1, 1:] = -1

    def blocks(indices: Tensor, positions: Tensor | None = None) -> Selection:
        return Selection.from_blocks(
            indices.to(device), block_size=size, context_length=context, query_positions=positions
        )

    if p.form == "blocks":
        yield "ragged rows, duplicates, an empty row, a tail block", Inputs(q, k, v, blocks(ragged), None)
        yield "all rows empty", Inputs(q, k, v, blocks(torch.full_like(ragged, -1)), None)
        yield "tied scores", Inputs(q, torch.ones_like(k), v, blocks(ragged), None)
        yield "large magnitudes", Inputs(q * 3, k * 3, v * 30, blocks(ragged), None)
        far_q, far_k = (t.to(device, dtype) for t in opposite_scores(p, ragged, count, context, generator))
        yield "scores beyond the exponential's range", Inputs(far_q, far_k, v, blocks(ragged), None)
        lengths = torch.tensor([size + 1, context], device=device)
        first = Selection.from_blocks(ragged.to(device), block_size=size, context_length=lengths)
        if queries <= size + 1:
            unused = torch.arange(context, device=device) >= lengths[:, None]
            spoilt_k, spoilt_v = (
                tensor.clone().masked_fill_(unused[:, None, :, None], float("nan")) for tensor in (k, v)
            )
            case = Inputs(q, spoilt_k, spoilt_v, first, None)
            yield "different context lengths in one batch, NaN beyond them", case
        strided = torch.cat((q, q), -1)[..., : p.Dk]
        wide = torch.stack((ragged, -ragged), -1).long()[..., 0]
        positions = torch.randint(context // 2, context, (batch, queries), generator=generator).to(device)
        case = Inputs(strided, k, v, blocks(wide, positions), None)
        yield "positions of the caller's, strided queries, strided blocks of 64 bits", case
        for name in WITH_GRADIENTS:
            yield name, odd_prompt(p, generator, device, ragged="ragged" in name)
    else:
        low = torch.randint(-2, context, (batch, queries, groups, p.topk), generator=generator)
        ranges = torch.stack((low, low + torch.randint(-3, size, low.shape, generator=generator)), -1)
        ranges[0, 0, 0] = 3
        ranges[-1, 0, 0, 0] = torch.tensor((2, 3))
        selection = Selection.from_ranges(ranges.to(device), context_length=context)
        yield "overlapping, inverted and empty ranges", Inputs(q, k, v, selection, None)


def opposite_scores(
    problem: SelectionProblem, blocks: Tensor, count: int, context: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Queries and keys of which every score is S or -S, S in 100 .. 200, one of the two throughout a block.

    Of one component each, so that the scores of a row are the same to the last bit in whatever order products are
    summed, and weights 0 or 1 over the number of keys at the top. A row may have -S alone.
    """
    p = problem
    size = 2.0 ** math.ceil(math.log2(100 * p.Dk**0.5))

    def signs(*shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0

    direction = torch.zeros(p.Dk)
    direction[-1] = 1.0
    query = size * direction * signs(*blocks.shape[:3], p.h, 1)
    of_block = signs(blocks.shape[0], blocks.shape[2], count, 1)
    return query, direction * of_block.repeat_interleave(p.block_size, 2)[:, :, :context]


def odd_prompt(problem: SelectionProblem, generator: torch.Generator, device: torch.device, *, ragged: bool) -> Inputs:
    """A prompt of more than a tile of queries, the last tile and block being part ones; in decode its last query.

    Its rows are complete and say so, or ``ragged``: with empty rows, duplicates and blocks behind their position.
    """
    p = problem
    context = max(3 * p.block_size + p.block_size // 2, 2 * LARGEST_TILE) + 1
    posed = msgspec.structs.replace(p, B=2, G=2, T=context, S=1 if p.mode == "decode" else context)
    shapes = (2, posed.S, 2, p.h, p.Dk), (2, 2, context, p.Dk), (2, context, 2, p.Dv)
    query, key, value = (torch.randn(shape, generator=generator).to(device, TORCH_DTYPES[p.dtype]) for shape in shapes)
    drawn = drawn_blocks(posed, 1, torch.Generator(device=device).manual_seed(7), device)
    if ragged:
        drawn[:, 3::7] = -1
        drawn[:, 1::3, :, -1] = drawn[:, 1::3, :, 0]
        drawn[:, 2::5, :, 0] = (context - 1) // p.block_size
    selection = Selection.from_blocks(
        drawn, block_size=p.block_size, context_length=context, overlap=p.overlap, complete=not ragged
    )
    return Inputs(query, key, value.transpose(1, 2), selection, None)


def awkward_branch_inputs(problem: SelectionProblem, device: torch.device) -> Iterator[tuple[str, Inputs]]:
    """Small calls of the window or the compressed branch, with the problem's heads, head dims, dtype and sizes.

    Keys and values are views into buffers with NaN behind the last one, as caches pass them, values strided besides.
    """
    p, dtype = problem, TORCH_DTYPES[problem.dtype]
    generator = torch.Generator().manual_seed(7)
    size, step = (p.window, 1) if p.operation == "window" else (p.kernel_size, p.kernel_stride)
    long = size + 37 if p.operation == "window" else 5 * size + step // 2 + 1

    def case(queries: int, context: int, value_dim: int = p.Dv) -> Inputs:
        posed = msgspec.structs.replace(p, B=2, G=2, S=queries, T=context, Dv=value_dim)
        query = torch.randn(2, queries, 2, p.h, p.Dk, generator=generator).to(device, dtype)
        key = torch.randn(2, 2, posed.keys + 3, p.Dk, generator=generator).to(device, dtype)
        value = torch.randn(2, posed.keys + 3, 2, value_dim, generator=generator).to(device, dtype).transpose(1, 2)
        for tensor in (key, value):
            tensor[:, :, posed.keys :] = float("nan")
        selection = structured_selection(posed, device)
        return Inputs(query, key[:, :, : posed.keys], value[:, :, : posed.keys], selection, None)

    sizes = {
        "the shortest context": (1, size if step > 1 else 1),
        "a row at the edge": (1, size + step),
        "a later chunk": (5, long),
        "a later chunk across the edge": (step + 3, size + step + 1),
        "an odd context at once": (long, long),
        "a context as long as the edge": (size, size),
    }
    for name, (queries, context) in sizes.items():
        if p.mode == "decode" or queries == 1:
            queries = 1
        yield name, case(queries, context)
    queries = 1 if p.mode == "decode" else 5
    for name, width in (("a wider value", p.Dv + 8), ("a narrower value", max(1, p.Dv // 2))):
        yield name, case(queries, long, width)
    ties, large = case(queries, long), case(queries, long)
    yield "tied scores", Inputs(ties.query, torch.ones_like(ties.key), ties.value, ties.selection, None)
    yield "large magnitudes", Inputs(large.query * 3, large.key * 3, large.value * 30, large.selection, None)


def problem_of(case: Inputs, like: SelectionProblem) -> SelectionProblem:
    """The problem that a call poses, mode and execution as in ``like``."""
    batch, queries, groups, heads, _ = case.query.shape
    given = case.selection.structure
    context = case.key.shape[2] if given is None else given.context
    changes = {"B": batch, "S": queries, "T": context, "G": groups, "h": heads, "Dv": case.value.shape[3]}
    changes["complete"] = case.selection.complete
    return msgspec.structs.replace(like, **changes)
