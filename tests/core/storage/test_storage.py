"""Facts about URIs and atomic writes, on real files and a real S3 service on loopback."""

import dataclasses
import errno
import os
import pickle
import re
import resource
import stat
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddray.cli import main
from ddray.errors import ConfigError, ShardError, StorageError
from ddray.sets.inspection import describe, verify
from ddray.sets.sharded_set import shard_name
from ddray.sets.trajectories.plan import TrajectoryPlan
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.storage import open_storage, s3
from ddray.storage.base import NotFoundError, Storage, read_ahead
from ddray.storage.local import LocalStorage, _local_errors
from ddray.storage.s3 import S3Storage
from tests.s3_server import BUCKET


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Give an empty storage of each kind."""
    if request.param == "local":
        return open_storage(str(tmp_path / "new" / "set"))
    request.getfixturevalue("s3_endpoint")
    name = re.sub(r"\W+", "-", request.node.name)
    return open_storage(f"s3://{BUCKET}/{name}/")


# What both kinds do.


def test_the_version_of_a_name_changes_when_it_is_written_again(storage: Storage) -> None:
    storage.write("x", b"first")
    first = storage.version("x")
    assert storage.version("x") == first
    storage.write("x", b"other")
    assert storage.version("x") != first
    with pytest.raises(NotFoundError):
        storage.version("y")


def test_what_is_moved_lies_under_its_new_name_alone(storage: Storage) -> None:
    storage.write("run/student/a.bin", b"12345")
    storage.write("run/notes.txt", b"mine")
    storage.move("run/student/a.bin", "old/run/student/a.bin")
    assert storage.list() == {"old/run/student/a.bin": 5, "run/notes.txt": 4}
    assert storage.read("old/run/student/a.bin") == b"12345"
    with pytest.raises(StorageError, match="run/student/a.bin"):
        storage.move("run/student/a.bin", "b.bin")
    storage.delete_folder("old")
    storage.delete_folder("old")
    assert storage.list() == {"run/notes.txt": 4}
    if isinstance(storage, LocalStorage):
        assert [path.name for path in Path(storage.uri).rglob("*")] == ["run", "notes.txt"]


def test_what_is_written_is_read_and_listed(storage: Storage) -> None:
    assert storage.list() == {}
    assert storage.write("shards/b.parquet", b"12345")
    assert storage.write("shards/a.parquet", b"")
    assert storage.write("manifest.json", b"{}")
    assert storage.read("shards/b.parquet") == b"12345"
    assert storage.list() == {"manifest.json": 2, "shards/a.parquet": 0, "shards/b.parquet": 5}
    assert list(storage.list("shards/")) == ["shards/a.parquet", "shards/b.parquet"]
    assert list(storage.list("shards/b")) == ["shards/b.parquet"]
    assert storage.list("other/") == {}
    names = ["shards/a.parquet", "shards/gone.parquet", *["shards/b.parquet"] * 40]
    assert list(read_ahead(storage, names)) == [b"", None, *[b"12345"] * 40]


def test_a_write_replaces_and_a_conditional_write_does_not(storage: Storage) -> None:
    assert storage.write("x", b"one", if_absent=True)
    assert not storage.write("x", b"two", if_absent=True)
    assert storage.read("x") == b"one"
    assert storage.write("x", b"three")
    assert storage.read("x") == b"three"
    assert storage.list() == {"x": 5}


def test_a_stream_is_written_whole_or_not_at_all(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_STREAMED_PART_BYTES", 5 * 2**20)
    part, taken = bytes(range(256)) * 2**12, []

    def parts(count: int) -> Iterator[bytes]:
        for i in range(count):
            taken.append(i)
            yield part
        yield b""
        if count == 9:
            raise ShardError("what it is made of is damaged")

    storage.write("array", b"earlier")
    # More than a part, a multiple of none.
    storage.write_stream("array", parts(11))
    assert (storage.read("array"), taken) == (part * 11, list(range(11)))
    with pytest.raises(ShardError, match="what it is made of is damaged"):
        storage.write_stream("array", parts(9))
    assert storage.read("array") == part * 11
    storage.write_stream("empty", iter(()))
    assert storage.list() == {"array": 11 * 2**20, "empty": 0}


def test_of_many_conditional_writers_one_wins(storage: Storage) -> None:
    barrier = threading.Barrier(8)

    def write(writer: int) -> bool:
        barrier.wait()
        return storage.write("x", str(writer).encode(), if_absent=True)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert sum(won) == 1
    assert storage.read("x") == str(won.index(True)).encode()
    assert list(storage.list()) == ["x"]


def test_exists_and_delete(storage: Storage) -> None:
    assert not storage.exists("a/x")
    storage.write("a/xy", b"")
    assert not storage.exists("a/x")
    storage.write("a/x", b"")
    assert storage.exists("a/x")
    storage.delete("a/x")
    storage.delete("a/x")
    assert not storage.exists("a/x")
    with pytest.raises(NotFoundError, match=r"cannot read .*a/x: no such"):
        storage.read("a/x")


def test_check_writable_leaves_nothing_behind(storage: Storage, tmp_path: Path) -> None:
    storage.check_writable()
    assert storage.list() == {}
    assert list(tmp_path.iterdir()) == []


def test_a_used_storage_pickles(storage: Storage) -> None:
    storage.write("x", b"1")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.uri == storage.uri
    assert copy.read("x") == b"1"


@pytest.mark.parametrize("name", ["", "/x", "../x", "a//b", "a/./b", "a/"])
def test_names_stay_below_the_uri(storage: Storage, name: str) -> None:
    with pytest.raises(StorageError, match="is not a plain relative path"):
        storage.write(name, b"")


def test_temporary_names_are_not_listed(storage: Storage) -> None:
    storage.write("shards/.tmp-0123", b"left by a killed writer")
    assert storage.list() == {}


# URIs.


def test_uris(tmp_path: Path) -> None:
    assert open_storage("some/path/").uri == str(Path("some/path").absolute())
    assert open_storage(tmp_path).uri == str(tmp_path)
    assert open_storage("file:///a%20b/c").uri == "/a b/c"
    assert open_storage("file://localhost/a").uri == "/a"
    assert open_storage("s3://bucket").join("a/b") == "s3://bucket/a/b"
    assert open_storage("s3://bucket/p/q/").join("a") == "s3://bucket/p/q/a"
    assert isinstance(open_storage("s3://bucket"), S3Storage)
    assert isinstance(open_storage("plain"), LocalStorage)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "uri is empty"),
        ("gs://bucket/x", "has the scheme 'gs'; give a path, file:///path or s3://"),
        ("s3:/bucket/x", "has the scheme 's3'"),
        ("file://host/x", "names a host or a relative path"),
        ("s3:///x", "is not s3://bucket/prefix"),
        ("s3://bucket/x?endpoint_override=y", "an endpoint goes into AWS_ENDPOINT_URL"),
    ],
)
def test_bad_uris_are_refused(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_storage(uri)


def test_a_secret_in_a_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="holds credentials") as caught:
        open_storage("s3://key:hunter2@bucket/x")
    assert "hunter2" not in str(caught.value)


# Local files.


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    open_storage(tmp_path).write("x", b"")
    (tmp_path / "plain").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("x", "plain")]
    assert modes[0] == modes[1]


def test_a_path_under_a_regular_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for uri in (tmp_path / "file", tmp_path / "file" / "below"):
        storage = open_storage(uri)
        message = rf"{tmp_path}/file.*: a part of the path is not a directory; choose another"
        for call in (
            storage.check_writable,
            lambda s=storage: s.write("x", b""),
            lambda s=storage: s.read("x"),
            lambda s=storage: s.exists("x"),
            storage.list,
        ):
            with pytest.raises(StorageError, match=message):
                call()


def test_a_directory_in_the_way_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*/x: it is a directory"):
        open_storage(tmp_path).write("x", b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_place_where_nothing_can_be_made_is_refused() -> None:
    # /proc takes no files, not even from root.
    with pytest.raises(StorageError, match=r"cannot write to /proc/nothing/here: .+; .+"):
        open_storage("/proc/nothing/here").check_writable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="permission denied; choose another URI"):
        open_storage(tmp_path / "set").check_writable()
    tmp_path.chmod(0o700)


WRITE_TOO_MUCH = """
import sys
from ddray.errors import StorageError
from ddray.storage import open_storage
storage = open_storage(sys.argv[1])
storage.write("x", b"old")
try:
    storage.write("x", bytes(1_000_000))
except StorageError as exc:
    print(exc)
"""


def test_a_write_that_fails_half_way_keeps_the_old_file_only(tmp_path: Path) -> None:
    # A limit of the kernel on the file's size stops the write after 100 kB, as a full disk would.
    done = subprocess.run(
        [sys.executable, "-c", WRITE_TOO_MUCH, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.stdout == (
        f"cannot write {tmp_path}/x: the file size limit is reached; "
        "raise it (ulimit -f), or write smaller shards\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_full_disk_is_named() -> None:
    message = "cannot write /dev/full: no space left on device; free some, or choose another URI"
    with pytest.raises(StorageError, match=f"^{message}$"), _local_errors("write", "/dev/full"):
        Path("/dev/full").write_bytes(b"x")


def test_an_unnamed_error_keeps_the_words_of_the_system() -> None:
    message = "^cannot read /x: Input/output error$"
    with pytest.raises(StorageError, match=message), _local_errors("read", "/x"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


# S3.


def test_a_missing_bucket_is_named(s3_endpoint: str) -> None:
    storage = open_storage("s3://no-such-bucket/set")
    message = r"s3://no-such-bucket/set.*: no such bucket; create it, or correct the URI$"
    for call in (
        storage.check_writable,
        lambda: storage.write("x", b""),
        lambda: storage.read("x"),
        lambda: storage.exists("x"),
        storage.list,
    ):
        with pytest.raises(StorageError, match=message):
            call()


def test_no_credentials_are_named(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="no credentials; set AWS_ACCESS_KEY_ID and"):
        open_storage(f"s3://{BUCKET}/set").check_writable()


def test_denied_access_is_named(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    iam = boto3.session.Session().client("iam")
    iam.create_user(UserName="nobody")
    key = iam.create_access_key(UserName="nobody")["AccessKey"]
    _authenticate_after(s3_endpoint, "0")
    try:
        with pytest.raises(StorageError, match="the credentials are refused; renew them"):
            open_storage(f"s3://{BUCKET}/set").check_writable()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        with pytest.raises(StorageError, match="access denied; these credentials need the right"):
            open_storage(f"s3://{BUCKET}/set").check_writable()
    finally:
        _authenticate_after(s3_endpoint, "inf")


def _authenticate_after(endpoint: str, num_calls: str) -> None:
    """Tell moto after how many calls it checks the caller's rights."""
    request = urllib.request.Request(
        f"{endpoint}/moto-api/reset-auth",
        data=num_calls.encode(),
        headers={"Content-Type": "text/plain"},
    )
    urllib.request.urlopen(request).close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("endpoint", "message"),
    [("not a url", "Invalid endpoint"), ("http://127.0.0.1:1", "the endpoint cannot be reached")],
)
def test_a_bad_endpoint_is_named(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, endpoint: str, message: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_RETRY_MODE", "standard")
    with pytest.raises(StorageError, match=message):
        open_storage(f"s3://{BUCKET}/set").exists("x")


def test_foreign_folder_markers_are_not_listed(s3_endpoint: str) -> None:
    import boto3

    client = boto3.session.Session().client("s3")
    client.put_object(Bucket=BUCKET, Key="marked/", Body=b"")
    client.put_object(Bucket=BUCKET, Key="marked/shards/", Body=b"")
    client.put_object(Bucket=BUCKET, Key="marked-too/x", Body=b"")
    assert open_storage(f"s3://{BUCKET}/marked").list() == {}


def test_a_listing_longer_than_a_page_is_whole(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")  # the real service's page is 1000 keys
    storage = open_storage(f"s3://{BUCKET}/many")
    names = [f"shards/{i:04d}" for i in range(8)]
    for name in names:
        storage.write(name, b"")
    assert list(storage.list()) == names


def test_a_link_gives_the_bytes_and_the_media_type_to_anybody(s3_endpoint: str) -> None:
    storage = S3Storage(f"s3://{BUCKET}/images")
    storage.write("a.webp", b"picture")
    link = storage.link("a.webp", 60, "image/webp")
    with urllib.request.urlopen(link) as answer:
        assert answer.read() == b"picture"
        assert answer.headers["content-type"] == "image/webp"
    # The older way to sign, boto3's own choice for us-east-1, is refused by new buckets.
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in link
    assert "X-Amz-Expires=60&" in link


def test_a_link_needs_credentials(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"cannot link s3://.*/x\.png: no credentials; set AWS_"):
        S3Storage(f"s3://{BUCKET}/images").link("x.png", 60, "image/png")


def test_a_trajectory_set_lives_on_s3_and_pyarrow_reads_it(s3_endpoint: str) -> None:
    import pyarrow.dataset

    uri = f"s3://{BUCKET}/set"
    plan = TrajectoryPlan(
        teacher="t",
        teacher_fingerprint="a",
        tokenizer_fingerprint="b",
        conditioning="class",
        num_classes=10,
        seed=0,
        noise_scheme="n",
        cfg=None,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        solver="ab2",
        num_evals=24,
        dtype="float32",
        threads=1,
        count=5,
        shard_rows=2,
        batch_size=2,
        stages=(4,),
        vocab_size=16,
    )
    trajectories = pickle.loads(pickle.dumps(TrajectorySet.create(uri, plan)))
    for k in trajectories.missing():
        index = plan.shard_range(k)
        tokens = [[i] * 4 for i in index]
        trajectories.write_shard(k, index, plan.label(index), tokens)
    assert TrajectorySet.open(uri).verify().ok
    table = pyarrow.dataset.dataset(f"{uri}/shards").to_table()
    assert table["index"].to_pylist() == [0, 1, 2, 3, 4]

    told = describe(uri)
    assert (told["rows"], told["tokens"]["codes_used"]) == (5, 5)
    assert told["labels"]["least_frequent"] == {"class": 0, "rows": 1}

    larger = TrajectorySet.create(uri, dataclasses.replace(plan, count=6))
    assert larger.missing() == [2]
    assert larger.quarantine(shard_name(1)) == "quarantine/shard-00001.parquet.bad"
    assert larger.missing() == [1, 2]
    with pytest.raises(ShardError, match=f"{uri}/shards/shard-00001.parquet is missing; rerun"):
        larger.read_shard(1)
    assert verify(uri) == [f"missing: {shard_name(1)}", f"missing: {shard_name(2)}"]


def test_looking_at_a_bucket_that_is_not_there_is_one_line(
    s3_endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for uri, message in (
        ("s3://no-such-bucket/set", "no such bucket; create it, or correct the URI"),
        (f"s3://{BUCKET}/nothing", f"no trajectory set at s3://{BUCKET}/nothing: it has no mani"),
    ):
        for flag in ("--verify", "--repair"):
            assert main(["inspect", uri, flag]) == 1
            stdout, stderr = capsys.readouterr()
            assert (stdout, stderr.count("\n")) == ("", 1)
            assert message in stderr
