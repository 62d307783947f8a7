"""Files out of tar and zip archives or folders, none of them outside the target."""

import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from tqdm.auto import tqdm

from ..disk import check_room

TAR = (".tar", ".tgz", ".tar.gz")
ZIP = (".zip",)
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError)


class Member(NamedTuple):
    """One file of a source; `open` gives its bytes, `path` is where it lies where that is on disk."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]
    path: Path | None = None


def is_archive(path: Path) -> bool:
    return path.name.endswith(TAR + ZIP)


def check_archive(path: Path) -> None:
    """Raises ValueError for a file that is not what its name says: another archive, a web page, a zip cut off."""
    wanted, holds = ("tar" if path.name.endswith(TAR) else "zip"), "neither a tar nor a zip archive"
    if zipfile.is_zipfile(path):
        holds = "zip"
    elif _is_tar(path):
        holds = "tar"
    if holds == wanted:
        return
    with path.open("rb") as file:
        start = file.read(16)
    cut = "cut off (a zip's table of contents is at its end) or " if wanted == "zip" and start[:2] == b"PK" else ""
    raise ValueError(
        f"{path} should be a {wanted} archive and is {holds}; it begins with {start!r}. It is {cut}another file than "
        "its name says (a web page saved in its place, perhaps), and nothing was unpacked; fetch it again."
    )


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except _BROKEN:
        return False


def members(source: Path) -> Iterator[Member]:
    """The files of an archive or a folder, in the order in which they lie there.

    Raises: ValueError for a member that would land outside a target folder, or a link that leads out of it.
    """
    if source.is_dir():
        for path in sorted(source.resolve().rglob("*")):
            if path.is_file():
                # The whole path, so that a folder may be given at any level: VOCdevkit/ or VOCdevkit/VOC2012/.
                yield Member(path.as_posix(), path.stat().st_size, lambda path=path: path.open("rb"), path)
        return
    check_archive(source)
    yield from _zip_members(source) if source.name.endswith(ZIP) else _tar_members(source)


def _tar_members(source: Path) -> Iterator[Member]:
    with tarfile.open(source, "r:*") as archive:
        for info in archive:
            refuse_outside(source, info.name)
            if info.issym():
                refuse_outside(source, info.name, str(PurePosixPath(info.name).parent / info.linkname), info.linkname)
            elif info.islnk():
                refuse_outside(source, info.name, info.linkname, info.linkname)
            elif info.isfile():
                yield Member(info.name, info.size, lambda info=info: archive.extractfile(info))


def _zip_members(source: Path) -> Iterator[Member]:
    with zipfile.ZipFile(source) as archive:
        for info in archive.infolist():  # all of them before the first is written
            refuse_outside(source, info.filename)
            if _is_link(info):
                link = archive.read(info).decode(errors="replace")
                refuse_outside(source, info.filename, str(PurePosixPath(info.filename).parent / link), link)
        for info in archive.infolist():
            if not info.is_dir() and not _is_link(info):
                yield Member(info.filename, info.file_size, lambda info=info: archive.open(info))


def _is_link(info: zipfile.ZipInfo) -> bool:
    return stat.S_ISLNK(info.external_attr >> 16)


def refuse_outside(source: Path, name: str, lands: str | None = None, link: str | None = None) -> None:
    """Raises ValueError where a member `name`, or the place that its link leads to, is not below the target."""
    place = (lands or name).replace("\\", "/")
    depth, absolute = 0, place.startswith("/") or place[1:2] == ":" or bool(link and link.startswith(("/", "\\")))
    for part in PurePosixPath(place).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            break
    if absolute or depth < 0:
        leads = f" is a link to {link!r}, which" if link is not None else ""
        raise ValueError(
            f"{source}: the member {name!r}{leads} lies outside the folder that the archive is unpacked to. It could "
            "overwrite files of yours, so no more of the archive was unpacked; do not use it, fetch the official one."
        )


def unpack(source: Path, folder: Path, place: Callable[[str], str | None], wanted: str) -> int:
    """Write the wanted members of an archive or folder below `folder`; returns how many there are.

    place: a member's name -> its path below `folder`, or None for what is not wanted. A file is there whole or not
    at all, and a file that is there with the member's size is not written again. Files of a folder become hard links
    where the disk allows it. Links in archives are never unpacked. wanted: what is looked for, for the error.
    Raises: ValueError as `members`, for an archive that is cut off, and where nothing wanted is there; OSError where
    the disk is too full.
    """
    check_room(folder, _room(source, place))
    count, first, made = 0, [], set()
    try:
        for member in tqdm(members(source), desc=f"unpacking {source.name}", unit=" files"):
            first = first if len(first) == 3 else [*first, member.name]
            if (relative := place(member.name)) is None:
                continue
            count += 1
            target = folder / relative
            if target.exists() and target.stat().st_size == member.size:
                continue
            if target.parent not in made:
                made.add(target.parent)
                target.parent.mkdir(parents=True, exist_ok=True)
            _write(member, target)
    except _BROKEN as error:
        raise ValueError(
            f"{source} is cut off or damaged ({error}). The files after that point are missing; what was unpacked is "
            "not used as it is: fetch the archive again and repeat the command."
        ) from None
    if not count:
        held = f"begins with {', '.join(first)}" if first else "is empty"
        raise ValueError(
            f"{source} holds none of the files looked for ({wanted}); it {held}. Nothing can be prepared from it; "
            "check that it is the data set's archive and not another year's or part's."
        )
    return count


def _write(member: Member, target: Path) -> None:
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    if member.path is not None:
        try:
            os.link(member.path.resolve(), temporary)
        except OSError:  # another disk, or one without links
            shutil.copyfile(member.path, temporary)
    else:
        with member.open() as content, temporary.open("wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
        if temporary.stat().st_size != member.size:
            raise EOFError(f"{member.name} has {temporary.stat().st_size} of {member.size} bytes")
    os.replace(temporary, target)


def _room(source: Path, place: Callable[[str], str | None]) -> int:
    """Bytes that unpacking needs, as well as they can be told without unpacking."""
    if source.is_dir():
        return 0  # hard links
    if source.name.endswith(ZIP) and zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            return sum(info.file_size for info in archive.infolist() if place(info.filename))
    size = source.stat().st_size
    return size if source.name.endswith(".tar") else 2 * size
