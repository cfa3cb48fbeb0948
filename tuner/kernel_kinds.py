"""Leaf. What kind of work a kernel (an operator on a CPU) does, by its name: so a profile says what bounds a step."""

from __future__ import annotations

import re

KINDS: tuple[tuple[str, str], ...] = (
    ("NSA kernels", r"^_?nsa_"),
    ("compiled element-wise", r"^triton_"),
    ("optimizer", r"multi_tensor|[Aa]dam|_foreach"),
    ("attention", r"flash|fmha|scaled_dot_product"),
    ("matrix products", r"nvjet|gemm|gemv|splitK|aten::(add|b|ba)?(mm|bmm)$"),
    ("softmax and loss", r"[Ss]oft[Mm]ax|nll_loss"),
    ("sort and top-k", r"[Ss]ort|topk|TopK|radix"),
    ("gather and scatter", r"index|gather|scatter|embedding|Embedding"),
    ("copies and casts", r"copy|Copy|Memcpy|Memset|CatArray|Fill|aten::(cat|fill_|zero_)"),
    ("reductions", r"reduce|scan|aten::(sum|cumsum|mean)"),
    ("element-wise", r"elementwise|^aten::"),
)
"""Kind -> pattern, the first that is found decides."""


def kind_of(name: str) -> str:
    """One of KINDS, or ``other``."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")
