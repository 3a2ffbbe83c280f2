"""`ddray cluster config`: the files of clusters with a user's names in them, and no others."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ddray
from ddray.cli import main
from ddray.errors import ConfigError
from ddray.runtime.cluster import deployment
from ddray.runtime.cluster.deployment import (
    ACCOUNTS,
    BUCKET,
    PARTS,
    REGION,
    REGISTRY,
    write_config,
)
from tests.core.deployment.kuberay import BUILDS, OWN_CLUSTER, build, read, templates
from tests.paths import ROOT

OWN = {
    "bucket": "mine.of-the-team",
    "registry": "111122223333.dkr.ecr.eu-central-1.amazonaws.com",
    "region": "eu-central-1",
}
PLACEHOLDERS = (BUCKET, REGISTRY, REGION, *ACCOUNTS)


def texts(folder: Path) -> dict[str, str]:
    """Every file of the parts, by its path."""
    tops = [folder / part for part in PARTS]
    paths = [one for top in tops for one in (top.rglob("*") if top.is_dir() else [top])]
    return {
        one.relative_to(folder).as_posix(): one.read_text("utf-8")
        for one in paths
        if one.is_file() and "__pycache__" not in one.parts
    }


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("own") / "files"
    told = write_config(**OWN, out=str(out))
    assert told == {
        "out": str(out),
        "files": len(texts(ROOT)),
        "image": f"{OWN['registry']}/ddray:{ddray.__version__}",
        "bucket": f"s3://{OWN['bucket']}",
        "region": OWN["region"],
        "account": "111122223333",
    }
    return out


def test_every_placeholder_is_in_the_files_and_none_in_the_copies(own: Path) -> None:
    before, after = texts(ROOT), texts(own)
    assert after.keys() == before.keys()
    for placeholder in PLACEHOLDERS:
        holders = [name for name, text in before.items() if placeholder in text]
        assert holders, placeholder
        assert [name for name in holders if placeholder in after[name]] == []
    changed = {name for name in before if before[name] != after[name]}
    assert {
        name for name, text in before.items() if any(p in text for p in PLACEHOLDERS)
    } == changed


def test_copies_say_the_same_with_other_names(own: Path) -> None:
    files = {name: text for name, text in texts(own).items() if name.endswith(".yaml")}
    # libyaml's, where there is one. The stack has tags of its own.
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    del files["cluster/aws/stack.yaml"]
    read = {name: [*yaml.load_all(text, loader)] for name, text in files.items()}
    assert len(read) > 60
    (growing,) = read["ray-cluster.yaml"]
    assert growing["provider"]["region"] == OWN["region"]
    assert growing["docker"]["image"] == f"{OWN['registry']}/ddray:{ddray.__version__}"
    (sample,) = read["jobs/configs/llamagen-b-sample.yaml"]
    assert sample["out"] == f"s3://{OWN['bucket']}/sets/llamagen-b"
    (cluster,) = read["cluster/eks/cluster.yaml"]
    assert cluster["metadata"]["region"] == OWN["region"]


@pytest.mark.parametrize("tag", ["2026-08-01", f"{ddray.__version__}.1", "_", "a" * 124])
def test_every_image_is_written_under_the_tag(tag: str, tmp_path: Path) -> None:
    told = write_config(**OWN, out=str(tmp_path), tag=tag)
    assert told["image"] == f"{OWN['registry']}/ddray:{tag}"
    pattern = re.compile(
        rf"\bddray:({re.escape(tag)}|{re.escape(ddray.__version__)})(-cpu)?(?![\w.-])"
    )
    before, after = texts(ROOT), texts(tmp_path)
    for name in before:
        was, found = (pattern.findall(text[name]) for text in (before, after))
        assert found == [(tag, variant) for _, variant in was], name
    # What pods and machines are made of has no other.
    kuberay = tmp_path / "cluster" / "kuberay"
    stages = [f"own-cluster/{stage}" for stage in OWN_CLUSTER]
    documents = [one for name in (*BUILDS, "jobs", *stages) for one in build(str(kuberay / name))]
    documents += read(kuberay / "overlays" / "dev" / "digits.yaml")
    of_pods = {
        container["image"]
        for document in documents
        for _, template in templates(document)
        for container in template["spec"]["containers"]
    }
    registry = f"{OWN['registry']}/ddray"
    assert {image for image in of_pods if not image.startswith("redis:")} == {
        *(f"{registry}:{tag}", f"{registry}:{tag}-cpu", f"ddray:{tag}-cpu")
    }
    growing = yaml.safe_load((tmp_path / "ray-cluster.yaml").read_text("utf-8"))
    cpu = growing["available_node_types"]["cpu"]["docker"]["worker_image"]
    images = growing["docker"]["image"], growing["docker"]["head_image"], cpu
    assert images == (f"{registry}:{tag}", f"{registry}:{tag}-cpu", f"{registry}:{tag}-cpu")


def test_names_that_hold_a_placeholder_stay_as_they_are(tmp_path: Path) -> None:
    bucket, registry = f"mine-{REGION}", f"{ACCOUNTS[0]}.dkr.ecr.{REGION}.amazonaws.com"
    write_config(bucket, registry, "eu-central-1", str(tmp_path), account="444455556666")
    growing = yaml.safe_load((tmp_path / "ray-cluster.yaml").read_text("utf-8"))
    assert growing["docker"]["image"] == f"{registry}/ddray:{ddray.__version__}"
    assert growing["provider"]["region"] == "eu-central-1"
    sample = yaml.safe_load((tmp_path / "jobs/configs/var-d16-sample.yaml").read_text("utf-8"))
    assert sample["out"] == f"s3://{bucket}/sets/var-d16"


@pytest.mark.parametrize("account", [None, "444455556666"])
def test_pods_take_the_images_and_roles_that_are_told(account: str | None, tmp_path: Path) -> None:
    names = OWN | {"registry": "registry.lab:5000/team/ddray"}
    told = write_config(**names, out=str(tmp_path), account=account)
    assert told["image"] == f"registry.lab:5000/team/ddray:{ddray.__version__}"
    assert told["account"] == account
    kubectl = Path(sys.executable).with_name("kubectl")
    folder = tmp_path / "cluster" / "kuberay" / "overlays" / "prod"
    done = subprocess.run(
        [kubectl, "kustomize", folder], capture_output=True, text=True, check=True
    )
    documents = [one for one in yaml.safe_load_all(done.stdout) if one["kind"] == "ServiceAccount"]
    assert documents
    for document in documents:
        found = document["metadata"].get("annotations") or {}
        name = document["metadata"]["name"]
        # Without an account, whoever makes the role says so to Kubernetes, as eksctl does.
        assert found.get("eks.amazonaws.com/role-arn") == (
            account and f"arn:aws:iam::{account}:role/{name}"
        )
    assert "image: registry.lab:5000/team/ddray:" in done.stdout


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        *(
            ("bucket", bucket, "is no name of a bucket: give 3 to 63 of a-z, 0-9")
            for bucket in (
                "s3://mine", "Mine", "my_bucket", "ab", "a" * 64, "a..b", "-mine", "mine-",
                "192.168.0.1", "xn--mine", "mine-s3alias", "mine--x-s3", "YOUR+BUCKET", "",
            )
        ),
        *(
            ("registry", registry, "is no registry: give its host")
            for registry in ("https://ghcr.io/me", "ghcr.io/me/", "ghcr.io/me:1", "Ghcr.io", "")
        ),
        *(
            ("region", region, "is no region of AWS; give one such as eu-central-1")
            for region in ("Frankfurt", "eu-central", "us-west-2a", "")
        ),
        *(
            ("account", account, "is no account of AWS; give its twelve digits")
            for account in ("1234", "1234-5678-9012", "x" * 12)
        ),
        *(
            ("tag", tag, "is no tag of an image: give 1 to 124 of a-z")
            for tag in ("", "-cpu", ".1", "a" * 125, "v1+2", "mine:1", "a b", "1\n")
        ),
        ("out", "s3://mine/files", "must be a folder of this machine"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_are_refused_before_anything_is_written(
    key: str, value: str, told: str, tmp_path: Path
) -> None:
    names = OWN | {"out": str(tmp_path / "files"), key: value}
    with pytest.raises(ConfigError, match=told) as refused:
        write_config(**names)
    assert f"{key}={value!r}" in str(refused.value)
    assert [*tmp_path.iterdir()] == []


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for out in (tmp_path, tmp_path / "notes"):
        with pytest.raises(ConfigError, match="is there and not an empty folder; give a new one"):
            write_config(**OWN, out=str(out))
    assert [one.read_text() for one in tmp_path.iterdir()] == ["mine"]


def test_an_installed_package_says_where_the_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "CHECKOUT", tmp_path)
    with pytest.raises(
        ConfigError, match=r"do not travel .* clone ddray's repository, `make setup`"
    ):
        write_config(**OWN, out=str(tmp_path / "files"))
    assert [*tmp_path.iterdir()] == []


def test_the_command_prints_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [word for key, value in OWN.items() for word in (f"--{key}", value)]
    out = str(tmp_path / "files")
    assert main(["cluster", "config", *flags, "--out", out, "--tag", "second"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["out"] == out and told["image"].endswith("/ddray:second")
    assert main(["cluster", "config", *flags, "--out", out]) == 2
    assert "is there and not an empty folder" in capsys.readouterr().err
    assert main(["cluster", "config", *flags]) == 2
    assert "--out; see ddray cluster config --help" in capsys.readouterr().err
