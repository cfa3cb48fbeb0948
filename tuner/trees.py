"""Trees: the two sides of a comparison, made from commits, the working tree or folders, and their ``nsa`` by name.

A commit becomes a git worktree in a temporary folder, removed afterwards; the working tree is copied, so that an edit
during a run changes nothing; a folder that holds ``nsa/`` (an exported or installed tree) is used where it is. A tree's
``nsa`` is loaded under a name of its own: it uses relative imports only, so several live side by side in one process.
It measures nothing and needs no torch until a package is loaded.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

import msgspec

WORKING_TREE = "working tree"
FOREIGN = "which is the running tool's own copy and not this tree's; import relatively"
NEEDED = (
    *("PATHS", "DispatchTable", "Selection", "SelectionProblem", "Workspace"),
    *("load_dispatch_table", "record_paths", "selection_attention", "use_dispatch_table"),
)
"""What a tree's nsa must offer to be measured."""


class TreeError(ValueError):
    """A side that cannot be had. Says which, what was found, and what to give instead."""


class DoesNotImport(TreeError):
    """A side that is there and whose nsa cannot be imported."""


class Tree(msgspec.Struct, frozen=True, kw_only=True):
    """One side. ``asked``: what the user wrote. ``commit``: its hash, '' for a folder. ``dirty``: differs from it.

    ``digest``: of the sources and dispatch tables below ``nsa/``; two trees with one digest are the same code.
    """

    asked: str
    folder: str
    commit: str = ""
    dirty: bool = False
    digest: str = ""

    @property
    def label(self) -> str:
        """For a person: the short hash, marked where dirty, or the folder's name and digest."""
        if not self.commit:
            return f"{Path(self.folder).name} ({self.digest[:8]})"
        return self.commit[:10] + (" + uncommitted changes" if self.dirty else "")


@contextmanager
def open_trees(*asked: str | None, repository: Path) -> Iterator[tuple[Tree, ...]]:
    """The trees for what was asked, None being the working tree, there until the block ends. Raises TreeError."""
    with ExitStack() as stack:
        yield tuple(stack.enter_context(open_tree(each, repository=repository)) for each in asked)


@contextmanager
def open_tree(asked: str | None, *, repository: Path) -> Iterator[Tree]:
    """One tree, there until the block ends: a folder that holds ``nsa/``, a commit, or None for the working tree."""
    if asked is not None and (Path(asked) / "nsa" / "__init__.py").is_file():
        yield tree_of(Path(asked).resolve(), asked)
        return
    top = top_of(repository, asked)
    with tempfile.TemporaryDirectory(prefix="nsa-tune-tree-") as temporary:
        folder = Path(temporary) / "tree"
        if asked is None:
            head = git(top, "rev-parse", "HEAD") if has_commits(top) else ""
            changed = bool(git(top, "status", "--porcelain", "--", "nsa", "results/dispatch_tables"))
            copy_package(top, folder)
            yield tree_of(folder, WORKING_TREE, head, dirty=changed)
            return
        commit = commit_of(top, asked)
        if not git(top, "ls-tree", "--name-only", commit, "nsa/__init__.py"):
            raise TreeError(f"commit {commit[:10]} ({asked}) has no nsa/; give commits of a repository that holds it")
        git(top, "worktree", "prune")  # what a killed run left behind
        git(top, "worktree", "add", "--detach", "--force", str(folder), commit)
        try:
            yield tree_of(folder, asked, commit)
        finally:
            git(top, "worktree", "remove", "--force", str(folder))


def tree_of(folder: Path, asked: str, commit: str = "", *, dirty: bool = False) -> Tree:
    """A tree that lies in a folder. Raises TreeError where there is no nsa/."""
    if not (folder / "nsa" / "__init__.py").is_file():
        raise TreeError(f"{asked!r}: no nsa/ in {folder}; give a commit, or a folder that holds nsa/")
    return Tree(asked=asked, folder=str(folder), commit=commit, dirty=dirty, digest=digest_of(folder / "nsa"))


def top_of(repository: Path, asked: str | None) -> Path:
    """The top folder of the git repository around ``repository``. Raises TreeError."""
    what = "the working tree" if asked is None else repr(asked)
    if not repository.is_dir():
        raise TreeError(f"{what}: {repository} is no folder; give two folders that hold nsa/, or a repository")
    try:
        return Path(git(repository, "rev-parse", "--show-toplevel"))
    except TreeError as error:
        raise TreeError(
            f"{what} is no folder that holds nsa/, and {repository} is no git repository; run inside one, or give "
            "two exported trees (git archive COMMIT nsa results/dispatch_tables | tar -x -C FOLDER)"
        ) from error


def commit_of(repository: Path, asked: str) -> str:
    """The full hash of a commit. Raises TreeError for one that is not there."""
    try:
        return git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{asked}^{{commit}}")
    except TreeError as error:
        raise TreeError(
            f"{asked!r} is neither a commit of {repository} nor a folder that holds nsa/; "
            "a shallow clone lacks old commits (git fetch --unshallow)"
        ) from error


def commits_between(repository: Path, first: str, last: str) -> list[str]:
    """Full hashes after ``first`` up to ``last``, oldest first, along first parents. Raises TreeError."""
    top = top_of(repository, last)
    start, end = commit_of(top, first), commit_of(top, last)
    found = git(top, "rev-list", "--reverse", "--first-parent", f"{start}..{end}").split()
    if not found:
        raise TreeError(f"no commits in {first}..{last}; expected FIRST to be an ancestor of LAST")
    return found


def subject_of(repository: Path, commit: str) -> tuple[str, str]:
    """(date, subject) of a commit."""
    date, _, subject = git(repository, "show", "--no-patch", "--format=%cI%x09%s", commit).partition("\t")
    return date, subject


def has_commits(repository: Path) -> bool:
    """Whether there is a HEAD at all."""
    return bool(git(repository, "rev-list", "--all", "--max-count=1"))


def git(repository: Path, *arguments: str) -> str:
    """What git says, stripped. Raises TreeError with git's own last line."""
    command = ["git", "-C", str(repository), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise TreeError(f"git does not run: {error}; install it, or give two folders that hold nsa/") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TreeError(f"{' '.join(command[3:])}: {last}")
    return done.stdout.strip()


def copy_package(top: Path, folder: Path) -> None:
    """``nsa/`` of the working tree as it stands, tables included, into ``folder``. Raises TreeError."""
    source = top / "nsa"
    if not (source / "__init__.py").is_file():
        raise TreeError(f"the working tree {top} has no nsa/; run inside a repository that holds it")
    shutil.copytree(source, folder / "nsa", ignore=shutil.ignore_patterns("__pycache__"), ignore_dangling_symlinks=True)


def digest_of(package: Path) -> str:
    """Hash over names and contents of a package's sources and dispatch tables."""
    state = hashlib.sha256()
    tables = package / "dispatch_tables"
    files = [*package.rglob("*.py"), *(tables.glob("*.json") if tables.is_dir() else ())]
    for file in sorted(files, key=lambda file: file.relative_to(package).as_posix()):
        state.update(f"{file.relative_to(package).as_posix()}\0".encode())
        state.update(hashlib.sha256(file.read_bytes()).digest())
    return state.hexdigest()


def load_package(tree: Tree, name: str) -> ModuleType:
    """The tree's ``nsa`` as the top-level package ``name``, loaded anew. What its import raises passes through.

    Raises TreeError for a package that imports and is not what a comparison needs.
    """
    package = Path(tree.folder) / "nsa"
    refuse_foreign_imports(tree, package)
    forget_package(name)
    spec = importlib.util.spec_from_file_location(
        name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    if spec is None or spec.loader is None:
        raise TreeError(f"{tree.label}: {package} cannot be loaded as a package")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with ExitStack() as undo:
        undo.callback(forget_package, name)
        spec.loader.exec_module(module)
        undo.pop_all()
    missing = [each for each in NEEDED if not hasattr(module, each)]
    if missing:
        raise TreeError(f"{tree.label}: its nsa has no {', '.join(missing)}; it is too old to measure")
    for path in module.PATHS.values():
        if path.target.startswith("nsa."):
            raise TreeError(f"{tree.label}: path {path.name!r} runs {path.target!r}, {FOREIGN}")
    return module


def refuse_foreign_imports(tree: Tree, package: Path) -> None:
    """Raise TreeError where a file of the package imports ``nsa`` by that name."""
    for file in sorted(package.rglob("*.py")):
        text = file.read_text()
        if not re.search(r"^\s*(from|import)\s+nsa\b", text, re.MULTILINE):
            continue
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == "nsa" for name in names):
                place = f"nsa/{file.relative_to(package).as_posix()}:{node.lineno}"  # type: ignore[attr-defined]
                raise TreeError(f"{tree.label}: {place} imports nsa by its name, {FOREIGN}")


def forget_package(name: str) -> None:
    """Drop a package and its submodules from the import system."""
    for known in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
        del sys.modules[known]
