"""Ledger: Optuna proposes candidates of one family and keeps what was told of them.

One Optuna trial is one candidate; its steps are contexts; its value is the mean log-ratio to the default path measured
in the same rounds; peak bytes beyond the limit is a constraint. Small spaces are enumerated, larger ones go to TPE in
generations without duplicates. It measures nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping

import msgspec
import optuna
from optuna.trial import Trial as OptunaTrial
from optuna.trial import TrialState

from nsa.paths import Candidate, Parameter
from nsa.trace import ParameterValue
from tuner.record import Record

ENUMERATE_AT_MOST = 96
GENERATIONS, PER_GENERATION = 4, 16
PRUNE_ABOVE = math.log(2.0)
"""A candidate twice as slow as the default at one context is not tried at larger ones."""

Space = Mapping[str, tuple[Parameter, ...]]


class Proposal(msgspec.Struct, frozen=True):
    """A candidate and the Optuna trial that proposed it."""

    candidate: Candidate
    trial: OptunaTrial


class Ledger:
    """One family's study. ``space`` maps path names to the parameters to cross."""

    def __init__(self, name: str, space: Space, storage: optuna.storages.BaseStorage | str, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of multivariate and group
            sampler = optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed)
        self.space = space
        self.study = optuna.create_study(
            study_name=name,
            storage=storage,
            sampler=sampler,
            pruner=optuna.pruners.ThresholdPruner(upper=PRUNE_ABOVE),
            direction="minimize",
            load_if_exists=True,
        )
        self.enumerated = size_of(space) <= ENUMERATE_AT_MOST
        self.generations = 1 if self.enumerated else GENERATIONS
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)  # the process that ran it was killed
        for _ in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self.study.tell(self.study.ask(), state=TrialState.FAIL)  # it was enqueued and never asked for

    def ask(self, generation: int) -> list[Proposal]:
        """The candidates of a generation, each once. All are proposed again after a kill; records say what is known."""
        if generation == 0:
            wanted = list(self.everything()) if self.enumerated else list(self.first_of_each_path())
            for candidate in wanted:
                self.study.enqueue_trial(self._fixed(candidate))
            return [self._proposal() for _ in wanted]
        seen = {str(trial.user_attrs.get("candidate")) for trial in self.study.get_trials(deepcopy=False)}
        fresh: list[Proposal] = []
        for _ in range(10 * PER_GENERATION):
            proposal = self._proposal()
            if proposal.candidate.name in seen:
                self.study.tell(proposal.trial, state=TrialState.PRUNED)  # of a failure TPE would learn nothing
                continue
            seen.add(proposal.candidate.name)
            fresh.append(proposal)
            if len(fresh) == PER_GENERATION:
                break
        return fresh

    def report(self, proposal: Proposal, log_ratio: float, context: int) -> bool:
        """Tell a step's value; answers whether the candidate is too slow for larger contexts."""
        proposal.trial.report(log_ratio, step=context)
        return proposal.trial.should_prune()

    def close(self, proposal: Proposal, log_ratios: list[float], peak_over_limit: float, *, pruned: bool) -> None:
        """End a candidate's trial: its value, its constraint, or that it was pruned or never ran."""
        proposal.trial.set_constraint("peak_bytes", peak_over_limit)
        if not log_ratios:
            self.study.tell(proposal.trial, state=TrialState.FAIL)
        elif pruned:
            self.study.tell(proposal.trial, state=TrialState.PRUNED)
        else:
            self.study.tell(proposal.trial, sum(log_ratios) / len(log_ratios))

    def everything(self) -> Iterator[Candidate]:
        """Every candidate of the space, each path's defaults first, paths taking turns."""
        columns = [list(candidates_of(path, items)) for path, items in self.space.items()]
        for row in range(max(map(len, columns), default=0)):
            for column in columns:
                if row < len(column):
                    yield column[row]

    def first_of_each_path(self) -> Iterator[Candidate]:
        """Each path at its defaults."""
        for path, items in self.space.items():
            yield next(candidates_of(path, items))

    def _fixed(self, candidate: Candidate) -> dict[str, object]:
        return {"path": candidate.path} | {
            f"{candidate.path}.{name}": value for name, value in candidate.parameters.items()
        }

    def _proposal(self) -> Proposal:
        trial = self.study.ask()
        path = trial.suggest_categorical("path", list(self.space))
        chosen: dict[str, ParameterValue] = {}
        for item in self.space[path]:
            value = trial.suggest_categorical(f"{path}.{item.name}", list(item.ladder))
            assert value is not None
            chosen[item.name] = value
        candidate = Candidate(path=path, parameters=chosen)
        trial.set_user_attr("candidate", candidate.name)
        return Proposal(candidate, trial)


class Progress:
    """A generation on its way through the contexts: who is still in, and what the ledger is told of each."""

    def __init__(self, ledger: Ledger, proposals: list[Proposal]) -> None:
        self.ledger, self.everyone, self.alive = ledger, proposals, list(proposals)
        self.values: dict[str, list[float]] = {proposal.candidate.name: [] for proposal in proposals}
        self.peaks: dict[str, int] = {}
        self.pruned: set[str] = set()

    def report(self, context: int, ratios: dict[str, float], records: list[Record]) -> None:
        """Tell a context's values. Who failed is out; who is too slow is, unless it is the best of its path. Who was
        not tried for want of time stays."""
        best: dict[str, str] = {}
        tried = {record.candidate for record in records}
        for record in sorted((r for r in records if r.candidate in ratios), key=lambda r: ratios[r.candidate]):
            best.setdefault(record.path, record.candidate)
            self.peaks[record.candidate] = max(self.peaks.get(record.candidate, 0), record.peak_bytes or 0)
        staying = []
        for proposal in self.alive:
            name = proposal.candidate.name
            if name in ratios:
                self.values[name].append(ratios[name])
                if not self.ledger.report(proposal, ratios[name], context) or name in best.values():
                    staying.append(proposal)
                else:
                    self.pruned.add(name)
            elif name not in tried:
                staying.append(proposal)
        self.alive = staying

    def close(self, memory_limit_bytes: int) -> None:
        """End every candidate's trial."""
        for proposal in self.everyone:
            name = proposal.candidate.name
            over = self.peaks.get(name, 0) - (memory_limit_bytes or 2**62)
            self.ledger.close(proposal, self.values[name], over, pruned=name in self.pruned)


def size_of(space: Space) -> int:
    """Number of candidates in a space."""
    return sum(math.prod(len(item.ladder) for item in items) for items in space.values())


def candidates_of(path: str, items: tuple[Parameter, ...]) -> Iterator[Candidate]:
    """Every combination of a path's ladders, defaults first."""

    def extend(index: int, chosen: dict[str, ParameterValue]) -> Iterator[Candidate]:
        if index == len(items):
            yield Candidate(path=path, parameters=dict(chosen))
            return
        item = items[index]
        for value in sorted(item.ladder, key=lambda value: value != item.default):
            yield from extend(index + 1, {**chosen, item.name: value})

    return extend(0, {})
