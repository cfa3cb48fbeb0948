"""Gradient oracle: what a call's gradients must be, in float64, and by how much they may differ. Asked by ``check``.

A row's gradients follow from the keys that it selects alone, and a key's are the sum over rows. So a large selection in
blocks is done by pieces of its query tokens, each over keys gathered for it, and added up; nothing is left out. What
has few scores is one piece over all keys, and so are spot rows of a large window or compression.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import torch
from torch import Tensor

from nsa.paths import reference
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
EXP_ERROR = 2.0**-20
"""Relative error of the least exact exponential in use: torch's SDPA on a CPU takes exp_u20, 20 bits; ex2.approx of a
GPU and libm are better."""
TOGETHER = 64
TURNS = (1.0, -1.0)
"""What the queries of the two calls of a training step are multiplied with."""
STEPS = {"first step": "qkv", "second step": "qkv"}
FROZEN = {"queries frozen": "kv", "keys and values frozen": "q"}
"""Step -> which of query, key and value want a gradient."""


class Piece(msgspec.Struct, frozen=True):
    """Query tokens ``rows`` and what they read: query (B, r, G, h, Dk); keys that all share, (B, G, K, D), or of each
    row its own, (B, r, G, K, D), then ``places`` (B * r * G * K,) says which of all keys; ``read`` (B, r, G, K)."""

    rows: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    read: Tensor
    places: Tensor | None

    @property
    def keys(self) -> str:
        """How einsum names the keys."""
        return "bgtd" if self.places is None else "bsgtd"

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add what belongs to this piece's keys to the total of all keys (B, G, T, D)."""
        if self.places is None:
            total += part
        else:
            total.view(-1, total.shape[3]).index_add_(0, self.places, part.flatten(0, 3).to(total.dtype))


class GradientOracle:
    """Gradients of two calls that share keys, values and a workspace, in float64, and the derived bounds.

    A bound is the largest of twice the error that the same formula has in the working dtype, 4*eps of the largest
    gradient, and what weights that are right to EXP_ERROR may do (``weight_errors``), for each TOGETHER neighbouring
    tokens: a key that every row reads has a thousand times the gradient of one that few do, and a query that reads few
    keys thirty times that of one that reads a thousand.
    """

    def __init__(self, inputs: Inputs, scale: float) -> None:
        self.inputs, self.scale = inputs, scale
        of_a_row = inputs.query.shape[:4].numel() // inputs.query.shape[1] * inputs.key.shape[2]
        self.large = of_a_row * inputs.query.shape[1] > FULL_GRADIENT_SCORES
        if self.large and inputs.selection.block_size:
            self.rows = torch.arange(inputs.query.shape[1], device=inputs.query.device)
        else:
            spots = max(LEAST_GRADIENT_ROWS, GRADIENT_SCORES // of_a_row)
            self.rows = compared_rows(inputs, FULL_GRADIENT_SCORES, spots)
        self.truth = self._gradients(torch.float64)
        usual = self._gradients(inputs.query.dtype)
        least = 4 * torch.finfo(inputs.query.dtype).eps
        self.bounds = []
        for found, want, error in zip(usual, self.truth, self._weight_errors(), strict=True):
            parts = (2 * (found.double() - want).abs(), least * want.abs(), EXP_ERROR * error)
            self.bounds.append(torch.stack([largest(part) for part in parts]).amax(0))

    def _pieces(self) -> Iterator[Piece]:
        inputs = self.inputs
        batch, groups, keys, width = inputs.key.shape
        if not (self.large and inputs.selection.block_size):
            query, key, value, selection = selected_rows(inputs, self.rows)
            read = reference.selected_keys(selection, keys, 0, len(self.rows))
            yield Piece(self.rows, query, key.nan_to_num(), value.nan_to_num(), read, None)
            return
        slots = inputs.selection.indices.shape[3] * inputs.selection.block_size
        step = max(1, GATHERED // (batch * groups * slots * (width + inputs.value.shape[3])))
        pair = torch.arange(batch * groups, device=inputs.key.device).view(batch, 1, groups, 1) * keys
        for first in range(0, len(self.rows), step):
            rows = self.rows[first : first + step]
            query, key, value, selection = selected_rows(inputs, rows)
            places, read = keys_read(selection, keys)
            flat = (pair + places).flatten()
            own_key, own_value = (t.reshape(-1, t.shape[3])[flat].view(*places.shape, -1) for t in (key, value))
            yield Piece(rows, query, own_key.nan_to_num(), own_value.nan_to_num(), read, flat)

    def _gradients(self, kind: torch.dtype) -> list[Tensor]:
        """Of query, key and value, computed in ``kind`` and added up as a product of that dtype is."""
        inputs, wide = self.inputs, torch.promote_types(kind, torch.float32)
        query_grad = torch.zeros(inputs.query.shape, dtype=kind, device=inputs.query.device)
        sums = [torch.zeros(t.shape, dtype=wide, device=t.device) for t in (inputs.key, inputs.value)]
        for piece in self._pieces():

            def run(case: Inputs, workspace: Workspace | None, piece: Piece = piece) -> Tensor:
                return attention_over(case.query, case.key, case.value, piece, self.scale)

            query, key, value = (t.to(kind) for t in (piece.query, piece.key, piece.value))
            case = Inputs(query, key, value, inputs.selection, None)
            here = torch.arange(len(piece.rows), device=piece.rows.device)
            query_grad[:, piece.rows], *rest = two_calls(run, case, None, here, piece.rows)
            for total, part in zip(sums, rest, strict=True):
                piece.add(total, part)
        return [query_grad, *sums]

    def _weight_errors(self) -> list[Tensor]:
        of_query = torch.zeros(self.inputs.query.shape, dtype=torch.float64, device=self.inputs.query.device)
        sums = [
            torch.zeros(t.shape, dtype=torch.float64, device=t.device) for t in (self.inputs.key, self.inputs.value)
        ]
        for piece in self._pieces():
            parts = [weight_errors(piece, self.scale, turn) for turn in TURNS]
            of_query[:, piece.rows] = parts[0][0] + parts[1][0]
            for _, *rest in parts:
                for total, part in zip(sums, rest, strict=True):
                    piece.add(total, part)
        return [of_query, *sums]

    def compare(self, call: Call, workspace: Workspace, where: str = "", *, frozen: bool = False) -> float:
        """Two steps with one workspace, poisoned in between, and with ``frozen`` one each with some inputs frozen: the
        largest error in units of its bound. Raises WrongResult."""
        worst, known = 0.0, list(zip("qkv", self.truth, self.bounds, strict=True))
        for step, wanted in (STEPS | FROZEN if frozen else STEPS).items():
            gradients = two_calls(call, self.inputs, workspace, self.rows, self.rows, wanted)
            for found, (name, want, bound) in zip(gradients, (one for one in known if one[0] in wanted), strict=True):
                error = (found.double() - want).abs()
                beyond = (~(error <= bound)).nonzero()
                if len(beyond):
                    place = tuple(beyond[0].tolist())
                    off, allowed = error[place], bound.expand_as(error)[place]
                    said = f"gradient of {name} off by {off:.3g} at {place}, derived bound {allowed:.3g}"
                    raise WrongResult(f"{where}{step}: {said}")
                worst = max(worst, float((error / bound).nan_to_num().max()))  # 0 of 0 where nothing is allowed
            workspace.poison()
        return worst


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


def largest(part: Tensor) -> Tensor:
    """The largest element of each TOGETHER neighbouring tokens: of keys (B, G, T, D) -> (B, G, T, 1), of queries
    (B, S, G, h, D) -> (B, S, G, 1, 1)."""
    if part.dim() == 5:
        return largest(part.transpose(1, 2).flatten(3)).transpose(1, 2)[..., None]
    batch, groups, tokens, _ = part.shape
    of_token = torch.nn.functional.pad(part.amax(-1), (0, -tokens % TOGETHER)).view(batch, groups, -1, TOGETHER)
    return of_token.amax(-1).repeat_interleave(TOGETHER, -1)[..., :tokens, None]


def attention_over(query: Tensor, key: Tensor, value: Tensor, piece: Piece, scale: float) -> Tensor:
    """Of each row over a piece's keys and values where it reads them: the definition, in the tensors' dtype."""
    scores = torch.einsum(f"bsghd,{piece.keys}->bsght", query, key) * scale
    scores = scores.masked_fill(~piece.read[:, :, :, None], float("-inf"))
    top = scores.amax(-1, keepdim=True).detach()
    weights = torch.exp(scores - torch.where(top.isfinite(), top, 0.0))
    total = weights.sum(-1, keepdim=True)
    return torch.einsum(f"bsght,{piece.keys}->bsghd", weights / torch.where(total > 0, total, 1.0), value)


def two_calls(
    run: Call, case: Inputs, workspace: Workspace | None, rows: Tensor, numbers: Tensor, wanted: str = "qkv"
) -> list[Tensor]:
    """Gradients of the ``wanted`` of query, key and value under a loss over the query tokens ``rows``, known by
    ``numbers``, of two calls, the second of the query turned round. What a path keeps in the workspace for its first
    backward, its second call overwrites. The gradient that the second call is handed is strided. Where none comes
    back it is zero."""
    tensors = dict(zip("qkv", (case.query, case.key, case.value), strict=True))
    leaves = {name: tensor.detach().clone().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    losses = []
    for turn in TURNS:
        out = run(Inputs(leaves["q"] * turn, leaves["k"], leaves["v"], case.selection, None), workspace)
        read = out[:, rows] if turn > 0 else out.transpose(1, 3)[:, :, :, rows].transpose(1, 3)
        losses.append((read * loss_weight(read.shape, numbers, out.dtype)).sum())
    asked, known = [leaves[name] for name in wanted], [loss for loss in losses if loss.requires_grad]
    if not known:
        return [torch.zeros_like(leaf) for leaf in asked]
    return list(torch.autograd.grad(known, asked, allow_unused=True, materialize_grads=True))


def loss_weight(shape: torch.Size, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """What each output element (B, r, G, h, D) of the query tokens ``numbers`` (r,) counts in the loss: one of 17
    eighths, exact in every dtype, neighbours unlike."""
    total = torch.zeros(shape, dtype=torch.int64, device=numbers.device)
    for axis, factor in enumerate((3, 5, 7, 11, 2)):
        along = numbers if axis == 1 else torch.arange(shape[axis], device=numbers.device)
        total += factor * along.view([-1 if axis == here else 1 for here in range(5)])
    return ((total % 17 - 6) / 8).to(dtype)


def weight_errors(piece: Piece, scale: float, turn: float) -> list[Tensor]:
    """By how much the gradients of a piece's query, key and value in one call are off at most, to first order, for a
    unit of relative error in every weight P = exp(score - top).

    Normalised, P_j is off by at most 2 P_j (1 - P_j), delta by m = sum of P_j |dP_j - delta|, so dS_j by
    2 P_j (1 - P_j) |dP_j - delta| + P_j m, and its sums over keys and rows by the same sums of absolute values.
    """
    query, key, value = piece.query.double() * turn, piece.key.double(), piece.value.double()
    upstream = loss_weight(torch.Size((*query.shape[:4], value.shape[-1])), piece.rows, query.dtype)
    scores = torch.einsum(f"bsghd,{piece.keys}->bsght", query, key) * scale
    weights = scores.masked_fill(~piece.read[:, :, :, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    slope = torch.einsum(f"{piece.keys},bsghd->bsght", value, upstream)
    slope = (slope - (weights * slope).sum(-1, keepdim=True)).abs()
    moved = 2 * weights * (1 - weights)
    slope = (moved * slope + weights * (weights * slope).sum(-1, keepdim=True)) * scale
    return [
        torch.einsum(f"bsght,{piece.keys}->bsghd", slope, key.abs()),
        torch.einsum(f"bsght,bsghd->{piece.keys}", slope, query.abs()),
        torch.einsum(f"bsght,bsghd->{piece.keys}", moved, upstream.abs()),
    ]
