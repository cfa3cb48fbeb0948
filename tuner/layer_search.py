"""LayerSearch: shoot out combinations of paths inside the whole layer, host included, against the branches' choices.

The baseline is what the table in force chooses for each operation; a candidate changes one of them, to a path that the
entry tied with or ran up, or to another that can run. It walks like ``tuner.search`` and decides as little.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import torch

from nsa.dispatch_table import DispatchTable, load_dispatch_table
from nsa.paths import Candidate
from nsa.problem import Operation, SelectionProblem
from tuner.layer import OPERATIONS, LayerSizes, combined
from tuner.layer_bench import LayerTrial
from tuner.search import Search
from tuner.sweep import Family, SweepDefinition, SweepError

ALTERNATIVES = 4
"""Other paths tried per operation, those that the entry names first."""


class LayerSearch(Search):
    """One layer-level sweep on one device. ``table``: whose choices are the baseline, by default the one in force."""

    def __init__(self, sweep: SweepDefinition, *, table: DispatchTable | None = None, **settings: Any) -> None:
        super().__init__(sweep, **settings)
        self.table = table or load_dispatch_table(device=torch.device(self.device).type)
        axes = sweep.axes
        own = {"window": axes.window, "kernel_size": axes.kernel_size, "kernel_stride": axes.kernel_stride}
        if axes.operations != ("selection",) or any(len(values) > 1 for values in own.values()):
            raise SweepError(f"sweep {sweep.name!r}: a layer has every operation, one window and one compression")
        self.sizes = LayerSizes(**{name: values[0] for name, values in own.items()})
        self.families = [msgspec.structs.replace(family, pattern=self.sizes.pattern) for family in self.families]

    def run_family(self, family: Family) -> None:
        """Screen and shoot out the combinations of each problem."""
        for problem in family.problems:
            self.screen(family, problem, self.combinations(problem), thorough=False)
            self.shoot_out(family, problem)
            self.done += 1

    def asked(self) -> dict[str, Any]:
        """The table too, whose choices are the baseline."""
        return {**super().asked(), "table": hashlib.sha256(self.table.encode()).hexdigest()[:16]}

    def reserves(self, family: Family, problem: SelectionProblem) -> None:
        """A layer's workspace is the paths' own; ``sweep reserve`` measures them."""

    def default(self, problem: SelectionProblem) -> Candidate:
        """The branches' choices."""
        return combined(self.choices(problem))

    def choices(self, problem: SelectionProblem) -> dict[Operation, Candidate]:
        """What the table in force chooses for each operation."""
        found = {name: self.table.lookup(posed) for name, posed in self.sizes.problems(problem).items()}
        return {name: Candidate(path=choice.path, parameters=choice.parameters) for name, choice in found.items()}

    def combinations(self, problem: SelectionProblem) -> list[Candidate]:
        """The baseline, and it with one operation changed."""
        base, problems = self.choices(problem), self.sizes.problems(problem)
        changed = [
            combined({**base, operation: other})
            for operation in OPERATIONS
            for other in self.alternatives(problems[operation], base[operation])
        ]
        return [combined(base), *changed]

    def alternatives(self, problem: SelectionProblem, taken: Candidate) -> list[Candidate]:
        """What the problem's entry tied with and ran up, then other paths that can run, at their defaults."""
        device = torch.device(self.device)
        named = [
            other
            for entry in self.table.entries
            if entry.problem() == problem
            for other in (*entry.tied, entry.runner_up, entry.default)
            if other is not None
        ]
        for name in self.sweep.paths:
            path, filled = self.paths[name], self.paths[name].defaults(problem, device)
            slow = path.slow_to_build and device.type == "cpu"
            if path.dispatchable and not slow and path.unsupported_reason(problem, device, filled) is None:
                named.append(Candidate(path=name, parameters=filled))
        distinct = {other.name: other for other in named if other != taken}
        once = {other.path: other for other in reversed(distinct.values()) if other.path != taken.path}
        return [other for other in distinct.values() if once.get(other.path, other) is other][:ALTERNATIVES]

    def trial(self, problem: SelectionProblem) -> LayerTrial:
        """The layer around a selection problem."""
        return LayerTrial(
            problem=problem, pattern=self.sizes.pattern, seed=self.sweep.seed, device=self.device,
            registry=self.registry, sizes=self.sizes,
        )  # fmt: skip

    def _hold(self, family: Family, problem: SelectionProblem) -> None:  # noqa: ARG002  the sizes are the sweep's
        self.session.hold(self.trial(problem))
