"""Places: what is written is there whole or not at all, and every failure is put in words."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import s3fs
from tenacity import wait_none

from connectors import failures, storage
from curate.errors import StorageError
from tests.connectors.conftest import in_child
from tests.s3_server import Endpoint, serve


def interrupted(url: str, blocks: list[bytes], look: Callable[[], None] = lambda: None) -> None:
    """A writer that fails before the end of its block."""
    with storage.atomic_writer(url) as f:
        for block in blocks:
            f.write(block)
        look()
        raise ZeroDivisionError


def test_round_trip_and_listing(place: str) -> None:
    assert not storage.exists(place)
    assert storage.list_files(place) == []
    storage.write_atomic(storage.join(place, "b/two.txt"), "zwei ü")
    storage.write_atomic(storage.join(place, "a.bin"), b"\x00\xff")
    for hidden in ("_meta/x.txt", ".cache/y", "b/.z"):
        storage.write_atomic(storage.join(place, hidden), "no")
    files = storage.list_files(place)
    assert [(f.name, f.size) for f in files] == [("a.bin", 2), ("b/two.txt", 7)]
    assert [storage.read_bytes(f.url) for f in files] == [b"\x00\xff", "zwei ü".encode()]
    assert storage.read_text(files[1].url) == "zwei ü"
    assert storage.is_dir(place)
    assert not storage.is_dir(files[0].url)
    assert storage.info(place) is None
    assert [storage.info(f.url).stamp for f in files] == [f.stamp for f in files]
    assert [f.name for f in storage.list_files(files[1].url)] == ["two.txt"]
    assert [f.url for f in storage.glob(storage.join(place, "*", "*.txt"))][-1:] == [files[1].url]


def test_overwrite_changes_the_stamp(place: str) -> None:
    url = storage.join(place, "x")
    storage.write_atomic(url, "one")
    before = storage.info(url)
    storage.write_atomic(url, "two")
    after = storage.info(url)
    assert storage.read_text(url) == "two"
    assert before.stamp != after.stamp


def test_reader_is_seekable_and_independent(place: str) -> None:
    url = storage.join(place, "x")
    storage.write_atomic(url, bytes(range(100)))
    with storage.open_read(url) as a, storage.open_read(url) as b:
        a.seek(90)
        assert b.read(3) == b"\x00\x01\x02"
        assert a.read() == bytes(range(90, 100))
        a.seek(-1, 2)
        assert a.read() == b"\x63"


def test_writer_streams_and_shows_nothing_before_the_end(place: str) -> None:
    url = storage.join(place, "x")
    with storage.atomic_writer(url) as f:
        for i in range(300):
            f.write(bytes([i % 256]) * 10_000)
        assert storage.list_files(place) == []
        assert f.tell() == 3_000_000
    assert storage.read_bytes(url) == b"".join(bytes([i % 256]) * 10_000 for i in range(300))


@pytest.mark.parametrize("size", [10, 3_000_000])
def test_failed_writer_leaves_nothing(place: str, size: int) -> None:
    url = storage.join(place, "x")
    with pytest.raises(ZeroDivisionError):
        interrupted(url, [b"x" * size])
    assert not storage.exists(url)
    assert storage.list_files(place) == []


def test_failed_writer_keeps_the_old_file(place: str) -> None:
    url = storage.join(place, "x")
    storage.write_atomic(url, "old")
    with pytest.raises(ZeroDivisionError):
        interrupted(url, [b"new"])
    assert storage.read_text(url) == "old"


def test_s3_upload_is_multipart_and_aborted_on_failure(s3: str, s3_endpoint: Endpoint) -> None:
    bucket = s3.removeprefix("s3://")
    block = b"x" * (1 << 20)

    seen = []

    def look() -> None:
        seen.append(len(s3_endpoint.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])))

    with pytest.raises(ZeroDivisionError):
        interrupted(f"{s3}/big", [block] * 60, look)
    look()
    assert seen == [1, 0]
    with storage.atomic_writer(f"{s3}/big") as f:
        for _ in range(60):
            f.write(block)
    head = s3_endpoint.client().head_object(Bucket=bucket, Key="big")
    assert head["ContentLength"] == 60 << 20
    assert head["ETag"].strip('"').endswith("-2")


def test_killed_writer_leaves_no_file_and_its_rest_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "part.jsonl"

    def write_and_die() -> None:
        with storage.atomic_writer(str(target)) as f:
            f.write(b"x" * 5_000_000)
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(write_and_die) == ""
    assert storage.list_files(str(tmp_path)) == []
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(left) == 1
    assert left[0].name.startswith(".part.jsonl.")
    with storage.atomic_writer(str(tmp_path / "sub" / "live")) as f:
        f.write(b"live")
        assert storage.remove_stale_temps(str(tmp_path)) == 1  # and not the live one
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["live"]
    assert storage.remove_stale_temps(str(tmp_path / "nothing")) == 0


def test_killed_s3_writer_leaves_no_object_and_its_rest_is_removed(s3: str, s3_endpoint: Endpoint) -> None:
    client, bucket = s3_endpoint.client(), s3.removeprefix("s3://")
    upload = client.create_multipart_upload(Bucket=bucket, Key="out/part")  # what a killed writer leaves there
    client.upload_part(Bucket=bucket, Key="out/part", PartNumber=1, UploadId=upload["UploadId"], Body=b"x" * 10)
    assert storage.list_files(s3) == []
    assert not storage.exists(f"{s3}/out/part")
    assert storage.remove_stale_temps(f"{s3}/out") == 1  # moto dates every upload to the year 2010
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)


def test_full_disk(tiny_disk: Path) -> None:
    target = tiny_disk / "out" / "part"
    with pytest.raises(StorageError, match=r"cannot write .*/part: no space left; free some space"):
        interrupted(str(target), [b"x" * 2_000_000])
    assert list(tiny_disk.rglob("*")) == [tiny_disk / "out"]
    storage.check_writable(str(tiny_disk / "out"))
    (tiny_disk / "filler").write_bytes(b"x" * 48_000)

    def fill() -> None:
        for i in range(20):
            storage.write_atomic(str(tiny_disk / f"more-{i}"), b"x" * 4096)

    with pytest.raises(StorageError, match="no space left"):
        fill()
    with pytest.raises(StorageError, match="no space left"):
        storage.check_writable(str(tiny_disk / "out"))


def test_file_size_limit(tmp_path: Path) -> None:
    def write() -> None:
        with storage.atomic_writer(str(tmp_path / "part")) as f:
            for _ in range(400):
                f.write(b"x" * 1000)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    message = in_child(write, limit)
    assert message.startswith(f"StorageError: cannot write {tmp_path}/part: the file is larger than the limit")
    assert list(tmp_path.iterdir()) == []


def test_read_only_file_system(tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(StorageError, match="read-only; choose a place that can be written"):
        storage.check_writable(str(tiny_disk / "out"))


def test_folder_without_rights() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "secret").mkdir(mode=0o700)
        (folder / "secret" / "f.jsonl").write_text("{}")
        if os.getuid():
            (folder / "secret").chmod(0)
        folder.chmod(0o555)

        def nobody() -> None:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)

        message = in_child(lambda: storage.check_writable(str(folder / "out")), nobody)
        assert message.startswith(f"StorageError: cannot write {folder}/out: ")
        assert "permission denied" in message
        # A folder that cannot be listed must not pass for an empty one.
        message = in_child(lambda: storage.list_files(str(folder)), nobody)
        assert message.startswith(f"StorageError: cannot list {folder}: permission denied")
    finally:
        folder.chmod(0o755)
        (folder / "secret").chmod(0o755)
        shutil.rmtree(folder)


def test_check_writable_leaves_nothing(place: str) -> None:
    storage.check_writable(place)
    assert storage._listing(place, all_files=True) == []


def test_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(StorageError, match="a file, not a folder"):
        storage.check_writable(str(tmp_path / "f" / "out"))
    with pytest.raises(StorageError, match="it is a folder"):
        storage.write_atomic(str(tmp_path), "x")


def test_missing(place: str) -> None:
    url = storage.join(place, "nothing.txt")
    for act in (storage.read_bytes, storage.read_text, storage.open_read, storage.local_copy):
        with pytest.raises(StorageError, match=r"nothing\.txt: it does not exist; check the spelling"):
            act(url)


def test_missing_bucket(s3: str) -> None:
    with pytest.raises(StorageError, match="its folder or bucket does not exist"):
        storage.check_writable("s3://no-such-bucket/out")
    assert not storage.exists("s3://no-such-bucket/out")
    assert storage.list_files("s3://no-such-bucket/out") == []


def test_wrong_credentials_are_not_an_empty_place(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    fs, _ = storage.split(s3)
    for name in ("info", "find", "pipe_file"):
        monkeypatch.setattr(fs, name, refuse)
    for act in (storage.exists, storage.list_files, storage.check_writable, storage.is_dir):
        with pytest.raises(StorageError, match=r"permission denied .* credentials"):
            act(s3)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://x/y", "unknown scheme 's4'; "),
        ("azz://x/y", "unknown scheme 'azz'; did you mean 'az'"),
        ("s3:/bucket/x", r"two slashes; did you mean s3://bucket/x\?"),
        ("s3://me:secret@bucket/x", "credentials in a URL"),
        ("simplecache::s3://bucket/x", "chained URLs"),
        ("gs://bucket/x", "pip install gcsfs"),
        ("az://bucket/x", "pip install adlfs"),
    ],
)
def test_refused_urls(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as e:
        storage.list_files(url)
    assert "secret" not in str(e.value)


def test_join() -> None:
    assert storage.join("s3://b/", "/x/", "y z") == "s3://b/x/y z"
    assert storage.join("memory://", "x") == "memory://x"
    assert storage.join("/", "x") == "/x"
    assert storage.join("a/b") == "a/b"
    with pytest.raises(StorageError, match="climbs out"):
        storage.join("s3://b", "x/../../y")


def test_local_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write_atomic("~/x", "home")
    assert storage.read_text(f"file://{tmp_path}/x") == storage.read_text(f"local://{tmp_path}/x") == "home"
    assert storage.local_copy("~/x") == tmp_path / "x"


def test_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("1")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "root" / "file").symlink_to(tmp_path / "real" / "x")
    assert [f.name for f in storage.list_files(str(tmp_path / "root"))] == ["file", "folder/x"]
    (tmp_path / "root" / "broken").symlink_to(tmp_path / "gone")
    with pytest.raises(StorageError, match="does not exist"):
        storage.list_files(str(tmp_path / "root"))
    (tmp_path / "root" / "broken").unlink()
    (tmp_path / "real" / "back").symlink_to(tmp_path / "root")
    with pytest.raises(StorageError, match="circle"):
        storage.list_files(str(tmp_path / "root"))


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        storage.write_atomic(str(tmp_path / "x"), "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


def test_writers_of_one_file_at_once(tmp_path: Path) -> None:
    target = str(tmp_path / "x")
    contents = [bytes([i]) * 200_000 for i in range(8)]
    threads = [threading.Thread(target=storage.write_atomic, args=(target, c)) for c in contents]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert storage.read_bytes(target) in contents
    assert os.listdir(tmp_path) == ["x"]


def test_transient_failures_are_tried_again(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_WAIT", wait_none())
    storage.write_atomic(f"{s3}/x", "here")
    fs, _ = storage.split(s3)
    real, failed = fs.cat_file, []

    def flaky(path: str) -> bytes:
        if len(failed) < 2:
            failed.append(path)
            raise ConnectionResetError("reset by peer")
        return real(path)

    monkeypatch.setattr(fs, "cat_file", flaky)
    assert storage.read_text(f"{s3}/x") == "here"
    assert len(failed) == 2


def test_store_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_WAIT", wait_none())
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # the client's own patience is half a minute
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with serve() as endpoint:
        endpoint.use(monkeypatch)
        bucket = endpoint.bucket("going")
        storage.write_atomic(f"{bucket}/x", b"x" * (storage.READ_BLOCK * 3))
        f = storage.open_read(f"{bucket}/x")
        assert f.read(10) == b"x" * 10
    with f, pytest.raises(StorageError, match=rf"cannot read {bucket}/x: the store does not answer"):
        f.read()
    with pytest.raises(StorageError, match=r"cannot write .*: the store does not answer .* check the endpoint"):
        storage.check_writable(bucket)


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):
        pass

    NoCredentialsError.__module__ = "botocore.exceptions"
    reason, remedy = failures.explain(NoCredentialsError("Unable to locate credentials"))
    assert "no credentials" in reason
    assert "AWS_ACCESS_KEY_ID" in remedy


def test_bugs_are_not_storage_errors() -> None:
    with pytest.raises(ZeroDivisionError), failures.told("x", "read"):
        1 / 0  # noqa: B018
