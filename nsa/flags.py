"""Leaf. The ``NSA_*`` environment flags, read once, at the edge: when a layer is constructed or a table is loaded.

Flags steer routes and memory, never results. Nothing here is read at import or per call, and no other module reads the
environment. A misspelt, malformed or self-contradicting flag is an error that lists the valid ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from .errors import FlagError
from .trace import ParameterValue

FLAGS: dict[str, tuple[type, str]] = {
    "NSA_USE_SEL_VARLEN": (bool, "1 forces selection path varlen in every mode; wins over NSA_USE_SEL_PACK"),
    "NSA_USE_SEL_PACK": (bool, "1 forces selection path packed in every mode"),
    "NSA_VARLEN_RESERVE_N": (int, "query rows that varlen's workspace has room for"),
    "NSA_VARLEN_RESERVE_K": (int, "gathered keys that varlen's workspace has room for"),
    "NSA_SEL_PACK_RESERVE_N": (int, "rows that packed's workspace has room for"),
    "NSA_SEL_PACK_RESERVE_L": (int, "keys per row that packed's workspace has room for"),
    "NSA_USE_FA2": (bool, "0 disallows FlashAttention; for _CMP and _WIN if unset"),
    "NSA_USE_FA2_CMP": (bool, "compression branch: 1 takes FlashAttention wherever it can run, 0 never"),
    "NSA_USE_FA2_WIN": (bool, "window branch: 1 takes FlashAttention wherever it can run, 0 never"),
    "NSA_SEL_RANGES_V2": (bool, "1 derives ranges from blocks vectorised, 0 by the readable loop (slow)"),
    "NSA_PREFILL_BATCHED": (bool, "1 prefills in one call, 0 token by token"),
    "NSA_USE_FUSED_DECODE": (bool, "1 forces the fused decode step, 0 decode by branches"),
    "NSA_DISPATCH_TABLE": (str, "file of the dispatch table to use"),
}
"""Flag -> (type, meaning). Booleans are 0 or 1, integers decimal and not negative."""

RESERVES: dict[str, tuple[str, str]] = {
    "NSA_VARLEN_RESERVE_N": ("varlen", "reserve_rows"),
    "NSA_VARLEN_RESERVE_K": ("varlen", "reserve_keys"),
    "NSA_SEL_PACK_RESERVE_N": ("packed", "reserve_rows"),
    "NSA_SEL_PACK_RESERVE_L": ("packed", "reserve_length"),
}
"""Flag -> (path, parameter)."""

FORCING: dict[str, str] = {"NSA_USE_SEL_VARLEN": "varlen", "NSA_USE_SEL_PACK": "packed"}
"""Flag -> the path that it forces, the winner first."""


class Flags(msgspec.Struct, frozen=True, kw_only=True):
    """What the environment asks for; the defaults are those of an empty one.

    ``path``: selection path forced in every mode, None = dispatch. ``reserves``: path -> parameters, for the forced
    path, or with none forced for whichever of them dispatch takes. ``flash_attention``: allowed to selection's paths;
    ``flash_attention_*``: True = taken wherever it can run, False = never, None = dispatch decides.
    ``overridden``: flags that were given and lost to another. ``given``: every NSA_ variable as it stood.
    """

    path: str | None = None
    reserves: dict[str, dict[str, int]] = {}
    flash_attention: bool = True
    flash_attention_compression: bool | None = None
    flash_attention_window: bool | None = None
    ranges_v2: bool = True
    batched_prefill: bool = True
    decode_route: Literal["auto", "fused", "branches"] = "auto"
    dispatch_table: str | None = None
    overridden: tuple[str, ...] = ()
    given: dict[str, str] = {}

    @property
    def recorded(self) -> dict[str, str]:
        """``given``, with a table's file by its name: the folder is of one machine and does not belong in a record."""
        return {name: Path(text).name if name == "NSA_DISPATCH_TABLE" else text for name, text in self.given.items()}

    def adjust(self, path: str, parameters: Mapping[str, ParameterValue]) -> dict[str, ParameterValue]:
        """The parameters of a path as the flags want them: with reserves, and without FlashAttention if disallowed."""
        backend = {"backend": "segment"} if path == "varlen" and not self.flash_attention else {}
        return {**parameters, **self.reserves.get(path, {}), **backend}


def read_flags(environ: Mapping[str, str] | None = None) -> Flags:
    """The flags of ``environ``, by default of the process. Raises FlagError."""
    source = os.environ if environ is None else environ
    given = {name: text for name, text in sorted(source.items()) if name.startswith("NSA_")}
    values = {name: _parse(name, text) for name, text in given.items()}
    _refuse_contradictions(values)
    path = next((path for flag, path in FORCING.items() if values.get(flag)), None)
    flash = _switch(values, "NSA_USE_FA2")
    return Flags(
        path=path,
        reserves=_reserves(values, path),
        flash_attention=flash is not False,
        flash_attention_compression=_switch(values, "NSA_USE_FA2_CMP", flash),
        flash_attention_window=_switch(values, "NSA_USE_FA2_WIN", flash),
        ranges_v2=bool(values.get("NSA_SEL_RANGES_V2", True)),
        batched_prefill=bool(values.get("NSA_PREFILL_BATCHED", True)),
        decode_route=_decode_route(values.get("NSA_USE_FUSED_DECODE")),
        dispatch_table=given.get("NSA_DISPATCH_TABLE"),
        overridden=tuple(flag for flag, value in values.items() if path and _loses(flag, value, path)),
        given=given,
    )


def _switch(values: Mapping[str, bool | int | str], name: str, default: bool | None = None) -> bool | None:
    return bool(values[name]) if name in values else default


def _parse(name: str, text: str) -> bool | int | str:
    if name not in FLAGS:
        raise FlagError(f"unknown flag {name}={text!r}. {_valid_flags()}")
    kind = FLAGS[name][0]
    if kind is bool and text in ("0", "1"):
        return text == "1"
    if kind is int and re.fullmatch("[0-9]+", text):
        return int(text)
    if kind is str and text:
        return text
    expected = {bool: "0 or 1", int: "a decimal number, 0 or more", str: "a file name"}[kind]
    raise FlagError(f"{name} is {text!r}, expected {expected}; correct it or unset it. {_valid_flags()}")


def _refuse_contradictions(values: Mapping[str, bool | int | str]) -> None:
    for flag, path in FORCING.items():
        reserves = [name for name, (owner, _) in RESERVES.items() if owner == path and name in values]
        if values.get(flag) is False and reserves:
            raise FlagError(
                f"{flag}=0 contradicts {', '.join(f'{name}={values[name]}' for name in reserves)}: expected no reserve "
                f"for a path that is switched off; unset one or the other. {_valid_flags()}"
            )
    if values.get("NSA_USE_FUSED_DECODE"):
        steering = [
            name for name in (*FORCING, "NSA_USE_FA2", "NSA_USE_FA2_CMP", "NSA_USE_FA2_WIN") if values.get(name)
        ]
        if steering:
            raise FlagError(
                f"NSA_USE_FUSED_DECODE=1 contradicts {', '.join(f'{name}=1' for name in steering)}: the fused step "
                f"runs no selection path and no FlashAttention; unset one or the other. {_valid_flags()}"
            )


def _decode_route(fused: bool | int | str | None) -> Literal["auto", "fused", "branches"]:
    return "auto" if fused is None else "fused" if fused else "branches"


def _reserves(values: Mapping[str, bool | int | str], forced: str | None) -> dict[str, dict[str, int]]:
    reserves: dict[str, dict[str, int]] = {}
    for flag, (path, parameter) in RESERVES.items():
        if flag in values and forced in (None, path):
            reserves.setdefault(path, {})[parameter] = int(values[flag])
    return reserves


def _loses(flag: str, value: bool | int | str, forced: str) -> bool:
    """Whether a flag asks for another path than the forced one, or for another path's reserve."""
    if flag in FORCING:
        return bool(value) and FORCING[flag] != forced
    return flag in RESERVES and RESERVES[flag][0] != forced


def _valid_flags() -> str:
    return "Valid flags: " + "; ".join(f"{name} ({kind.__name__}: {what})" for name, (kind, what) in FLAGS.items())
