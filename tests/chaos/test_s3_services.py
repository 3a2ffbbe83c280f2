"""S3 services that are not Amazon's, and all of AWS's ways to say where one is."""

import os
import pickle
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddray.errors import StorageError
from ddray.runtime.cluster.doctor import probing
from ddray.storage import arrow, open_storage
from ddray.storage.arrow import arrow_filesystem
from ddray.storage.base import NotFoundError
from ddray.storage.caption_file import CaptionFile
from ddray.storage.s3_client import new_client
from tests.loopback import free_port
from tests.patience import PATIENCE_S, wait_until
from tests.runtime.tiny import command, environment, write_teacher
from tests.s3_server import BUCKET, CHECKSUM_HEADERS, FaultyProxy, s3_environment, s3_server

pytestmark = pytest.mark.chaos

DEAD = "http://127.0.0.1:1"
S3RVER = "s3rver@3.7.1"


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def proxy(service: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Something before the service that sees its requests; nothing says yet where it is."""
    with FaultyProxy(service) as proxy:
        for name in s3_environment(""):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
        yield proxy


def use(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_environment(endpoint).items():
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


def test_large_files_go_in_parts_and_are_read_anywhere(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(proxy.endpoint, monkeypatch)
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
    assert filesystem.open_input_stream(path).read() == content


def test_an_upload_that_fails_leaves_nothing(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(proxy.endpoint, monkeypatch)
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


def _use_everything(uri: str, conditional: bool = True) -> None:
    storage = open_storage(uri)
    storage.check_writable()
    assert storage.write("manifest.json", b"{}", if_absent=True)
    assert storage.write("manifest.json", b"{}", if_absent=True) is not conditional
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


@pytest.mark.parametrize("said_by", ["variable", "profile"])
def test_who_asks_for_checksums_gets_them(
    proxy: FaultyProxy, said_by: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(proxy.endpoint, monkeypatch)
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


def test_a_service_that_refuses_checksums_is_used_as_any_other(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(proxy.endpoint, monkeypatch)
    monkeypatch.setattr(arrow, "PART_BYTES", 5 * 2**20)
    proxy.unknown = CHECKSUM_HEADERS
    _use_everything(f"s3://{BUCKET}/without-checksums")


def _npm(*arguments: str, cwd: Path) -> None:
    """Run npm; without it, or without its registry, the test is skipped."""
    if shutil.which("npm") is None:
        pytest.skip("there is no npm, which brings an S3 service that others wrote")
    quiet = ("--no-audit", "--no-fund", "--loglevel=error")
    done = subprocess.run(
        ["npm", *arguments, *quiet], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S
    )
    if done.returncode:
        pytest.skip(f"npm {arguments[0]} failed: {done.stderr.strip()[-300:]}")


@pytest.fixture
def s3rver(tmp_path: Path) -> Iterator[str]:
    """The endpoint of s3rver, which shares no code with moto or botocore."""
    _npm("install", S3RVER, cwd=tmp_path)
    port = free_port()
    command = ["node", "node_modules/.bin/s3rver", "--directory", "data", "--address", "127.0.0.1"]
    command += ["--port", str(port), "--configure-bucket", BUCKET, "--silent"]
    (tmp_path / "data").mkdir()
    server = subprocess.Popen(command, cwd=tmp_path)

    def answers() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(answers, "an answer of s3rver", lambda: server.poll() is None)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def test_a_service_that_others_wrote(s3rver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(s3rver, monkeypatch)
    # Its own names of users.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "S3RVER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S3RVER")
    monkeypatch.setattr(arrow, "PART_BYTES", 5 * 2**20)
    # It ignores If-None-Match, as the doctor says of it.
    _use_everything(f"s3://{BUCKET}/a b/\u00fc+1", conditional=False)
    unconditional = pytest.raises(StorageError, match="does not honour conditional writes")
    with unconditional, probing([f"s3://{BUCKET}/probed"]):
        pass


def test_checkpoints_of_a_training_lie_where_its_student_lies(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray Train, in its own processes, writes and finds them by the profile and under the name."""
    file = f"[profile lab]\nregion = eu-west-3\nendpoint_url = {proxy.endpoint}\n{IN_FILE}"
    (tmp_path / "config").write_text(file)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    proxy.unknown = CHECKSUM_HEADERS
    teacher, out = write_teacher(tmp_path / "teacher"), f"s3://{BUCKET}/runs/a b%20+#"
    sizes = ["--count=40", "--shard-rows=20", "--batch-size=8", "--num-evals=6"]
    sets = ["sample", "--teacher", teacher, "--out", str(tmp_path / "set"), *sizes]
    train = ["distill", "--data", str(tmp_path / "set"), "--out", out, "--steps=4"]
    train += ["--batch-size=8", "--schedule=0,8", "--threads=1", "--checkpoint-every=2"]
    for arguments in (sets, train):
        _run(arguments)
    storage = open_storage(out)
    names = storage.list("checkpoints-")
    assert any(name.endswith("model_states.pt") for name in names), names
    for name in ("summary.json", "student/config.json"):
        storage.delete(name)
    written = {name: storage.version(name) for name in names if "/step-" in name}
    _run(train)
    assert storage.exists("student/config.json")
    # It went on from the last checkpoint, which has all steps.
    assert {name: storage.version(name) for name in written} == written
    assert {name.split("/")[0] for name in open_storage(f"s3://{BUCKET}/runs").list()} == {
        "a b%20+#"
    }
    assert proxy.regions == {"eu-west-3"}


def _run(arguments: list[str]) -> None:
    done = subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
