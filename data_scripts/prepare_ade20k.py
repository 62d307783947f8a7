"""Prepare ADE20K's 150 classes (20,210 train, 2,000 val).

python data_scripts/prepare_ade20k.py data/ade20k [--from FOLDER_OR_ARCHIVE]
"""

from sptseg_lib.datasets.command import command
from sptseg_lib.datasets.layouts import ADE20K

if __name__ == "__main__":
    command(ADE20K)
