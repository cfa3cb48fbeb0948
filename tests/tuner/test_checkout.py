"""Claims about the commit that records name: whatever decides what is measured tells two states of the code apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tuner.scripted import Repository
from tuner.checkout import current_commit


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return Repository(tmp_path_factory.mktemp("checkout") / "repository")


def test_a_clean_checkout_is_its_commit(repository: Repository) -> None:
    assert current_commit(here=repository.folder) == repository.first


def test_a_new_file_counts_with_what_it_says_and_not_only_with_its_name(repository: Repository) -> None:
    seen = []
    for text in ("slow", "fast", "slow"):
        (repository.folder / "nsa" / "paths" / "mine.py").write_text(f"# {text}\n")
        seen.append(current_commit(here=repository.folder))
    (repository.folder / "nsa" / "paths" / "mine.py").unlink()
    assert seen[0] == seen[2] != seen[1]
    assert all(found.startswith(f"{repository.first}-dirty-") for found in seen)


def test_paths_of_another_module_count_with_what_they_say(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    for text in ("slow", "fast"):
        (tmp_path / "their_paths.py").write_text(f"# {text}\n")
        seen.append(current_commit("their_paths", repository.folder))
    assert len({repository.first, *seen}) == 3
    assert current_commit("no_such.module", repository.folder) == repository.first
