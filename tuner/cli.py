"""The ``nsa-tune`` command line: where configuration enters. Results on stdout, progress and advice on stderr.

Exit codes: 0 done, 1 failed, 2 usage, 3 regression, 4 undecided, 130 stopped by Ctrl-C. Every command imports what it
needs when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from tuner.checkout import current_commit
from tuner.gate_cli import CommitOption, DeviceOption, JsonFlag, clear_errors, mount
from tuner.record import DEFAULT_REGISTRY

app = typer.Typer(
    name="nsa-tune",
    help="Find the fastest correct selection path for this machine, prove it, and catch regressions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OutOption = Annotated[Path, typer.Option(help="Folder that receives records/ (and dispatch_tables/ with --export).")]


def version() -> str:
    """The installed version; that of the checkout where nothing is installed."""
    try:
        return metadata.version("nsa-tune")
    except metadata.PackageNotFoundError:
        return "0.1.0 (not installed)"


@app.callback(invoke_without_command=True)
def main(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Find the fastest correct selection path for this machine, prove it, and catch regressions."""
    if show_version:
        typer.echo(f"nsa-tune {version()}")
        raise typer.Exit


@app.command()
def sweep(
    name: Annotated[str, typer.Argument(help="A sweep of this project, or a .toml file.")] = "quick",
    budget: Annotated[str | None, typer.Option(help="Time to aim at, such as 90s, 10m or 1h.")] = None,
    effort: Annotated[
        str, typer.Option(help="quick: the sweep's coarse ladders. full: whole ladders, slow builds.")
    ] = "quick",
    override: Annotated[
        list[str] | None, typer.Option("--set", help="AXIS=VALUE[,VALUE...] instead of the file's.")
    ] = None,
    out: OutOption = Path("results"),
    export: Annotated[bool, typer.Option(help="Write OUT/dispatch_tables/ too, to be committed.")] = False,
    figures: Annotated[bool, typer.Option(help="Draw the run at its end; 'nsa-tune plot' does it later.")] = True,
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage URL instead of a journal beside the records.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what would be measured, and stop.")] = False,
    device: DeviceOption = "auto",
    commit: CommitOption = "",
    registry: Annotated[str, typer.Option(help="module:NAME of the paths to measure.")] = DEFAULT_REGISTRY,
    json: JsonFlag = False,
) -> None:
    """Check, attest and time every candidate, and write the dispatch table that the runtime consults."""
    from tuner import sweep_command

    with clear_errors():
        options = sweep_command.SweepOptions(
            name=name, budget=budget, effort=effort, overrides=tuple(override or ()), out=out, export=export,
            figures=figures, storage=storage, device=device,
            commit=commit or current_commit(registry.partition(":")[0]), registry=registry, json=json,
        )  # fmt: skip
        raise typer.Exit((sweep_command.plan if dry_run else sweep_command.sweep)(options))


@app.command()
def show(
    table: Annotated[Path | None, typer.Argument(help="A dispatch table; by default the one in force here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write it there as a Markdown page.")] = None,
    records: Annotated[Path, typer.Option(help="Folder of the records that the page names.")] = Path("results/records"),
    json: JsonFlag = False,
) -> None:
    """Show a dispatch table: what it picks, why, and how sure it is."""
    from tuner import commands

    with clear_errors():
        commands.show(table, markdown=markdown, records=records, json=json)


@app.command()
def doctor(json: JsonFlag = False) -> None:
    """Show the device, versions, each path (available, or why not), and which table is in force."""
    from tuner import commands

    with clear_errors():
        commands.doctor(json=json)


@app.command()
def export(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, below OUT/records; the last one's word counts.")],
    to: Annotated[Path, typer.Option(help="The table to write, beside what it holds for other problems.")],
) -> None:
    """Write a dispatch table from the records of runs, also of one that was cut short."""
    from tuner import commands

    with clear_errors():
        commands.export(runs, to)


@app.command()
def regret(
    run: Annotated[Path, typer.Argument(help="A run's folder, below OUT/records.")],
    table: Annotated[Path | None, typer.Option(help="A dispatch table; by default the one in force here.")] = None,
    hold_out: Annotated[
        bool, typer.Option(help="Ask for each problem with its own entry left out of the table.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Say how much slower a table's answers are than the best candidate of a run, problem by problem."""
    from tuner import commands

    with clear_errors():
        commands.regret(run, table, hold_out=hold_out, json=json)


@app.command()
def plot(
    run: Annotated[
        Path | None, typer.Argument(help="A run's folder, by default the newest below OUT/records; or 'regressions'.")
    ] = None,
    out: OutOption = Path("results"),
    to: Annotated[Path | None, typer.Option(help="Folder for the figures; by default beside the records.")] = None,
) -> None:
    """Draw a run's figures (latency, winners, reserves, evidence), or the regressions of the newest history."""
    from tuner import commands

    with clear_errors():
        if run == Path("regressions"):
            from tuner import gate_commands

            gate_commands.plot_regressions(out, to)
        else:
            commands.plot(run, out, to)


@app.command()
def report(
    markdown: Annotated[
        Path | None, typer.Option(help="Write the report there as Markdown, figures beside it.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report there as one self-contained HTML file.")] = None,
    records: Annotated[Path, typer.Option(help="Folder that holds records/, compares/ and history/.")] = Path(
        "results"
    ),
    device: Annotated[str, typer.Option(help="A device's slug; by default that of the newest run.")] = "",
    commit: Annotated[str, typer.Option(help="Only runs of commits that begin so.")] = "",
    json: JsonFlag = False,
) -> None:
    """Say from records alone what ran, whether it was right, how fast it is, and whether to merge it, with reasons."""
    with clear_errors():
        from tuner import validation_report

        document, exit_code = validation_report.report(
            records, device=device, commit=commit, markdown=markdown, html=html
        )
        shown = validation_report.as_json(document).decode() if json else validation_report.as_text(document)
        typer.echo(shown, nl=False)
        for file in filter(None, (markdown, html)):
            typer.echo(f"report   {file}", err=True)
        raise typer.Exit(exit_code)


mount(app)
