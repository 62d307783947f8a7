"""Make requirements.lock and environment.yml from pyproject.toml.

python data_scripts/lock.py           both; the lock needs uv and the package index
python data_scripts/lock.py --conda   environment.yml alone, without a network
"""

import argparse
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOWEST_PYTHON = "3.11"  # the lock holds for this version and every later one that pyproject.toml allows
# Two weeks: the newest releases have not reached every mirror, and malicious ones are found within days.
COOLING_OFF = "14 days"
CONDA_NAMES = {
    "torch": "pytorch",
    "open_clip_torch": "open-clip-torch",
    "playwright": "playwright-python",
}


def requirements(pyproject: dict) -> list[str]:
    """Everything a full installation needs, as pyproject.toml writes it: run, test and build dependencies."""
    project = pyproject["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    return [*project["dependencies"], *extras, *pyproject["build-system"]["requires"]]


def conda_environment(pyproject: dict) -> str:
    """The text of environment.yml. Requirements here are a name and a lower bound; markers are not handled."""
    lines = []
    for requirement in requirements(pyproject):
        name, _, bound = requirement.partition(">=")
        if not bound or ";" in requirement:
            raise ValueError(
                f"{requirement!r} is not of the form 'name>=version', so environment.yml would ask conda for "
                "something else than pip installs; write it so, or teach conda_environment() the new form."
            )
        lines.append(f"{CONDA_NAMES.get(name, name)} >={bound}")
    return "\n".join(
        [
            "# Made from pyproject.toml by `make lock`; do not edit. Use: conda env create -f environment.yml",
            "name: sptseg",
            "channels:",
            "  - conda-forge",
            "  - nodefaults",
            "dependencies:",
            f"  - python {pyproject['project']['requires-python']}",
            *(f"  - {line}" for line in lines),
            "  - pip",
            "  - pip:",
            "      - -e .",
            "",
        ]
    )


def write_lock(pyproject: dict) -> None:
    """Write requirements.lock: exact versions and hashes for every platform, from the public index, no addresses."""
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("uv was not found, so the lock cannot be made; install it (pip install uv) and try again.")
    options = ["--universal", "--python-version", LOWEST_PYTHON, "--fork-strategy", "fewest", "--generate-hashes"]
    options += ["--no-config", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
    options += ["--exclude-newer", COOLING_OFF, "--upgrade", "--output-file", "requirements.lock", "-"]
    # A find-links folder or a second index of this machine must not leak into everybody's lock.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    text = "\n".join(requirements(pyproject)) + "\n"
    subprocess.run([uv, "pip", "compile", *options], cwd=ROOT, env=environment, input=text, text=True, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conda", action="store_true", help="write environment.yml alone")
    only_conda = parser.parse_args().conda
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (ROOT / "environment.yml").write_text(conda_environment(pyproject), encoding="utf-8")
    if not only_conda:
        write_lock(pyproject)


if __name__ == "__main__":
    main()
