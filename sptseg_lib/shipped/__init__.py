"""The checkpoint that comes with the package: prompts and decoder of the demo's SPT-SEG run (see CARD.md)."""

from pathlib import Path

FOLDER = Path(__file__).parent
