"""Downloads that go on where they stopped, and checksums."""

import hashlib
import json
import os
import ssl
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tqdm.auto import tqdm

from ..disk import check_room

CHUNK = 1 << 20


def file_digests(path: Path, *algorithms: str) -> dict[str, str]:
    """Hexadecimal digests of a file, all from one pass over it: {"sha256": "…", "md5": "…"}."""
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        tqdm(total=size, desc=f"checking {path.name}", unit="B", unit_scale=True, disable=size < 1 << 28) as bar,
    ):
        while block := file.read(CHUNK):
            for digest in digests.values():
                digest.update(block)
            bar.update(len(block))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def write_json(path: Path, content) -> None:
    """Write a JSON file as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def download(url: str, target: Path, attempts: int = 5, wait: float = 2.0, timeout: float = 60.0) -> Path:
    """Fetch a file; what is there of it already is kept, and asked for no second time.

    The part fetched so far is `<target>.part`, beside the server's tag of it: a file that changed on the server in
    between is fetched anew. `attempts` connections in a row may end without a new byte before it gives up.
    Raises: OSError where the server fails for good (with how much is kept), or where the disk is too full.
    """
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part, failures, trouble = target.with_name(target.name + ".part"), 0, ""
    while failures < attempts:
        before = _size(part)
        try:
            complete = _fetch(url, part, timeout)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise OSError(
                    f"{url} answered {error.code} {error.reason}. Nothing of {target.name} can be fetched there; get "
                    "it by hand and hand it over with --from."
                ) from None
            complete, trouble = False, f"{error.code} {error.reason}"
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            complete, trouble = False, str(error)
        if complete:
            os.replace(part, target)
            _tag_file(part).unlink(missing_ok=True)
            return target
        trouble = trouble or "it closed the connection half-way"
        failures = failures + 1 if _size(part) <= before else 0
        time.sleep(wait if failures else 0)
    raise OSError(
        f"{url} stopped after {_size(part) / 1e6:.1f} MB ({trouble}), {attempts} times in a row. What has arrived is "
        f"kept in {part.name}; the same command goes on from there."
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag_file(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _fetch(url: str, part: Path, timeout: float) -> bool:
    """One connection; appends to `part`. True when the file is whole."""
    here, tag_file = _size(part), _tag_file(part)
    tag = tag_file.read_text() if tag_file.exists() else ""
    headers = {"User-Agent": "sptseg", "Accept-Encoding": "identity"}
    if here and tag:
        headers |= {"Range": f"bytes={here}-", "If-Range": tag}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # Nothing after `here`: whole if the server says that this is its length, and not the server's file otherwise.
        if error.headers.get("Content-Range", "") == f"bytes */{here}":
            return True
        part.unlink()
        return False
    with answer:
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {here}-")
        start = here if resumed else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else None
        check_room(part.parent, (total or start) - start)
        tag = answer.headers.get("ETag", "")
        tag_file.write_text(tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", ""))
        bar = tqdm(total=total, initial=start, desc=part.stem, unit="B", unit_scale=True)
        with part.open("ab" if resumed else "wb") as file, bar:
            # read1 hands over what has arrived, so that a connection that breaks loses none of it.
            while block := answer.read1(CHUNK):
                file.write(block)
                bar.update(len(block))
    return _size(part) == total if total is not None else True


def check_checksum(path: Path, published: str | None, first_seen: Path | None = None) -> dict:
    """A file's sha256, held against what is known of it.

    published: "md5:…" or "sha1:…", or None where nobody published one; then `first_seen`, a JSON file of sums by
    file name that `remember` writes, may hold what the first download had.
    Returns: name, bytes, sha256, and which of the two it was held against.
    Raises: ValueError for another checksum.
    """
    algorithm, _, wanted = (published or "sha256:").partition(":")
    digests = file_digests(path, "sha256", algorithm)
    row = {
        "name": path.name,
        "bytes": path.stat().st_size,
        "sha256": digests["sha256"],
        "held_against": published or "nothing",
    }
    source = "the published one"
    if not published and first_seen is not None:
        known = json.loads(first_seen.read_text(encoding="utf-8")) if first_seen.exists() else {}
        wanted, source = known.get(path.name, ""), "that of the first download"
        row["held_against"] = "the first download" if wanted else "nothing: first seen"
    if wanted and digests[algorithm] != wanted:
        hint = " (or say --unofficial, if it is a subset of your own)" if published else ""
        raise ValueError(
            f"{path} has {algorithm} {digests[algorithm]}, {source} is {wanted}. It is damaged or another file than "
            f"its name says, and its labels could be anything; delete it and fetch it again{hint}."
        )
    return row


def remember(row: dict, first_seen: Path) -> None:
    """Keep a file's sha256 as that of its first download, once it has proved to be whole."""
    known = json.loads(first_seen.read_text(encoding="utf-8")) if first_seen.exists() else {}
    write_json(first_seen, {row["name"]: row["sha256"]} | known)
