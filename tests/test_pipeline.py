"""The pipeline runner, on notebooks of three cells: order, skipping, resuming, one clear error for each bad input."""

import json
import shutil
from base64 import b64encode
from collections import namedtuple
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from typer.testing import CliRunner

from sptseg_lib import execute
from sptseg_lib import pipeline as pipelines
from sptseg_lib.__main__ import app
from sptseg_lib.execute import StepError, run_pipeline
from sptseg_lib.pipeline import PipelineError, load_pipeline
from sptseg_lib.report import clock, seed_table, write_report

PIXEL = b64encode(b"\x89PNG not a real picture").decode()
COUNT = "scale = 2.0\nrun_dir = 'runs/notebook'\nlabel = 'a'\nloud = False"
APPEND = """from pathlib import Path
assert Path("notebooks").is_dir() and Path(run_dir).is_absolute()
log = Path(run_dir) / "log.txt"
old = log.read_text() if log.exists() else ""
"""


class Project:
    """A folder with notebooks/ and notebooks/pipelines/, and the run folder of its one pipeline."""

    def __init__(self, root: Path):
        self.root = root
        self.run_dir = root / "runs" / "tiny"
        (root / "notebooks" / "pipelines").mkdir(parents=True)

    def notebook(self, name: str, parameters: str, *cells: str) -> None:
        first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
        notebook = new_notebook(cells=[new_markdown_cell("# Title"), first, *map(new_code_cell, cells)])
        nbformat.write(notebook, self.root / "notebooks" / f"{name}.ipynb")

    def pipeline(self, text: str = "", **content) -> Path:
        path = self.root / "notebooks" / "pipelines" / "tiny.yaml"
        path.write_text(text or yaml.safe_dump({"name": "tiny", **content}))
        return path

    def run(self, path: Path, *overrides: str, **options) -> list[str]:
        """What a run shows: a line for each step."""
        shown: list[str] = []
        run_pipeline(load_pipeline(path, overrides), show=shown.append, **options)
        return shown

    @property
    def log(self) -> list[str]:
        return (self.run_dir / "log.txt").read_text().split()


@pytest.fixture
def project(tmp_path, monkeypatch):
    package = tmp_path / "package"  # a library of its own: the real one may change while the tests run
    (package / "clip" / "tiny").mkdir(parents=True)
    (package / "model.py").write_text("width = 1\n")
    (package / "clip" / "tiny" / "weights.safetensors").write_text("1")
    monkeypatch.setattr(pipelines, "PACKAGE", package)
    made = Project(tmp_path)
    made.package = package
    made.notebook("01_first", COUNT, APPEND + "_ = log.write_text(f'{old}first-{label}-{scale} ')")
    made.notebook("02_second", "run_dir = ''\nscale = 1.0", APPEND + "_ = log.write_text(f'{old}second-{scale} ')")
    return made


def two_steps(project: Project, **content) -> Path:
    return project.pipeline(steps=[{"notebook": "01_first"}, {"notebook": "02_second", "id": "two"}], **content)


def test_runs_in_order_then_skips_then_follows_changed_code(project, monkeypatch):
    path = two_steps(project, parameters={"scale": 3})
    monkeypatch.chdir(project.root.parent)
    lines = project.run(path, "01_first.label=b")
    assert [line.split(":")[0] for line in lines] == ["[1/2] 01_first", "[2/2] two"]
    assert project.log == ["first-b-3.0", "second-3.0"]
    assert {"01-01_first.ipynb", "02-two.ipynb", "report.html", "state.json"} <= {
        p.name for p in project.run_dir.iterdir()
    }

    lines = project.run(path, "01_first.label=b")
    assert all("done before" in line for line in lines) and len(project.log) == 2

    project.notebook("02_second", "run_dir = ''\nscale = 1.0", APPEND + "_ = log.write_text(f'{old}again-{scale} ')")
    lines = project.run(path, "01_first.label=b")
    assert "done before" in lines[0] and "changed" in lines[1]
    assert project.log == ["first-b-3.0", "second-3.0", "again-3.0"]


def test_fingerprints_cover_notebook_library_weights_and_earlier_steps(project):
    path = two_steps(project)

    def change_notebook():
        project.notebook("01_first", COUNT, APPEND + "_ = log.write_text(f'{old}other ')")

    def change(name: str):
        return lambda: (project.package / name).write_text("width = 2\n")

    for edit in (change_notebook, change("model.py"), change("clip/tiny/weights.safetensors")):
        before = load_pipeline(path).steps
        edit()
        after = load_pipeline(path).steps
        assert all(old.fingerprint != new.fingerprint for old, new in zip(before, after, strict=True))
    change("report.py")()  # no notebook imports it
    assert load_pipeline(path).steps == after


def test_failure_names_step_cell_and_error_and_resumes_there(project):
    project.notebook("02_second", "run_dir = ''\nscale = 1.0", "'fine'", "height = 0\n1 / height", "'never'")
    path = two_steps(project)
    result = CliRunner().invoke(app, ["run", str(path)])
    assert result.exit_code == 1
    for part in ("[2/2] two (02_second.ipynb)", "cell 4 (In [4])", "ZeroDivisionError", "1 / height", "02-two.ipynb"):
        assert part in result.stderr
    assert "Traceback" not in result.stderr and not (project.run_dir / "report.html").exists()
    assert (project.run_dir / "02-two.ipynb").exists()

    project.notebook("02_second", "run_dir = ''\nscale = 1.0", APPEND + "_ = log.write_text(f'{old}mended ')")
    result = CliRunner().invoke(app, ["run", str(path)])
    assert result.exit_code == 0 and "01_first: done before" in result.stdout
    assert project.log == ["first-a-2.0", "mended"] and (project.run_dir / "report.html").exists()


def test_a_kernel_that_dies_is_a_clear_error(project):
    project.notebook("02_second", "scale = 1.0", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(StepError, match=r"\[1/1\] 02_second .*DeadKernelError"):
        project.run(project.pipeline(steps=[{"notebook": "02_second"}]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"stepz": []}, "there is no setting 'stepz'"),
        ({"steps": []}, "at least 1 item"),
        ({"name": "../up", "steps": [{"notebook": "01_first"}]}, "name='../up'"),
        ({"steps": [{"notebook": "01_frist"}]}, "no notebook '01_frist'.*Did you mean '01_first'.*02_second"),
        ({"steps": [{"notebook": "01_first"}] * 2}, "2 steps are called '01_first'"),
        ({"steps": [{"notebook": "01_first", "parameters": {"scael": 1}}]}, "'scael'.*Did you mean 'scale'"),
        ({"steps": [{"notebook": "01_first"}], "parameters": {"lable": "b"}}, "'lable'.*Did you mean 'label'"),
        ({"steps": [{"notebook": "01_first"}], "parameters": {"scale": "wide"}}, "scale='wide' in step '01_first'"),
        ({"steps": [{"notebook": "01_first"}], "parameters": {"scale": True}}, "scale=True .* not numbers"),
        ({"steps": [{"notebook": "01_first"}], "parameters": {"scale": float("nan")}}, "scale=nan"),
        ({"steps": [{"notebook": "01_first"}], "parameters": {"label": 3}}, "label=3 .* default is 'a'"),
        ({"steps": [{"notebook": "01_first"}], "parameters": {"loud": 1}}, "loud=1 "),
        ({"steps": [{"notebook": "01_first"}], "parameters": {"run_dir": "x"}}, "run_dir is set by the pipeline"),
    ],
)
def test_a_bad_pipeline_file_stops_before_anything_is_written(project, content, message):
    path = project.pipeline(**content)
    with pytest.raises(PipelineError, match=message):
        load_pipeline(path)
    result = CliRunner().invoke(app, ["run", str(path)])
    assert result.exit_code == 2 and result.stderr.startswith("Error: ") and "Traceback" not in result.stderr
    assert not (project.root / "runs").exists()


def test_unreadable_files(project):
    with pytest.raises(PipelineError, match="not YAML"):
        load_pipeline(project.pipeline("name: [tiny\nsteps: }"))
    with pytest.raises(PipelineError, match="not a pipeline"):
        load_pipeline(project.pipeline("just a sentence"))
    with pytest.raises(PipelineError, match="cannot be read"):
        load_pipeline(project.root / "missing.yaml")
    path = project.pipeline(steps=[{"notebook": "03_third"}])
    (project.root / "notebooks" / "03_third.ipynb").write_text('{"cells": [')
    with pytest.raises(PipelineError, match="cannot be read as a notebook"):
        load_pipeline(path)
    project.notebook("03_third", "import os\nfolder = os.getcwd()")
    with pytest.raises(PipelineError, match="not a list of plain literals"):
        load_pipeline(path)


def test_parameters_are_repaired_and_reach_the_notebooks_that_declare_them(project):
    project.notebook("03_third", 'rates = [0.1, 1.0]  # a comment\nnote = "a # b = c"\nsteps: int = 3\nnothing = None')
    steps = [
        {"notebook": "01_first"},
        {"notebook": "03_third", "parameters": {"rates": ["1e-3", 2], "nothing": {"a": 1}}},
    ]
    steps[1]["parameters"]["steps"] = 4
    path = project.pipeline(steps=steps, parameters={"scale": "1e-3", "note": "x", "steps": 9})
    assert load_pipeline(path).steps[1].parameters["steps"] == 4  # a step's own value comes before the shared one
    first, third = load_pipeline(path, ["03_third.steps=5", "label=c"]).steps
    assert first.parameters == {"scale": 1e-3, "label": "c", "loud": False}
    assert third.parameters == {"rates": [1e-3, 2.0], "note": "x", "steps": 5, "nothing": {"a": 1}}
    assert [type(rate) for rate in third.parameters["rates"]] == [float, float]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("label", "not name=value"),
        ("frist.label=b", "no step 'frist'"),
        ("01_first.lable=b", "Did you mean 'label'"),
        ("lable=b", "Did you mean 'label'"),
        ("label=[", "not YAML"),
        ("loud=3", "wrong type"),
        ("label=b", "every step that takes label sets its own. Name the step: -p 01_first.label="),
    ],
)
def test_a_bad_override(project, override, message):
    path = project.pipeline(steps=[{"notebook": "01_first", "parameters": {"label": "z"}}])
    with pytest.raises(PipelineError, match=message):
        load_pipeline(path, [override])


def test_a_run_folder_of_other_parameters(project):
    path = two_steps(project)
    project.run(path)
    with pytest.raises(PipelineError, match=r"01_first.label was 'a' and is now 'b'.*--out.*--fresh"):
        project.run(path, "label=b")
    shorter = project.pipeline(steps=[{"notebook": "01_first"}])
    with pytest.raises(PipelineError, match="holds a step 'two'"):
        project.run(shorter)
    assert project.log == ["first-a-2.0", "second-1.0"]
    project.run(shorter, "label=b", fresh=True)
    assert project.log == ["first-b-2.0"]


def test_a_folder_that_no_pipeline_made_is_left_alone(project):
    path = two_steps(project)
    project.run_dir.mkdir(parents=True)
    (project.run_dir / "thesis.tex").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(PipelineError, match="not a pipeline's run folder"):
            project.run(path, fresh=fresh)
    assert [p.name for p in project.run_dir.iterdir()] == ["thesis.tex"]
    (project.run_dir / "state.json").write_text('{"steps": {"one": ')
    with pytest.raises(PipelineError, match="damaged.*--fresh"):
        project.run(path)


def test_no_room_on_the_disk(project, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**12, 10**12 - 499 * 10**6, 499 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(PipelineError, match="499 MB are free.*500 MB are needed.*needs_mb: 500"):
        project.run(two_steps(project))
    assert not (project.root / "runs").exists()


TRAIN = "run_dir = ''\nmethod = 'spt_seg'\nsetting = 'inductive'\niterations = 5\nseed = 0\noverrides = {}"
WRITE_TRAIN = (
    "from pathlib import Path\nfolder = Path(run_dir) / 'train' / f'{method}-{setting}-seed{seed}'\n"
    "folder.mkdir(parents=True, exist_ok=True)\n_ = (folder / 'step.txt').write_text('VERSION')"
)


def test_training_parameters_are_checked_by_their_model(project):
    project.notebook("05_train", TRAIN, WRITE_TRAIN)
    project.notebook("06_evaluate", "run_dir = ''\nscenes = 5\ngammas = [0.1]", "")
    train = {"notebook": "05_train", "id": "a"}
    for changes, message in [
        ({"method": "spt_sge"}, "spt_seg"),
        ({"iterations": 0}, "iterations=0"),
        ({"overrides": {"windwo": 2}}, "windwo"),
    ]:
        with pytest.raises(PipelineError, match=message):
            load_pipeline(project.pipeline(steps=[{**train, "parameters": changes}]))
    with pytest.raises(PipelineError, match="'a' and 'b' would both write train/spt_seg-inductive-seed0"):
        load_pipeline(project.pipeline(steps=[train, {**train, "id": "b"}]))
    with pytest.raises(PipelineError, match="scenes=0"):
        load_pipeline(project.pipeline(steps=[{"notebook": "06_evaluate", "parameters": {"scenes": 0}}]))


def test_changed_code_trains_anew_and_metrics_must_exist(project):
    project.notebook("05_train", TRAIN, WRITE_TRAIN)
    project.notebook("06_evaluate", "run_dir = ''\nscenes = 5", "'forgets to write metrics.json'")
    path = project.pipeline(steps=[{"notebook": "05_train"}, {"notebook": "06_evaluate"}])
    with pytest.raises(StepError, match=r"06_evaluate.*without writing metrics.json"):
        project.run(path)
    step = project.run_dir / "train" / "spt_seg-inductive-seed0" / "step.txt"
    step.write_text("old code")

    text = '{"runs": [{"method": "spt_seg", "mIoU_unseen": 47.26}]}'
    write = f"from pathlib import Path\n_ = (Path(run_dir) / 'metrics.json').write_text('{text}')"
    project.notebook("05_train", TRAIN, WRITE_TRAIN + "\n'mended'")
    project.notebook("06_evaluate", "run_dir = ''\nscenes = 5", write)
    project.run(path)
    assert step.read_text() == "VERSION"  # not taken over from the old code
    assert (project.run_dir / "replaced" / step.parent.name / "step.txt").read_text() == "old code"
    assert ">47.3<" in (project.run_dir / "report.html").read_text()


def test_report_holds_scores_seeds_and_figures_and_escapes(tmp_path):
    runs = [
        {
            "method": "<b>x</b>",
            "setting": "inductive",
            "seed": s,
            "hIoU": 50.0 + 2 * s,
            "mIoU_seen": None,
            "pAcc": 70.16,
        }
        for s in (0, 1)
    ]
    runs[0] |= {"things_unseen": 12.34, "stuff_unseen": float("nan"), "images_per_second": 9.87}
    sweep = {**runs[0], "gamma": 0.3, "reported": False, "hIoU": 88.8}
    (tmp_path / "metrics.json").write_text(json.dumps({"runs": [*runs, sweep]}))
    picture = nbformat.v4.new_output("display_data", {"image/png": PIXEL + "\n"})
    cells = [
        new_code_cell("draw()", metadata={"tags": ["report"], "caption": 'a "big" <figure>'}, outputs=[picture]),
        new_code_cell("draw()", outputs=[picture]),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "01-one.ipynb")
    steps = [{"id": "one", "notebook": "01_one", "parameters": {"note": "<i>"}, "file": "01-one.ipynb", "seconds": 65}]
    html = write_report(tmp_path, "T & <script>", {"size": 128}, steps, "2 CPU cores").read_text()

    assert html.count(">88.8<") == 1 and html.index("<details>") < html.index(">88.8<") < html.index("</details>")
    assert html.count("data:image/png;base64," + PIXEL + '"') == 1
    for part in (
        "T &amp; &lt;script&gt;",
        "&lt;b&gt;x",
        "&lt;figure&gt;",
        "note = &lt;i&gt;",
        "size = 128",
        "1 min 05 s",
    ):
        assert part in html
    for raw in ("<script", "<b>", "<i>", "http://", "https://", "nan"):
        assert raw not in html
    for part in (">70.2<", ">12.3<", ">9.9<", "things, mIoU(U)", "51.0 ± 1.4", 'href="01-one.ipynb"', "2 CPU cores"):
        assert part in html
    assert [row["seeds"] for row in seed_table(runs)] == [2] and seed_table(runs[:1]) == []


def test_damaged_metrics_and_clock(tmp_path):
    (tmp_path / "metrics.json").write_text('{"runs": 3}')
    with pytest.raises(ValueError, match="run 06_evaluate again"):
        write_report(tmp_path, "t", {}, [], "")
    assert [clock(seconds) for seconds in (0.4, 59.6, 3600, 7389)] == ["0 s", "1 min 00 s", "1 h 00 min", "2 h 03 min"]


def test_check_prints_the_plan_and_runs_nothing(project):
    result = CliRunner().invoke(app, ["check", str(two_steps(project)), "-p", "scale=4"])
    assert result.exit_code == 0 and "[2/2] two (02_second.ipynb) scale=4.0" in result.stdout
    assert not (project.root / "runs").exists()


def test_interrupting_says_how_to_go_on(project, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(execute, "_execute", interrupt)
    result = CliRunner().invoke(app, ["run", str(two_steps(project))])
    assert result.exit_code == 130 and "the same command goes on" in result.stderr
    assert json.loads((project.run_dir / "state.json").read_text())["steps"]["01_first"]["done"] is False
