"""The notebooks as files: complete, committed executed, small, and in the form that papermill and readers rely on."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest
from papermill.inspection import inspect_notebook

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
LESSONS = [
    "00_start_here",
    "01_clip_features",
    "02_fft_prompts",
    "03_spectral_decoder",
    "04_losses_and_splits",
    "05_train",
    "06_evaluate",
    "07_segment_your_image",
    "08_ablations",
    "09_peers",
    "10_cost",
    "11_deep_spectral_methods",
    "12_frequency_balancing",
    "13_robustness",
]
SOLUTIONS = sorted(path.stem for path in FOLDER.glob("solutions/*.ipynb"))
ALL = [FOLDER / f"{stem}.ipynb" for stem in LESSONS] + [FOLDER / "solutions" / f"{stem}.ipynb" for stem in SOLUTIONS]
MOST_LINES = 30
FORBIDDEN = {
    r"^\s*[!%]\s*pip\b": "installs packages; they belong in pyproject.toml",
    r"^\s*%cd\b": "changes the folder, so the notebook works from one place only",
    r"^\s*from\s+\S+\s+import\s+\*": "imports everything from a module",
    r"(filterwarnings|simplefilter)\(\s*[\"']ignore": "silences warnings",
}
LOCAL_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|work|tmp|Users)/\w[^\s\"'<>]*")

every_notebook = pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
every_lesson = pytest.mark.parametrize("path", ALL[: len(LESSONS)], ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    assert path.is_file(), f"notebooks/{path.name} is missing"
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code" and cell.source.strip()]


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def parameter_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]


def literal_assignments(source: str) -> dict[str, object]:
    """{name: value} of a cell that does nothing but `name = literal`; ValueError for anything else in it."""
    values = {}
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise ValueError(f"{ast.unparse(node)!r} is not of the form name = literal")
        values[node.targets[0].id] = ast.literal_eval(node.value)
    return values


def test_no_lesson_is_left_out():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == LESSONS


@every_notebook
def test_is_a_valid_notebook(path):
    nbformat.validate(json.loads(path.read_text(encoding="utf-8")))
    assert read(path).metadata.kernelspec.name == "python3"


@every_notebook
def test_is_small(path):
    size = path.stat().st_size
    assert size < 1_000_000, f"{size / 1e6:.1f} MB: draw fewer or smaller figures, or lower their resolution"


@every_notebook
def test_is_committed_executed(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts, "the notebook has no code"
    assert counts == list(range(1, len(counts) + 1)), "run it from top to bottom in a fresh kernel and save it"
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    assert outputs, "no cell shows anything"
    assert not [output.evalue for output in outputs if output.output_type == "error"]


@every_notebook
def test_begins_with_a_title(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")


@every_lesson
def test_begins_with_a_question(path):
    assert "**Question:**" in read(path).cells[0].source


@every_notebook
def test_parameters_are_plain_literals(path):
    cells = parameter_cells(path)
    assert len(cells) <= 1
    if cells:
        values = literal_assignments(cells[0].source)
        # Papermill reads the cell with its own parser, which must find the same names and the same defaults.
        seen = {name: entry["default"] for name, entry in inspect_notebook(str(path)).items()}
        assert {name: ast.literal_eval(default) for name, default in seen.items()} == values


@every_lesson
def test_has_parameters(path):
    assert len(parameter_cells(path)) == 1, "tag one cell `parameters`"


@pytest.mark.parametrize("source", ["a: int = 1", "a = b = 1", "a = 2 * 3", "import torch", "a = [len('x')]"])
def test_what_is_not_a_plain_literal_is_found(source):
    with pytest.raises(ValueError):
        literal_assignments(source)


@every_notebook
def test_cells_are_short(path):
    longest = max(code_cells(path), key=lambda cell: cell.source.count("\n"))
    assert longest.source.count("\n") < MOST_LINES, f"a cell is too long to read in one piece: {longest.source[:200]}"


@every_notebook
@pytest.mark.parametrize("pattern", FORBIDDEN, ids=["pip", "cd", "star", "silence"])
def test_does_nothing_forbidden(path, pattern):
    found = [line for cell in code_cells(path) for line in cell.source.splitlines() if re.search(pattern, line)]
    assert not found, f"{found[0].strip()!r} {FORBIDDEN[pattern]}"


@every_notebook
def test_shows_no_path_of_the_machine_that_ran_it(path):
    notebook = read(path)
    for cell in code_cells(path):
        for output in cell.outputs:
            for kind in [kind for kind in output.get("data", {}) if kind.startswith("image/")]:
                output.data.pop(kind)
            found = LOCAL_PATH.search(json.dumps(output))
            assert not found, f"an output names {found[0]}, a path that readers do not have"
    assert not LOCAL_PATH.search(json.dumps(notebook.metadata))


@every_notebook
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if not re.match(r"[a-z]+:|#", target):
            file = path.parent / target.partition("#")[0]
            assert file.exists(), f"{path.name} links to {target}, which does not exist"


@every_lesson
def test_exercises_have_solutions(path):
    if re.search(r"^#+ .*Exercises", prose(path), re.MULTILINE):
        assert f"{path.stem}_solutions" in SOLUTIONS, f"{path.name} has exercises but no solutions notebook"
