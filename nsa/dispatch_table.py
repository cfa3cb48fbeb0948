"""DispatchTable: measured picks with their evidence, read strictly, looked up without files, tensors or waiting.

A table is JSON: ``{version, device, software, entries}``; an entry is of one of three operations. Unknown fields, paths
and parameters are refused with the JSON path of the fault. It decides nothing at run time but which candidate a problem
gets; ``nsa.dispatch`` runs it.
"""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from platformdirs import user_data_path

from .defaults import default_candidate
from .device import DeviceIdentity, SoftwareIdentity, device_identity, software_identity
from .dispatch_entry import Choice, DispatchEntry, Level, Status
from .errors import DispatchTableError
from .flags import read_flags
from .paths import PATHS
from .problem import Overlap, SelectionProblem

VERSION = 2
READ_VERSIONS = (1, 2)
"""Version 1 knew selection alone; its entries lack the newer fields and read as their defaults."""
MAX_TABLE_BYTES = 16 * 2**20
MAX_REMEMBERED = 2**13
"""Problems and kinds of calls that a table remembers; with one more all are forgotten. A kind takes 3 KiB, and each
token of a context that grows makes some."""
PACKAGED = Path(__file__).parent / "dispatch_tables"

Families = dict[Any, dict[int, dict[int, tuple[int, DispatchEntry]]]]
"""Family -> batch -> context -> number and entry."""


class DispatchTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True, eq=False):
    """Picks for one device. Make it by decoding (``decode``, ``load_dispatch_table``) or from entries."""

    device: DeviceIdentity
    software: SoftwareIdentity
    entries: tuple[DispatchEntry, ...] = ()
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version not in READ_VERSIONS:
            raise DispatchTableError(f"dispatch table version {self.version}, this nsa reads {list(READ_VERSIONS)}")
        msgspec.structs.force_setattr(self, "version", VERSION)
        state = self.__dict__
        state["tier"] = "argument"
        state["choices"] = {}
        state["plans"] = {}
        state["stale"] = self.software.stale_against(software_identity()) if self.entries else ""
        state["families"] = self._families("branch")

    def _families(self, level: Level) -> Families:
        """Entries by family, batch and context; of two for one problem that of ``level``."""
        families: Families = {}
        seen: dict[Any, int] = {}
        for number, entry in sorted(enumerate(self.entries), key=lambda item: item[1].level != level):
            family = _family(entry)
            before = seen.setdefault((family, entry.B, entry.T, entry.level), number)
            if before != number:
                raise DispatchTableError(f"entries {before} and {number} are for the same problem")
            families.setdefault(family, {}).setdefault(entry.B, {}).setdefault(entry.T, (number, entry))
        return families

    def of_layer(self) -> DispatchTable:
        """The table as ``NSAAttention`` asks it: where the whole layer was timed too, what was fastest in it."""
        state = self.__dict__
        if "inside" not in state:
            state["inside"] = self
            if any(entry.level == "layer" for entry in self.entries):
                found = DispatchTable(device=self.device, software=self.software, entries=self.entries)
                found.__dict__.update(tier=state["tier"], families=self._families("layer"), inside=found)
                state["inside"] = found
        return cast(DispatchTable, state["inside"])

    @staticmethod
    def decode(data: bytes) -> DispatchTable:
        """From JSON. Raises DispatchTableError naming the fault and its JSON path."""
        if len(data) > MAX_TABLE_BYTES:
            raise DispatchTableError(f"dispatch table of {len(data)} bytes; at most {MAX_TABLE_BYTES} are read")
        try:
            return msgspec.json.decode(data, type=DispatchTable)
        except msgspec.DecodeError as error:
            raise DispatchTableError(f"not a dispatch table: {error}") from error

    def encode(self) -> bytes:
        """As indented JSON, one trailing newline."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    def lookup(self, problem: SelectionProblem) -> Choice:
        """The choice for a problem, remembered. No file, no tensor, no synchronisation."""
        choice: Choice | None = self.__dict__["choices"].get(problem)
        if choice is None:
            choice = self._resolve(problem)
            if len(self.__dict__["choices"]) >= MAX_REMEMBERED:
                self.__dict__["choices"].clear()
            self.__dict__["choices"][problem] = choice
        return choice

    def _resolve(self, problem: SelectionProblem) -> Choice:
        """Entries for problems alike in ``overlap`` answer; where there are none at all, those of the other one do.

        It says whether neighbouring rows agree, which changes what is fastest and never what is right. So such an
        answer is ``extrapolated``, but for one query, which has no neighbours.
        """
        choice = self._resolve_hinted(problem)
        if choice.entry and (problem.S > 1 or choice.status != "extrapolated"):
            return choice
        overlap: Overlap = "high" if problem.overlap == "low" else "low"
        other = self._resolve_hinted(msgspec.structs.replace(problem, overlap=overlap))
        if not other.entry or (choice.entry and other.status == "extrapolated"):
            return choice
        if problem.S == 1:
            return other
        why = f"{other.reason}; with {overlap} overlap, none with {problem.overlap}"
        return msgspec.structs.replace(other, status="extrapolated", reason=why)

    def _resolve_hinted(self, problem: SelectionProblem) -> Choice:
        """Entries for problems alike in ``complete`` answer; where none does, or only from afar, the others'.

        Those were measured on calls of the same sizes, and the hint changes no kernel: it only lets some paths run. So
        a pick that needs no hint serves a call without it, and any pick serves a call with it.
        """
        choice = self._resolve_alike(problem)
        if choice.entry and choice.status != "extrapolated":
            return choice
        other = self._resolve_alike(msgspec.structs.replace(problem, complete=not problem.complete))
        usable = other.entry and (problem.complete or not PATHS[other.path].needs_complete)
        otherwise = usable and problem.dense and PATHS[other.path].reads_complete
        if otherwise and other.status in ("exact", "bucket", "stale"):
            why = f"{other.reason}; with complete={not problem.complete}, with which {other.path} launches otherwise"
            return msgspec.structs.replace(other, status="extrapolated", reason=why)
        return other if usable and (not choice.entry or other.status != "extrapolated") else choice

    def _resolve_alike(self, problem: SelectionProblem) -> Choice:
        by_batch = self.__dict__["families"].get(_family(problem))
        if not by_batch:
            why = "no measurement of this kind of problem" if self.entries else "no dispatch table for this device"
            return self._default(problem, why)
        for batch in sorted(batch for batch in by_batch if batch >= problem.B):
            contexts = by_batch[batch]
            if problem.T in contexts:
                number, entry = contexts[problem.T]
                return self._measured(number, entry, batch == problem.B)
            ordered = sorted(contexts)
            place = bisect_left(ordered, problem.T)
            if 0 < place < len(ordered):
                return self._between(contexts[ordered[place - 1]][1], *contexts[ordered[place]])
        contexts = by_batch[min((batch for batch in by_batch if batch >= problem.B), default=max(by_batch))]
        number, nearest = contexts[min(contexts, key=lambda context: abs(context - problem.T))]
        measured = {batch: sorted(contexts) for batch, contexts in by_batch.items()}
        why = f"outside the measured contexts by batch {measured}; as at batch {nearest.B}, context {nearest.T}"
        return self._pick(number, nearest, "extrapolated", why + self._but_stale)

    def _measured(self, number: int, entry: DispatchEntry, same_batch: bool) -> Choice:
        status: Status = "exact" if same_batch else "bucket"
        reason = "measured" if same_batch else f"measured at the next larger batch {entry.B}"
        if entry.hinted:
            status, reason = "extrapolated", f"{reason}; with complete=True, with which {entry.path} launches otherwise"
        elif self.__dict__["stale"]:
            status = "stale"
        return self._pick(number, entry, status, reason + self._but_stale)

    def _between(self, lower: DispatchEntry, number: int, upper: DispatchEntry) -> Choice:
        agree = (
            "which agree" if lower.path == upper.path else f"which disagree ({lower.path}, {upper.path}): the upper's"
        )
        where = f"between measured contexts {lower.T} and {upper.T} at batch {upper.B}, {agree}"
        return self._pick(number, upper, "interpolated", where + self._but_stale)

    @property
    def _but_stale(self) -> str:
        return f", but {self.__dict__['stale']}" if self.__dict__["stale"] else ""

    def _pick(self, number: int, entry: DispatchEntry, status: Status, reason: str) -> Choice:
        return Choice(
            path=entry.path,
            parameters=entry.parameters,
            status=status,
            tier=self.__dict__["tier"],
            entry=f"{entry.run_id}#{number}",
            reason=reason,
            tied=entry.tied,
        )

    def _default(self, problem: SelectionProblem, reason: str) -> Choice:
        candidate = default_candidate(problem, self.device.kind)
        return Choice(
            path=candidate.path,
            parameters=candidate.parameters,
            status="default",
            tier=self.__dict__["tier"],
            reason=reason,
        )


def _family(problem: SelectionProblem) -> tuple[Any, ...]:
    """All that must be equal for two problems to share contexts. S = T (a whole prefill) is one family over T."""
    p = problem
    queries = -1 if p.S == p.T and p.mode != "decode" else p.S
    return (
        *(p.mode, p.dtype, queries, p.G, p.h, p.Dk, p.Dv),
        *(p.block_size, p.topk, p.form, p.overlap, p.execution, p.cache, p.complete),
        *(p.operation, p.window, p.kernel_size, p.kernel_stride),
    )


def user_table_path(device: DeviceIdentity) -> Path:
    """Where this user's table for a device lives; ``nsa-tune sweep`` writes it."""
    return user_data_path("nsa-tune") / "dispatch_tables" / f"{device.slug}.json"


def read_dispatch_table(path: Path) -> DispatchTable:
    """Read a table of any device. Raises DispatchTableError; a file over 16 MiB is refused before it is read."""
    try:
        size = path.stat().st_size
        if size > MAX_TABLE_BYTES:
            raise DispatchTableError(f"{path} has {size} bytes; a dispatch table has at most {MAX_TABLE_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise DispatchTableError(f"cannot read dispatch table {path}: {error.strerror}") from error
    try:
        return DispatchTable.decode(data)
    except DispatchTableError as error:
        raise DispatchTableError(f"{path}: {error}; make it again with 'nsa-tune sweep' or remove the file") from error


def load_dispatch_table(source: str | Path | None = None, *, device: str | None = None) -> DispatchTable:
    """The table to use on the current device: ``source``, else NSA_DISPATCH_TABLE, the user's, the packaged, or none.

    ``device`` is "cuda" or "cpu", by default "cuda" where there is one. Raises DispatchTableError where the file that
    is asked for is unreadable or belongs to another device; it never goes on to the next source then.
    """
    identity = device_identity(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    environment = read_flags().dispatch_table
    if source is not None:
        return _for_device(Path(source), identity, "argument")
    if environment:
        return _for_device(Path(environment), identity, "environment")
    for path, tier in ((user_table_path(identity), "user"), (PACKAGED / f"{identity.slug}.json", "packaged")):
        if path.exists():
            return _for_device(path, identity, tier)
    table = DispatchTable(device=identity, software=software_identity())
    table.__dict__["tier"] = "defaults"
    return table


def _for_device(path: Path, identity: DeviceIdentity, tier: str) -> DispatchTable:
    table = read_dispatch_table(path)
    if table.device.slug != identity.slug:
        raise DispatchTableError(
            f"{path} is for device {table.device.slug}, this one is {identity.slug}; run 'nsa-tune sweep' here"
        )
    table.__dict__["tier"] = tier
    return table
