"""LayerBench: what a worker holds for a layer-level trial: an NSAAttention, its oracle, and its calls by candidate.

A candidate names a path for each operation of the layer; the layer takes them from a table that answers nothing else.
Proof: the output against ``tuner.layer_oracle``, the trace, and the launches that the three paths declare together.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nsa import NSAAttention, NSAConfig
from nsa.device import device_identity, software_identity
from nsa.dispatch_entry import Choice
from nsa.dispatch_table import DispatchTable
from nsa.flags import Flags
from nsa.paths import PATHS, Candidate, Evidence
from nsa.problem import TORCH_DTYPES, Operation, SelectionProblem
from nsa.trace import record_paths
from tuner.attest import FellBack, attest
from tuner.bench import Bench
from tuner.layer import LayerSizes, choices_of
from tuner.layer_oracle import chosen_blocks, decided, layer_rows, reordered, weights_of
from tuner.measure import RoundTimer, Stopwatch, sm_clock_reader
from tuner.oracle import WrongResult, orders
from tuner.trial import Assessment, Trial

SPOT_ROWS = 32


class LayerTrial(Trial, frozen=True, kw_only=True):
    """A layer around a selection problem: dim is its query heads times Dk; mean compression."""

    sizes: LayerSizes

    def config(self) -> NSAConfig:
        """The layer's sizes."""
        p, sizes = self.problem, self.sizes
        return NSAConfig(
            dim=p.G * p.h * p.Dk, num_heads=p.G * p.h, num_kv_heads=p.G, head_dim=p.Dk, value_head_dim=p.Dv,
            kernel_size=sizes.kernel_size, kernel_stride=sizes.kernel_stride, window_size=sizes.window,
            block_size=p.block_size, topk=p.topk,
        )  # fmt: skip

    def open_bench(self, about: Callable[[str], None], memory_limit_bytes: int) -> LayerBench:
        """Called in the worker."""
        return LayerBench(self, about, memory_limit_bytes)


class Named(DispatchTable, frozen=True, kw_only=True, eq=False, dict=True):
    """A table that answers with one candidate per operation, whatever the problem."""

    def lookup(self, problem: SelectionProblem) -> Choice:
        """The candidate of the problem's operation."""
        named: Candidate = self.__dict__["named"][problem.operation]
        return Choice(path=named.path, parameters=named.parameters, status="forced", tier="argument", reason="named")


class LayerBench(Bench):
    """A layer with seeded weights and tokens. Runs inside the worker process."""

    trial: LayerTrial

    def __init__(self, trial: LayerTrial, about: Callable[[str], None], memory_limit_bytes: int = 0) -> None:
        self.trial, self.about, self.memory_limit_bytes = trial, about, memory_limit_bytes
        self.device = torch.device(trial.device)
        self.config, self.dtype = trial.config(), TORCH_DTYPES[trial.problem.dtype]
        self.problems = trial.sizes.problems(trial.problem)
        torch.manual_seed(trial.seed)
        self.layer = NSAAttention(
            self.config, flags=Flags(), workspace=self._workspace(), device=self.device, dtype=self.dtype
        )
        tokens = torch.randn(trial.problem.B, trial.problem.T, self.config.dim, device=self.device)
        self.x = tokens.to(self.dtype)
        self.calls: dict[str, Callable[[], Any]] = {}
        self.per_replay = 1
        watch = Stopwatch(self.device, cold=trial.problem.cache == "cold")
        self.timer = RoundTimer(watch, sm_clock_reader(self.device))
        self.truths: dict[int, tuple[Tensor, Tensor, Tensor, float]] = {}

    def prepared(self) -> None:
        """Selections come from the layer itself, so nothing is known of their overlap."""

    def assess(self, candidate: Candidate, thorough: bool) -> Assessment:  # noqa: ARG002  always thorough
        """Check at a context whose blocks are all selected and at the trial's own; attest at the latter."""
        choices = choices_of(candidate.parameters)
        for operation, problem in self.problems.items():
            chosen = choices[operation]
            reason = PATHS[chosen.path].unsupported_reason(problem, self.device, chosen.parameters)
            if reason is not None:
                return Assessment(outcome="unsupported", reason=reason)
        self.about(candidate.name)
        error, bound = self._check(candidate)
        call = self._call(candidate)
        once = attest(call, self._evidence(choices), cuda=self.device.type == "cuda")
        return Assessment(
            outcome="ok", oracle_error=error, oracle_bound=bound, kernels=once.kernels, peak_bytes=once.peak_bytes
        )

    def build(self, candidate: Candidate) -> float:
        """Make an assessed candidate ready to be timed here. Returns microseconds of one call."""
        self.about(candidate.name)
        self._check(candidate)
        self.calls[candidate.name] = call = self._call(candidate)
        call()
        began = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) * 1e6

    def recheck(self, candidate: Candidate) -> float:
        """Hold what the timed call itself gives against the oracle. Raises WrongResult."""
        return self._compare(self.calls[candidate.name](), self.trial.problem.T, "the very call that is timed")[0]

    def _check(self, candidate: Candidate) -> tuple[float, float]:
        problem = self.trial.problem
        worst = (0.0, 1.0)
        for context in sorted({min(problem.T, problem.topk * problem.block_size), problem.T}):
            with record_paths() as seen:
                out = self._call(candidate, context)()
            wanted = {name: choice.path for name, choice in choices_of(candidate.parameters).items()}
            ran = {record.operation: record.path for record in seen.executed if record.operation in wanted}
            if ran != wanted:
                raise FellBack(f"at context {context} the layer was to run {wanted}, it ran {ran}")
            found = self._compare(out, context, f"context {context}")
            worst = max(worst, found, key=lambda pair: pair[0] / pair[1])
        if problem.mode == "train":
            self._check_gradient(candidate, min(problem.T, problem.topk * problem.block_size))
        return worst

    def _check_gradient(self, candidate: Candidate, context: int) -> None:
        """The gradient of the tokens under a loss over spot rows, at a context whose blocks are all selected."""
        rows = self._truth(context)[0]
        weight = torch.linspace(-1, 1, self.config.dim, dtype=torch.float64, device=self.device)

        def gradient(y_of: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
            x = self.x[:, :context].detach().to(dtype).requires_grad_()
            return torch.autograd.grad((y_of(x) * weight.to(dtype)).sum(), x)[0].double()

        def formula(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
            weights = weights_of(self.layer.state_dict(), self.config, dtype)
            return lambda x: layer_rows(self.config, weights, x, rows, taken)

        exact = weights_of(self.layer.state_dict(), self.config, torch.float64)
        taken, _ = chosen_blocks(self.config, exact, self.x[:, :context].double(), rows)
        truth, usual = gradient(formula(torch.float64), torch.float64), gradient(formula(self.dtype), self.dtype)
        self._name(candidate)
        found = gradient(lambda x: self.layer(x)[:, rows], self.dtype)
        floor = 4 * torch.finfo(self.dtype).eps * float(truth.abs().max())
        bound, error = max(2 * float((usual - truth).abs().max()), floor), float((found - truth).abs().max())
        if not error <= bound:
            raise WrongResult(f"context {context}: gradient of x off by {error:.3g}, derived bound {bound:.3g}")

    def _name(self, candidate: Candidate | None) -> None:
        """Make the layer take a combination, or the defaults."""
        identity = device_identity(self.device.type), software_identity()
        if candidate is None:
            self.layer.dispatch_table = DispatchTable(device=identity[0], software=identity[1])
            return
        table = Named(device=identity[0], software=identity[1])
        table.__dict__["named"] = choices_of(candidate.parameters)
        self.layer.dispatch_table = table

    def _compare(self, out: Tensor, context: int, where: str) -> tuple[float, float]:
        """Largest error over the rows whose blocks are decided, and the derived bound. Raises WrongResult."""
        rows, sure, truth, bound = self._truth(context)
        if not bool(out.isfinite().all()):
            raise WrongResult(f"{where}: the layer's output is not finite")
        mine = out if out.shape[1] == 1 else out[:, rows]
        error = float(((mine.double() - truth).abs().amax(-1) * sure).max())
        if not error <= bound:
            raise WrongResult(f"{where}: the layer is off by {error:.3g}, derived bound {bound:.3g}")
        return error, bound

    def _truth(self, context: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """Rows (R,), which of them are decided (B, R), their outputs in float64 (B, R, dim), and the bound."""
        if context not in self.truths:
            decode = self.trial.problem.mode == "decode"
            spots = torch.linspace(0, context - 1, min(SPOT_ROWS, context)).long()
            rows = torch.tensor([context - 1]) if decode else torch.unique(spots)
            rows, state, x = rows.to(self.device), self.layer.state_dict(), self.x[:, :context]
            exact = weights_of(state, self.config, torch.float64)
            taken, gap = chosen_blocks(self.config, exact, x.double(), rows)
            truth = layer_rows(self.config, exact, x.double(), rows, taken)
            sure, eager = decided(gap, self.dtype), weights_of(state, self.config, self.dtype)
            usual = 0.0
            for order in orders(self.config.dim, self.device):
                found = layer_rows(self.config, reordered(eager, order), x[..., order], rows, taken)
                usual = max(usual, float(((found.double() - truth).abs().amax(-1) * sure).max()))
            bound = max(2 * usual, 4 * torch.finfo(self.dtype).eps * float(truth.abs().max()))
            self.truths[context] = rows, sure, truth, bound
        return self.truths[context]

    def _evidence(self, choices: Mapping[Operation, Candidate]) -> Evidence:
        """What the three paths launch together: where two share an operator, its launches add up."""
        required: Counter[str] = Counter()
        open_ended: set[str] = set()
        for operation, problem in self.problems.items():
            chosen = choices[operation]
            lengths = [problem.row_width] * problem.rows if chosen.path in ("packed", "varlen") else []
            found = PATHS[chosen.path].evidence(problem, self.device, chosen.parameters, lengths)
            required.update(found.required)
            open_ended |= {pattern for pattern, count in found.required.items() if not count or chosen.path == "packed"}
        return Evidence(required={name: 0 if name in open_ended else count for name, count in required.items()})

    def _call(self, candidate: Candidate, context: int = 0) -> Callable[[], Tensor]:  # type: ignore[override]
        """The layer's output for the first ``context`` tokens, 0 = all, as the mode asks."""
        mode, layer = self.trial.problem.mode, self.layer
        x = self.x[:, :context] if context else self.x
        self._name(candidate)
        table = layer.dispatch_table

        def prefill() -> Tensor:
            layer.dispatch_table = table
            return layer.prefill(x)[0]

        if mode == "prefill":
            return prefill
        if mode == "train":
            leaves = [x.detach().clone().requires_grad_(), *layer.parameters()]

            def step() -> Tensor:
                layer.dispatch_table = table
                y: Tensor = layer(leaves[0])
                torch.autograd.grad(y, leaves, torch.ones_like(y))
                return y.detach()

            return step
        self._name(None)
        _, cache = layer.prefill(x[:, :-1], capacity=x.shape[1])
        before = cache.length

        def decode() -> Tensor:
            layer.dispatch_table = table
            y, _ = layer.decode(x[:, -1:], cache, route="branches")  # the route that takes its paths from the table
            cache.truncate(before)
            return y

        return decode
