"""The script that trains the tiny CLIP: both cycles in miniature, interrupted and not."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from scripts import SCRIPTS, load_script

from sptseg_lib.clip.tiny import WEIGHTS_PATH

BATCH = 16


@pytest.fixture(scope="module")
def script():
    return load_script("pretrain_tiny_clip")


def small(cycle):
    return cycle._replace(images=4 * BATCH)


def test_the_second_cycle_draws_scenes_that_the_first_did_not(script):
    first, second = script.CYCLES
    assert second.first >= first.first + first.images
    index = script.draw_batch(second.first, BATCH, second, script.SMALL, "cpu")[2]
    assert index.tolist() == list(range(second.first, second.first + BATCH))


@pytest.mark.parametrize("number", [0, 1])
def test_an_interrupted_cycle_ends_as_an_unbroken_one(script, tmp_path, number):
    cycle, start = small(script.CYCLES[number]), [None, WEIGHTS_PATH][number]
    whole = script.Trainer(tmp_path, cycle, BATCH, "cpu", start)
    for _ in range(4):
        whole.step()
    broken = script.Trainer(tmp_path, cycle, BATCH, "cpu", start)
    for _ in range(2):
        broken.step()
    broken.save()
    resumed = script.Trainer(tmp_path, cycle, BATCH, "cpu", start)
    assert resumed.seen == 2 * BATCH
    for _ in range(2):
        resumed.step()
    expected, there = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(there[name], expected[name]) for name in expected)
    assert not torch.equal(expected["visual.proj"], load_file(WEIGHTS_PATH)["visual.proj"].float())


def test_help_says_what_is_needed():
    command = [sys.executable, SCRIPTS / "pretrain_tiny_clip.py", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--out" in said and "--start" in said
