"""Prepare PASCAL Context's 59 classes (4,998 train, 5,105 val), or 60 with background: --variant with-background.

python data_scripts/prepare_pascal_context.py data/pascal_context [--from FOLDER_OR_ARCHIVE]
"""

from sptseg_lib.datasets.command import command
from sptseg_lib.datasets.layouts import LAYOUTS

if __name__ == "__main__":
    command(LAYOUTS["pascal_context"], {"with-background": LAYOUTS["pascal_context_60"]})
