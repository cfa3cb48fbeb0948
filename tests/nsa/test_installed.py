"""Claims about which packages are there, asked without importing them: two of them share a folder."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nsa import device
from nsa.device import installed

FIRST = ("flash_attn/__init__.py", "flash_attn/flash_attn_interface.py")
OWN_CUTE = ("flash_attn/cute/__init__.py", "flash_attn/cute/interface.py", "flash_attn/cute/flash_fwd.py")
FOURTH = (*OWN_CUTE, "flash_attn/cute/flash_fwd_sm90.py")
DSL = ("cutlass/__init__.py", "cutlass/cute/__init__.py")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Put files whose import raises into a folder in front of all others."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def put(files: tuple[str, ...]) -> Path:
        for name in files:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("raise AssertionError('imported')\n")
        importlib.invalidate_caches()
        installed.cache_clear()
        return tmp_path

    yield put
    installed.cache_clear()


@pytest.mark.parametrize(
    ("files", "second", "fourth"),
    [
        ((), False, False),
        (FIRST, True, False),
        ((*FIRST, *OWN_CUTE, *DSL), True, False),
        ((*FOURTH, *DSL), False, True),
        (FOURTH, False, False),
        ((*FIRST, *FOURTH, *DSL), True, True),
        (("flash_attn/cute/left", "cutlass/cute/left"), False, False),
        ((*FIRST, "flash_attn/cute/left", *DSL), True, False),
        ((*FOURTH, "cutlass/cute/left"), False, False),
    ],
    ids=[
        "neither",
        "2",
        "2-with-its-own-cute",
        "4-as-a-namespace",
        "4-without-its-compiler",
        "both",
        "bare-folders",
        "2-and-a-bare-cute",
        "4-and-a-bare-compiler",
    ],
)
def test_flash_attention_2_and_4_are_told_apart_in_the_folder_that_they_share(site, files, second, fourth):
    site(files)
    assert (installed("flash_attn"), installed("flash_attn_4")) == (second, fourth)
    assert not {"flash_attn", "cutlass"} & set(sys.modules)


def test_a_stand_in_that_came_from_no_file_is_not_installed(monkeypatch):
    installed.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    assert not installed("flash_attn")
    installed.cache_clear()


def test_a_version_is_that_of_the_package_asked_for(site):
    folder = site((*FOURTH, *DSL))
    assert (device._version("flash_attn"), device._version("flash_attn_4")) == ("", "unknown")
    for name, version in (("flash_attn", "2.8.3"), ("flash_attn_4", "4.0.0b36")):
        (folder / f"{name}-{version}.dist-info").mkdir()
        (folder / f"{name}-{version}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    assert device.software_identity.__wrapped__().flash_attn == "4.0.0b36"
    site((*FIRST, *FOURTH, *DSL))
    assert device.software_identity.__wrapped__().flash_attn == "2.8.3, 4.0.0b36"


def test_other_packages_go_by_their_module():
    installed.cache_clear()
    assert installed("torch")
    assert not installed("no_such_package")
