"""From archives to a prepared folder, in steps that can be interrupted and go on."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..disk import check_room
from .archives import is_archive, unpack
from .download import check_checksum, download, remember, write_json
from .labels import convert_mask, spread
from .layouts import Archive, Layout
from .manifest import SETS, check_manifest, describe, mask_path, read_manifest, write_manifest
from .verify import verify

STATE = "preparing.json"  # in the partial folder: what it is being made from


def prepare(
    layout: Layout,
    out: Path,
    sources: Sequence[Path] = (),
    archives: Path | None = None,
    official: bool = True,
    workers: int = 1,
) -> dict:
    """Make the folder `out` of a data set, or verify it where it is there already.

    All work is done in `<out>.partial`, which gets the name `out` when it is complete and verified: whatever happens
    before, no folder `out` exists. What was done is kept there, and the next call goes on.
    sources: local archives or folders; none: archives are downloaded to `archives` (default: `archives` beside out).
    official: the published checksums and numbers of pictures are enforced.
    Returns: the manifest.
    Raises: ValueError or OSError, in one sentence, for everything that is wrong with sources, disk or folder.
    """
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        return verify_again(layout, out, official, workers)
    partial_folder = out.with_name(out.name + ".partial")
    state = _State(partial_folder, {"dataset": layout.name, "official": official})
    if (manifest := read_manifest(partial_folder)) is None:
        found = find_sources(layout, [Path(source) for source in sources])
        state.begin()
        rows = []
        for archive in layout.archives:
            local = found.get(archive.name) if sources else fetch(archive, archives or out.parent / "archives")
            rows.append(_unpack(archive, local, partial_folder, state, official, not sources))
        _convert(layout, partial_folder, workers)
        counts = verify(partial_folder, layout.suffix, workers, layout.counts if official else None)
        manifest = describe(partial_folder, layout.name, official, layout.suffix, counts, rows)
        write_manifest(partial_folder, manifest)
    # Complete and verified from here on: what is left is to tidy up and to give it its name.
    shutil.rmtree(partial_folder / "raw", ignore_errors=True)
    state.path.unlink(missing_ok=True)
    os.replace(partial_folder, out)
    return manifest


class _State:
    """What the partial folder is made from; other options or archives are refused, not mixed in."""

    def __init__(self, folder: Path, options: dict):
        self.path, self.options, self.sources = folder / STATE, options, {}
        if self.path.exists():
            known = json.loads(self.path.read_text(encoding="utf-8"))
            self.sources = known.pop("sources")
        elif (manifest := read_manifest(folder)) is not None:
            known = {name: manifest[name] for name in options}
        elif folder.exists() and any(path.suffix != ".tmp" for path in folder.iterdir()):
            raise ValueError(f"{folder} holds files of unknown origin and would be mixed up with them; move it away.")
        else:
            return
        if known != options:
            raise ValueError(
                f"{folder} was begun with {known}, not with {options}. Two data sets would be mixed; repeat the "
                "first command, or delete the folder."
            )

    def begin(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self) -> None:
        write_json(self.path, self.options | {"sources": self.sources})


def find_sources(layout: Layout, sources: list[Path]) -> dict[str, Path]:
    """Which of the given archives and folders stands for which archive of the data set.

    Raises: FileNotFoundError for a path that is not there, ValueError for an archive of another name, or where one is
    missing.
    """
    names = [archive.name for archive in layout.archives]
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"--from {source}: there is no such file or folder. Nothing was prepared.")
        if source.is_file() and source.name not in names:
            raise ValueError(
                f"--from {source}: {layout.name} is made from {', '.join(names)}, and its files would be looked for "
                "in vain in another archive. Give the archive its official name, or hand over its folder."
            )
    found = {}
    for archive in layout.archives:
        candidates = [*(s for s in sources if s.name == archive.name), *(s / archive.name for s in sources)]
        local = next((path for path in candidates if path.is_file() and is_archive(path)), None)
        local = local or next((s for s in sources if s.is_dir() and _holds(s, archive)), None)
        if local is not None:
            found[archive.name] = local
    missing = [archive for archive in layout.archives if archive.name not in found]
    if missing and (sources or any(archive.url is None for archive in missing)):
        where = "; ".join(f"{archive.name} from {archive.url or layout.by_hand}" for archive in missing)
        raise ValueError(
            f"{layout.name} cannot be prepared yet, {len(missing)} of {len(names)} archives are missing: {where}. "
            "Fetch them, and give all archives, or folders with them or their files, with --from."
        )
    return found


def _holds(folder: Path, archive: Archive) -> bool:
    return any(archive.place(path.as_posix()) for path in folder.resolve().rglob("*"))


def fetch(archive: Archive, folder: Path) -> Path:
    """The downloaded archive. A file of its name that is in the folder already is taken; it is checked later."""
    return download(archive.url, folder / archive.name)


def _unpack(archive: Archive, local: Path, folder: Path, state: _State, official: bool, fetched: bool) -> dict:
    """Check and unpack one archive, unless that was done before; returns its row of the manifest."""
    size = local.stat().st_size if local.is_file() else None
    if (known := state.sources.get(archive.name)) is not None:
        if (known.get("bytes"), known["path"]) != (size, str(local)):
            raise ValueError(
                f"{folder} was begun with {known['path']}, and {local} is another file. Two versions would be mixed; "
                "repeat the first command, or delete the folder."
            )
    else:
        first_seen = local.parent / "checksums.json" if fetched and not archive.checksum else None
        if size is None:
            known = {"name": archive.name, "held_against": "nothing: taken from a folder"}
        else:
            known = check_checksum(local, archive.checksum if official else None, first_seen)
        unpack(local, folder, archive.place, ", ".join(pattern for pattern, _ in archive.rules))
        if first_seen:
            remember(known, first_seen)
        state.sources[archive.name] = known | {"path": str(local)}
        state.save()
    return {key: value for key, value in state.sources[archive.name].items() if key != "path"}


def _convert(layout: Layout, folder: Path, workers: int) -> None:
    """Masks to train ids, lists and class names; pictures that no set lists are removed."""
    pairs = layout.pairs(folder / "raw")
    jobs = {stem: job for name in SETS for stem, job in pairs[name].items()}
    for stem, (source, _) in jobs.items():
        if not source.is_file():
            raise FileNotFoundError(
                f"{stem} is listed but has no mask: {source.name} was in none of the sources. The set would be "
                "incomplete; fetch the archive of masks again."
            )
    for name in SETS:
        if not pairs[name]:
            raise ValueError(
                f"{layout.name}: the set {name!r} is empty. There would be nothing to learn or score; check that the "
                "archives hold both parts."
            )
    (folder / "SegmentationClass").mkdir(exist_ok=True)
    check_room(folder, 64 * 1024 * len(jobs))
    work = [(source, mask_path(folder, stem), table) for stem, (source, table) in jobs.items()]
    spread(_convert_job, work, workers, "converting masks")
    for path in (folder / "JPEGImages").iterdir():
        if path.stem not in jobs:
            path.unlink()
    (folder / "classes.txt").write_text("\n".join(layout.classes) + "\n", encoding="utf-8")
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        (lists / f"{name}.txt").write_text("\n".join(pairs[name]) + "\n")


def _convert_job(job: tuple) -> None:
    convert_mask(*job)


def verify_again(layout: Layout, out: Path, official: bool, workers: int) -> dict:
    """Verify a folder that was prepared before; changes nothing.

    Raises: ValueError where it is another data set's, was not prepared, or no longer is what it was.
    """
    if not out.is_dir() or read_manifest(out) is None:
        raise ValueError(
            f"{out} is there but was not prepared (no manifest.json). Its files would be mixed up; choose another "
            "folder or move it away."
        )
    manifest = check_manifest(out)
    if manifest["dataset"] != layout.name:
        raise ValueError(f"{out} holds {manifest['dataset']}, not {layout.name}; choose another folder.")
    if official and not manifest["official"]:
        raise ValueError(
            f"{out} was prepared with --unofficial, so its scores cannot stand beside published ones. Say --unofficial "
            "to verify it as it is, or prepare the official data to another folder."
        )
    counts = verify(out, layout.suffix, workers, layout.counts if official else None)
    for name, row in counts.items():
        if any(manifest["sets"][name][key] != value for key, value in row.items()):
            raise ValueError(
                f"{out}: the labels of the set {name!r} are not those that were verified when it was prepared. Masks "
                "were changed; delete the folder and prepare it again (the archives are kept)."
            )
    return manifest
