"""Leaf. opaque: functions that torch.compile leaves as they are, at one break of the graph each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo

Given = ParamSpec("Given")
Made = TypeVar("Made")


def opaque(
    function: Callable[Given, Made], *, when: Callable[..., bool] = lambda *_, **__: True
) -> Callable[Given, Made]:
    """``function``, of which nothing is traced where torch.compile traces a caller and ``when`` its arguments.

    ``torch.compiler.disable`` would do, but imports the compiler with this package, which takes a second.
    """
    beyond: Any = _disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        if torch.compiler.is_compiling() and when(*args, **kwargs):
            made: Made = beyond(*args, **kwargs)
            return made
        return function(*args, **kwargs)

    return call
