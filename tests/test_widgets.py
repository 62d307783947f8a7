"""Widgets driven as a reader does: JupyterLab in headless Chromium, move the control, watch the figure change."""

import ast
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from sptseg_lib.settings import TrainSettings
from sptseg_lib.train import fit

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
SETTINGS = {
    # Every cell stays in the page, also those out of sight; no news from the network.
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
START_S, RUN_S, CHANGE_S = 240, 600, 60

# (notebook, part of the control's label)
WIDGETS = [
    ("01_clip_features.ipynb", "head"),
    ("02_fft_prompts.ipynb", "radius"),
    ("03_spectral_decoder.ipynb", "row"),
    ("04_losses_and_splits.ipynb", "γ"),
    ("12_frequency_balancing.ipynb", "radius"),
]
TOY = """\
%matplotlib inline
import matplotlib.pyplot as plt
import ipywidgets

def draw(radius=1):
    plt.figure(figsize=(2, 2))
    plt.plot([0, radius])
    plt.show()

ipywidgets.interact(draw, radius=(1, 5), continuous_update=False);
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, or a skip that says what is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no widget is tested")
    if CHROMIUM is None:
        pytest.skip("no Chromium was found, so no widget is tested; on Debian: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of the notebooks, so that those of the checkout stay as they are."""
    copy = tmp_path_factory.mktemp("widgets") / "notebooks"
    shutil.copytree(ROOT / "notebooks", copy, ignore=shutil.ignore_patterns(".*"))
    return copy


@pytest.fixture(scope="module")
def lab(browser, folder):
    """Serve the folder by JupyterLab on a free loopback port, with a configuration of its own; yields an address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token, state, log_file = secrets.token_hex(16), folder.parent / "jupyter", folder.parent / "jupyterlab.log"
    for name, values in SETTINGS.items():
        file = state / "settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(state / "config"),
        "JUPYTER_DATA_DIR": str(state / "data"),
        "JUPYTER_RUNTIME_DIR": str(state / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(state / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(state / "workspaces"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "IPYTHONDIR": str(state / "ipython"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]
    with log_file.open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder)
        try:
            wait_for_server(server, f"http://127.0.0.1:{port}/api/status?token={token}", log_file)
            yield f"http://127.0.0.1:{port}/lab/workspaces/{{workspace}}/tree/{{name}}?token={token}"
        finally:
            server.terminate()  # it ends its kernels, too
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_for_server(server: subprocess.Popen, address: str, log_file: Path) -> None:
    end = time.monotonic() + START_S
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for loopback
    while time.monotonic() < end and server.poll() is None:
        try:
            direct.open(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start:\n{log_file.read_text(errors='replace')[-2000:]}")


def prepare(file: Path, values: dict) -> None:
    """Set values in the cell tagged `parameters`, and leave out what follows the widget: nbval runs the rest."""
    notebook = nbformat.read(file, as_version=4)
    widgets = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and "interact(" in cell.source]
    assert widgets, f"{file.name} calls interact() nowhere"
    notebook.cells = notebook.cells[: widgets[-1] + 1]
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    tree = ast.parse(cell.source)
    assignments = {node.targets[0].id: node for node in tree.body}
    for name, value in values.items():
        assignments[name].value = ast.parse(repr(value), mode="eval").body
    cell.source = ast.unparse(tree)
    nbformat.write(notebook, file)


def open_and_run(page, lab: str, name: str) -> None:
    """Open a notebook in a fresh workspace, wait for its kernel to be idle, and run all cells."""
    page.goto(lab.format(workspace=f"test-{secrets.token_hex(4)}", name=name), wait_until="commit")
    # The indicator beside the kernel's name says idle before there is a kernel; cells run then are dropped.
    kernel = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel"
    page.wait_for_function(f"() => {kernel}?.status === 'idle'", timeout=START_S * 1000)
    run = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
    page.evaluate(f"() => {{ {run}.then(done => window.outcome = String(done), why => window.outcome = String(why)) }}")
    page.wait_for_function("() => window.outcome !== undefined", timeout=RUN_S * 1000)
    errors = page.evaluate("""() => window.jupyterapp.shell.currentWidget.content.widgets
        .flatMap(cell => cell.model.sharedModel.outputs ?? []).filter(output => output.output_type === 'error')
        .map(output => `${output.ename}: ${output.evalue}`)""")
    assert page.evaluate("window.outcome") == "true" and not errors, f"{name} stopped: {errors}"


def move_control(page, label: str) -> None:
    """Move the first slider (or menu) whose label contains `label` by the keyboard."""
    control = page.locator(".jupyter-widgets", has=page.locator("> .widget-label", has_text=re.compile(label, re.I)))
    control.first.wait_for(timeout=CHANGE_S * 1000)
    control.first.scroll_into_view_if_needed()
    handle, menu = control.first.locator(".noUi-handle"), control.first.locator("select")
    if handle.count():
        low, high, now = (float(handle.first.get_attribute(f"aria-value{end}")) for end in ("min", "max", "now"))
        handle.first.focus()
        for _ in range(2):
            page.keyboard.press("ArrowRight" if now < (low + high) / 2 else "ArrowLeft")
    else:
        menu.select_option(index=(menu.evaluate("menu => menu.selectedIndex") + 1) % menu.locator("option").count())


def figures(page, label: str) -> list[str]:
    """The pictures in the cell that holds the control, as data addresses."""
    label_here = page.locator(".jupyter-widgets > .widget-label", has_text=re.compile(label, re.I))
    cell = page.locator(".jp-CodeCell", has=label_here).first
    return cell.locator(".jp-OutputArea-output img").evaluate_all("pictures => pictures.map(picture => picture.src)")


def wait_until(condition, what: str) -> None:
    end = time.monotonic() + CHANGE_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def check_widget(browser, lab: str, name: str, label: str) -> None:
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    try:
        page = context.new_page()
        open_and_run(page, lab, name)
        wait_until(lambda: figures(page, label), f"{name} shows no figure beside the control {label!r}")
        before = figures(page, label)
        move_control(page, label)
        wait_until(
            lambda: figures(page, label) not in ([], before),
            f"{name}: the control {label!r} was moved, but the figure beside it stayed the same",
        )
    finally:
        context.close()


def write_toy(file: Path, source: str) -> str:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, file)
    return file.name


def test_harness_sees_a_figure_change(browser, lab, folder):
    check_widget(browser, lab, write_toy(folder / "toy_moves.ipynb", TOY), "radius")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [(("[0, radius]", "[0, 1]"), "stayed the same"), (("import ipywidgets", "1 / 0"), "ZeroDivisionError")],
)
def test_harness_notices(browser, lab, folder, monkeypatch, change, complaint):
    monkeypatch.setattr(sys.modules[__name__], "CHANGE_S", 5)
    name = write_toy(folder / "toy_fails.ipynb", TOY.replace(*change))
    with pytest.raises(AssertionError, match=complaint):
        check_widget(browser, lab, name, "radius")


@pytest.mark.parametrize(("name", "label"), WIDGETS)
def test_widget_changes_its_figure(browser, lab, folder, name, label):
    prepare(folder / name, {})
    check_widget(browser, lab, name, label)


def test_gamma_widget_changes_its_figure(browser, lab, folder, tmp_path):
    """06 needs a trained model: twelve small steps are enough for a curve that moves."""
    small = {"size": 64, "batch": 4, "run_dir": str(tmp_path)}
    fit(TrainSettings(iterations=12, **small))
    prepare(folder / "06_evaluate.ipynb", {**small, "scenes": 24})
    check_widget(browser, lab, "06_evaluate.ipynb", "γ")
