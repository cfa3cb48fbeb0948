"""The window branch: each query over the last ``window`` keys, by the path that dispatch chooses.

Queries are the last S of the T keys. It knows no cache and no gates.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .dispatch import selection_attention
from .dispatch_table import DispatchTable
from .planning import Strict
from .selection import Selection
from .trace import ParameterValue
from .workspace import Workspace

FLASH_ATTENTION = "flash_attn_window"


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    scale: float | None = None,
    flash_attention: bool | None = None,
    path: str = "auto",
    parameters: Mapping[str, ParameterValue] | None = None,
    workspace: Workspace | None = None,
    strict: Strict = False,
    table: DispatchTable | None = None,
) -> Tensor:
    """Attention over keys max(0, t - window + 1) .. t of the query at position t.

    query (B, S, G, h, Dk), the last S of the keys (B, G, T, Dk); value (B, G, T, Dv) -> (B, S, G, h, Dv). ``scale``:
    None = Dk**-0.5. ``flash_attention``: True takes it wherever it can run, False never, None leaves it to dispatch.
    The other arguments and errors are those of ``selection_attention``.
    """
    rows = (query.shape[0], query.shape[1], query.shape[2])
    return selection_attention(
        query,
        key,
        value,
        Selection.window(window, rows=rows, context_length=key.shape[2], device=query.device),
        path=path,
        parameters=parameters,
        scale=scale,
        workspace=workspace,
        strict=strict,
        table=table,
        prefer=FLASH_ATTENTION if flash_attention else "",
        avoid=FLASH_ATTENTION if flash_attention is False else "",
    )
