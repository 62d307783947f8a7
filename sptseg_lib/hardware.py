"""What machine this is, for results that depend on it."""

import os
import platform
import shutil
import subprocess
from importlib import metadata


def hardware() -> str:
    """One line about this machine: cores, GPU, system, Python and torch, without importing torch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{cores} CPU cores", f"{platform.system()} {platform.machine()}", f"Python {platform.python_version()}"]
    if shutil.which("nvidia-smi"):
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
        )
        parts[1:1] = sorted(set(asked.stdout.strip().splitlines())) if asked.returncode == 0 else []
    try:
        parts.append(f"torch {metadata.version('torch')}")
    except metadata.PackageNotFoundError:
        pass
    return ", ".join(parts)
