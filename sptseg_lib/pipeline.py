"""Pipeline files: everything about them is checked before a kernel starts.

A pipeline file lies in notebooks/pipelines/:

    name: demo
    parameters: {size: 128}          # each is passed to the steps whose notebook declares it
    steps:
      - {notebook: 05_train, id: spt_seg, parameters: {method: spt_seg}}
      - {notebook: 06_evaluate}

`load_pipeline` finds every fault and writes nothing; `execute.run_pipeline` runs what is not done yet.
"""

import ast
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import nbformat
import yaml
from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StrictStr, TypeAdapter, ValidationError

from . import settings

PACKAGE = Path(__file__).parent
SETTINGS = {"05_train": "TrainSettings", "06_evaluate": "EvaluateSettings"}  # notebooks whose parameters have a model
# No notebook imports these, so no result depends on them.
NOT_IN_RESULTS = {"pipeline.py", "execute.py", "report.py", "__main__.py"}


class PipelineError(ValueError):
    """The pipeline cannot be run as asked; nothing was started or written."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class StepEntry(settings.Settings):
    """One step, as written in a pipeline file."""

    notebook: str
    id: Name | None = Field(None, description="unique; None: the notebook's name")
    parameters: dict[str, Any] = {}


class PipelineFile(settings.Settings):
    """A pipeline file."""

    name: Name
    title: str | None = None
    parameters: dict[str, Any] = Field({}, description="passed to every step whose notebook declares the name")
    needs_mb: int = Field(500, ge=0, description="free disk space, in megabytes, without which nothing starts")
    steps: Annotated[list[StepEntry], Field(min_length=1)]


@dataclass(frozen=True)
class Step:
    """One checked step. `parameters` holds the notebook's defaults too, `given` only what the pipeline sets."""

    id: str
    notebook: Path
    parameters: dict[str, Any]
    given: dict[str, Any]
    takes_run_dir: bool
    product: str | None  # what it must leave in the run folder
    fingerprint: str  # of its code, its parameters, the library and the steps before it


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline; `root` is the folder above notebooks/."""

    name: str
    title: str
    root: Path
    parameters: dict[str, Any]
    needs_mb: int
    steps: tuple[Step, ...]


def load_pipeline(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Pipeline:
    """Read and check a pipeline file.

    `overrides` are texts `name=value` (shared) or `step.name=value` (one step's), the value in YAML.
    Raises: PipelineError for a file of another form, an unknown notebook, step or parameter, a value of the wrong
    type, and two steps that would write the same training run.
    """
    path = Path(path).resolve()
    file = _read_file(path)
    folder = path.parent.parent
    notebooks = {
        p.relative_to(folder).with_suffix("").as_posix(): p
        for p in sorted(folder.rglob("*.ipynb"))
        if ".ipynb_checkpoints" not in p.parts
    }
    for entry in file.steps:
        _one_of("notebook", entry.notebook, notebooks)
    ids = [entry.id or Path(entry.notebook).name for entry in file.steps]
    for name in ids:
        if ids.count(name) > 1:
            raise PipelineError(
                f"{ids.count(name)} steps are called {name!r}. One would overwrite the other's notebook; give them ids."
            )
    cells = [_code_cells(notebooks[entry.notebook]) for entry in file.steps]
    declared = [_declared(entry.notebook, step_cells) for entry, step_cells in zip(file.steps, cells, strict=True)]
    own = [dict(entry.parameters) for entry in file.steps]
    shared = _override(dict(file.parameters), ids, own, declared, overrides)
    _check_names(shared, ids, own, declared)

    steps, fingerprint, products = [], _library_hash(), {}
    for entry, name, step_cells, defaults, changes in zip(file.steps, ids, cells, declared, own, strict=True):
        given = {key: value for key, value in {**shared, **changes}.items() if key in defaults}
        given = {key: _checked_value(name, key, value, defaults[key]) for key, value in given.items()}
        parameters = {**{key: value for key, value in defaults.items() if key != "run_dir"}, **given}
        product = _product(entry.notebook, name, parameters)
        if product and product in products:
            raise PipelineError(
                f"Steps {products[product]!r} and {name!r} would both write {product}. "
                "One would overwrite the other, or take it for its own; change one (method, setting, seed) or drop it."
            )
        products[product] = name
        _check_start(name, parameters, products)
        what = {key: value for key, value in parameters.items() if key not in settings.HOW}
        fingerprint = _sha256(json.dumps([fingerprint, [cell.source for cell in step_cells], what]).encode())
        steps.append(
            Step(name, notebooks[entry.notebook], parameters, given, "run_dir" in defaults, product, fingerprint)
        )
    return Pipeline(file.name, file.title or file.name, folder.parent, shared, file.needs_mb, tuple(steps))


def _read_file(path: Path) -> PipelineFile:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"The pipeline file {path} cannot be read: {error}. Check the path.") from None
    except yaml.YAMLError as error:
        raise PipelineError(f"The pipeline file {path} is not YAML: {error}. Nothing was run; correct it.") from None
    try:
        return PipelineFile.model_validate(content)
    except ValidationError as error:
        raise PipelineError(
            f"The pipeline file {path} is not a pipeline: {settings.explain(error)}. "
            f"It may hold {', '.join(PipelineFile.model_fields)}; a step {', '.join(StepEntry.model_fields)}."
        ) from None


def _one_of(kind: str, name: str, known) -> None:
    try:
        settings.one_of(kind, name, known)
    except ValueError as error:
        raise PipelineError(str(error)) from None


def _code_cells(path: Path) -> list:
    try:
        return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    except Exception as error:  # nbformat raises whatever its JSON schema, reader or converter raises
        raise PipelineError(f"{path} cannot be read as a notebook ({error}). Save it again from Jupyter.") from None


def _declared(notebook: str, cells: list) -> dict[str, Any]:
    """The names and defaults in the cell tagged `parameters`; empty when there is none."""
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if not tagged:
        return {}
    defaults = {}
    try:
        for line in ast.parse(tagged[0]).body:
            if isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name):
                defaults[line.targets[0].id] = ast.literal_eval(line.value)
            elif isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value:
                defaults[line.target.id] = ast.literal_eval(line.value)
            elif not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)):
                raise ValueError(f"line {line.lineno} is no assignment to a name")
        return json.loads(json.dumps(defaults, allow_nan=False))
    except (SyntaxError, ValueError, TypeError) as error:
        raise PipelineError(
            f"The parameters cell of {notebook} is not a list of plain literals ({error}). "
            "Its types could not be checked; move everything else to the next cell."
        ) from None


def _override(shared: dict, ids: list[str], own: list[dict], declared: list[dict], overrides) -> dict:
    """Put the command line's values into `shared`, and into `own`, the steps' parameters, in place."""
    for text in overrides:
        target, equals, value = text.partition("=")
        step, dot, name = target.strip().rpartition(".")
        if not equals or not name:
            raise PipelineError(f"-p {text} is not name=value or step.name=value. It would change nothing; correct it.")
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise PipelineError(f"The value in -p {text} is not YAML: {error}. Put it in quotes.") from None
        if dot:
            _one_of("step", step, ids)
            own[ids.index(step)][name] = value
            continue
        takers = [(i, changes) for i, changes, names in zip(ids, own, declared, strict=True) if name in names]
        if takers and all(name in changes for _, changes in takers):
            raise PipelineError(
                f"-p {text} would change nothing: every step that takes {name} sets its own. "
                f"Name the step: -p {takers[0][0]}.{name}=..."
            )
        shared[name] = value
    return shared


def _check_names(shared: dict, ids: list[str], own: list[dict], declared: list[dict]) -> None:
    for changes in (shared, *own):
        if "run_dir" in changes:
            raise PipelineError(
                "run_dir is set by the pipeline: the run folder. Another value would scatter the results; use --out."
            )
    everything = sorted({name for names in declared for name in names} - {"run_dir"})
    for name in shared:
        _one_of("parameter", name, everything)
    for step, changes, names in zip(ids, own, declared, strict=True):
        for name in changes:
            _one_of(f"parameter of step {step!r} called", name, [known for known in names if known != "run_dir"])


def _no_bool(value):
    if isinstance(value, bool):
        raise ValueError("True and False are not numbers")
    return value


def _type_like(default) -> Any:
    """The pydantic type of values that may replace a default: an int may stand for a float, and so may '1e-3'."""
    if default is None:
        return Any
    if isinstance(default, list):
        kinds = {type(item) for item in default}
        if kinds <= {int, float} and float in kinds:
            return list[_type_like(0.0)]
        return list[_type_like(default[0])] if len(kinds) == 1 else list
    scalar = {bool: StrictBool, int: StrictInt, str: StrictStr, float: Annotated[float, BeforeValidator(_no_bool)]}
    return scalar.get(type(default), dict[str, Any])


def _checked_value(step: str, name: str, value, default):
    try:
        value = TypeAdapter(_type_like(default)).validate_python(value)
        json.dumps(value, allow_nan=False)
    except (ValidationError, ValueError, TypeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise PipelineError(
            f"{name}={value!r} in step {step!r} has the wrong type: {reason}. The notebook's default is {default!r}; "
            "it would fail or train something else. Give a value of that type (a number in quotes is text)."
        ) from None
    return value


def _product(notebook: str, step: str, parameters: dict) -> str | None:
    """Check the parameters of 05_train and 06_evaluate with their settings model; name what they write."""
    if notebook not in SETTINGS:
        return None
    try:
        checked = getattr(settings, SETTINGS[notebook])(**parameters)
    except ValidationError as error:
        raise PipelineError(
            f"Step {step!r} ({notebook}) would fail: {settings.explain(error)}. Correct the pipeline file or -p."
        ) from None
    return f"train/{checked.name}" if notebook == "05_train" else "metrics.json"


def _check_start(step: str, parameters: dict, products: dict) -> None:
    if parameters.get("setting") != "transductive" or parameters.get("start") or parameters.get("pseudo") == "clip":
        return
    wanted = f"train/{parameters['method']}-inductive-seed{parameters['seed']}"
    if wanted not in products:
        raise PipelineError(
            f"Step {step!r} would go on from {wanted}, which no step before it trains. It would fail hours later; "
            "train that first, or give start: the folder of a finished inductive run."
        )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _library_hash() -> str:
    """sha256 of everything in the package that a notebook's result can depend on: code and the tiny CLIP."""
    files = [p for p in PACKAGE.rglob("*.py") if p.name not in NOT_IN_RESULTS]
    files += [p for p in (PACKAGE / "clip" / "tiny").glob("*") if p.suffix in {".json", ".safetensors"}]
    return _sha256("".join(f"{p.relative_to(PACKAGE)}:{_sha256(p.read_bytes())}\n" for p in sorted(files)).encode())
