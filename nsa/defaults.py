"""What runs where nothing was measured: a literal path for each operation, kind of device and mode."""

from __future__ import annotations

import torch

from .paths import PATHS, Candidate
from .problem import Mode, Operation, SelectionProblem

DEFAULT_PATHS: dict[Operation, dict[tuple[str, Mode], tuple[str, ...]]] = {
    "selection": {
        ("cpu", "decode"): ("gather",),
        ("cpu", "prefill"): ("dense",),
        ("cpu", "train"): ("dense",),
        ("cuda", "decode"): ("varlen",),
        ("cuda", "prefill"): ("varlen",),
        ("cuda", "train"): ("varlen",),
    },
    "window": {
        ("cpu", "decode"): ("sdpa_window",),
        ("cpu", "prefill"): ("sdpa_window",),
        ("cpu", "train"): ("sdpa_window",),
        ("cuda", "decode"): ("flash_attn_window", "sdpa_window"),
        ("cuda", "prefill"): ("triton_window", "flash_attn_window", "sdpa_window"),
        ("cuda", "train"): ("triton_window", "flash_attn_window", "sdpa_window"),
    },
    "compression": {
        ("cpu", "decode"): ("sdpa_compressed",),
        ("cpu", "prefill"): ("sdpa_compressed",),
        ("cpu", "train"): ("sdpa_compressed",),
        ("cuda", "decode"): ("flash_attn_compressed", "sdpa_compressed"),
        ("cuda", "prefill"): ("triton_compressed", "sdpa_compressed"),
        ("cuda", "train"): ("cudnn_compressed", "sdpa_compressed"),
    },
}
"""Where nothing was measured: of these the first that can run the problem, the last one always can. Each was seen right
and fast on its kind of device in its mode."""


def default_candidate(problem: SelectionProblem, kind: str) -> Candidate:
    """The literal default of an operation, device kind and mode, at its default parameters, reserves left out."""
    device = torch.device(kind)
    names = DEFAULT_PATHS[problem.operation][kind, problem.mode]
    for name in names:
        items = PATHS[name].tunables(problem, device)
        candidate = Candidate(path=name, parameters={item.name: item.default for item in items if not item.reserve})
        if name == names[-1] or PATHS[name].unsupported_reason(problem, device, candidate.parameters) is None:
            break
    return candidate
