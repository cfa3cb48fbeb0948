"""What a training run leaves behind: its TrainingSetup in environment.json, and a TrainingRecord per reading of losses.

``tuner.training`` writes them, ``tuner.validation`` reads them. A line is appended whole and synced, so a kill loses at
most the steps since the last reading. Nothing here needs a GPU.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from tuner.compare_record import LineFile
from tuner.record import Environment, Outcome, RecordError, Value, write_whole


class TrainingSetup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was trained. ``layer``: the fields of nsa.NSAConfig by name. ``parameters``: elements of the model.

    ``requested``: operation -> what the flags or the caller asked for. ``flags``: the NSA_ environment as it stood;
    ``overridden``: those of them that lost to another. ``text``: what was learnt.
    """

    name: str
    layer: dict[str, Value | None]
    layers: int
    parameters: int
    batch: int
    sequence: int
    steps: int
    dtype: str
    text: str
    compiled: bool = False
    requested: dict[str, str]
    flags: dict[str, str] = {}
    overridden: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch * self.sequence


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One way in which an operation was executed, and how often. ``met``: whether that is what was requested."""

    operation: str
    path: str
    parameters: dict[str, Value]
    status: str
    reason: str
    calls: int
    requested: str
    met: bool


class KernelTime(msgspec.Struct, frozen=True, array_like=True):
    """A kernel (an operator on a CPU) of one step: name, launches, microseconds in it alone."""

    name: str
    launches: int
    us: float


class TrainingRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The steps between two readings of the device, or the failure that ended them.

    ``losses``: of steps ``first_step`` .., as far as they are finite. ``seconds``: of all these steps, with the work of
    the device. ``peak_bytes``: of torch's allocator on a GPU, resident bytes of the process on a CPU.
    ``activation_bytes``: what one forward pass leaves for backward; None where no allocator tells.
    ``profiled``: one more step, under a profiler; then ``seconds`` is no measurement, ``kernels`` is by time, and
    ``synchronisations`` counts how often the host waited for the device or read from it (None on a CPU).
    """

    run_id: str
    commit: str
    date: str
    outcome: Outcome = "ok"
    reason: str = ""
    first_step: int
    losses: list[float] = []
    tokens: int = 0
    seconds: float = 0.0
    executed: list[Route] = []
    peak_bytes: int | None = None
    activation_bytes: int | None = None
    workspace_bytes: int | None = None
    growths: int | None = None
    profiled: bool = False
    kernels: list[KernelTime] = []
    synchronisations: int | None = None

    @property
    def tokens_per_s(self) -> float:
        """Of these steps."""
        return self.tokens / self.seconds


class TrainingFolder:
    """``records/<device>/<name>/<run_id>/``: environment.json (its ``sweep`` is the TrainingSetup), training.jsonl."""

    FILE = "training.jsonl"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment_file = path / "environment.json"
        self.done_file = path / "complete"
        self.lines: LineFile[TrainingRecord] = LineFile(path / self.FILE, TrainingRecord)

    def start(self, environment: Environment) -> None:
        """Make the folder and write its environment."""
        write_whole(self.environment_file, msgspec.json.format(msgspec.json.encode(environment), indent=1) + b"\n")

    def environment(self) -> Environment:
        """Where, when and on what. Raises RecordError for a file that is none."""
        try:
            return msgspec.json.decode(self.environment_file.read_bytes(), type=Environment)
        except msgspec.DecodeError as error:
            raise RecordError(f"{self.environment_file}: not an environment: {error}") from error

    def setup(self) -> TrainingSetup:
        """What was trained. Raises RecordError."""
        try:
            return msgspec.convert(self.environment().sweep, TrainingSetup)
        except msgspec.ValidationError as error:
            raise RecordError(f"{self.environment_file}: no training run: {error}") from error

    def finish(self) -> None:
        """Mark the run complete."""
        write_whole(self.done_file, b"")
