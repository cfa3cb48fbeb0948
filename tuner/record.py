"""What a run leaves behind: Record (a JSON line per candidate and problem), Environment beside it, and their files.

Everything downstream (verdicts, tables, plots, reports) reads these and nothing else; no GPU and no torch from here on.
Files are written to a temporary name, synced and renamed; lines are appended whole and synced.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

Outcome = Literal["ok", "unsupported", "wrong", "fell_back", "oom", "crash", "hang", "compile_error"]
Stage = Literal["screen", "shootout", "reserve"]
Value = int | float | str | bool
DEFAULT_REGISTRY = "nsa.paths:PATHS"
"""``module:NAME`` of the paths that are measured where none is named, and that the runtime and its tables know."""


class RecordError(ValueError):
    """A file of a run that cannot be read. Names the file and the line."""


def new_run_id(now: datetime, commit: str) -> str:
    """``20261123T040302-61e9152-5c0f3a``: when and of which commit, and no other run's, on whatever machine."""
    return f"{now:%Y%m%dT%H%M%S}-{commit[:7]}-{secrets.token_hex(3)}"


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One timing: which round, at which position of that round's order, and microseconds per call."""

    round: int
    position: int
    us: float


class SequenceSample(msgspec.Struct, frozen=True, array_like=True):
    """One call of a reserve sequence: step, keys of that call, microseconds, growths of the workspace so far."""

    step: int
    T: int
    us: float
    growths: int


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One candidate on one problem. Only ``outcome`` "ok" has samples; there is no number made from absence.

    ``problem``: the fields of nsa.SelectionProblem by name. ``union``: measured overlap of the selections timed on.
    ``oracle_error``/``oracle_bound``: largest deviation from the float64 oracle, and what was allowed.
    ``kernels``: name and launches of what a profiler saw in one call. ``dropped``: samples discarded for throttling.
    ``baseline``: the candidate is what the others of this problem are compared with: the default, or where that failed
    what stood in for it.
    """

    run_id: str
    commit: str
    date: str
    stage: Stage
    problem: dict[str, Value]
    pattern: str
    union: float | None = None
    path: str
    parameters: dict[str, Value]
    baseline: bool = False
    outcome: Outcome
    reason: str = ""
    oracle_error: float | None = None
    oracle_bound: float | None = None
    kernels: dict[str, int] = {}
    samples: list[Sample] = []
    sequence: list[SequenceSample] = []
    dropped: int = 0
    calls_per_sample: int = 0
    peak_bytes: int | None = None
    workspace_bytes: int | None = None
    growths: int | None = None

    @property
    def candidate(self) -> str:
        """``path(parameter=value, ...)``."""
        inner = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"{self.path}({inner})" if inner else self.path


class Environment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and how a run was made. ``device`` and ``software`` are nsa.device's identities by field."""

    run_id: str
    commit: str
    date: str
    tool: str
    device: dict[str, Value]
    software: dict[str, Value]
    clocks: dict[str, Value]
    timer: dict[str, Value]
    sweep: dict[str, Any]

    def execution_words(self, mode: str, execution: str) -> str:
        """``eager``, ``graph``, or ``graph of 8 calls`` in decode. Times by another number of calls do not compare."""
        calls = int(self.sweep.get("calls_per_graph", 1))
        return f"graph of {calls} calls" if (mode, execution) == ("decode", "graph") and calls > 1 else execution


class RunFolder:
    """``records/<device>/<sweep>/<run_id>/``: environment.json, trials.jsonl, and the ledger optuna.journal."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment_file = path / "environment.json"
        self.trials_file = path / "trials.jsonl"
        self.ledger_file = path / "optuna.journal"
        self.done_file = path / "complete"

    def hold(self) -> bool:
        """Take the run for this process until it ends; False where another process has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Let other processes have the run."""
        self._lock.close()

    @property
    def complete(self) -> bool:
        """Whether the run reached its end."""
        return self.done_file.exists()

    def environment(self) -> Environment:
        """The run's environment. Raises RecordError for a file that is none."""
        try:
            return msgspec.json.decode(self.environment_file.read_bytes(), type=Environment)
        except msgspec.DecodeError as error:
            raise RecordError(f"{self.environment_file}: not an environment: {error}") from error

    def start(self, environment: Environment) -> None:
        """Make the folder and write its environment."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.environment_file, msgspec.json.format(msgspec.json.encode(environment), indent=1) + b"\n")

    def append(self, records: list[Record]) -> None:
        """Append a line per record in one write, synced, so that a kill loses at most what was being measured."""
        with self.trials_file.open("ab") as file:
            file.write(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> tuple[list[Record], str]:
        """All whole records, and a word about a half-written last line ('' where there was none)."""
        if not self.trials_file.exists():
            return [], ""
        data = self.trials_file.read_bytes()
        whole, _, rest = data.rpartition(b"\n")
        records = [
            _decode_line(line, number, self.trials_file) for number, line in enumerate(whole.split(b"\n"), 1) if line
        ]
        return records, f"dropped a half-written line of {len(rest)} bytes" if rest else ""

    def repair(self) -> str:
        """Cut a half-written last line off the records, and the ledger where a full disk tore it; say so."""
        records, word = self.records()
        if word:
            write_whole(self.trials_file, b"".join(msgspec.json.encode(record) + b"\n" for record in records))
        return "; ".join(filter(None, (word, self._repair_ledger())))

    def _repair_ledger(self) -> str:
        """Optuna appends behind a line that a full disk cut short, and can read neither then. What is cut off is
        proposed again; what was measured of it stands in the records."""
        data = self.ledger_file.read_bytes() if self.ledger_file.exists() else b""
        whole = 0
        for line in data.splitlines(keepends=True):
            try:
                msgspec.json.decode(line)
            except msgspec.DecodeError:
                break
            if not line.endswith(b"\n"):
                break
            whole += len(line)
        if whole == len(data):
            return ""
        write_whole(self.ledger_file, data[:whole])
        return f"cut {len(data) - whole} unreadable bytes off the ledger"

    def finish(self) -> None:
        """Mark the run complete."""
        write_whole(self.done_file, b"")


def _decode_line(line: bytes, number: int, file: Path) -> Record:
    try:
        return msgspec.json.decode(line, type=Record)
    except msgspec.DecodeError as error:
        raise RecordError(f"{file}:{number}: not a record: {error}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old one or the new one, never half: temporary name, sync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)  # there only if something failed


def run_folders(root: Path) -> Iterator[RunFolder]:
    """Every run below a records folder, oldest first by run id."""
    found = sorted(root.glob("**/environment.json"), key=lambda file: file.parent.name)
    return (RunFolder(file.parent) for file in found)


def resume_or_start(records: Path, environment: Environment) -> tuple[RunFolder, str]:
    """The unfinished run of the same sweep, commit and software on the same device below ``records``, or a new one.

    Held for this process; with a word about what was dropped of the unfinished one. A budget says how long to go on,
    not what is measured: a run goes on under another one.
    """
    root = records / str(environment.device["slug"]) / str(environment.sweep["name"])
    wanted = _asked(msgspec.json.decode(msgspec.json.encode(environment), type=Environment))
    for folder in reversed(list(run_folders(root))):
        if not folder.complete and _asked(folder.environment()) == wanted and folder.hold():
            return folder, folder.repair()
    folder = RunFolder(root / environment.run_id)
    folder.hold()
    folder.start(environment)
    return folder, ""


def _asked(environment: Environment) -> tuple[dict[str, Any], str, dict[str, Value]]:
    sweep = {name: value for name, value in environment.sweep.items() if name != "budget_s"}
    return sweep, environment.commit, environment.software


def problem_key(problem: dict[str, Value], pattern: str) -> tuple[Any, ...]:
    """A hashable form of what was measured."""
    return (*sorted(problem.items()), ("pattern", pattern))


def by_problem(records: Iterable[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """Records grouped by problem and pattern, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(problem_key(record.problem, record.pattern), []).append(record)
    return groups
