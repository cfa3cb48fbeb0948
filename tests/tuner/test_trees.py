"""Trees become folders, packages live side by side under names of their own, and what cannot be had is said clearly."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.tuner.scripted import ROOT, Repository, append, remark
from tuner.trees import (
    TreeError,
    commits_between,
    forget_package,
    load_package,
    open_tree,
    open_trees,
    subject_of,
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return Repository(tmp_path_factory.mktemp("trees") / "repository")


@pytest.fixture(autouse=True)
def _names_forgotten() -> object:
    yield
    for name in ("nsa_base", "nsa_head"):
        forget_package(name)


def test_two_commits_live_side_by_side_and_share_nothing(repository: Repository) -> None:
    second = repository.commit("a second", append("__init__.py", "\nSECOND = True\n"))
    with open_trees(repository.first, second, repository=repository.folder) as (first_tree, second_tree):
        base, head = load_package(first_tree, "nsa_base"), load_package(second_tree, "nsa_head")
        assert not hasattr(base, "SECOND")
        assert head.SECOND
        assert base.Selection is not head.Selection
        assert base.PATHS["gather"].function() is not head.PATHS["gather"].function()
        assert base.PATHS["gather"].function().__module__ == "nsa_base.paths.gather"
        mine = {module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "nsa_head"}
        assert all(file.startswith(second_tree.folder) for file in mine if file)
        selections = [
            package.Selection.from_blocks(torch.zeros(1, 1, 1, 2, dtype=torch.int32), block_size=4, context_length=8)
            for package in (base, head)
        ]
        query, key = torch.ones(1, 1, 1, 1, 4), torch.randn(1, 1, 8, 4)
        outs = [
            package.selection_attention(query, key, key, selection)
            for package, selection in zip((base, head), selections, strict=True)
        ]
        torch.testing.assert_close(outs[0], outs[1])
        assert base.dispatch_stats().calls == head.dispatch_stats().calls
        base.selection_attention(query, key, key, selections[0])
        assert base.dispatch_stats().calls != head.dispatch_stats().calls
        with pytest.raises(sys.modules["nsa_base.errors"].ArgumentError):
            base.selection_attention(query, key, key, None)


def test_worktrees_are_removed_afterwards(repository: Repository) -> None:
    with open_tree(repository.first, repository=repository.folder) as tree:
        assert (Path(tree.folder) / "nsa" / "paths").is_dir()
        assert repository.git("worktree", "list").count("\n") == 1
    assert not Path(tree.folder).exists()
    assert repository.git("worktree", "list").count("\n") == 0


def test_a_dirty_working_tree_is_a_snapshot_and_is_noted(repository: Repository) -> None:
    with open_tree(None, repository=repository.folder) as clean:
        assert not clean.dirty
    remark("not committed")(repository.folder / "nsa")
    try:
        with open_tree(None, repository=repository.folder) as dirty:
            before = (Path(dirty.folder) / "nsa" / "errors.py").read_text()
            remark("while it runs")(repository.folder / "nsa")
            assert (Path(dirty.folder) / "nsa" / "errors.py").read_text() == before
        assert dirty.dirty
        assert dirty.commit == clean.commit
        assert dirty.digest != clean.digest
        assert "uncommitted" in dirty.label
    finally:
        repository.git("checkout", "--", "nsa")


def test_equal_code_has_an_equal_digest_wherever_it_lies(repository: Repository, tmp_path: Path) -> None:
    with open_tree(repository.first, repository=repository.folder) as tree:
        os.symlink(Path(tree.folder) / "nsa", tmp_path / "nsa")
        with open_tree(str(tmp_path), repository=tmp_path) as exported:
            assert exported.digest == tree.digest
            assert exported.commit == ""


def test_this_checkout_loads_under_another_name() -> None:
    with open_tree(str(ROOT), repository=ROOT) as tree:
        assert load_package(tree, "nsa_base").PATHS.keys() >= {"varlen", "packed"}


@pytest.mark.parametrize(
    ("asked", "where", "words"),
    [
        ("no-such-commit", "repository", "neither a commit"),
        ("HEAD", "outside", "no git repository"),
        (None, "outside", "no git repository"),
        ("HEAD", "nowhere", "is no folder"),
    ],
)
def test_what_cannot_be_had_is_said_clearly(
    repository: Repository, tmp_path: Path, asked: str | None, where: str, words: str
) -> None:
    folder = {"repository": repository.folder, "outside": tmp_path, "nowhere": tmp_path / "none"}[where]
    with pytest.raises(TreeError, match=words), open_tree(asked, repository=folder):
        pass


def test_a_commit_without_nsa_is_refused(tmp_path: Path) -> None:
    empty = Repository(tmp_path / "repository")
    empty.git("rm", "-r", "--quiet", "nsa")
    empty.git("commit", "--quiet", "--message", "without")
    with pytest.raises(TreeError, match="has no nsa/"), open_tree("HEAD", repository=empty.folder):
        pass
    with pytest.raises(TreeError, match="has no nsa/"), open_tree(None, repository=empty.folder):
        pass


def test_a_tree_that_does_not_import_leaves_nothing_behind(repository: Repository) -> None:
    broken = repository.commit("broken", append("dispatch.py", "\nimport no_such_module\n"))
    repository.git("reset", "--quiet", "--hard", "HEAD~1")
    with open_tree(broken, repository=repository.folder) as tree:
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            load_package(tree, "nsa_base")
        assert not [name for name in sys.modules if name.split(".")[0] == "nsa_base"]


def test_a_package_that_is_too_old_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "nsa").mkdir()
    (tmp_path / "nsa" / "__init__.py").write_text("PATHS = {}\n")
    with open_tree(str(tmp_path), repository=tmp_path) as tree, pytest.raises(TreeError, match="Workspace"):
        load_package(tree, "nsa_base")


def test_commits_of_a_range_come_oldest_first_with_their_subjects(repository: Repository) -> None:
    commits = repository.seven("range", {})
    assert commits_between(repository.folder, repository.first, "HEAD") == commits
    assert subject_of(repository.folder, commits[2])[1] == "commit 2 of range"
    with pytest.raises(TreeError, match="no commits in"):
        commits_between(repository.folder, "HEAD", "HEAD")
    repository.git("checkout", "--quiet", "main")


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("rows.py", "\nfrom nsa.errors import ArgumentError as Foreign\n", r"nsa/rows.py:\d+ imports nsa by its name"),
        ("rows.py", "\ndef late():\n    import nsa.selection\n", r"nsa/rows.py:\d+ imports nsa by its name"),
        (
            "paths/__init__.py",
            "\nfrom msgspec.structs import replace\nOTHER = replace(PATHS['gather'], target='nsa.paths.gather:run')"
            "\nPATHS['gather'] = OTHER\n",
            "path 'gather' runs 'nsa.paths.gather:run'",
        ),
    ],
)
def test_a_tree_that_would_run_the_tools_own_nsa_is_refused(
    repository: Repository, file: str, line: str, said: str
) -> None:
    commit = repository.commit("imports by name", append(file, line))
    with open_tree(commit, repository=repository.folder) as tree, pytest.raises(TreeError, match=said):
        load_package(tree, "nsa_head")
    repository.git("reset", "--hard", "--quiet", "HEAD~1")


def test_words_about_an_import_are_none(repository: Repository) -> None:
    commit = repository.commit("an example", append("rows.py", '\nEXAMPLE = """\nfrom nsa import Selection\n"""\n'))
    with open_tree(commit, repository=repository.folder) as tree:
        load_package(tree, "nsa_head")
    repository.git("reset", "--hard", "--quiet", "HEAD~1")
