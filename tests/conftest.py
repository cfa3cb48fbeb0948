"""Without a GPU, Triton kernels run in its interpreter and tests marked ``gpu`` are deselected, and counted as such."""

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture(autouse=True)
def own_user_folder(tmp_path, monkeypatch):
    """No test reads or writes this user's dispatch tables, or inherits NSA_ flags."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "user-data"))
    for name in [name for name in os.environ if name.startswith("NSA_")]:
        monkeypatch.delenv(name)
