"""Compare report: a result as JSON, as a table for a terminal, and as Markdown for a pull request. Pure text."""

from __future__ import annotations

import msgspec

from tuner.evidence import ratio_text
from tuner.judge import CompareResult, ScenarioResult
from tuner.verdict import Comparison

HEADLINES = {"regressed": "REGRESSED", "undecided": "UNDECIDED", "passed": "PASSED"}
LANE_WORDS = {"aa": "base against itself", "slow_1": "1 % of extra work", "slow_4": "4 % of extra work"}


def exit_code(result: CompareResult) -> int:
    """3 if anything is slower, wrong, fell back, fails or takes more memory; else 4 if undecided; else 0."""
    return result.exit_code


def as_json(result: CompareResult) -> bytes:
    """Indented JSON with the exit code, one trailing newline."""
    fields = {**msgspec.to_builtins(result), "exit_code": result.exit_code}
    return msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n"


def rows_of(result: CompareResult) -> list[tuple[str, str, str, str, str, str]]:
    """(scenario, verdict, ratio with interval, pairs, e-value, why) per scenario."""
    return [
        (
            found.scenario,
            verdict_text(found, result.effect),
            ratio_of(found.comparison),
            str(found.comparison.pairs) if found.comparison else "",
            f"{found.comparison.e_value:.3g}" if found.comparison else "",
            why(found),
        )
        for found in result.scenarios
    ]


def verdict_text(found: ScenarioResult, effect: float) -> str:
    """The verdict in words."""
    if found.verdict == "same":
        return f"same within {100 * effect:.3g} %"
    return str(found.verdict)


def ratio_of(comparison: Comparison | None) -> str:
    """``1.041 [1.032, 1.050]``; nothing where there is no pair."""
    if comparison is None or comparison.ratio is None:
        return ""
    return ratio_text(comparison).partition(" in ")[0]


def why(found: ScenarioResult) -> str:
    """Reason and changes, one after the other."""
    return "; ".join(filter(None, [found.reason, *(f"{change.kind}: {change.detail}" for change in found.changes)]))


def audit_text(result: CompareResult) -> list[str]:
    """What the run says of itself, a sentence per line."""
    audit, lines = result.audit, []
    for lane, words in LANE_WORDS.items():
        found = audit.lanes[lane]
        share = f" (calibrated {100 * audit.injected[lane]:.2f} %)" if lane in audit.injected else ""
        lines.append(f"{words}{share} reads {ratio_text(found)}: {_seen(lane, found)}")
    least = audit.smallest_effect
    lines.append(
        "smallest slowdown that this run finds 95 times in 100: "
        + ("none: too few pairs" if least is None else f"{100 * least:.2f} %")
    )
    lines.append("audit passed" if audit.passed else f"audit FAILED, so no verdict on time stands: {audit.reason}")
    return lines


def _seen(lane: str, found: Comparison) -> str:
    if lane == "aa":
        return "alarm" if found.verdict in ("slower", "faster") else "no alarm"
    return "seen" if found.verdict == "slower" else "not seen"


def settings_text(result: CompareResult) -> str:
    """What was asked, and on what."""
    return (
        f"alpha {result.alpha:g} over {len(result.scenarios)} scenarios, effect {100 * result.effect:g} %, "
        f"{result.launches} launches, {result.rounds} rounds, {result.dropped} pairs dropped for throttling, "
        f"{result.seconds:.0f} s on {result.device}"
    )


def as_text(result: CompareResult) -> str:
    """For a terminal."""
    head = ("scenario", "verdict", "head/base", "pairs", "E")
    rows = [head, *(row[:5] for row in rows_of(result))]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [f"{HEADLINES[result.verdict]}  {result.head.label} against {result.base.label}", settings_text(result), ""]
    for row, reason in zip(rows, ["", *(row[5] for row in rows_of(result))], strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        lines += [f"    {part}" for part in reason.split("; ") if part]
    lines += ["", *audit_text(result), *result.notes]
    return "\n".join(lines) + "\n"


def as_markdown(result: CompareResult) -> str:
    """For a pull request's comment."""
    lines = [
        f"### nsa-tune: {HEADLINES[result.verdict]}", "",
        f"`{result.head.label}` against `{result.base.label}`. {settings_text(result)}.", "",
        "| scenario | verdict | head / base | pairs | E | what changed, why |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows_of(result)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "<details><summary>How far this run can be believed</summary>", ""]
    lines += [f"- {line}" for line in (*audit_text(result), *result.notes)]
    lines += ["", "Ratios above 1 are slower. Exit codes: 3 regressed, 4 undecided, 0 passed.", "</details>"]
    return "\n".join(lines) + "\n"
