"""What machine this is, for results that depend on it."""

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path


def _processor() -> str:
    """The processor's name in brackets, where Linux tells it."""
    told = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", told.read_text()) if told.is_file() else None
    return f" ({found[1].strip()})" if found else ""


def hardware() -> str:
    """One line about this machine: cores, their name, GPU, system, Python and torch, without importing torch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.machine()}"
    parts = [f"{cores} CPU cores{_processor()}", system, f"Python {platform.python_version()}"]
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
