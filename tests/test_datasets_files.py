"""Downloads and archives: servers that stop half-way, files that are not what they say, members that climb out."""

import io
import os
import stat
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fake_archives import WRITERS, write_tar, write_zip

from sptseg_lib import disk
from sptseg_lib.datasets.archives import unpack
from sptseg_lib.datasets.download import check_checksum, download, file_digests, remember
from sptseg_lib.datasets.layouts import LAYOUTS
from sptseg_lib.datasets.prepare import prepare

CONTENT = bytes(range(256)) * 400


class Server(ThreadingHTTPServer):
    """Serves `files` on 127.0.0.1 with ranges; `stops` says after how many bytes each next answer breaks off."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.stops, self.asked = {"/data.bin": CONTENT}, [], []
        self.ranges, self.tag, self.status = True, '"one"', 200

    def address(self, name: str = "/data.bin") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{name}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server: Server = self.server
        wanted = self.headers.get("Range")
        server.asked.append(wanted)
        if server.status != 200 or self.path not in server.files:
            return self.send_error(server.status if server.status != 200 else 404)
        content, start = server.files[self.path], 0
        if wanted and server.ranges and self.headers.get("If-Range") == server.tag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", server.tag)
        self.end_headers()
        self.wfile.write(content[start:][: server.stops.pop(0) if server.stops else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: Server, target, **options):
    return download(server.address(), target, wait=0.0, timeout=5.0, **options)


def test_a_server_that_stops_half_way_is_asked_for_the_rest_only(server, tmp_path):
    server.stops = [30_000, 30_000, 10]
    assert get(server, tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=30000-", "bytes=60000-", "bytes=60010-"]
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]
    get(server, tmp_path / "data.bin")
    assert len(server.asked) == 4  # what is there is not fetched again


def test_a_server_that_gives_nothing_more_leaves_a_part_to_go_on_from(server, tmp_path):
    server.stops = [50_000, 0, 0, 0]
    with pytest.raises(OSError, match=r"stopped after 0.1 MB \(.*\), 3 times in a row.*data.bin.part; the same"):
        get(server, tmp_path / "data.bin", attempts=3)
    assert not (tmp_path / "data.bin").exists() and (tmp_path / "data.bin.part").stat().st_size == 50_000
    assert get(server, tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=50000-"


def test_a_file_that_changed_on_the_server_is_fetched_anew(server, tmp_path):
    server.stops = [50_000, 0]
    with pytest.raises(OSError):
        get(server, tmp_path / "data.bin", attempts=1)
    server.files["/data.bin"], server.tag = CONTENT[::-1], '"two"'
    assert get(server, tmp_path / "data.bin").read_bytes() == CONTENT[::-1]


def test_servers_without_ranges_and_whole_parts(server, tmp_path):
    server.stops, server.ranges = [50_000], False
    assert get(server, tmp_path / "data.bin").read_bytes() == CONTENT
    server.ranges = True
    (tmp_path / "again.bin.part").write_bytes(CONTENT)  # whole, but stopped before it got its name
    (tmp_path / "again.bin.part.tag").write_text(server.tag)
    assert get(server, tmp_path / "again.bin").read_bytes() == CONTENT
    (tmp_path / "long.bin.part").write_bytes(CONTENT + b"x")
    (tmp_path / "long.bin.part.tag").write_text(server.tag)
    assert get(server, tmp_path / "long.bin").read_bytes() == CONTENT


def test_refusals_and_full_disks_are_named(server, tmp_path, monkeypatch):
    with pytest.raises(OSError, match="answered 404 .*--from"):
        download(server.address("/gone"), tmp_path / "x", wait=0.0)
    assert len(server.asked) == 1
    server.status = 503
    with pytest.raises(OSError, match=r"stopped after 0.0 MB \(503 .*2 times"):
        get(server, tmp_path / "x", attempts=2)
    server.status = 200
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: _Full)
    with pytest.raises(OSError, match="0 MB are free .* 0 MB are needed"):
        get(server, tmp_path / "x")
    assert not (tmp_path / "x").exists()


class _Full:
    free = 1000


def test_a_closed_port_is_named(tmp_path):
    with pytest.raises(OSError, match=r"stopped after 0.0 MB \(.*refused"):
        download("http://127.0.0.1:9/x", tmp_path / "x", attempts=2, wait=0.0)


def test_checksums(tmp_path):
    path, seen = tmp_path / "data.bin", tmp_path / "checksums.json"
    path.write_bytes(CONTENT)
    digests = file_digests(path, "md5", "sha1", "sha256")
    assert check_checksum(path, f"md5:{digests['md5']}")["held_against"] == f"md5:{digests['md5']}"
    with pytest.raises(ValueError, match=f"sha1 {digests['sha1']}, the published one is 0000"):
        check_checksum(path, "sha1:0000")
    row = check_checksum(path, None, seen)
    assert row["held_against"] == "nothing: first seen" and not seen.exists()  # it may yet prove to be cut off
    remember(row, seen)
    assert check_checksum(path, None, seen)["held_against"] == "the first download"
    path.write_bytes(CONTENT[1:])
    with pytest.raises(ValueError, match="sha256 .*, that of the first download is"):
        check_checksum(path, None, seen)


def test_prepared_from_downloads(server, tmp_path):
    """The whole way, over a server that stops once; the archives stay beside the folder."""
    WRITERS["coco_stuff"](tmp_path / "there")
    server.files = {f"/{path.name}": path.read_bytes() for path in (tmp_path / "there").iterdir()}
    layout = LAYOUTS["coco_stuff"]
    archives = tuple(replace(one, url=server.address(f"/{one.name}"), checksum=None) for one in layout.archives)
    layout, server.stops = replace(layout, archives=archives), [1000]
    manifest = prepare(layout, tmp_path / "coco", official=False)
    assert {row["held_against"] for row in manifest["sources"]} == {"nothing: first seen"}
    assert {path.name for path in (tmp_path / "archives").iterdir()} == {one.name for one in archives} | {
        "checksums.json"
    }
    asked = len(server.asked)
    prepare(layout, tmp_path / "coco", official=False)
    assert len(server.asked) == asked


def everything(name: str) -> str | None:
    return name


def links(kind: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo("inner/link")
    info.type, info.linkname = {"symbolic": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}[kind], target
    return info


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/evil.txt", "a\\..\\..\\evil.txt", "C:/evil.txt"])
@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_members_that_climb_out_are_refused(write, name, tmp_path):
    path = write(tmp_path / ("x.tar" if write is write_tar else "x.zip"), {name: b"x", "good.txt": b"y"})
    with pytest.raises(ValueError, match="lies outside the folder that the archive is unpacked to"):
        unpack(path, tmp_path / "deep" / "target", everything, "all")
    assert not list(tmp_path.rglob("evil.txt")) and not list(tmp_path.rglob("good.txt"))


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
@pytest.mark.parametrize("target", ["../../etc", "/etc/passwd", "../.."])
def test_links_that_lead_out_are_refused(kind, target, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(links(kind, target))
    with pytest.raises(ValueError, match="inner/link' is a link to .* outside the folder"):
        unpack(tmp_path / "x.tar", tmp_path / "target", everything, "all")


def test_links_that_stay_inside_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(links("symbolic", "../file"))
        info = tarfile.TarInfo("file")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    assert unpack(tmp_path / "x.tar", tmp_path / "target", everything, "all") == 1
    assert [path.name for path in (tmp_path / "target").rglob("*")] == ["file"]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="link to '/etc/passwd'"):
        unpack(tmp_path / "x.zip", tmp_path / "target", everything, "all")


@pytest.mark.parametrize("name", ["x.tar", "x.tgz", "x.zip"])
def test_archives_that_are_cut_off_are_refused(name, tmp_path):
    write = write_zip if name.endswith("zip") else write_tar
    path = write(tmp_path / name, {f"{i}.bin": os.urandom(20_000) for i in range(5)})
    path.write_bytes(path.read_bytes()[:60_000])
    with pytest.raises(ValueError, match="cut off"):
        unpack(path, tmp_path / "target", everything, "all")
    written = [file for file in (tmp_path / "target").rglob("*.bin")]
    assert len(written) < 5 and all(file.stat().st_size == 20_000 for file in written)


def test_a_flipped_byte_in_a_zip_is_found(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a.bin": bytes(1000)})
    content = bytearray(path.read_bytes())
    content[content.find(b"a.bin") + 8] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cut off or damaged"):
        unpack(path, tmp_path / "target", everything, "all")


def test_files_that_are_not_what_they_say_are_refused(tmp_path):
    (tmp_path / "page.tar").write_bytes(b"<!DOCTYPE html><html>404</html>")
    with pytest.raises(ValueError, match="page.tar should be a tar archive and is neither .* begins with b'<!DOCTYPE"):
        unpack(tmp_path / "page.tar", tmp_path / "target", everything, "all")
    write_tar(tmp_path / "a.tar", {"x": b"x"}).rename(tmp_path / "tar.zip")
    with pytest.raises(ValueError, match="should be a zip archive and is tar"):
        unpack(tmp_path / "tar.zip", tmp_path / "target", everything, "all")
    other = write_tar(tmp_path / "other.tar", {"VOC2007/JPEGImages/1.jpg": b"x"})
    with pytest.raises(ValueError, match="holds none of the files .*VOC2012.* begins with VOC2007/JPEGImages/1.jpg"):
        unpack(other, tmp_path / "target", LAYOUTS["voc12"].archives[0].place, "VOC2012/…")
    with pytest.raises(ValueError, match="it is empty"):
        unpack(write_zip(tmp_path / "empty.zip", {}), tmp_path / "target", everything, "all")


def test_too_little_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "x.zip", {"a.bin": bytes(5000)})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: _Full)
    with pytest.raises(OSError, match="are needed. Writing would stop half-way"):
        unpack(path, tmp_path / "target", everything, "all")
    assert not (tmp_path / "target").exists()
