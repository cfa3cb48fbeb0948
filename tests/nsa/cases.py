"""Random problems for the runtime's tests: tensors and selections of every awkward kind, from hypothesis or a seed."""

import torch
from hypothesis import strategies as st

from nsa.selection import Selection


@st.composite
def selections(draw, form=None):
    """A Selection with its B, S, G, T; blocks or ranges, any order, empty, inverted, beyond the ends, duplicated."""
    form = form or draw(st.sampled_from(("blocks", "ranges")))
    batch, queries, groups = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    context, slots = draw(st.integers(queries, 40)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from((torch.int32, torch.int64)))
    positions = draw(st.none() | st.just("explicit"))
    if positions:
        positions = torch.randint(0, context, (batch, queries), generator=generator(draw))
    length = draw(st.sampled_from(("int", "tensor")))
    if length == "tensor":
        length = torch.randint(1, context + 1, (batch,), generator=generator(draw))
        positions = positions if positions is not None else torch.arange(queries)
    else:
        length = context
    shape = (batch, queries, groups, slots)
    if form == "blocks":
        size = draw(st.integers(1, 9))
        blocks = torch.randint(-1, -(-context // size) + 1, shape, generator=generator(draw)).to(dtype)
        selection = Selection.from_blocks(blocks, block_size=size, context_length=length, query_positions=positions)
    else:
        ranges = torch.randint(-5, context + 6, (*shape, 2), generator=generator(draw)).to(dtype)
        selection = Selection.from_ranges(ranges, context_length=length, query_positions=positions)
    return selection, context


def generator(draw):
    """A torch generator from a drawn seed."""
    return torch.Generator().manual_seed(draw(st.integers(0, 2**31)))


def tensors(selection, context, heads, key_dim, value_dim, dtype=torch.float32, seed=0, requires_grad=False):
    """Query, key and value for a selection; key and value are strided views, as (B, T, H, D) models pass them."""
    batch, queries, groups = selection.indices.shape[:3]
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    query = normal(batch, queries, groups, heads, key_dim)
    key = normal(batch, context, groups, key_dim).transpose(1, 2)
    value = normal(batch, groups, context, value_dim)
    return [tensor.requires_grad_(requires_grad) for tensor in (query, key, value)]


def keys_of(selection, context):
    """The definition, in plain Python: (b, s, g) -> the set of keys that the row reads."""
    indices, size = selection.indices, selection.block_size
    batch, queries, groups, slots = indices.shape[:4]
    found = {}
    for b in range(batch):
        length = int(selection.context_length[b]) if torch.is_tensor(selection.context_length) else context
        for s in range(queries):
            if selection.query_positions is None:
                position = length - queries + s
            elif selection.query_positions.dim() == 2:
                position = int(selection.query_positions[b, s])
            else:
                position = int(selection.query_positions[s])
            for g in range(groups):
                keys = set()
                for i in range(slots):
                    if size:
                        block = int(indices[b, s, g, i])
                        keys |= set(range(block * size, (block + 1) * size)) if block >= 0 else set()
                    else:
                        keys |= set(range(int(indices[b, s, g, i, 0]), int(indices[b, s, g, i, 1])))
                found[b, s, g] = {key for key in keys if 0 <= key < min(length, position + 1)}
    return found
