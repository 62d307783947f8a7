"""Prepare Cityscapes' 19 classes (2,975 train, 500 val); its archives need a login, so --from is required.

python data_scripts/prepare_cityscapes.py data/cityscapes --from ~/Downloads
"""

from sptseg_lib.datasets.command import command
from sptseg_lib.datasets.layouts import CITYSCAPES_19

if __name__ == "__main__":
    command(CITYSCAPES_19)
