"""Prepare PASCAL VOC 2012 with SBD's masks (10,582 train, 1,449 val).

python data_scripts/prepare_voc12.py data/voc12 [--from FOLDER_OR_ARCHIVE]
"""

from sptseg_lib.datasets.command import command
from sptseg_lib.datasets.layouts import VOC12

if __name__ == "__main__":
    command(VOC12)
