"""Validation: everything that the records of one device say, read and chosen for a report. It measures nothing.

Of sweeps the newest run of each problem counts, of training the newest run of each setup, the newest comparison of two
trees, and the newest history. ``tuner.validation_rules`` recommends from it, ``tuner.validation_sections`` lays it out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from tuner.compare_record import CompareFolder, Line
from tuner.history import HistoryResult, read_history
from tuner.judge import CompareResult, judge
from tuner.record import Environment, Record, RecordError, RunFolder, problem_key
from tuner.training_record import TrainingFolder, TrainingRecord, TrainingSetup


class SweepRun(msgspec.Struct, frozen=True, kw_only=True):
    """A sweep's run. ``complete``: it reached its end."""

    environment: Environment
    records: tuple[Record, ...]
    complete: bool


class CompareRun(msgspec.Struct, frozen=True, kw_only=True):
    """A comparison's run, judged. ``lines``: its facts and pairs."""

    environment: Environment
    result: CompareResult
    lines: tuple[Line, ...]
    complete: bool

    @property
    def head(self) -> str:
        """The head's commit, written as other records write theirs, or its label."""
        head = self.result.head
        return head.commit + (f"-dirty-{head.digest[:8]}" if head.dirty else "") if head.commit else head.label

    @property
    def of_itself(self) -> bool:
        """Whether it is of one commit twice, as ``nsa-tune selftest`` makes: that tells of the machine, of no commit.
        Two commits that hold the same code are a comparison."""
        base, head = self.result.base, self.result.head
        return (base.commit, base.digest) == (head.commit, head.digest)

    @property
    def trees(self) -> tuple[str, str]:
        """The code that was compared."""
        return self.result.base.digest, self.result.head.digest


class TrainingRun(msgspec.Struct, frozen=True, kw_only=True):
    """A training run."""

    environment: Environment
    setup: TrainingSetup
    records: tuple[TrainingRecord, ...]
    complete: bool

    @property
    def label(self) -> str:
        """Its name, and what tells it from others of that name: a path that was asked for, compilation, batch."""
        path = self.setup.requested.get("selection", "auto")
        words = [word for word in (path if path != "auto" else "", "compiled" if self.setup.compiled else "") if word]
        return " ".join([self.setup.name, *words, f"B{self.setup.batch}"])


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    """What is reported on: one device. ``records`` are those that count; ``left_out`` says what does not.

    ``standing``: failures of the same commit in older runs, of candidates that the newer run did not try again.
    ``rejected``: older comparisons of the same two trees that found a regression.
    """

    root: str
    device: str = ""
    sweeps: tuple[SweepRun, ...] = ()
    records: tuple[Record, ...] = ()
    training: tuple[TrainingRun, ...] = ()
    compare: CompareRun | None = None
    standing: tuple[Record, ...] = ()
    rejected: tuple[CompareRun, ...] = ()
    history: HistoryResult | None = None
    left_out: tuple[str, ...] = ()

    @property
    def environments(self) -> list[Environment]:
        """Of every run that counts, oldest first."""
        runs: list[SweepRun | TrainingRun | CompareRun] = [*self.sweeps, *self.training]
        runs += [self.compare] if self.compare else []
        return sorted((run.environment for run in runs), key=lambda found: found.date)

    @property
    def subject(self) -> str:
        """The commit that the report is about: the comparison's head, else that of the newest run; '' without any."""
        if self.compare:
            return self.compare.head
        return self.environments[-1].commit if self.environments else ""

    def of_mode(self, mode: str) -> list[Record]:
        """The records of ``decode``, ``prefill`` or ``train``."""
        return [record for record in self.records if record.problem["mode"] == mode]


def read_validation(root: Path, *, device: str = "", commit: str = "") -> Validation:
    """What the folder ``root`` (records/, compares/, history/) says of a device, by default that of the newest run.

    ``commit``: only runs of commits that begin so. Raises RecordError for a file that cannot be read.
    """
    sweeps, training, compares = [], [], []
    for file in sorted(root.glob("**/environment.json"), key=lambda file: file.parent.name):
        folder = file.parent
        if (folder / TrainingFolder.FILE).exists():
            training.append(read_training(folder))
        elif (folder / "lines.jsonl").exists():
            compares.append(read_compare(folder))
        elif (folder / "trials.jsonl").exists():
            sweeps.append(read_sweep_run(folder))
    histories = [read_history(file) for file in sorted(root.glob("**/history/*.jsonl"))]
    chosen = device or newest_device([*sweeps, *training, *compares], histories)
    sweeps, left_out = kept(sweeps, chosen, commit, lambda run: run.environment.commit)
    training, more = kept(training, chosen, commit, lambda run: run.environment.commit)
    compares, still_more = kept(compares, chosen, commit, lambda run: run.head)
    if any(run.of_itself for run in compares):
        still_more.append("comparisons of a tree with itself, as selftest makes")
        compares = [run for run in compares if not run.of_itself]
    ours = [found for found in histories if found.lines and found.lines[0].device == chosen]
    newest = {record_key(record): run for run in sweeps for record in run.records}
    records = tuple(record for run in sweeps for record in run.records if newest[record_key(record)] is run)
    ids = {record.run_id for record in records}
    return Validation(
        root=str(root), device=chosen, records=records,
        sweeps=tuple(run for run in sweeps if run.environment.run_id in ids),
        training=tuple({setup_key(run.setup): run for run in training}.values()),
        compare=compares[-1] if compares else None,
        standing=standing_failures(sweeps, newest),
        rejected=tuple(
            run for run in compares[:-1] if run.trees == compares[-1].trees and run.result.verdict == "regressed"
        ),
        history=max(ours, key=lambda found: found.lines[-1].date, default=None),
        left_out=tuple(dict.fromkeys([*left_out, *more, *still_more])),
    )  # fmt: skip


def standing_failures(sweeps: list[SweepRun], newest: dict[tuple[Any, ...], SweepRun]) -> tuple[Record, ...]:
    """A failure stands until the same code is measured again: a run without the candidate does not take it back."""
    found: dict[tuple[Any, ...], Record] = {}
    for run in sweeps:
        for record in run.records:
            found[(*record_key(record), record.candidate, record.commit)] = record
    return tuple(
        record
        for key, record in found.items()
        if record.outcome != "ok"
        and (last := newest[key[:-2]]).environment.run_id != record.run_id
        and last.environment.commit == record.commit
    )


def read_sweep_run(folder: Path) -> SweepRun:
    """A sweep's run."""
    run = RunFolder(folder)
    return SweepRun(environment=run.environment(), records=tuple(run.records()[0]), complete=run.complete)


def read_training(folder: Path) -> TrainingRun:
    """A training run."""
    run = TrainingFolder(folder)
    lines = read_lines(run.lines)
    return TrainingRun(
        environment=run.environment(), setup=run.setup(), records=tuple(lines), complete=run.done_file.exists()
    )


def read_compare(folder: Path) -> CompareRun:
    """A comparison, judged anew."""
    run = CompareFolder(folder)
    lines = read_lines(run.lines)
    try:
        environment, question = run.environment(), run.question()
    except msgspec.DecodeError as error:
        raise RecordError(f"{run.environment_file}: no comparison: {error}") from error
    result = judge(question, lines, run=str(folder))
    return CompareRun(environment=environment, result=result, lines=tuple(lines), complete=run.done_file.exists())


def read_lines(file: Any) -> list[Any]:
    """All whole lines. Raises RecordError."""
    try:
        return list(file.read())
    except ValueError as error:
        raise RecordError(str(error)) from error


def kept(runs: list[Any], device: str, commit: str, commit_of: Any) -> tuple[list[Any], list[str]]:
    """The runs of a device and of commits that begin so, and words on the others."""
    found, words = [], []
    for run in runs:
        if run.environment.device["slug"] != device:
            words.append(f"runs on {run.environment.device['slug']} (--device)")
        elif not commit_of(run).startswith(commit):
            words.append(f"runs of commit {short(commit_of(run))}")
        else:
            found.append(run)
    return found, words


def newest_device(runs: Iterable[SweepRun | TrainingRun | CompareRun], histories: Iterable[HistoryResult]) -> str:
    """Of the newest run; of a history where there is nothing else; '' where there is no record."""
    newest = max((run.environment for run in runs), key=lambda found: found.date, default=None)
    if newest is not None:
        return str(newest.device["slug"])
    return next((found.lines[-1].device for found in histories if found.lines), "")


def record_key(record: Record) -> tuple[Any, ...]:
    """What a sweep's record is about, the candidate left out: operation, problem, pattern."""
    return operation_of(record), *problem_key(record.problem, record.pattern)


def setup_key(setup: TrainingSetup) -> bytes:
    """What tells two training runs apart but for when they ran."""
    return msgspec.json.encode(setup)


def operation_of(record: Record) -> str:
    """``selection``, ``compression``, ``window``, or ``layer``, whose path is a combination of the three's."""
    return "layer" if record.path == "layer" else str(record.problem.get("operation", "selection"))


def short(commit: str) -> str:
    """A commit for a reader: ten digits, ``+`` where the tree differed from it; what is no hash as it is."""
    head, dirty, _ = commit.partition("-dirty-")
    return (head[:10] if re.fullmatch("[0-9a-f]{10,}", head) else head) + ("+" if dirty else "")
