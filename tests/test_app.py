"""`make app` as a person uses it: notebook 07 served by voila, in headless Chromium, on a desk and on a telephone."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_widgets import START_S, browser, wait_for_server, wait_until  # noqa: F401

from sptseg_lib.shipped import FOLDER

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (FOLDER / "checkpoint.safetensors").is_file(), reason="no checkpoint is shipped: no app"),
]


def options() -> list[str]:
    """What the Makefile gives to voila."""
    recipe = re.search(r"^app:.*\n\t\$\(RUN\) -m voila ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe, "the Makefile has no target app that calls voila"
    return shlex.split(recipe[1].replace("\\\n", " "))


@pytest.fixture(scope="module")
def app(browser, tmp_path_factory):  # noqa: F811
    """The app on a free loopback port, with a configuration of its own; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    state = tmp_path_factory.mktemp("app")
    names = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    environment = os.environ | {name: str(state / folder) for name, folder in names.items()}
    environment |= {"JUPYTER_PREFER_ENV_PATH": "1", "IPYTHONDIR": str(state / "ipython")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "voila", *options(), "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    log_file = state / "voila.log"
    with log_file.open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        try:
            wait_for_server(server, f"http://127.0.0.1:{port}/voila/static/voila.js", log_file)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def open_app(browser, app, width: int):  # noqa: F811
    page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
    page.goto(app, timeout=START_S * 1000, wait_until="commit")
    page.get_by_role("button", name="Segment").wait_for(timeout=START_S * 1000)
    wait_until(lambda: len(pictures(page)) == 2, "the app shows no label map and no heat maps")
    return page


def pictures(page) -> list[str]:
    return page.locator(".jp-OutputArea-output img").evaluate_all("all => all.map(one => one.src)")


def message(page) -> str:
    return page.locator(".widget-html-content").all_inner_texts()[-1]


def press(page) -> None:
    page.get_by_role("button", name="Segment").click()


def upload(page, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator("button", has_text="Picture").click()
    chooser.value.set_files(path)
    wait_until(lambda: "(1)" in page.locator("button", has_text="Picture").inner_text(), "nothing was uploaded")


def test_on_a_desk_names_pictures_and_gamma_change_the_figures(browser, app, tmp_path):  # noqa: F811
    page = open_app(browser, app, 1280)
    text = page.inner_text("body")
    assert "Try it" in text and "Exercises" not in text and "import" not in text

    before = pictures(page)
    handle = page.locator(".noUi-handle").first
    handle.focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    wait_until(lambda: len(pictures(page)) == 2 and pictures(page)[0] != before[0], "γ changes no label map")

    words = page.locator("textarea")
    words.fill("star, Star")
    press(page)
    wait_until(lambda: "named more than once" in message(page), "a name that comes twice is not refused")
    words.fill("<b>red</b>, blue")
    before = pictures(page)
    press(page)
    wait_until(lambda: len(pictures(page)) == 2 and pictures(page)[0] != before[0], "other names change no label map")
    wait_until(lambda: "Largest" in message(page), f"no result is named, only {message(page)!r}")

    half = np.zeros((60, 90, 3), np.uint8)
    half[:, 45:] = (250, 120, 10)
    Image.fromarray(half).save(tmp_path / "half.jpg")
    before = pictures(page)
    upload(page, tmp_path / "half.jpg")
    press(page)
    wait_until(lambda: len(pictures(page)) == 2 and pictures(page)[1] != before[1], "an upload changes no figure")

    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    upload(page, tmp_path / "broken.png")
    press(page)
    wait_until(lambda: "no picture" in message(page) or "truncated" in message(page), "a broken file is not refused")


def test_on_a_telephone_nothing_is_wider_than_the_screen(browser, app):  # noqa: F811
    page = open_app(browser, app, 390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for kind in ("textarea", "button", ".widget-checkbox", ".jp-OutputArea-output img", ".noUi-target"):
        for box in filter(None, (one.bounding_box() for one in page.locator(kind).all())):
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390, f"{kind} reaches beyond the screen: {box}"
    before = pictures(page)
    page.get_by_text("low heads").click()
    press(page)
    wait_until(lambda: len(pictures(page)) == 2 and pictures(page)[1] != before[1], "a switch changes no figure")
