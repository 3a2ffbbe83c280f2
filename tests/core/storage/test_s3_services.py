"""Facts about S3 as all of ddray reads it: one client, whatever AWS's files say, whoever serves."""

import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from ddray.errors import StorageError
from ddray.storage import arrow, open_storage
from ddray.storage.arrow import arrow_filesystem
from ddray.storage.base import NotFoundError
from ddray.storage.caption_file import CaptionFile
from ddray.storage.s3_client import media_type, new_client
from tests.s3_server import BUCKET, CHECKSUM_HEADERS, FaultyProxy, s3_environment

DEAD = "http://127.0.0.1:1"


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


# Ways to say where the service is: variables, the config file, the region that comes of it.
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
IN_FILE = "aws_access_key_id = test\naws_secret_access_key = test\n"
WAYS = {
    "variable": (
        {**KEYS, "AWS_ENDPOINT_URL": "{here}", "AWS_REGION": "eu-west-1"},
        "",
        "eu-west-1",
    ),
    "of s3 alone": (
        {**KEYS, "AWS_ENDPOINT_URL": DEAD, "AWS_ENDPOINT_URL_S3": "{here}"},
        "[default]\nregion = eu-north-1\n",
        "eu-north-1",
    ),
    "two regions": (
        {**KEYS, "AWS_ENDPOINT_URL": "{here}", "AWS_DEFAULT_REGION": "a-1", "AWS_REGION": "b-1"},
        "[default]\nregion = c-1\n",
        "a-1",
    ),
    "default profile": (
        {},
        f"[default]\nregion = ap-east-1\nendpoint_url = {{here}}\n{IN_FILE}",
        "ap-east-1",
    ),
    "named profile": (
        {"AWS_PROFILE": "lab"},
        f"[default]\nendpoint_url = {DEAD}\nregion = us-west-2\n"
        f"[profile lab]\nregion = sa-east-1\nendpoint_url = {{here}}\n{IN_FILE}",
        "sa-east-1",
    ),
    "services": (
        {"AWS_PROFILE": "lab"},
        f"[profile lab]\nservices = onsite\nregion = eu-west-3\nendpoint_url = {DEAD}\n{IN_FILE}"
        "[services onsite]\ns3 =\n  endpoint_url = {here}\n",
        "eu-west-3",
    ),
    "no region": ({**KEYS, "AWS_ENDPOINT_URL": "{here}"}, "", "us-east-1"),
}


@pytest.mark.parametrize("way", WAYS)
def test_all_readers_ask_one_service_for_one_region(
    proxy: FaultyProxy, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables, file, region = WAYS[way]
    (tmp_path / "config").write_text(file.format(here=proxy.endpoint))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(here=proxy.endpoint))
    uri = f"s3://{BUCKET}/ways/{way}"
    open_storage(uri).write("captions.jsonl", b'{"index": 0, "caption": "a cat"}\n')
    captions = CaptionFile(f"{uri}/captions.jsonl", length=4, width=8)
    assert [row.caption for row in captions.rows(1)] == ["a cat"]
    filesystem, path = arrow_filesystem(uri)
    # As Train sends it to its workers.
    with pickle.loads(pickle.dumps(filesystem)).open_output_stream(f"{path}/checkpoint") as out:
        out.write(b"weights")
    assert open_storage(uri).read("checkpoint") == b"weights"
    assert proxy.regions == {region}


KEY_NAMES = ["a b", "50%25", "a#b", "a+b&c=d", "f\u00fcr/\u732b", "~", "it's (1)!*", "a:b;c,d@e$f"]


@pytest.mark.parametrize("name", KEY_NAMES)
def test_a_key_is_one_object_by_every_reader(s3_endpoint: str, name: str) -> None:
    uri = f"s3://{BUCKET}/keys/{name}"
    storage, (filesystem, path) = open_storage(uri), arrow_filesystem(uri)
    storage.write("x.json", b"{}")
    with filesystem.open_output_stream(f"{path}/y") as out:
        out.write(b"12345")
    keys = new_client().list_objects_v2(Bucket=BUCKET, Prefix=f"keys/{name}/")["Contents"]
    assert [entry["Key"] for entry in keys] == [f"keys/{name}/x.json", f"keys/{name}/y"]
    assert storage.list() == {"x.json": 2, "y": 5}
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(path))
    assert {info.path: info.size for info in found} == {f"{path}/x.json": 2, f"{path}/y": 5}
    assert filesystem.open_input_file(f"{path}/x.json").read() == storage.read("x.json") == b"{}"


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


def test_large_files_go_in_parts_and_are_read_anywhere(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrow, "PART_BYTES", 5 * 2**20)  # the least that S3 takes
    filesystem, path = arrow_filesystem(f"s3://{BUCKET}/large.json")
    content = os.urandom(11 * 2**20)
    with filesystem.open_output_stream(path) as out:
        for start in range(0, len(content), 3 * 2**20):
            out.write(content[start : start + 3 * 2**20])
    head = new_client().head_object(Bucket=BUCKET, Key="large.json")
    assert (head["ContentLength"], head["ContentType"]) == (len(content), "application/json")
    assert head["ETag"].endswith('-3"')
    with filesystem.open_input_file(path) as file:
        file.seek(7_000_000)
        assert file.read(1000) == content[7_000_000:7_001_000]
        assert file.size() == len(content)
        file.seek(len(content) - 5)
        assert file.read() == content[-5:]
    whole = io.BytesIO(filesystem.open_input_stream(path).read())
    assert whole.getvalue() == content


def test_an_upload_that_fails_leaves_nothing(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(proxy, monkeypatch)
    monkeypatch.setattr(arrow, "PART_BYTES", 5 * 2**20)
    filesystem, path = arrow_filesystem(f"s3://{BUCKET}/failed")
    out = filesystem.open_output_stream(path)
    out.write(bytes(5 * 2**20))
    proxy.unknown = {"content-md5": (400, "X"), "content-length": (403, "AccessDenied")}
    with pytest.raises(StorageError, match=f"cannot write s3://{BUCKET}/failed: access denied"):
        out.write(bytes(5 * 2**20))
    proxy.unknown = {}
    del out
    assert not open_storage(f"s3://{BUCKET}").exists("failed")


def test_a_parquet_file_is_read_by_its_columns(s3_endpoint: str) -> None:
    table = pyarrow.table({"index": [0, 1], "caption": ["a", "b"]})
    filesystem, path = arrow_filesystem(f"s3://{BUCKET}/a b.parquet")
    with filesystem.open_output_stream(path) as out:
        pq.write_table(table, out)
    assert pq.read_table(path, filesystem=filesystem).equals(table)
    rows = CaptionFile(f"s3://{BUCKET}/a b.parquet", length=4, width=8).rows(2)
    assert [row.caption for row in rows] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("manifest.json", "application/json"),
        ("events.jsonl", "application/x-ndjson"),
        ("report.html", "text/html; charset=utf-8"),
        ("images/3/000000007.png", "image/png"),
        ("x.webp", "image/webp"),
        ("shards/shard-00000.tar", "application/x-tar"),
        ("shards/shard-00000.parquet", "application/vnd.apache.parquet"),
        ("model.safetensors", "application/octet-stream"),
        ("png", "image/png"),
    ],
)
def test_objects_have_the_media_type_of_their_name(s3_endpoint: str, name: str, kind: str) -> None:
    assert media_type(name) == kind
    open_storage(f"s3://{BUCKET}/kinds").write(name, b"")
    assert new_client().head_object(Bucket=BUCKET, Key=f"kinds/{name}")["ContentType"] == kind


def _use_everything(uri: str) -> None:
    storage = open_storage(uri)
    storage.check_writable()
    assert storage.write("manifest.json", b"{}", if_absent=True)
    assert not storage.write("manifest.json", b"{}", if_absent=True)
    assert storage.write("x", bytes(1000))
    assert (storage.read("x"), storage.exists("x")) == (bytes(1000), True)
    assert storage.version("x") == storage.version("x")
    storage.delete("x")
    assert storage.list() == {"manifest.json": 2}
    with pytest.raises(NotFoundError):
        storage.read("x")
    filesystem, path = arrow_filesystem(uri)
    with filesystem.open_output_stream(f"{path}/checkpoint/y") as out:
        out.write(bytes(11 * 2**20))
    assert filesystem.open_input_file(f"{path}/checkpoint/y").read() == bytes(11 * 2**20)
    filesystem.delete_dir(f"{path}/checkpoint")
    assert storage.list() == {"manifest.json": 2}


def test_a_service_that_refuses_checksums_is_used_as_any_other(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(proxy, monkeypatch)
    monkeypatch.setattr(arrow, "PART_BYTES", 5 * 2**20)
    proxy.unknown = CHECKSUM_HEADERS
    _use_everything(f"s3://{BUCKET}/without-checksums")


@pytest.mark.parametrize("said_by", ["variable", "profile"])
def test_who_asks_for_checksums_gets_them(
    proxy: FaultyProxy, said_by: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(proxy, monkeypatch)
    if said_by == "variable":
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    else:
        (tmp_path / "config").write_text(
            "[default]\nrequest_checksum_calculation = when_supported\n"
        )
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    proxy.unknown = CHECKSUM_HEADERS
    message = "InvalidArgument.*; if it speaks of checksums, unset AWS_REQUEST_CHECKSUM_CALCULATION"
    with pytest.raises(StorageError, match=message):
        open_storage(f"s3://{BUCKET}/with-checksums").check_writable()


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
        link: str = new_client().generate_presigned_url("get_object", {"Bucket": "b", "Key": "k"})
        return link.partition("?")[0]

    for host in ("127.0.0.1:9000", "localhost:9000", "minio:9000", "[::1]:9000", "s3.example.org"):
        assert asked(f"http://{host}") == f"http://{host}/b/k"
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert asked("https://s3.example.org") == "https://b.s3.example.org/k"


def test_a_profile_that_is_not_there_is_told(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(proxy, monkeypatch)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match=r"profile \(nobody\) could not be found"):
        open_storage(f"s3://{BUCKET}/x").check_writable()
