"""The gate's commands on the command line: compare, history, bisect, selftest. Mounted by ``tuner.cli``.

Exit codes: 0 done, 1 failed, 2 usage, 3 regression, 4 undecided, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.checkout import current_commit

if TYPE_CHECKING:
    from tuner.gate_commands import GateOptions

SweepOption = Annotated[str, typer.Option("--sweep", help="The sweep whose problems are compared.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="AXIS=VALUE[,VALUE...] instead of the sweep's.")]
PathOption = Annotated[list[str] | None, typer.Option("--path", help="auto, or a path by name; may be repeated.")]
AlphaOption = Annotated[float, typer.Option(help="Chance of a false alarm, over all scenarios and looks.")]
EffectOption = Annotated[str, typer.Option(help="What counts as a slowdown, such as 1%.")]
BudgetOption = Annotated[str, typer.Option(help="Time for one comparison, such as 90s or 5m.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
OutOption = Annotated[Path, typer.Option(help="Folder that receives the records.")]
CommitOption = Annotated[str, typer.Option(help="Commit to record where no git repository is at hand.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
GOES_ON = "a sweep, compare or history goes on where it was when the same command is given again"


@contextmanager
def clear_errors() -> Iterator[None]:
    """Errors that a user can act on become one line and exit code 2 (what was asked) or 1 (what happened)."""
    from nsa.errors import NSAError
    from tuner.hiring import DeviceError
    from tuner.record import RecordError
    from tuner.sweep import SweepError
    from tuner.trees import DoesNotImport, TreeError

    try:
        yield
    except DoesNotImport as error:
        typer.echo(f"nsa-tune: {error}", err=True)
        raise typer.Exit(1) from error
    except (SweepError, TreeError, DeviceError) as error:
        typer.echo(f"nsa-tune: {error}", err=True)
        raise typer.Exit(2) from error
    except (NSAError, RecordError, OSError) as error:
        typer.echo(f"nsa-tune: {in_words(error)}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo(f"nsa-tune: stopped; {GOES_ON}", err=True)
        raise typer.Exit(130) from error


def in_words(error: Exception) -> str:
    """What happened, to which file; after a full disk, what to do."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    where = f": {error.filename}" if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{error.strerror}{where}" + (f"; make room, then {GOES_ON}" if full else "")


def options_of(
    sweep: str, override: list[str] | None, path: list[str] | None, alpha: float, effect: str, budget: str, device: str,
    out: Path, json: bool, commit: str = "",
) -> GateOptions:  # fmt: skip
    """The command line as the commands take it."""
    from tuner.gate_commands import GateOptions

    return GateOptions(
        sweep=sweep, overrides=tuple(override or ()), paths=tuple(path or ()), alpha=alpha, effect=effect,
        budget=budget, device=device, out=out, commit=commit or current_commit(), json=json,
    )  # fmt: skip


def compare(
    base: Annotated[str, typer.Argument(help="A commit, or a folder that holds nsa/.")],
    head: Annotated[str | None, typer.Argument(help="As BASE; by default the working tree.")] = None,
    sweep: SweepOption = "quick",
    override: SetOption = None,
    path: PathOption = None,
    alpha: AlphaOption = 0.001,
    effect: EffectOption = "1%",
    budget: BudgetOption = "5m",
    device: DeviceOption = "auto",
    out: OutOption = Path("results"),
    markdown: Annotated[Path | None, typer.Option(help="Write a pull-request comment there.")] = None,
    commit: CommitOption = "",
    json: JsonFlag = False,
) -> None:
    """Tell whether HEAD made any path slower, wrong, hungrier or no longer executing than BASE, with stated errors."""
    with clear_errors():
        from tuner import gate_commands

        options = options_of(sweep, override, path, alpha, effect, budget, device, out, json, commit)
        raise typer.Exit(gate_commands.compare(base, head, options, markdown=markdown))


def history(
    commits: Annotated[str, typer.Argument(help="FIRST..LAST; FIRST is the anchor.")],
    anchor: Annotated[str | None, typer.Option(help="Another anchor than FIRST.")] = None,
    sweep: SweepOption = "quick",
    override: SetOption = None,
    path: PathOption = None,
    alpha: AlphaOption = 0.001,
    effect: EffectOption = "1%",
    budget: BudgetOption = "5m",
    device: DeviceOption = "auto",
    out: OutOption = Path("results"),
    json: JsonFlag = False,
) -> None:
    """Measure each commit against one anchor, one record per commit; goes on where it stopped."""
    with clear_errors():
        from tuner import gate_commands

        options = options_of(sweep, override, path, alpha, effect, budget, device, out, json)
        raise typer.Exit(gate_commands.history(commits, options, anchor=anchor))


def bisect(
    good: Annotated[str, typer.Argument(help="A commit that is as it should be.")],
    bad: Annotated[str, typer.Argument(help="A later commit that is not.")],
    scenario: Annotated[str, typer.Option(help="Name of the scenario, or a part that only it has.")],
    sweep: SweepOption = "quick",
    override: SetOption = None,
    path: PathOption = None,
    alpha: AlphaOption = 0.001,
    effect: EffectOption = "1%",
    budget: BudgetOption = "5m",
    device: DeviceOption = "auto",
    out: OutOption = Path("results"),
    json: JsonFlag = False,
) -> None:
    """Find the commit that made a scenario worse, by paired measurements."""
    with clear_errors():
        from tuner import gate_commands

        options = options_of(sweep, override, path, alpha, effect, budget, device, out, json)
        raise typer.Exit(gate_commands.bisect(good, bad, scenario, options))


def selftest(
    budget: BudgetOption = "1m",
    device: DeviceOption = "auto",
    out: OutOption = Path("results"),
    json: JsonFlag = False,
) -> None:
    """Say what this machine can and cannot detect: timer, A/A, injected slowdowns, every broken path of the drill."""
    with clear_errors():
        from tuner import gate_commands

        raise typer.Exit(
            gate_commands.selftest(options_of("quick", None, None, 0.001, "1%", budget, device, out, json))
        )


def mount(app: typer.Typer) -> None:
    """Add the four commands."""
    for command in (compare, history, bisect, selftest):
        app.command()(command)
