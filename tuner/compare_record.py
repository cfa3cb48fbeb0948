"""What a comparison of two trees leaves behind: its Question, and lines of facts and pairs, appended as they come.

``tuner.compare`` writes them, ``tuner.judge`` reads them and nothing else. A line is appended whole and synced, so a
kill loses at most what was being measured; the same question asked again goes on from there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec

from nsa.problem import SelectionProblem
from tuner.record import Environment, Outcome, RecordError, Value, write_whole
from tuner.sweep import SweepDefinition, SweepError, families
from tuner.trees import Tree

Side = Literal["base", "twin", "head"]
"""``twin`` is base loaded a second time: the other side of the lanes by which a run audits itself."""
SIDES: tuple[Side, ...] = ("base", "twin", "head")

Lane = Literal["head", "aa", "slow_1", "slow_4", "kernel"]
"""``head``: head against base. ``aa``: twin against base. ``slow_1``, ``slow_4``: twin with extra work against base.
``kernel``: the path that base chose, called directly on both sides: tells a slower kernel from dearer dispatch."""
INJECTED: dict[Lane, float] = {"aa": 0.0, "slow_1": 0.01, "slow_4": 0.04}
AUTO = "auto"

LineT = TypeVar("LineT")


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What is compared: a problem with inputs of a pattern, run by ``path``; "auto" is what each side dispatches."""

    name: str
    problem: SelectionProblem
    pattern: str
    path: str = AUTO


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one side in one scenario before a clock is read; ``path`` and ``parameters`` are what it ran."""

    outcome: Outcome
    reason: str = ""
    path: str = ""
    parameters: dict[str, Value] = {}
    status: str = ""
    oracle_error: float | None = None
    oracle_bound: float | None = None
    peak_bytes: int | None = None
    workspace_bytes: int | None = None
    growths: int | None = None

    @property
    def choice(self) -> str:
        """``path(parameter=value, ...)``."""
        return f"{self.path}({', '.join(f'{name}={value}' for name, value in self.parameters.items())})"


class Pair(msgspec.Struct, frozen=True, array_like=True):
    """Samples of two sides taken in turn: microseconds per call of base and of the lane's other side."""

    scenario: str
    lane: Lane
    round: int
    base_first: bool
    base_us: float
    other_us: float


class Checked(msgspec.Struct, frozen=True, kw_only=True, tag="check"):
    """One side's facts; a later line about the same side and scenario replaces an earlier one."""

    scenario: str
    side: Side
    facts: Facts


class Launched(msgspec.Struct, frozen=True, kw_only=True, tag="launch"):
    """A worker was started: in which order it loaded the sides, on what device. ``calls``: calls per sample."""

    number: int
    order: tuple[Side, ...]
    device: str
    calls: dict[str, int] = {}


class Measured(msgspec.Struct, frozen=True, kw_only=True, tag="pairs"):
    """Pairs of some rounds. ``dropped``: pairs discarded for throttling. ``clock_mhz``: median SM clock, 0 on a CPU.

    ``injected``: scenario -> lane -> calibrated share of extra work. ``seconds``: of the budget, since the line before.
    """

    launch: int
    pairs: list[Pair]
    dropped: int = 0
    clock_mhz: int = 0
    injected: dict[str, dict[Lane, float]] = {}
    seconds: float = 0.0


Line = Checked | Launched | Measured


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked. ``alpha``: false-alarm rate over all scenarios and looks. ``effect``: what change matters.

    ``sample_us``: length of a sample, 0 = the device's own. ``watch``: "module:factory" of the stopwatch, called with
    (device, cold=, waits=); tests put a scripted one there.
    Raises SweepError for what cannot be asked.
    """

    base: Tree
    head: Tree
    scenarios: tuple[Scenario, ...]
    device: str = "cpu"
    alpha: float = 0.001
    effect: float = 0.01
    budget_s: float = 300.0
    sample_us: float = 0.0
    launches: int = 3
    memory_limit_bytes: int = 0
    watch: str = "tuner.measure:Stopwatch"

    def __post_init__(self) -> None:
        if not 0.0 <= self.effect < INJECTED["slow_4"]:
            raise SweepError(f"effect {self.effect}: expected 0 <= effect < 0.04, or the 4 % lane cannot be found")
        if not 0.0 < self.alpha < 1.0:
            raise SweepError(f"alpha {self.alpha}: expected a rate between 0 and 1, such as 0.001")
        if not self.scenarios:
            raise SweepError("nothing to compare: the sweep has no scenario")

    def same_as(self, other: Question) -> bool:
        """Whether pairs measured for one serve the other: same code on both sides, scenarios and limits."""
        return self._key() == other._key()

    def _key(self) -> tuple[Any, ...]:
        return (
            *(self.base.digest, self.head.digest, self.scenarios, self.device, self.alpha, self.effect),
            *(self.sample_us, self.memory_limit_bytes, self.watch),
        )


class LineFile(Generic[LineT]):
    """JSON lines of one type, appended whole and synced. Reading cuts off a half-written last line."""

    def __init__(self, path: Path, kind: Any) -> None:
        self.path, self.decoder = path, msgspec.json.Decoder(kind)

    def append(self, *lines: LineT) -> None:
        """Append in one write, synced."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[LineT]:
        """All whole lines. Raises RecordError with the place of one that is none of this type."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole, end, rest = data.rpartition(b"\n")
        if rest:
            write_whole(self.path, whole + end)
        found: list[LineT] = []
        for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
            try:
                found.append(self.decoder.decode(line))
            except msgspec.DecodeError as error:
                raise RecordError(f"{self.path}:{number}: {error}; move the file away to start over") from error
        return found


class CompareFolder:
    """``compares/<device>/<run_id>/``: environment.json (its ``sweep`` is the Question) and lines.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment_file = path / "environment.json"
        self.done_file = path / "complete"
        self.lines: LineFile[Line] = LineFile(path / "lines.jsonl", Line)

    def start(self, environment: Environment) -> None:
        """Make the folder and write its environment."""
        write_whole(self.environment_file, msgspec.json.format(msgspec.json.encode(environment), indent=1) + b"\n")

    def environment(self) -> Environment:
        """Where, when and on what. Raises msgspec.ValidationError for a file that is none."""
        return msgspec.json.decode(self.environment_file.read_bytes(), type=Environment)

    def question(self) -> Question:
        """What was asked."""
        return msgspec.convert(self.environment().sweep, Question)

    def finish(self) -> None:
        """Mark the comparison complete."""
        write_whole(self.done_file, b"")


def unfinished(root: Path, question: Question, software: dict[str, Value], tool: str) -> CompareFolder | None:
    """The newest comparison below ``root`` that asked the same with the same software and tool and did not end."""
    for file in sorted(root.glob("*/environment.json"), key=lambda file: file.parent.name, reverse=True):
        folder = CompareFolder(file.parent)
        if folder.done_file.exists():
            continue
        try:
            before = folder.environment()
            same = (before.software, before.commit) == (software, tool) and folder.question().same_as(question)
        except msgspec.ValidationError:  # another version of this tool asked it
            same = False
        if same:
            return folder
    return None


def scenarios_of(sweep: SweepDefinition, device_kind: str, paths: tuple[str, ...] = ()) -> tuple[Scenario, ...]:
    """Each problem of a sweep as dispatched, and by each path that the sweep or ``paths`` names. Raises SweepError.

    Names are ``decode T=1024 auto``; the family is spelt out where the sweep has more than one of a mode.
    """
    if not paths:
        default = next(field.default for field in msgspec.structs.fields(SweepDefinition) if field.name == "paths")
        paths = (AUTO, *(sweep.paths if sweep.paths != default else ()))
    found = families(sweep, device_kind)
    modes = [family.problems[0].mode for family in found]
    return tuple(
        Scenario(
            name=f"{problem.mode if modes.count(problem.mode) == 1 else family.name} T={problem.T} {path}",
            problem=problem, pattern=family.pattern, path=path,
        )
        for family in found
        for problem in family.problems
        for path in paths
    )  # fmt: skip
