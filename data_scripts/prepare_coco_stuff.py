"""Prepare COCO-Stuff 164K (118,287 train, 5,000 val).

python data_scripts/prepare_coco_stuff.py data/coco_stuff [--from FOLDER_OR_ARCHIVE]
"""

from sptseg_lib.datasets.command import command
from sptseg_lib.datasets.layouts import COCO_STUFF

if __name__ == "__main__":
    command(COCO_STUFF)
