"""Inputs of a trial: query, key, value and a selection of a stated pattern, from a seed. Worker side.

``fixed``: the window or the compressed tokens of each row, as the problem's operation says. Patterns of selection:
``scored``: the module's own scoring on correlated inputs. ``smooth``: neighbouring rows agree. ``random``: they do not.
Every row holds block 0, its own block and the one before, as the scoring forces them, and is complete: as many blocks
as topk and its position allow. Whether the selection says so is the problem's ``complete``.
"""

from __future__ import annotations

import dataclasses

import msgspec
import torch
from torch import Tensor

from nsa.problem import TORCH_DTYPES, SelectionProblem
from nsa.scoring import choose_blocks
from nsa.selection import Selection

KERNEL_SIZE, KERNEL_STRIDE = 32, 16
CORRELATION = 0.97
"""Of neighbouring tokens' queries under ``scored``; gives a mean union of 4 rows of 0.35 to 0.55 of 4*topk at 16k."""

SMOOTH_SPAN = 64
"""Query tokens that share their random blocks under ``smooth``."""

CHUNK_SCORES = 2**24


class Inputs(msgspec.Struct, frozen=True):
    """Tensors of one call, shapes as in nsa.problem; ``union`` is Selection.overlap(), None in decode."""

    query: Tensor
    key: Tensor
    value: Tensor
    selection: Selection
    union: float | None

    def at(self, context: int) -> Inputs:
        """The same call with the first ``context`` keys: the last query in decode, the first ones otherwise."""
        whole = self.selection
        queries = self.query.shape[1]
        count = 1 if queries == 1 else context
        blocks = whole.indices[:, :count].clamp_max((context - 1) // max(1, whole.block_size))
        selection = Selection.from_blocks(
            blocks, block_size=whole.block_size, context_length=context, complete=whole.complete and queries > 1
        )
        key, value = self.key[:, :, :context], self.value[:, :, :context]
        return Inputs(self.query[:, :count], key, value, selection, self.union)


def make_inputs(problem: SelectionProblem, pattern: str, seed: int, device: torch.device) -> Inputs:
    """Inputs of a problem. The same seed gives the same inputs on one device kind."""
    generator = torch.Generator(device=device).manual_seed(seed)
    p, dtype = problem, TORCH_DTYPES[problem.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    noise = normal(p.B, p.S, p.G, p.h, p.Dk)
    query = (walk(noise, CORRELATION) if pattern == "scored" else noise).to(dtype)
    key = normal(p.B, p.G, p.keys, p.Dk).to(dtype)  # one at a time: a cache for 64 sequences fills half a GPU
    value = normal(p.B, p.G, p.keys, p.Dv).to(dtype)
    if p.operation != "selection":
        return Inputs(query, key, value, structured_selection(problem, device), None)
    if pattern == "scored":
        blocks = scored_blocks(problem, query, key)
    else:
        blocks = drawn_blocks(problem, SMOOTH_SPAN if pattern == "smooth" else 1, generator, device)
    selection = Selection.from_blocks(
        blocks, block_size=p.block_size, context_length=p.T, overlap=p.overlap, complete=p.complete
    )
    return Inputs(query, key, value, selection, selection.overlap() if p.S >= 4 else None)


def turned_inputs(problem: SelectionProblem, inputs: Inputs, calls: int) -> list[Inputs]:
    """The inputs of ``calls`` decode calls, the first as given: where ``cold``, no two read the same keys or values.

    All have one query. Where the context holds the keys of all calls they share the cache, and a row selects other
    blocks, or its window ends earlier; else, as always in compression, which reads every key, each has a cache of its
    own with other values, which then holds fewer than ``calls`` times what one call reads. A ``hot`` problem's are all
    the same.
    """
    p = problem
    if p.cache == "hot" or calls == 1:
        return [inputs] * calls
    if p.keys < calls * p.row_width:
        return [inputs, *(with_own_cache(inputs, turn) for turn in range(1, calls))]
    if p.operation == "window":
        return [inputs, *(with_earlier_window(p, inputs, turn * p.window) for turn in range(1, calls))]
    return [inputs, *(with_blocks(inputs, blocks) for blocks in other_blocks(p, inputs.selection, calls))]


def with_own_cache(inputs: Inputs, turn: int) -> Inputs:
    """The same call on another cache: keys and values change places, each by another distance."""
    key, value = inputs.key.roll(turn, 2), inputs.value.roll(2 * turn, 2)
    return Inputs(inputs.query, key, value, inputs.selection, inputs.union)


def with_earlier_window(problem: SelectionProblem, inputs: Inputs, tokens: int) -> Inputs:
    """The same call at a context that is so many tokens shorter, a view of the same cache."""
    context = problem.T - tokens
    selection = structured_selection(msgspec.structs.replace(problem, T=context), inputs.key.device)
    return Inputs(inputs.query, inputs.key[:, :, :context], inputs.value[:, :, :context], selection, inputs.union)


def with_blocks(inputs: Inputs, blocks: Tensor) -> Inputs:
    """The same call with other blocks (B, S, G, n)."""
    selection = dataclasses.replace(inputs.selection, indices=blocks)
    return Inputs(inputs.query, inputs.key, inputs.value, selection, inputs.union)


def other_blocks(problem: SelectionProblem, selection: Selection, calls: int) -> list[Tensor]:
    """For each of the calls but the first topk blocks (B, 1, G, topk) int32 that neither it nor another call selects.

    Of a decode call whose rows are complete. Drawn, always the same: blocks in order would be read faster.
    """
    p, taken = problem, selection.indices
    generator = torch.Generator(device=taken.device).manual_seed(0)
    score = torch.rand(*taken.shape[:3], -(-p.T // p.block_size), generator=generator, device=taken.device)
    order = score.scatter(-1, taken.long(), 2.0).argsort(-1, descending=True).to(torch.int32)
    return [order[..., turn * p.topk : (turn + 1) * p.topk].contiguous() for turn in range(1, calls)]


def structured_selection(problem: SelectionProblem, device: torch.device) -> Selection:
    """The window or compressed selection of a problem; its queries are the last of the context."""
    p = problem
    rows = (p.B, p.S, p.G)
    if p.operation == "window":
        return Selection.window(p.window, rows=rows, context_length=p.T, device=device)
    return Selection.compressed(p.kernel_size, p.kernel_stride, rows=rows, first_position=p.T - p.S, device=device)


def walk(noise: Tensor, correlation: float) -> Tensor:
    """A stationary first-order random walk along dim 1 of ``noise``, neighbours correlated by ``correlation``.

    Computed in blocks of 128 tokens by a triangular product, so that no Python loop runs over tokens.
    """
    span = 128
    steps = torch.arange(span, device=noise.device)
    lag = (steps[:, None] - steps[None, :]).clamp_min(0)
    kernel = torch.tril(correlation ** lag.float()) * (1 - correlation**2) ** 0.5
    decay = correlation ** (steps + 1).float()
    parts, state = [], noise[:, 0]
    for first in range(0, noise.shape[1], span):
        part = noise[:, first : first + span]
        size = part.shape[1]
        moved = torch.einsum("st,bt...->bs...", kernel[:size, :size], part)
        moved = moved + torch.einsum("s,b...->bs...", decay[:size], state)
        parts.append(moved)
        state = moved[:, -1]
    return torch.cat(parts, 1)


def scored_blocks(problem: SelectionProblem, query: Tensor, key: Tensor) -> Tensor:
    """Blocks (B, S, G, n) int32 by the module's scoring over mean-compressed keys."""
    p = problem
    compressed = key.unfold(2, KERNEL_SIZE, KERNEL_STRIDE).mean(-1) if p.T >= KERNEL_SIZE else key[:, :, :0]
    positions = torch.arange(p.T - p.S, p.T, device=query.device)
    return choose_blocks(
        query,
        compressed * (p.Dk**0.5),  # a mean of random keys is short; learned compression is not
        positions=positions,
        context_length=p.T,
        kernel_size=KERNEL_SIZE,
        kernel_stride=KERNEL_STRIDE,
        block_size=p.block_size,
        topk=p.topk,
    )


def drawn_blocks(problem: SelectionProblem, span: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Distinct random eligible blocks (B, S, G, n) int32, drawn anew every ``span`` tokens; forced ones included."""
    p = problem
    count = -(-p.T // p.block_size)
    slots = min(p.topk, count)
    own = torch.arange(p.T - p.S, p.T, device=device) // p.block_size
    parts = []
    step = max(span, CHUNK_SCORES // (p.B * p.G * count) // span * span)
    for first in range(0, p.S, step):
        mine = own[first : first + step]
        draws = -(-len(mine) // span)
        score = torch.rand(p.B, draws, p.G, count, generator=generator, device=device)
        score = score.repeat_interleave(span, 1)[:, : len(mine)]
        block = torch.arange(count, device=device)
        away = mine[:, None] - block
        forced = (block == 0) | (away == 0) | (away == 1)
        score = score.masked_fill(forced[None, :, None], 2.0).masked_fill((away < 0)[None, :, None], -1.0)
        best = score.topk(slots, -1)
        parts.append(torch.where(best.values >= 0, best.indices, -1).to(torch.int32))
    blocks = torch.cat(parts, 1)
    padding = blocks.new_full((*blocks.shape[:3], p.topk - slots), -1)
    return torch.cat((blocks, padding), -1)
