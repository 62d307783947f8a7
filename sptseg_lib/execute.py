"""Run a checked pipeline: notebooks in order through papermill, resumed where a run stopped."""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat

from .disk import check_room
from .hardware import hardware
from .pipeline import Pipeline, PipelineError, Step
from .report import clock, read_metrics, write_report
from .settings import HOW


class StepError(RuntimeError):
    """A step's notebook failed; the steps before it are kept."""


def run_pipeline(
    pipeline: Pipeline, out: str | Path | None = None, fresh: bool = False, show: Callable[[str], Any] = print
) -> Path:
    """Execute the steps that are not done yet, in <out>/<name> (default: runs/ beside notebooks/); return report.html.

    `fresh` deletes what the run folder holds and starts over. `show` gets one line a step.
    Raises: PipelineError, before anything is written, for a run folder that is not this run's and for a full disk;
    StepError when a notebook fails.
    """
    run_dir = (Path(out or pipeline.root / "runs") / pipeline.name).resolve()
    state = _read_state(run_dir, fresh)
    _refuse_other_parameters(pipeline, run_dir, state)
    try:
        check_room(run_dir, pipeline.needs_mb * 10**6)
    except OSError as error:
        raise PipelineError(f"{error} The pipeline file asks for needs_mb: {pipeline.needs_mb}.") from None
    if fresh and run_dir.exists():
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(pipeline.steps, 1):
        label = f"[{number}/{len(pipeline.steps)}] {step.id}"
        output = run_dir / f"{number:02d}-{step.id}.ipynb"
        entry = state["steps"].get(step.id, {"done": False, "seconds": 0.0, "fingerprint": step.fingerprint})
        changed = entry["fingerprint"] != step.fingerprint
        complete = output.exists() and (step.product is None or (run_dir / step.product).exists())
        if entry["done"] and complete and not changed:
            show(f"{label}: done before ({clock(entry['seconds'])})")
            continue
        if entry["done"] and changed:
            show(f"{label}: its code, or that of a step before it, has changed; it runs again")
            _set_aside(run_dir, step.product)
        elif changed:
            show(
                f"{label}: the code has changed since it stopped; it goes on from its checkpoint (--fresh starts over)"
            )
        for old in run_dir.glob(f"[0-9][0-9]-{step.id}.ipynb"):
            old.unlink()
        before = 0.0 if entry["done"] else entry["seconds"]
        entry = {"parameters": step.parameters, "fingerprint": step.fingerprint, "done": False, "seconds": before}
        state.update(name=pipeline.name, hardware=hardware())
        state["steps"][step.id] = entry
        _write_state(run_dir, state)
        started = time.monotonic()
        try:
            _execute(step, label, output, run_dir, pipeline.root)
            entry["done"] = True
        finally:
            entry["seconds"] = before + time.monotonic() - started
            _write_state(run_dir, state)
        show(f"{label}: {clock(entry['seconds'])}")
    rows = [
        {
            "id": step.id,
            "notebook": step.notebook.stem,
            "parameters": {k: v for k, v in step.given.items() if (k, v) not in pipeline.parameters.items()},
            "file": f"{number:02d}-{step.id}.ipynb",
            "seconds": state["steps"][step.id]["seconds"],
        }
        for number, step in enumerate(pipeline.steps, 1)
    ]
    return write_report(run_dir, pipeline.title, pipeline.parameters, rows, state["hardware"])


def train_pipeline(pipeline: Pipeline, out: str | Path | None = None) -> None:
    """Train and evaluate what the steps of 05_train and 06_evaluate describe, in this process, without notebooks.

    Raises: PipelineError for a run folder of other parameters, and what `fit` and `evaluate` raise.
    """
    from lightning.pytorch.utilities import rank_zero_only  # heavy, and a check needs none of it

    from .evaluate import evaluate
    from .settings import EvaluateSettings, TrainSettings
    from .train import fit

    run_dir = (Path(out or pipeline.root / "runs") / pipeline.name).resolve()
    if rank_zero_only.rank == 0:  # the others would see the folder half made
        state = _read_state(run_dir, fresh=False)
        _refuse_other_parameters(pipeline, run_dir, state)
        run_dir.mkdir(parents=True, exist_ok=True)
        _write_state(run_dir, state)  # a run folder of this pipeline, perhaps with no notebook executed yet
    for step in pipeline.steps:
        if step.product == "metrics.json":
            evaluate(EvaluateSettings(**step.parameters, run_dir=str(run_dir)))
        elif step.product:
            fit(TrainSettings(**step.parameters, run_dir=str(run_dir)))


def _read_state(run_dir: Path, fresh: bool) -> dict:
    path = run_dir / "state.json"
    if not path.exists():
        if run_dir.exists() and (not run_dir.is_dir() or any(not p.name.startswith(".") for p in run_dir.iterdir())):
            raise PipelineError(
                f"{run_dir} exists and is not a pipeline's run folder (no state.json). "
                "Its files would be mixed with the results; choose another --out."
            )
        return {"steps": {}}
    if fresh:
        return {"steps": {}}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if all({"parameters", "fingerprint", "done", "seconds"} <= set(entry) for entry in state["steps"].values()):
            return state
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    raise PipelineError(f"{path} is damaged: what is done cannot be told. Start over with --fresh.")


def _refuse_other_parameters(pipeline: Pipeline, run_dir: Path, state: dict) -> None:
    steps = {step.id: step for step in pipeline.steps}
    differences = []
    for name, entry in state["steps"].items():
        if name not in steps:
            differences.append(f"it holds a step {name!r} that the pipeline does not have")
            continue
        now = steps[name].parameters
        differences += [
            f"{name}.{key} was {old!r} and is now {now[key]!r}"
            for key, old in entry["parameters"].items()
            if key in now and now[key] != old and key not in HOW
        ]
    if differences:
        raise PipelineError(
            f"The run folder {run_dir} belongs to other parameters: {'; '.join(differences)}. Results of both would be "
            "mixed. Use another folder (--out), ask for the old values (-p name=value), or delete it with --fresh."
        )


def _set_aside(run_dir: Path, product: str | None) -> None:
    """Keep what the old code made, where no step finds it: replaced/ holds the last of each."""
    if product and (run_dir / product).exists():
        kept = run_dir / "replaced" / Path(product).name
        if kept.is_dir():
            shutil.rmtree(kept)
        kept.parent.mkdir(exist_ok=True)
        os.replace(run_dir / product, kept)


def _write_state(run_dir: Path, state: dict) -> None:
    partial = run_dir / "state.json.partial"
    partial.write_text(json.dumps(state, indent=1), encoding="utf-8")
    os.replace(partial, run_dir / "state.json")


def _execute(step: Step, label: str, output: Path, run_dir: Path, root: Path) -> None:
    """Run one notebook in a kernel of this environment, its folder the project's root; raise StepError if it fails."""
    import papermill  # heavy, and a check needs none of it

    logging.getLogger("papermill").setLevel(logging.ERROR)  # its guesses about parameter names; they were checked
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this environment before a user's own
    place = {"run_dir": str(run_dir)} if step.takes_run_dir else {}
    if step.product == "metrics.json":
        (run_dir / step.product).unlink(missing_ok=True)  # so that an old file cannot pass for a new one
    try:
        cells = len(nbformat.read(step.notebook, as_version=4).cells) + bool(step.parameters or place)
        with _progress(label, cells) as (on_cell_start, line):
            papermill.execute_notebook(
                str(step.notebook).replace("{", "{{").replace("}", "}}"),  # papermill formats paths
                str(output).replace("{", "{{").replace("}", "}}"),
                parameters={**step.parameters, **place},
                kernel_name="python3",
                language="python",
                cwd=root,
                start_timeout=300,
                progress_bar=False,
                extra_arguments=["--log-level=CRITICAL"],  # the kernel would write about its transport into the bar
                on_cell_start=on_cell_start,
                stdout_file=line,
                stderr_file=line,
            )
        if step.product and not (run_dir / step.product).exists():
            raise FileNotFoundError(f"the notebook ended without writing {step.product}")
        if step.product == "metrics.json":
            read_metrics(run_dir / step.product)
    except papermill.PapermillExecutionError as error:
        tags = [cell.metadata.get("tags", []) for cell in nbformat.read(output, as_version=4).cells]
        executed = [cell_tags for cell_tags in tags if "papermill-error-cell-tag" not in cell_tags]
        # The author's notebook has no cell of injected parameters.
        number = 1 + sum("injected-parameters" not in cell_tags for cell_tags in executed[: error.cell_index])
        where = f"cell {number} (In [{error.exec_count}]): {error.ename}: {error.evalue}"
        raise StepError(_failure(label, step, where, output, error.source)) from None
    except Exception as error:  # a kernel that dies or does not start, a full disk: whatever it is, name the step
        raise StepError(_failure(label, step, f"{type(error).__name__}: {error}", output)) from error


def _failure(label: str, step: Step, where: str, output: Path, source: str = "") -> str:
    if where.startswith("DeadKernelError"):
        where += " The kernel was killed, most often because memory was short: try a smaller batch or size."
    lines = source.strip().splitlines()
    code = "".join(f"\n    {line}" for line in lines[:6]) + ("\n    ..." if len(lines) > 6 else "")
    return (
        f"{label} ({step.notebook.name}) stopped at {where}{code}\n"
        f"The notebook as far as it came: {output}\nThe same command goes on at this step."
    )


@contextmanager
def _progress(label: str, cells: int):
    """A bar of cells, the clock running, with the last line that the notebook printed; nothing where no terminal is."""
    from tqdm import tqdm

    stopped = threading.Event()
    form = "{desc}: cell {n}/{total} |{bar:20}| {elapsed}{postfix}"  # cells differ too much to foretell an end
    with tqdm(total=cells, desc=label, bar_format=form, leave=False, dynamic_ncols=True, disable=None) as bar:

        def tick():
            while not stopped.wait(1.0):
                bar.refresh()

        def write(text: str):
            lines = text.replace("\r", "\n").strip().splitlines()
            if lines:
                bar.set_postfix_str(lines[-1].strip()[:60], refresh=False)

        clock_thread = threading.Thread(target=tick, daemon=True)
        clock_thread.start()
        try:
            yield lambda cell, cell_index: bar.update(cell_index + 1 - bar.n), SimpleNamespace(write=write, flush=int)
        finally:
            stopped.set()
            clock_thread.join()
