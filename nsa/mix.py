"""The layer's last step before its output projection: the gated sum of the three branches (paper eq. 5).

On a GPU one Triton kernel each way, which reads and writes every tensor once; elsewhere plain arithmetic.
"""

from __future__ import annotations

from functools import partial
from typing import cast

from torch import Tensor

from .kernels.support import Route, by_triton
from .opaque import opaque


@partial(opaque, when=lambda gates, *_, **__: gates.is_cuda)
def mix_branches(
    gates: Tensor, compression: Tensor, selection: Tensor, window: Tensor, *, route: Route = "auto"
) -> Tensor:
    """gates (B, S, G, h, 3), branches (B, S, G, h, Dv), one dtype -> (B, S, G, h, Dv), summed in float32 or wider."""
    fused = by_triton(route, gates)
    if fused and gates.dtype == compression.dtype == selection.dtype == window.dtype:
        from .kernels.mix import MixFunction  # Triton, loaded when first run

        return cast(Tensor, MixFunction.apply(gates, compression, selection, window))  # type: ignore[no-untyped-call]
    return gates[..., 0:1] * compression + gates[..., 1:2] * selection + gates[..., 2:3] * window
