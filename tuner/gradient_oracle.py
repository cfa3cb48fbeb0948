"""Gradient oracle: what a call's gradients must be, in float64, and by how much they may differ. Asked by ``check``.

Of a call with few scores, and of a window or compression, by ``reference`` as a whole. Of a larger selection in blocks
by pieces of its query tokens: a row's gradients follow from the keys that it selects alone, and a key's are the sum
over rows, so the pieces are gathered, done apart and added up. Nothing is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.paths import reference
from nsa.problem import TORCH_DTYPES
from nsa.selection import Selection
from nsa.workspace import Workspace
from tuner.inputs import Inputs
from tuner.oracle import Call, WrongResult, compared_rows, selected_rows

FULL_GRADIENT_SCORES = 2**25
"""Up to this many scores all are computed at once; autograd keeps a dozen float64 copies of them."""
GATHERED = 2**27
"""Key and value elements gathered at a time: 1 GiB in float64, of which a few copies live."""
GRADIENT_SCORES, LEAST_GRADIENT_ROWS = 2**26, 32
"""Of a large window or compression the loss reads spot rows of so many scores; the others' gradients are zero."""


class GradientOracle:
    """Gradients of two layers that share keys, values and a workspace, in float64 and in the working dtype."""

    def __init__(self, inputs: Inputs, scale: float) -> None:
        self.inputs, self.scale = inputs, scale
        of_a_row = inputs.query.shape[:4].numel() // inputs.query.shape[1] * inputs.key.shape[2]
        large = of_a_row * inputs.query.shape[1] > FULL_GRADIENT_SCORES
        compute = self._of_reference
        if large and inputs.selection.block_size:
            self.rows = torch.arange(inputs.query.shape[1], device=inputs.query.device)
            compute = self._of_pieces
        else:
            spots = max(LEAST_GRADIENT_ROWS, GRADIENT_SCORES // of_a_row)
            self.rows = compared_rows(inputs, FULL_GRADIENT_SCORES, spots)
        self.truth = compute("float64")
        self.usual = compute(str(inputs.query.dtype).removeprefix("torch."))

    def _of_reference(self, dtype: str) -> list[Tensor]:
        def run(case: Inputs, workspace: Workspace | None) -> Tensor:
            tensors = case.query, case.key, case.value
            return reference.run(*tensors, case.selection, scale=self.scale, compute_dtype=dtype)

        query, key, value, selection = selected_rows(self.inputs, self.rows)
        kind = TORCH_DTYPES[dtype]
        cast = Inputs(query.to(kind), key.to(kind), value.to(kind), selection, None)
        found, *rest = two_layers(run, cast, None, torch.arange(len(self.rows), device=query.device))
        whole = torch.zeros_like(self.inputs.query, dtype=found.dtype)
        whole[:, self.rows] = found
        return [whole, *rest]

    def _of_pieces(self, dtype: str) -> list[Tensor]:
        kind, inputs = TORCH_DTYPES[dtype], self.inputs
        batch, groups, keys, width = inputs.key.shape
        slots = inputs.selection.indices.shape[3] * inputs.selection.block_size
        step = max(1, GATHERED // (batch * groups * slots * (width + inputs.value.shape[3])))
        query_grad = torch.empty(inputs.query.shape, dtype=kind, device=inputs.query.device)
        exact = torch.promote_types(kind, torch.float32)  # what a product of the working dtype adds up in
        sums = [torch.zeros(t.shape, dtype=exact, device=t.device) for t in (inputs.key, inputs.value)]
        pair = torch.arange(batch * groups, device=inputs.key.device).view(batch, 1, groups, 1) * keys
        for first in range(0, len(self.rows), step):
            rows = self.rows[first : first + step]
            query, key, value, selection = selected_rows(inputs, rows)
            places, read = keys_read(selection, keys)
            flat = (pair + places).flatten()
            own_key, own_value = (t.reshape(-1, t.shape[3])[flat].view(*places.shape, -1) for t in (key, value))

            def run(case: Inputs, workspace: Workspace | None, read: Tensor = read) -> Tensor:
                return attention_over(case.query, case.key, case.value, read, self.scale)

            case = Inputs(query.to(kind), own_key.to(kind), own_value.to(kind), selection, None)
            query_grad[:, rows], *rest = two_layers(run, case, None, torch.arange(len(rows), device=rows.device))
            for total, part in zip(sums, rest, strict=True):
                total.view(-1, total.shape[3]).index_add_(0, flat, part.flatten(0, 3).to(exact))
        return [query_grad, *sums]

    def compare(self, call: Call, workspace: Workspace) -> None:
        """Two steps with one workspace, poisoned in between. Raises WrongResult."""
        for step in ("first", "second"):
            gradients = two_layers(call, self.inputs, workspace, self.rows)
            for name, found, want, usual in zip("qkv", gradients, self.truth, self.usual, strict=True):
                floor = 4 * torch.finfo(self.inputs.query.dtype).eps * float(want.abs().max())
                bound = max(2 * float((usual.double() - want).abs().max()), floor)
                error = float((found.double() - want).abs().max())
                if not error <= bound:
                    raise WrongResult(f"{step} step: gradient of {name} off by {error:.3g}, derived bound {bound:.3g}")
            workspace.poison()


def keys_read(selection: Selection, keys: int) -> tuple[Tensor, Tensor]:
    """Of a selection in blocks with positions: the key at each of a row's places, (B, S, G, n * block size), and
    whether the row reads it there: below its limits, and in no earlier slot. From the definition, slot by slot."""
    size, raw = selection.block_size, selection.indices
    assert selection.query_positions is not None, "selected_rows makes them explicit"
    batch, queries, _, slots = raw.shape
    length = torch.as_tensor(selection.context_length, device=raw.device).expand(batch)[:, None, None, None]
    position = selection.query_positions.expand(batch, queries)[:, :, None, None]
    places, read = [], []
    for slot in range(slots):
        block = raw[:, :, :, slot].long()
        token = block[..., None] * size + torch.arange(size, device=raw.device)
        fresh = (block >= 0) & (raw[:, :, :, :slot] != raw[:, :, :, slot, None]).all(-1)
        read.append(fresh[..., None] & (token <= position) & (token < length) & (token < keys))
        places.append(token.clamp(0, keys - 1))
    return torch.cat(places, -1), torch.cat(read, -1)


def attention_over(query: Tensor, key: Tensor, value: Tensor, read: Tensor, scale: float) -> Tensor:
    """Of each row over keys and values of its own, (B, S, G, K, D), where it reads them: the reference's formula."""
    scores = torch.einsum("bsghd,bsgtd->bsght", query, key) * scale
    scores = scores.masked_fill(~read[:, :, :, None], float("-inf"))
    top = scores.amax(-1, keepdim=True).detach()
    weights = torch.exp(scores - torch.where(top.isfinite(), top, 0.0))
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bsght,bsgtd->bsghd", weights / torch.where(total > 0, total, 1.0), value)


def two_layers(run: Call, case: Inputs, workspace: Workspace | None, rows: Tensor) -> list[Tensor]:
    """Gradients with respect to query, key and value through two calls, the second reading the first one's output, of a
    loss over the query tokens ``rows``."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (case.query, case.key, case.value)]
    query, key, value = leaves
    width = query.shape[-1]
    out = run(Inputs(query, key, value, case.selection, None), workspace)
    mixed = torch.nn.functional.pad(out, (0, max(0, width - out.shape[-1])))[..., :width]
    again = run(Inputs(query + mixed, key, value, case.selection, None), workspace)
    weight = torch.linspace(-1, 1, again.shape[-1], device=again.device, dtype=again.dtype)
    return list(torch.autograd.grad((again[:, rows] * weight).sum(), leaves))
