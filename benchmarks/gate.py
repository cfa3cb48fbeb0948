"""How often the gate is wrong on this machine, really run: the figures of "The gate" in docs/measurement.md.

`python benchmarks/gate.py` runs 200 A/A compares of at most 30 s of the quick decode scenario (alarms must be none at
alpha 0.001), 50 compares with a real 4 % slowdown of the varlen path (all must be found, median time to verdict below
60 s), and beside them what it replaces, on the same machine: a block of base, then a block of head, Mann-Whitney.
It goes on where it was stopped: a line per compare in OUT/gate-<tree>.jsonl. `--quick` is a smoke run of two each.
The slowdown is real: the tree's varlen path does small matrix products, as many as take 4 % of a call here, counted
once by a longer compare and kept in the same file.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from scipy.stats import mannwhitneyu

from tuner import stats
from tuner.compare import Comparing
from tuner.compare_record import LineFile, Question, Scenario, scenarios_of
from tuner.judge import CompareResult
from tuner.lanes import Stand
from tuner.measure import Stopwatch
from tuner.sides import LoadedSide
from tuner.sweep import read_sweep
from tuner.trees import Tree, copy_package, open_tree, tree_of

ROOT = Path(__file__).parent.parent
ALPHA = 0.001
SLOWDOWN = 0.04
TRIAL_PRODUCTS = 15  # about 4 % here: the first of them costs more than the rest, so count near the aim
CALIBRATION_S = 90.0
BLOCK = 30  # samples per arm of the sequential comparison
MARK = "    rows = widened(pack_queries("
EXTRA = """

_EXTRA = torch.ones(16, 16)


def _slower() -> None:
    for _ in range({products}):
        torch.mm(_EXTRA, _EXTRA)
"""


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """One run. part: "aa", "slow", "blocks aa", "blocks slow" or "products" (its ratio, `products` of them)."""

    part: str
    verdict: str
    ratio: float
    seconds: float
    rounds: int
    products: int = 0
    reason: str = ""


@contextmanager
def slowed(base: Tree, products: int) -> Iterator[Tree]:
    """The base tree with a varlen path that does so many more products per call."""
    with tempfile.TemporaryDirectory(prefix="nsa-tune-slowed-") as folder:
        copy_package(Path(base.folder), Path(folder))
        file = Path(folder) / "nsa" / "paths" / "varlen.py"
        text = file.read_text()
        if text.count(MARK) != 1:
            raise SystemExit(f"{file}: expected one line {MARK!r}; adapt benchmarks/gate.py")
        file.write_text(text.replace(MARK, f"    _slower()\n{MARK}") + EXTRA.format(products=products))
        yield tree_of(Path(folder), "slowed")


def compare(base: Tree, head: Tree, scenario: Scenario, out: Path, budget_s: float, **settings: float) -> CompareResult:
    """One compare of one scenario."""
    question = Question(base=base, head=head, scenarios=(scenario,), alpha=ALPHA, budget_s=budget_s, **settings)
    return Comparing(question, out=out).run()


def done(part: str, result: CompareResult, seconds: float, products: int = 0) -> Done:
    """What is kept of a compare."""
    found = result.scenarios[0]
    ratio = found.comparison.ratio if found.comparison and found.comparison.ratio else 0.0
    return Done(
        part=part, verdict=found.verdict, ratio=ratio, seconds=round(seconds, 2), rounds=result.rounds,
        products=products, reason=found.reason,
    )  # fmt: skip


class Gate:
    """All parts on one tree. Each `run_*` adds the runs that its file lacks."""

    def __init__(self, base: Tree, file: LineFile[Done], arguments: argparse.Namespace) -> None:
        self.base, self.file, self.arguments = base, file, arguments
        self.runs = file.read()
        sweep = read_sweep("quick", ["modes=decode", f"contexts={arguments.context}"])
        self.auto, self.varlen = scenarios_of(sweep, "cpu", ("auto", "varlen"))
        self.until = time.monotonic() + arguments.minutes * 60

    def of(self, part: str) -> list[Done]:
        """Runs of a part so far."""
        return [run for run in self.runs if run.part == part]

    def add(self, run: Done) -> None:
        """Keep a run."""
        self.file.append(run)
        self.runs.append(run)
        words = f"{run.part:12s} {run.verdict:10s} {run.ratio:.4f} {run.seconds:5.1f} s {run.reason[:80]}"
        print(words, file=sys.stderr)

    def more(self, part: str, wanted: int) -> Iterator[int]:
        """Numbers of the runs still to do, while there is time."""
        for number in range(len(self.of(part)), wanted):
            if time.monotonic() > self.until:
                return
            yield number

    def run_aa(self) -> None:
        """Compares of the tree with itself."""
        for _ in self.more("aa", self.arguments.aa):
            began = time.monotonic()
            result = compare(self.base, self.base, self.auto, self.arguments.out, self.arguments.seconds)
            self.add(done("aa", result, time.monotonic() - began))

    def products(self) -> int:
        """How many products are 4 % of a call, counted once."""
        known = self.of("products")
        if not known:
            began = time.monotonic()
            with slowed(self.base, TRIAL_PRODUCTS) as head:
                result = compare(self.base, head, self.varlen, self.arguments.out, CALIBRATION_S, effect=0.0)
            share = (done("", result, 0).ratio - 1.0) / TRIAL_PRODUCTS
            if share <= 0:
                raise SystemExit("the extra products cost nothing measurable: this machine is too busy now")
            self.add(done("products", result, time.monotonic() - began, products=max(1, round(SLOWDOWN / share))))
        return self.of("products")[-1].products

    def run_slow(self) -> None:
        """Compares with the slowed tree."""
        for _ in self.more("slow", self.arguments.slow):
            with slowed(self.base, self.products()) as head:
                began = time.monotonic()
                result = compare(self.base, head, self.varlen, self.arguments.out, self.arguments.slow_seconds)
                self.add(done("slow", result, time.monotonic() - began, products=self.products()))

    def run_blocks(self) -> None:
        """What the gate replaces: all of base, then all of head, and a rank test."""
        with slowed(self.base, self.products()) as head:
            for part, tree, wanted in (("aa", self.base, self.arguments.aa), ("slow", head, self.arguments.slow)):
                if len(self.of(f"blocks {part}")) >= wanted:
                    continue
                trees = {"base": self.base, "twin": self.base, "head": tree}
                sides = {side: LoadedSide(each, side, torch.device("cpu")) for side, each in trees.items()}  # type: ignore[arg-type]
                watch = Stopwatch(torch.device("cpu"), cold=False)
                stand = Stand(self.varlen, sides, watch, sample_us=500.0, kernel=None)  # type: ignore[arg-type]
                for number in self.more(f"blocks {part}", wanted):
                    self.add(self.block(stand, part, number))

    def block(self, stand: Stand, part: str, number: int) -> Done:
        """One block each; "slower" where the rank test says so at alpha."""
        stand.deal(random.Random(number))
        began = time.monotonic()
        base, head = ([stand.sample(call) for _ in range(BLOCK)] for call in stand.lanes["head"])
        p_value = float(mannwhitneyu(head, base, alternative="greater").pvalue)
        return Done(
            part=f"blocks {part}", verdict="slower" if p_value <= ALPHA else "not slower",
            ratio=statistics.median(head) / statistics.median(base), seconds=round(time.monotonic() - began, 2),
            rounds=BLOCK,
        )  # fmt: skip

    def print_figures(self) -> bool:
        """The figures; whether every promise held."""
        aa, slow = self.of("aa"), self.of("slow")
        alarms = [run for run in aa if run.verdict in ("slower", "faster")]
        found = [run for run in slow if run.verdict == "slower"]
        print(f"tree {self.base.label}, {self.auto.name} and {self.varlen.name}, {torch.get_num_threads()} threads")
        if aa:
            upper = stats.binomial_upper(len(alarms), len(aa), 0.95)
            verdicts = {name: sum(run.verdict == name for run in aa) for name in sorted({run.verdict for run in aa})}
            print(f"A/A: {len(alarms)} alarms in {len(aa)} compares (rate at most {upper:.2%}, 95 %); {verdicts}")
            print(f"     {spread([run.seconds for run in aa])} s each, ratio {spread([run.ratio for run in aa])}")
        if slow:
            print(f"+4 %: found {len(found)} of {len(slow)}, {spread([run.seconds for run in slow])} s to the verdict,")
            print(f"     ratio {spread([run.ratio for run in slow])} by {slow[-1].products} products a call")
        for part in ("aa", "slow"):
            blocks = self.of(f"blocks {part}")
            if blocks:
                share = sum(run.verdict == "slower" for run in blocks) / len(blocks)
                words = "alarms" if part == "aa" else "found"
                print(f"sequential blocks of {BLOCK}, Mann-Whitney, {part}: {words} {share:.1%} of {len(blocks)}")
        in_time = not slow or statistics.median(run.seconds for run in slow) < 60.0
        return not alarms and len(found) == len(slow) and in_time


def spread(values: list[float]) -> str:
    """median (5 % .. 95 %)."""
    ordered = sorted(values)
    low, high = ordered[int(0.05 * (len(ordered) - 1))], ordered[-1 - int(0.05 * (len(ordered) - 1))]
    return f"{statistics.median(ordered):.4g} ({low:.4g} .. {high:.4g})"


def main() -> int:
    """Run what is missing, print the figures; 0 where every promise held, 1 otherwise."""
    parser = argparse.ArgumentParser(description="error rates of the gate on this machine, really run")
    parser.add_argument("--aa", type=int, default=200, help="A/A compares")
    parser.add_argument("--slow", type=int, default=50, help="compares with a 4 %% slowdown")
    parser.add_argument("--seconds", type=float, default=30.0, help="budget of an A/A compare")
    parser.add_argument("--slow-seconds", type=float, default=120.0, help="budget of a compare with a slowdown")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after that long; run again to go on")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its own choice")
    parser.add_argument("--tree", default=None, help="commit or folder; by default the working tree")
    parser.add_argument("--out", type=Path, default=Path("out/gate"))
    parser.add_argument("--quick", action="store_true", help="a smoke run: two of each")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.aa = arguments.slow = 2
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the workers, which start later
        torch.set_num_threads(arguments.threads)
    with open_tree(arguments.tree, repository=ROOT) as base:
        name = f"gate-{base.digest[:10]}-T{arguments.context}-x{torch.get_num_threads()}.jsonl"
        gate = Gate(base, LineFile(arguments.out / name, Done), arguments)
        gate.run_blocks()
        gate.run_slow()
        gate.run_aa()
        held = gate.print_figures()
    print("every promise held" if held else "A PROMISE WAS BROKEN")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
