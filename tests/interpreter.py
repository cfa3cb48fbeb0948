"""Run Triton kernels on the CPU: set the interpreter up before Triton is first imported.

Triton 3.6's interpreter is repaired in two places. It turns a scalar into a loop bound with ``int(array of one
element)``, which numpy 2.4 refuses; ``item()`` does the same. And it multiplies bfloat16 matrices as the uint16 that it
holds them in. Drop ``_repair`` with the first Triton that does both itself.
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
    _repair()
    return True


def _repair() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widen(handle: Any) -> Any:
        if handle.dtype != tl.bfloat16:
            return handle
        data = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None).view("float32")
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widen(a), widen(b), *rest)

    interpreter._patch_lang_tensor = patch_tensor
    interpreter.InterpreterBuilder.create_dot = create_dot
