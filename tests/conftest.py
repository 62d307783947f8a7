"""Fixtures that every test file may use."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the specification and the golden files: SPTSEG_SHARED, or `shared` beside the checkout."""
    folder = Path(os.environ.get("SPTSEG_SHARED", ROOT.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no golden files: {folder} has no folder golden; set SPTSEG_SHARED to the folder that has one")
    return folder
