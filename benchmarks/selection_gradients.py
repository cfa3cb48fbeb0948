"""Gradients of ``benchmarks/selection.py``: how a backward alone is called, and its check on spot rows and blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nsa.problem import TORCH_DTYPES, SelectionProblem
from tuner.check import WrongResult
from tuner.inputs import Inputs

SPOTS = 16
"""Query tokens whose gradients are compared, besides one block of keys and values per group."""


def with_leaves(inputs: Inputs) -> Inputs:
    """The same call, its tensors asking for gradients."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in (inputs.query, inputs.key, inputs.value))
    return Inputs(query, key, value, inputs.selection, inputs.union)


def gradients(run: Callable[[Inputs], Tensor], inputs: Inputs, weight: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """The backward alone, of a forward that ran once."""
    case = with_leaves(inputs)
    out = run(case)
    return lambda: torch.autograd.grad(out, (case.query, case.key, case.value), weight, retain_graph=True)


class GradientSpots:
    """Gradients of some rows and of one block per group, in float64 and, for the bound, with rounded factors."""

    def __init__(self, problem: SelectionProblem, inputs: Inputs, weight: Tensor) -> None:
        self.problem, self.inputs, self.weight = problem, inputs, weight
        blocks = -(-problem.T // problem.block_size)
        self.blocks = [(g * 7 + 3) % blocks for g in range(problem.G)]
        self.rows = torch.randint(problem.S, (SPOTS,), device=inputs.query.device)
        self.truth, usual = self._compute(torch.float64), self._compute(TORCH_DTYPES[problem.dtype])
        least = 4 * torch.finfo(TORCH_DTYPES[problem.dtype]).eps
        self.bounds = [max(2 * distance(u, t), least) for u, t in zip(usual, self.truth, strict=True)]

    def _compute(self, dtype: torch.dtype) -> list[Tensor]:
        """(query rows (G, r, h, Dk), key blocks (G, l', Dk), value blocks (G, l', Dv)); factors rounded to dtype."""
        p, (query, key, value) = self.problem, (self.inputs.query, self.inputs.key, self.inputs.value)
        selected, scale = self.inputs.selection.blocks[0].long(), p.Dk**-0.5
        found: list[list[Tensor]] = [[], [], []]
        for g in range(p.G):
            keys = torch.arange(p.block_size, device=key.device) + self.blocks[g] * p.block_size
            sums = [torch.zeros(len(keys), n, dtype=torch.float64, device=key.device) for n in (p.Dk, p.Dv)]
            choosing = (selected[:, g] == self.blocks[g]).any(-1).nonzero()[:, 0]
            for first, rows in enumerate((self.rows, *choosing.split(128))):
                places = (selected[rows, g][..., None] * p.block_size).add(
                    torch.arange(p.block_size, device=key.device)
                )
                allowed = (selected[rows, g] >= 0)[..., None] & (places <= rows[:, None, None])
                places, allowed = places.flatten(1).clamp(0, p.T - 1), allowed.flatten(1)[:, None]
                k, v = key[0, g][places].double(), value[0, g][places].double()
                q, w = query[0, rows, g].double(), self.weight[0, rows, g].double()
                score = torch.einsum("rhd,rkd->rhk", q, k) * scale
                share = score.masked_fill(~allowed, float("-inf")).softmax(-1).to(dtype).double()
                out = torch.einsum("rhk,rkd->rhd", share, v).to(dtype).double()
                slope = torch.einsum("rhd,rkd->rhk", w, v) - (w * out).sum(-1, keepdim=True)
                slope = (share * slope).to(dtype).double() * scale
                if first == 0:
                    found[0].append(torch.einsum("rhk,rkd->rhd", slope, k))
                    continue
                here = ((places[:, None] == keys[:, None]) & allowed).double()
                sums[0] += torch.einsum("rhk,rjk,rhd->jd", slope, here, q)
                sums[1] += torch.einsum("rhk,rjk,rhd->jd", share, here, w)
            found[1].append(sums[0])
            found[2].append(sums[1])
        return [torch.stack(parts).to(dtype).double() for parts in found]

    def compare(self, grads: tuple[Tensor, ...], where: str) -> float:
        """The largest relative error. Raises WrongResult where one is beyond its bound, or NaN."""
        p, size = self.problem, self.problem.block_size
        spots = [slice(block * size, block * size + size) for block in self.blocks]
        rows = torch.stack([grads[0][0, self.rows, g] for g in range(p.G)])
        blocks = [torch.stack([grads[i][0, g, spot] for g, spot in enumerate(spots)]) for i in (1, 2)]
        errors = [distance(found, truth) for found, truth in zip((rows, *blocks), self.truth, strict=True)]
        if not all(error <= bound for error, bound in zip(errors, self.bounds, strict=True)):
            raise WrongResult(f"{where}: gradients off by {errors} of their norm, derived bounds {self.bounds}")
        return max(errors)


def distance(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of ``truth``; NaN where anything is NaN."""
    return float((found.double() - truth).norm() / truth.norm())
