"""Run Triton kernels on the CPU: set the interpreter up before Triton is first imported.

Triton 3.6 turns a scalar into a loop bound with ``int(array of one element)``, which numpy 2.4 refuses; ``item()`` does
the same. Drop ``_accept_numpy`` with the first Triton that does so itself.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch


def prepare() -> bool:
    """Interpret where there is no GPU. Returns whether kernels will be interpreted; call it before Triton is imported.

    Raises RuntimeError where Triton was imported before without TRITON_INTERPRET: its functions would want a GPU.
    """
    if torch.cuda.is_available():
        return False
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton was imported before tests.interpreter.prepare(); import this first")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    _accept_numpy()
    return True


def _accept_numpy() -> None:
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
