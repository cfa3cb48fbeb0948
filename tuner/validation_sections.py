"""The sections of a validation report that tell what ran and what it took: environment, correctness, routes, memory.

From a Validation to tables; times are in ``tuner.validation_times``. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tuner.plot_style import byte_text
from tuner.record import Environment, Record
from tuner.validation import TrainingRun, Validation, operation_of, short
from tuner.validation_layout import Cell, Section, Table, Tone, cells, verdict_cell
from tuner.validation_rules import FAILED, HOW

KERNELS_SHOWN = 3
LABELS = {
    "cuda": "CUDA", "driver": "driver", "flash_attn": "flash-attn", "sm_mhz": "SM clock at the start, MHz",
    "max_sm_mhz": "highest SM clock, MHz", "memory_mhz": "memory clock, MHz", "power_limit_w": "power limit, W",
    "temperature_c": "temperature at the start, C",
}  # fmt: skip


def environment_section(found: Validation) -> Section:
    """Device, driver, clocks, power, versions, flags, and the runs."""
    environments = found.environments
    if not environments:
        return Section(key="environment", title="Environment", summary="no records", missing=HOW["decode"])
    last = environments[-1]
    facts = [
        ("device", f"{last.device['name']}, {last.device['units']} {units(last)}"), *joined(environments, "software"),
        *joined(environments, "clocks"),
    ]  # fmt: skip
    facts += [(f"flags of {run.label}", flags_text(run)) for run in found.training]
    runs = [
        cells(e.run_id, e.tool, name, short(commit), e.date, ended(done)) for e, name, commit, done in listed(found)
    ]
    columns = ("run", "made by", "name", "commit", "date", "complete")
    tables = [
        Table(caption="Machine and software", columns=("what", "value"), rows=tuple(cells(*fact) for fact in facts)),
        Table(caption="Runs that count", columns=columns, rows=tuple(runs)),
    ]
    summary = f"{last.device['name']}, {len(runs)} {'run' if len(runs) == 1 else 'runs'}"
    if found.left_out:
        summary += f"; left out: {', '.join(found.left_out)}"
    return Section(key="environment", title="Environment", summary=summary, tables=tuple(tables))


def listed(found: Validation) -> Iterable[tuple[Environment, str, str, bool]]:
    """Every run that counts: its environment, its name, the commit it is of, whether it reached its end."""
    for run in found.sweeps:
        yield run.environment, str(run.environment.sweep.get("name", "")), run.environment.commit, run.complete
    for trained in found.training:
        yield trained.environment, trained.setup.name, trained.environment.commit, trained.complete
    if found.compare:
        sides = f"{found.compare.result.head.label} against {found.compare.result.base.label}"
        yield found.compare.environment, sides, found.compare.head, found.compare.complete


def flags_text(run: TrainingRun) -> str:
    """The flags of a run; those that lost to another are named."""
    given = " ".join(f"{name}={value}" for name, value in sorted(run.setup.flags.items()))
    lost = ", ".join(run.setup.overridden)
    return (given or "none set") + (f"; overridden: {lost}" if lost else "")


def units(environment: Environment) -> str:
    """What the device's units are."""
    return "threads" if environment.device.get("kind") == "cpu" else "multiprocessors"


def ended(complete: bool) -> Cell:
    """Whether a run reached its end."""
    return Cell("yes", "good") if complete else Cell("no", "open")


def joined(environments: Sequence[Environment], part: str) -> list[tuple[str, str]]:
    """Each fact of ``software`` or ``clocks``, with all values that it had, the newest last."""
    values: dict[str, list[str]] = {}
    for environment in environments:
        for name, value in getattr(environment, part).items():
            if value != "":
                values.setdefault(LABELS.get(name, name.replace("_", " ")), []).append(str(value))
    return [(name, ", ".join(dict.fromkeys(seen))) for name, seen in values.items()]


def correctness_section(found: Validation) -> Section:
    """Per path: what was exercised, with which outcomes, how near to the bound, and which kernels were seen."""
    paths = list(dict.fromkeys((operation_of(record), record.path) for record in found.records))
    rows = []
    for operation, path in paths:
        mine = [record for record in found.records if (operation_of(record), record.path) == (operation, path)]
        outcomes = Counter[str](record.outcome for record in mine)
        tone: Tone = "bad" if any(outcomes[name] for name in FAILED) else "good" if outcomes["ok"] else ""
        text = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        rows.append(cells(path, operation, exercised(mine), Cell(text, tone), nearest(mine), kernels(mine)))
    columns = ("path", "operation", "exercised", "outcomes", "error, of its bound", "kernels seen")
    tables = [
        Table(
            caption="Each path against the float64 oracle and under a profiler; the error nearest to its bound",
            columns=columns,
            rows=tuple(rows),
            numeric=(4,),
        )
    ]
    failed = [record for record in found.records if record.outcome not in ("ok", "unsupported")]
    if failed:
        why = [
            cells(
                record.candidate,
                f"{record.problem['mode']} T={record.problem['T']} {record.problem['dtype']}",
                verdict_cell(record.outcome),
                record.reason,
            )
            for record in failed
        ]
        parts = ("candidate", "problem", "outcome", "reason")
        tables.append(Table(caption="What failed", columns=parts, rows=tuple(why)))
    if not rows:
        return Section(key="correctness", title="Correctness", summary="no records", missing=HOW["decode"])
    good = sum(1 for record in found.records if record.outcome == "ok")
    summary = f"{good} of {len(found.records)} candidates on problems were right and seen to execute"
    bad = [record for record in failed if record.outcome in FAILED]
    summary += f"; {len(bad)} failed" if bad else ""
    return Section(key="correctness", title="Correctness", summary=summary, tables=tuple(tables))


def exercised(records: Sequence[Record]) -> str:
    """Modes, dtypes and contexts of the records that ran."""
    ran = [record for record in records if record.outcome != "unsupported"]
    parts = []
    for mode in ("decode", "prefill", "train"):
        mine = [record for record in ran if record.problem["mode"] == mode]
        if mine:
            contexts = sorted({int(record.problem["T"]) for record in mine})
            span = f"{contexts[0]}" if len(contexts) == 1 else f"{contexts[0]} to {contexts[-1]}"
            parts.append(f"{mode} {'/'.join(sorted({str(record.problem['dtype']) for record in mine}))} T {span}")
    return "; ".join(parts) or "nothing"


def nearest(records: Sequence[Record]) -> str:
    """The error that came nearest to its bound, of those that were measured."""
    known = [(r.oracle_error, r.oracle_bound) for r in records if r.oracle_error is not None and r.oracle_bound]
    if not known:
        return ""
    error, bound = max(known, key=lambda pair: pair[0] / pair[1])
    return f"{error:.1e}, {100 * error / bound:.0f} %"


def kernels(records: Sequence[Record]) -> str:
    """The most frequent kernels or operators, and how many others."""
    seen = Counter[str]()
    for record in records:
        seen.update(set(record.kernels))
    names = [kernel_name(name) for name, _ in seen.most_common(KERNELS_SHOWN)]
    more = f" and {len(seen) - KERNELS_SHOWN} more" if len(seen) > KERNELS_SHOWN else ""
    return ", ".join(dict.fromkeys(names)) + more


def kernel_name(name: str, width: int = 48) -> str:
    """A kernel's name without return type, namespaces and template arguments."""
    if name.startswith("aten::"):
        return name
    plain = name.removeprefix("void ").split("<")[0].split("(")[0].split("::")[-1]
    return plain[:width]


def routes_section(found: Validation) -> Section:
    """What was asked for against what ran: sweeps by path, the comparison by scenario, training by operation."""
    rows = [*swept_routes(found), *compared_routes(found), *trained_routes(found)]
    if not rows:
        return Section(key="routes", title="Executed against requested", summary="no records", missing=HOW["training"])
    columns = ("where", "requested", "executed", "as requested", "why")
    counts = Counter[str](row[3].tone for row in rows)
    words = {"good": "met", "bad": "not met", "open": "not shown to be met"}
    summary = ", ".join(f"{counts[tone]} {word}" for tone, word in words.items() if counts[tone])
    table = Table(caption="Requests and what ran", columns=columns, rows=tuple(rows))
    return Section(key="routes", title="Executed against requested", summary=summary, tables=(table,))


def swept_routes(found: Validation) -> Iterable[tuple[Cell, ...]]:
    """Sweeps name paths; ``ok`` means that a profiler saw the path's kernels and no other's."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in found.records:
        if record.outcome != "unsupported":
            groups.setdefault((operation_of(record), record.path), []).append(record)
    for (operation, path), mine in groups.items():
        fell = [record for record in mine if record.outcome == "fell_back"]
        ok = sum(1 for record in mine if record.outcome == "ok")
        verdict = Cell("no", "bad") if fell else Cell(f"{ok} of {len(mine)}", "good" if ok == len(mine) else "open")
        yield cells(f"sweep, {operation}", path, path if ok else "nothing", verdict, fell[0].reason if fell else "")


def compared_routes(found: Validation) -> Iterable[tuple[Cell, ...]]:
    """What head ran in each scenario."""
    for each in found.compare.result.scenarios if found.compare else ():
        asked = each.scenario.rsplit(" ", 1)[-1]
        if each.head is None:
            yield cells(f"compare, {each.scenario}", asked, "not recorded", Cell("not known", "open"), "")
            continue
        ran = each.head.choice if each.head.path else "nothing"
        good = each.head.outcome == "ok"
        met = Cell("yes", "good") if good else Cell("no", "bad")
        why = each.head.status if good else f"{each.head.outcome}: {each.head.reason}"
        yield cells(f"compare, {each.scenario}", asked, ran, met, why)


def trained_routes(found: Validation) -> Iterable[tuple[Cell, ...]]:
    """What each operation of a training run was asked for and ran."""
    for run in found.training:
        calls = Counter[tuple[str, str, str, str, str, bool]]()
        for record in run.records:
            for route in record.executed:
                key = (route.operation, route.requested, route.path, route.status, route.reason, route.met)
                calls[key] += route.calls
        for (operation, requested, path, status, reason, met), count in calls.items():
            verdict = Cell("yes", "good") if met else Cell("no", "bad")
            why = "; ".join(filter(None, (status, reason)))
            yield cells(f"training {run.label}, {operation}", requested, f"{path}, {count} calls", verdict, why)


def memory_section(found: Validation) -> Section:
    """The most that each path took in a mode, growths, and what training took."""
    rows = []
    for operation, path, mode in dict.fromkeys(
        (operation_of(r), r.path, str(r.problem["mode"])) for r in found.records if r.outcome == "ok"
    ):
        mine = [r for r in found.records if (operation_of(r), r.path, r.problem["mode"]) == (operation, path, mode)]
        rows.append(cells(f"{operation} {path}", mode, *most(mine)))
    rows += [cells(f"training {run.label}", run.setup.dtype, *most(run.records)) for run in found.training]
    if not rows:
        return Section(key="memory", title="Memory and growths", summary="no records", missing=HOW["decode"])
    columns = ("what", "where", "peak of a call or step", "workspace", "growths of the workspace")
    caption = "The most over all problems and candidates; training on a CPU: resident bytes of the process"
    table = Table(caption=caption, columns=columns, rows=tuple(rows), numeric=(2, 3, 4))
    changes = [
        f"{each.scenario}: {change.kind}: {change.detail}"
        for each in (found.compare.result.scenarios if found.compare else ())
        for change in each.changes
        if change.kind in ("more memory", "more growths")
    ]
    nothing = "no scenario takes more memory than base" if found.compare else f"{len(rows)} figures"
    summary = "; ".join(changes) or nothing
    return Section(key="memory", title="Memory and growths", summary=summary, tables=(table,))


def most(records: Sequence[object]) -> tuple[str, str, str]:
    """Largest peak, workspace and growths of records that have them."""

    def largest(name: str) -> int | None:
        return max((value for r in records if (value := getattr(r, name)) is not None), default=None)

    peak, workspace, growths = largest("peak_bytes"), largest("workspace_bytes"), largest("growths")
    return (
        "" if peak is None else byte_text(peak), "" if workspace is None else byte_text(workspace),
        "" if growths is None else str(growths),
    )  # fmt: skip
