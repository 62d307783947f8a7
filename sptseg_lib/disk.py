"""Room on disk, looked at before work is begun that would be lost."""

import shutil
from pathlib import Path


def check_room(folder: Path, needed: int) -> None:
    """Raises OSError when the disk below `folder` has fewer than `needed` bytes free."""
    existing = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{free / 1e6:.0f} MB are free for {folder}, {needed / 1e6:.0f} MB are needed. "
            "Writing would stop half-way; free some room or choose another folder."
        )
