"""What a configuration may name: schemes, folders, and no secret within a URL."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from connectors import registry, storage
from connectors.urls import shown
from curate.errors import CorpusError, StorageError

SECRET = "kR7/Canary+secret"


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        (f"s3://AKIACANARY:{SECRET}@bucket/x", "s3://…@bucket/x"),
        (f"s3://AKIACANARY:{SECRET}", "s3://…"),
        (f"gs://{SECRET.replace('/', '')}@bucket/x", "gs://…@bucket/x"),
        (f"https://me:{SECRET}@host/x.jsonl", "https://…@host/x.jsonl"),
        (f"https://host/x.jsonl?X-Amz-Credential=a&X-Amz-Signature={SECRET}", "https://host/x.jsonl?…"),
        (f"s3://bucket/x.jsonl?versionId=3&AWSAccessKeyId=a&Signature={SECRET}", "s3://bucket/x.jsonl?…"),
        (f"az://box/x.jsonl?sv=2024&sig={SECRET}", "az://box/x.jsonl?…"),
        (f"https://host/x?hf_token={SECRET}", "https://host/x?…"),
        (f"s4://me:{SECRET}@bucket", "s4://…@bucket"),
        (f"simplecache::s3://me:{SECRET}@bucket", "simplecache::s3://…@bucket"),
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_repeated(url: str, safe: str) -> None:
    for act in (storage.exists, storage.list_files, storage.read_bytes, storage.check_writable, registry.discover):
        with pytest.raises(StorageError) as e:
            act(url)
        assert not [piece for piece in (SECRET, "Canary", "CANARY") if piece in str(e.value)]
        assert safe in str(e.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a:b@c/x.jsonl", "abfs://box@account.dfs.core.windows.net/x", "hf://datasets/o/n@main/x.parquet",
        "s3://bucket/part-?.jsonl", "s3://bucket/x.jsonl?versionId=3", "data/?token=1.jsonl", "/data/a:b@c.jsonl",
        "memory://x/tokens=3/y",
    ],
)  # fmt: skip
def test_what_only_looks_like_one_is_left_alone(url: str) -> None:
    assert shown(url) == url
    assert storage.scheme(url) in storage.SCHEMES


def test_the_environment_says_which_schemes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.txt"
    file.write_text("x")
    monkeypatch.setenv("CURATE_SCHEMES", "s3, memory")
    for url in (str(file), file.as_uri()):
        with pytest.raises(StorageError, match="local paths are not allowed here"):
            storage.read_text(url)
    with pytest.raises(StorageError, match=r"gs:// is not allowed here \(CURATE_SCHEMES"):
        storage.exists("gs://bucket/x")
    assert not storage.exists("memory://nothing/here")
    monkeypatch.setenv("CURATE_SCHEMES", "file")
    assert storage.read_text(str(file)) == "x"
    with pytest.raises(StorageError, match="memory:// is not allowed"):
        storage.exists("memory://nothing/here")


def test_a_scheme_of_fsspec_can_be_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"dir://{tmp_path}/x.txt"
    with pytest.raises(StorageError, match="unknown scheme 'dir'"):
        storage.exists(place)
    monkeypatch.setenv("CURATE_SCHEMES", "+dir")
    monkeypatch.setitem(fsspec.config.conf, "dir", {"path": "/", "target_protocol": "file"})
    storage.write_atomic(place, "added")
    assert storage.read_text(place) == (tmp_path / "x.txt").read_text() == "added"
    assert storage.read_text(str(tmp_path / "x.txt")) == "added"  # those of before are still there


@pytest.fixture
def fenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside of which nothing may be read or written, beside one that has a file."""
    (tmp_path / "in/corpus").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/secret.jsonl").write_text('{"messages": []}\n')
    monkeypatch.setenv("CURATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CURATE_LOCAL_ROOTS", f"{tmp_path / 'in'}:/nonexistent")
    return tmp_path


def test_no_path_leads_out_of_the_allowed_folders(fenced: Path) -> None:
    storage.write_atomic(str(fenced / "in/a/b.txt"), "b")
    assert storage.read_text(f"file://{fenced}/in/a/b.txt") == "b"
    outside = [str(fenced / "out/secret.jsonl"), f"file://{fenced}/in/../out/secret.jsonl", "/etc/passwd", "~/x"]
    for url in outside:
        for act in (storage.read_bytes, storage.exists, storage.list_files, storage.open_read, storage.local_copy):
            with pytest.raises(StorageError, match="lies outside the folders that are allowed here"):
                act(url)
        with pytest.raises(StorageError, match=r"cannot write .* outside"):
            storage.write_atomic(url, "x")
        with pytest.raises(StorageError, match="outside"):
            registry.discover(url)
    assert (fenced / "out/secret.jsonl").read_text() == '{"messages": []}\n'


@pytest.mark.parametrize("pattern", ["", "/*.jsonl", "/**/*.jsonl"])
def test_a_link_in_the_source_does_not_lead_out_either(fenced: Path, pattern: str) -> None:
    (fenced / "in/corpus/link.jsonl").symlink_to(fenced / "out/secret.jsonl")
    connector, (found,) = registry.discover(str(fenced / "in/corpus") + pattern)
    with pytest.raises(StorageError, match=r"which is .*out/secret.jsonl\).*outside"):
        connector.scan(found, 10)


def test_installed_packages_may_be_read_and_not_written(fenced: Path) -> None:
    import numpy

    from connectors.packages import expand

    assert storage.read_text(expand("pkg://curate/embedded/corpus.jsonl"))
    assert storage.exists(numpy.__file__)
    with pytest.raises(StorageError, match="outside"):
        storage.write_atomic(str(Path(numpy.__file__).parent / "planted.py"), "x")


def test_models_and_templates_are_held_to_it_too(fenced: Path) -> None:
    from curate.models.load import ModelSpec, load_tokenizer
    from curate.models.locate import locate
    from tests.tiny import save_tiny

    model = save_tiny(fenced / "in/model")
    outside = save_tiny(fenced / "out/model")
    assert locate(str(model)) == model
    (fenced / "out/template.jinja").write_text("secret")
    for act in (
        lambda: locate(str(outside)),
        lambda: load_tokenizer(ModelSpec(str(model), chat_template=str(fenced / "out/template.jinja"))),
    ):
        with pytest.raises(StorageError, match="outside the folders"):
            act()


def test_names_in_an_object_store_do_not_climb() -> None:
    from io import BytesIO

    body = BytesIO()
    pq.write_table(pa.table({"id": ["a"]}), body)
    fs = fsspec.filesystem("memory")
    fs.store["/climbing/a/../../../x.parquet"] = fsspec.implementations.memory.MemoryFile(
        fs, "/climbing/a/../../../x.parquet", body.getvalue()
    )
    try:
        for url in ("memory://climbing", "memory://climbing/a", "memory://climbing/**"):
            with pytest.raises((CorpusError, StorageError), match=r"leads out|climbs out|no such file|no file"):
                registry.discover(url)
    finally:
        del fs.store["/climbing/a/../../../x.parquet"]
