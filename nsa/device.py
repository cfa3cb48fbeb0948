"""Leaf. Which device and which software a result belongs to, and what makes a result stale."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import platform
import re
import sys
from functools import cache
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

import msgspec
import torch

MARKS = {
    "flash_attn": ("flash_attn.flash_attn_interface",),
    "flash_attn_4": ("flash_attn.cute.flash_fwd_sm90", "cutlass.cute"),
}
"""Modules that show a package which its name does not. FlashAttention-4 installs into the folder of FlashAttention 2,
and alone leaves a ``flash_attn`` that is none. FlashAttention 2.8 brings a ``flash_attn.cute`` of its own, older and
without a module for Hopper. The CuTe DSL is what compiles FlashAttention-4."""


class DeviceIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a dispatch table is valid for. ``slug`` names files: ``nvidia-h200``, ``cpu-amd-epyc-x2``."""

    slug: str
    name: str
    kind: Literal["cpu", "cuda"]
    units: int
    """Threads that torch uses on a CPU, multiprocessors on a GPU."""
    capability: str = ""
    memory_bytes: int = 0


class SoftwareIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Versions as strings; empty where the thing is absent. ``flash_attn`` is of FlashAttention 2, of 4, or both."""

    torch: str
    triton: str = ""
    cuda: str = ""
    driver: str = ""
    flash_attn: str = ""
    python: str = ""

    def stale_against(self, now: SoftwareIdentity) -> str:
        """Why a table made with ``self`` is stale under ``now``: torch or triton minor, or driver major; '' if not."""
        for field, parts in (("torch", 2), ("triton", 2), ("driver", 1)):
            then_value, now_value = _leading(getattr(self, field), parts), _leading(getattr(now, field), parts)
            if then_value != now_value:
                return f"{field} {getattr(self, field) or 'absent'} then, {getattr(now, field) or 'absent'} now"
        return ""


def _leading(version: str, parts: int) -> list[str]:
    return version.split("+")[0].split(".")[:parts]


@cache
def device_identity(kind: str) -> DeviceIdentity:
    """Identity of the current device of ``kind``, "cpu" or "cuda". Reads /proc or asks the driver, once."""
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return DeviceIdentity(
            slug=slug(properties.name),
            name=properties.name,
            kind="cuda",
            units=properties.multi_processor_count,
            capability=f"{properties.major}.{properties.minor}",
            memory_bytes=properties.total_memory,
        )
    threads = torch.get_num_threads()
    name = _cpu_name()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceIdentity(
        slug=f"cpu-{slug(name)}-x{threads}", name=name, kind="cpu", units=threads, memory_bytes=memory
    )


@cache
def software_identity() -> SoftwareIdentity:
    """Versions in this process. Triton counts only beside a CUDA build of torch: on a CPU it changes nothing."""
    return SoftwareIdentity(
        torch=str(torch.__version__),
        triton=_version("triton") if torch.version.cuda else "",
        cuda=torch.version.cuda or "",
        driver=_driver_version() if torch.cuda.is_available() else "",
        flash_attn=", ".join(filter(None, map(_version, MARKS))),
        python=platform.python_version(),
    )


def slug(name: str) -> str:
    """A file-name form of a device name: lower case, runs of anything else than letters and digits to one dash."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


@cache
def installed(package: str) -> bool:
    """Whether a package, one of MARKS or any other by its module, can be imported, without importing it."""
    return all(_found(module) for module in MARKS.get(package, (package,)))


def _found(module: str) -> bool:
    """Whether the file of a module is there. Python's own search would import the packages that it lies in."""
    package, *inside = module.split(".")
    loaded = sys.modules.get(package)
    if loaded is not None and loaded.__spec__ is None:
        return False  # a stand-in that came from no file
    spec = importlib.util.find_spec(package)
    if not inside or spec is None:
        return spec is not None
    folders = list(spec.submodule_search_locations or ())
    for name in inside[:-1]:
        folders = [os.path.join(folder, name) for folder in folders]
    found = PathFinder.find_spec(inside[-1], folders)
    return found is not None and found.has_location


def _version(module: str) -> str:
    """Version of an installed package; of the module itself where it was installed without metadata."""
    if not installed(module):
        return ""
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        found = importlib.import_module(module) if importlib.util.find_spec(module) else None
        return str(getattr(found, "__version__", "unknown"))


def _driver_version() -> str:
    """The NVIDIA driver's version from NVML, '' where the library does not answer."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ""
    buffer = ctypes.create_string_buffer(80)
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlSystemGetDriverVersion(buffer, 80) != 0:
        return ""
    return buffer.value.decode()
