"""The sections of a validation report that tell how fast: decode, prefill, training, and regressions per commit.

From a Validation to tables and figures. A path's ratio is to the default of its problem, in shared rounds; a head's is
to base, in pairs. Pure.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from tuner import stats, verdict
from tuner.compare_record import Measured, Pair
from tuner.compare_report import verdict_text, why
from tuner.evidence import ratio_text
from tuner.history import HistoryResult
from tuner.kernel_kinds import kind_of
from tuner.marks import CommitScenario
from tuner.plot_style import byte_text, evidence_text
from tuner.record import Record, by_problem
from tuner.report import shape_line
from tuner.rounds import aligned_records
from tuner.validation import TrainingRun, Validation, operation_of, short
from tuner.validation_figures import curve_svg, regressions_svgs
from tuner.validation_layout import TONES, Cell, Figure, Section, Table, cells, verdict_cell
from tuner.validation_rules import HOW, losses_of
from tuner.verdict import Comparison

KERNELS_SHOWN = 3
TITLES = {"decode": "Decode", "prefill": "Prefill"}


def timed_section(found: Validation, mode: str) -> Section:
    """Decode or prefill: head against base, and every path against the default."""
    tables = [*compared_table(found, mode), *path_tables(found, mode)]
    if not tables:
        return Section(key=mode, title=TITLES[mode], summary="no records", missing=HOW[mode])
    return Section(key=mode, title=TITLES[mode], summary="; ".join(summaries(found, mode)), tables=tuple(tables))


def summaries(found: Validation, mode: str) -> Iterable[str]:
    """A sentence on the comparison and one on the paths."""
    mine = [each for each in found.compare.result.scenarios if each.scenario.startswith(mode)] if found.compare else []
    if mine:
        verdicts = [str(each.verdict) for each in mine]
        counts = ", ".join(f"{verdicts.count(word)} {word}" for word in dict.fromkeys(verdicts))
        yield f"head against base: {counts}"
    groups = list(shootouts(found.of_mode(mode)))
    if groups:
        yield f"paths compared on {len(groups)} {'problem' if len(groups) == 1 else 'problems'}"


def compared_table(found: Validation, mode: str) -> Iterable[Table]:
    """Head against base, a row per scenario of the mode."""
    if found.compare is None:
        return
    result = found.compare.result
    pairs = [pair for line in found.compare.lines if isinstance(line, Measured) for pair in line.pairs]
    rows = []
    for each in result.scenarios:
        if not each.scenario.startswith(mode):
            continue
        mine = [pair for pair in pairs if (pair.scenario, pair.lane) == (each.scenario, "head")]
        say = Cell(verdict_text(each, result.effect), TONES.get(str(each.verdict), "bad"))
        figures = comparison_cells(each.comparison)
        rows.append(cells(each.scenario, *medians(mine), figures[0], say, *figures[1:], why(each)))
    if rows:
        caption = (
            f"Head {result.head.label} against base {result.base.label}: alpha {result.alpha:g} over "
            f"{len(result.scenarios)} scenarios, effect {100 * result.effect:g} %"
        )
        columns = ("scenario", "base us", "head us", "head / base", "verdict", "pairs", "E", "why")
        yield Table(caption=caption, columns=columns, rows=tuple(rows), numeric=(1, 2, 5, 6))


def medians(pairs: Sequence[Pair]) -> tuple[str, str]:
    """Median microseconds of base and head."""
    if not pairs:
        return "", ""
    base, head = (statistics.median(getattr(pair, name) for pair in pairs) for name in ("base_us", "other_us"))
    return f"{base:.1f}", f"{head:.1f}"


def comparison_cells(found: Comparison | None) -> tuple[Cell, str, str]:
    """Ratio with its interval, pairs, evidence."""
    if found is None or found.ratio is None:
        return Cell(""), "", ""
    text = ratio_text(found).partition(" in ")[0]
    interval = (found.ratio, found.ratio_low, found.ratio_high)
    return Cell(text, interval=interval), str(found.pairs), evidence_text(found.e_value)


def shootouts(records: Iterable[Record]) -> Iterable[list[Record]]:
    """The shoot-outs with a default, a list of finalists per operation, problem and pattern."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.stage == "shootout" and record.outcome == "ok" and record.samples:
            groups.setdefault(operation_of(record), []).append(record)
    for mine in groups.values():
        yield from (group for group in by_problem(mine).values() if any(record.baseline for record in group))


def path_tables(found: Validation, mode: str) -> Iterable[Table]:
    """Per shape: each problem's finalists against its default. By graphs of another number of calls: another table."""
    environments = {run.environment.run_id: run.environment for run in found.sweeps}
    tables: dict[str, list[tuple[Cell, ...]]] = {}
    for group in shootouts(found.of_mode(mode)):
        title = f"{operation_of(group[0])}, {shape_line(group[0].problem)}, {group[0].pattern}"
        execution = str(group[0].problem["execution"])
        timed = environments[group[0].run_id].execution_words(mode, execution)
        title += f", {timed}" if timed != execution else ""
        tables.setdefault(title, []).extend(path_rows(group))
    columns = ("context", "path", "median us", "time / default's", "verdict", "pairs", "E", "peak")
    for title, rows in tables.items():
        yield Table(caption=title, columns=columns, rows=tuple(rows), numeric=(2, 5, 6, 7))


def path_rows(group: Sequence[Record]) -> Iterable[tuple[Cell, ...]]:
    """The finalists of one problem, the default first, the others by time."""
    by_name = {record.candidate: record for record in group}
    default = next(name for name, record in by_name.items() if record.baseline)
    samples = aligned_records(list(by_name.values()))
    others = max(1, len(samples) - 1)
    for name in sorted(samples, key=lambda name: (name != default, median_us(by_name[name]))):
        record = by_name[name]
        place = f"{record.problem['T']}" + (f" B{record.problem['B']}" if record.problem["B"] != 1 else "")
        peak = "" if record.peak_bytes is None else byte_text(record.peak_bytes)
        if name == default:
            yield cells(place, f"{name} (default)", f"{median_us(record):.1f}", "1", "", "", "", peak)
            continue
        pairs = verdict.log_ratios(samples[default], samples[name])
        said = verdict.compare(pairs, alpha=verdict.PICK_ALPHA, scenarios=others, effect=0.0)
        ratio, count, evidence = comparison_cells(said)
        enough = said.pairs >= stats.pairs_needed(alpha=verdict.PICK_ALPHA, scenarios=others)
        word = verdict_cell(said.verdict if enough else "undecided")
        yield cells(place, name, f"{median_us(record):.1f}", ratio, word, count, evidence, peak)


def median_us(record: Record) -> float:
    """Median of a record's samples."""
    return statistics.median(sample.us for sample in record.samples)


def training_section(found: Validation) -> Section:
    """A row per training run, its loss, and what its step spends its time on."""
    of_operations = [*compared_table(found, "train"), *path_tables(found, "train")]
    if not found.training:
        return Section(
            key="training", title="Training", summary="no training run", tables=tuple(of_operations),
            missing=HOW["training"],
        )  # fmt: skip
    columns = ("run", "model", "step", "tokens/s", "loss", "outcome", "peak", "left for backward", "host waits a step")
    rows = [training_row(run) for run in found.training]
    tables = [Table(caption="Training runs", columns=columns, rows=tuple(rows), numeric=(3, 6, 7))]
    figures = []
    for number, run in enumerate(found.training):
        tables += kernel_table(run)
        if len(losses_of(run)) > 1:
            caption = f"Loss of {run.label} over {len(losses_of(run))} steps; {run.setup.text}"
            name = f"loss-{number}-{run.setup.name}"
            figures.append(Figure(name=name, svg=curve_svg(losses_of(run)), caption=caption))
    good = sum(1 for row in rows if row[5].text == "ok")
    best = max(found.training, key=rate_of)
    summary = f"{good} of {len(rows)} runs ok; fastest: {best.label}, {rate_of(best):,.0f} tokens/s"
    tables += of_operations
    return Section(key="training", title="Training", summary=summary, tables=tuple(tables), figures=tuple(figures))


def training_row(run: TrainingRun) -> tuple[Cell, ...]:
    """Sizes, speed, loss and memory of a run. The first reading, which compiles and allocates, has no speed."""
    setup, losses = run.setup, losses_of(run)
    rates = rates_of(run)
    rate = ""
    if rates:
        spread = f" ({min(rates):,.0f} to {max(rates):,.0f})" if len(rates) > 1 else ""
        rate = f"{rate_of(run):,.0f}{spread}"
    bad = [record for record in run.records if record.outcome != "ok"]
    outcome = verdict_cell("ok") if run.complete else Cell("not finished", "open")
    peak = max((r.peak_bytes for r in run.records if r.peak_bytes is not None), default=None)
    left = max((r.activation_bytes for r in run.records if r.activation_bytes is not None), default=None)
    waits = [record.synchronisations for record in run.records if record.synchronisations is not None]
    kind = f"{setup.parameters / 1e6:.1f}M, {setup.layers} layers, dim {setup.layer['dim']}, {setup.dtype}"
    return cells(
        f"{run.label}, {short(run.environment.commit)}", kind,
        f"{setup.batch} x {setup.sequence} tokens", rate,
        f"{losses[0]:.3f} to {losses[-1]:.3f}" if losses else "none", verdict_cell(bad[0].outcome) if bad else outcome,
        "" if peak is None else byte_text(peak), "" if left is None else byte_text(left),
        Cell(str(max(waits)), "bad" if max(waits) else "good") if waits else "",
    )  # fmt: skip


def rates_of(run: TrainingRun) -> list[float]:
    """Tokens per second between readings, but for the first."""
    return [r.tokens_per_s for r in run.records if r.outcome == "ok" and not r.profiled and r.first_step > 0]


def rate_of(run: TrainingRun) -> float:
    """Their median, 0 where there is none."""
    return statistics.median(rates_of(run) or [0.0])


def kernel_table(run: TrainingRun) -> Iterable[Table]:
    """What one profiled step spent its time on: by kind of work, then the dearest kernels."""
    for record in run.records:
        total = sum(kernel.us for kernel in record.kernels)
        if not total:
            continue
        kinds: dict[str, tuple[int, float]] = {}
        for kernel in record.kernels:
            launches, us = kinds.get(kind_of(kernel.name), (0, 0.0))
            kinds[kind_of(kernel.name)] = launches + kernel.launches, us + kernel.us
        shown = [(name, *found) for name, found in sorted(kinds.items(), key=lambda item: -item[1][1])]
        shown += [(f"dearest: {each.name[:80]}", each.launches, each.us) for each in record.kernels[:KERNELS_SHOWN]]
        rows = [cells(name, launches, f"{us / 1e3:.2f}", f"{100 * us / total:.1f} %") for name, launches, us in shown]
        caption = f"One step of {run.label} under a profiler"
        columns = ("work", "launches", "ms", "share")
        yield Table(caption=caption, columns=columns, rows=tuple(rows), numeric=(1, 2, 3))


def regressions_section(found: Validation) -> Section:
    """Every commit of the newest history against its anchor, and the plot."""
    history = found.history
    if history is None or not history.lines:
        return Section(key="regressions", title="Regressions per commit", summary="no history", missing=HOW["history"])
    marked: dict[str, list[str]] = {}
    for mark in history.marks:
        marked.setdefault(mark.commit, []).append(f"{mark.scenario}: {mark.what}".rstrip("; "))
    rows = [
        cells(
            short(line.commit), line.subject, verdict_cell(line.verdict), worst(line.scenarios),
            "; ".join(marked.get(line.commit, [line.reason])),
        )
        for line in history.lines
    ]  # fmt: skip
    columns = ("commit", "subject", "verdict", "slowest against the anchor", "what is worse than the commit before")
    table = Table(caption=f"Commits against {short(history.lines[0].anchor)}", columns=columns, rows=tuple(rows))
    count = len(history.lines)
    summary = f"{count} commits, " + (f"{len(marked)} of them worse than the one before" if marked else "none is worse")
    return Section(
        key="regressions", title="Regressions per commit", summary=summary, tables=(table,),
        figures=tuple(plots(history)),
    )  # fmt: skip


def worst(scenarios: Sequence[CommitScenario]) -> Cell:
    """The largest ratio of a commit, with its interval and scenario."""
    known = [each for each in scenarios if each.ratio is not None]
    if not known:
        return Cell("")
    most = max(known, key=lambda each: each.ratio or 0.0)
    high = "inf" if most.ratio_high is None else f"{most.ratio_high:.3f}"
    text = f"{most.ratio:.3f} [{most.ratio_low:.3f}, {high}] {most.scenario}"
    return Cell(text, interval=(most.ratio or 1.0, most.ratio_low, most.ratio_high))


def plots(history: HistoryResult) -> Iterable[Figure]:
    """The regression plot."""
    for number, svg in enumerate(regressions_svgs(history), 1):
        name = "regressions" if number == 1 else f"regressions-{number}"
        yield Figure(
            name=name, svg=svg, caption="Time of each commit over the anchor's, with what the pairs do not reject"
        )
