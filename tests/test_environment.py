"""pyproject.toml, requirements.lock and environment.yml say the same, and the first is the source of the others."""

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import sptseg_lib
from data_scripts.lock import conda_environment, requirements

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = ["3.11", "3.12", "3.13"]
LINE = re.compile(r"(?P<name>[\w.-]+)==(?P<version>\S+)(?: ; (?P<marker>.+))?")


def locked() -> list[tuple[str, Version, str | None, list[str]]]:
    """(name, version, marker, hashes) of every entry of requirements.lock."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    entries = []
    for line in filter(None, map(str.strip, text.splitlines())):
        pin, *hashes = re.split(r"\s+--hash=", line)
        match = LINE.fullmatch(pin.strip())
        assert match, f"requirements.lock holds a line that pins no version: {line[:80]}"
        entries.append((canonicalize_name(match["name"]), Version(match["version"]), match["marker"], hashes))
    return entries


LOCKED = locked()


def pinned_for(python: str, platform: str = "linux") -> dict[str, Version]:
    """What the lock installs under one Python version on a 64-bit PC."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.2",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "platform_machine": "x86_64",
        "sys_platform": platform,
        "os_name": "nt" if platform == "win32" else "posix",
    }
    applies = [entry for entry in LOCKED if entry[2] is None or Marker(entry[2]).evaluate(environment)]
    pins = {name: version for name, version, *_ in applies}
    assert len(pins) == len(applies), "requirements.lock pins a package twice for one Python version"
    return pins


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", PYTHONS)
def test_lock_satisfies_every_requirement(python, platform):
    pins = pinned_for(python, platform)
    for requirement in map(Requirement, requirements(PYPROJECT)):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is in pyproject.toml but not in requirements.lock: run make lock"
        assert pins[name] in requirement.specifier, (
            f"{name} {pins[name]} is locked, {requirement} wanted: run make lock"
        )


def test_every_locked_version_is_checked_by_hash():
    for name, _, _, hashes in LOCKED:
        assert hashes, f"{name} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), f"{name} has a malformed hash"


def test_lock_covers_every_supported_python():
    supported = SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert all(python in supported for python in PYTHONS)
    assert "3.10" not in supported and "3.14" not in supported, "PYTHONS above no longer lists every supported version"


def test_conda_environment_is_in_step():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert text == conda_environment(PYPROJECT), "environment.yml is out of step with pyproject.toml: run make lock"


def test_conda_environment_refuses_what_it_cannot_translate():
    changed = {**PYPROJECT, "build-system": {"requires": ["setuptools"]}}
    with pytest.raises(ValueError, match="name>=version"):
        conda_environment(changed)


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements.lock", "environment.yml"])
def test_no_addresses(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    found = re.findall(r"\S*(?:://|file:|git\+|index-url|find-links)\S*", text)
    assert not found, f"{name} names a place that another machine may not have: {found[:3]}"


def test_package_and_citation_name_one_version():
    version = PYPROJECT["project"]["version"]
    assert sptseg_lib.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_console_command_is_the_command_line(monkeypatch, capsys):
    module, _, name = PYPROJECT["project"]["scripts"]["sptseg"].partition(":")
    monkeypatch.setattr("sys.argv", ["sptseg", "run", "--help"])
    with pytest.raises(SystemExit) as stopped:
        getattr(import_module(module), name)()
    assert not stopped.value.code
    assert "notebooks/pipelines" in capsys.readouterr().out


def test_torchvision_belongs_to_torch():
    from torchvision.ops import nms  # fails on import when the pair was built apart

    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 6.0]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 2]
