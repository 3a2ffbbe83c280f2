"""Facts about S3 as all of ddray reads it: one client, whatever AWS's files say, whoever serves."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from ddray.errors import StorageError
from ddray.storage import open_storage
from ddray.storage.arrow import arrow_filesystem
from ddray.storage.caption_file import CaptionFile
from ddray.storage.s3_client import media_type, new_client
from tests.s3_server import BUCKET, CHECKSUM_HEADERS, FaultyProxy, s3_environment


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Something before the service that sees its requests; nothing says yet where it is."""
    with FaultyProxy(s3_endpoint) as proxy:
        for name in s3_environment(""):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
        yield proxy


def use(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_environment(proxy.endpoint).items():
        monkeypatch.setenv(name, value)


KEY_NAMES = [
    "a b",
    "50%25",
    "a#b",
    "a+b&c=d",
    "f\u00fcr",
    "\u732b",
    "~",
    "it's (1)!*",
    "a:b;c,d@e$",
]


def test_a_key_is_one_object_by_every_reader(s3_endpoint: str) -> None:
    uri = f"s3://{BUCKET}/keys %41"
    storage, (filesystem, path) = open_storage(uri), arrow_filesystem(uri)
    for name in KEY_NAMES:
        storage.write(f"{name}/x", b"12")
        with filesystem.open_output_stream(f"{path}/{name}/y") as out:
            out.write(b"345")
        assert storage.read(f"{name}/y") == b"345"
        assert filesystem.open_input_file(f"{path}/{name}/x").read() == b"12"
    sizes = {f"{name}/{file}": size for name in KEY_NAMES for file, size in (("x", 2), ("y", 3))}
    assert storage.list() == dict(sorted(sizes.items()))
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    assert {i.path.removeprefix(f"{path}/"): i.size for i in found if i.is_file} == sizes


def test_files_and_folders_as_arrow_sees_them(s3_endpoint: str, tmp_path: Path) -> None:
    filesystem, path = arrow_filesystem(f"s3://{BUCKET}/tree/")
    for name in ("a", "one/b", "one/two/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    pyarrow.fs.copy_files(str(tmp_path), path, destination_filesystem=filesystem)
    open_storage(f"s3://{BUCKET}/tree-beside").write("x", b"")

    def listed(**how: Any) -> dict[str, bool]:
        found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, **how))
        return {info.path.removeprefix(f"{path}/"): info.is_file for info in found}

    assert listed() == {"a": True, "one": False}
    everything = {"a": True, "one": False, "one/b": True, "one/two": False, "one/two/c": True}
    assert listed(recursive=True) == everything
    kinds = filesystem.get_file_info([path, f"{path}/one", f"{path}/one/b", f"{path}/on", BUCKET])
    assert [info.type.name for info in kinds] == [
        "Directory",
        "Directory",
        "File",
        "NotFound",
        "Directory",
    ]
    filesystem.move(f"{path}/a", f"{path}/d")
    with filesystem.open_input_stream(f"{path}/d") as file:
        assert file.read() == b"a"
    filesystem.delete_dir(path)
    assert open_storage(f"s3://{BUCKET}/tree").list() == {}
    assert open_storage(f"s3://{BUCKET}/tree-beside").list() == {"x": 0}
    with pytest.raises(FileNotFoundError, match=f"no such file: s3://{BUCKET}/tree/a"):
        filesystem.open_input_file(f"{path}/a")
    with pytest.raises(FileNotFoundError, match=f"no such folder: s3://{BUCKET}/tree"):
        filesystem.get_file_info(pyarrow.fs.FileSelector(path))
    assert filesystem == arrow_filesystem("s3://other/x")[0]


def test_a_parquet_file_is_read_by_its_columns(s3_endpoint: str) -> None:
    table = pyarrow.table({"index": [0, 1], "caption": ["a", "b"]})
    filesystem, path = arrow_filesystem(f"s3://{BUCKET}/a b.parquet")
    with filesystem.open_output_stream(path) as out:
        pq.write_table(table, out)
    assert pq.read_table(path, filesystem=filesystem).equals(table)
    rows = CaptionFile(f"s3://{BUCKET}/a b.parquet", length=4, width=8).rows(2)
    assert [row.caption for row in rows] == ["a", "b"]


KINDS = {
    "manifest.json": "application/json",
    "events.jsonl": "application/x-ndjson",
    "report.html": "text/html; charset=utf-8",
    "images/3/000000007.png": "image/png",
    "x.webp": "image/webp",
    "shards/shard-00000.tar": "application/x-tar",
    "shards/shard-00000.parquet": "application/vnd.apache.parquet",
    "model.safetensors": "application/octet-stream",
}


def test_objects_have_the_media_type_of_their_name(s3_endpoint: str) -> None:
    assert {name: media_type(name) for name in KINDS} == KINDS
    storage, client = open_storage(f"s3://{BUCKET}/kinds"), new_client()
    for name in ("x.png", "x.json"):
        storage.write(name, b"")
        head = client.head_object(Bucket=BUCKET, Key=f"kinds/{name}")
        assert head["ContentType"] == media_type(name)


def test_a_service_that_refuses_checksums_takes_what_is_written(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(proxy, monkeypatch)
    proxy.unknown = CHECKSUM_HEADERS
    storage = open_storage(f"s3://{BUCKET}/without-checksums")
    storage.check_writable()
    assert storage.write("x", b"1", if_absent=True)
    assert storage.read("x") == b"1"
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    message = "InvalidArgument.*; if it speaks of checksums, unset AWS_REQUEST_CHECKSUM_CALCULATION"
    with pytest.raises(StorageError, match=message):
        open_storage(storage.uri).write("x", b"1")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (501, "NotImplemented", "does not know conditional writes .If-None-Match., by which two"),
        (400, "InvalidArgument", "InvalidArgument.*; if it speaks of checksums"),
    ],
)
def test_a_service_without_conditional_writes_is_told_what_it_is(
    proxy: FaultyProxy, status: int, code: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(proxy, monkeypatch)
    proxy.unknown = {"if-none-match": (status, code)}
    storage = open_storage(f"s3://{BUCKET}/unconditional")
    storage.check_writable()
    with pytest.raises(StorageError, match=message) as caught:
        storage.write("manifest.json", b"{}", if_absent=True)
    assert "\n" not in str(caught.value)


def test_hosts_without_names_for_buckets_are_asked_by_path(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(proxy, monkeypatch)

    def asked(endpoint: str) -> str:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        link: str = new_client().generate_presigned_url(
            "get_object", {"Bucket": "bucket", "Key": "k"}
        )
        return link.partition("?")[0]

    for host in ("localhost:9000", "minio:9000", "s3.example.org"):
        assert asked(f"http://{host}") == f"http://{host}/bucket/k"
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert asked("https://s3.example.org") == "https://bucket.s3.example.org/k"


def test_a_profile_that_is_not_there_is_told(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(proxy, monkeypatch)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match=r"profile \(nobody\) could not be found"):
        open_storage(f"s3://{BUCKET}/x").check_writable()
