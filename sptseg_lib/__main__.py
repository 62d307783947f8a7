"""The command line: `python -m sptseg_lib run notebooks/pipelines/demo.yaml`."""

from pathlib import Path
from typing import Annotated

import typer

from .execute import StepError, run_pipeline, train_pipeline
from .pipeline import Pipeline, PipelineError, load_pipeline

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="PIPELINE", help="A file in notebooks/pipelines/.", show_default=False)]
Changes = Annotated[
    list[str] | None,
    typer.Option("-p", metavar="NAME=VALUE", help="A shared parameter, or STEP.NAME=VALUE for one step's."),
]


@app.callback()
def main() -> None:
    """Run the workbook's pipelines: notebooks in order, checked before, resumed after."""


@app.command()
def run(
    pipeline: File,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="Folder of run folders; default: runs/ beside notebooks/.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run folder and start over.")] = False,
) -> None:
    """Execute a pipeline's notebooks; a second call goes on where the first stopped."""
    loaded = _load(pipeline, changes)
    try:
        report = run_pipeline(loaded, out, fresh, typer.echo)
    except KeyboardInterrupt:
        _stop("Interrupted. Finished steps are kept; the same command goes on at the step that was running.", 130)
    except StepError as error:
        _stop(str(error), 1)
    except (ValueError, OSError) as error:
        _stop(f"Error: {error}", 2)
    typer.echo(f"Report: {report}")


@app.command()
def train(
    pipeline: File,
    changes: Changes = None,
    out: Annotated[Path | None, typer.Option(help="Folder of run folders; default: runs/ beside notebooks/.")] = None,
) -> None:
    """Train and score a pipeline's runs without notebooks: under torchrun or SLURM, on many machines.

    `run` with the same arguments then makes the notebooks and the report, and finds everything trained.
    """
    loaded = _load(pipeline, changes)
    try:
        train_pipeline(loaded, out)
    except (ValueError, OSError) as error:
        _stop(f"Error: {error}", 2)


@app.command()
def check(pipeline: File, changes: Changes = None) -> None:
    """Check a pipeline file and its parameters; run nothing."""
    loaded = _load(pipeline, changes)
    for number, step in enumerate(loaded.steps, 1):
        values = " ".join(f"{name}={value!r}" for name, value in step.parameters.items())
        typer.echo(f"[{number}/{len(loaded.steps)}] {step.id} ({step.notebook.name}) {values}")
    typer.echo(f"{loaded.name}: nothing wrong.")


def _load(path: Path, changes: list[str] | None) -> Pipeline:
    try:
        return load_pipeline(path, changes or [])
    except PipelineError as error:
        _stop(f"Error: {error}", 2)


def _stop(message: str, code: int) -> None:
    typer.echo(message, err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
