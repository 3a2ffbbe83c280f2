"""The files that clusters are made of, with a user's own names in them.

They lie beside the package in a checkout and name a bucket, a registry, a region and an account
that are nobody's. A copy is written: the checkout stays as it is, and can be updated.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ddray
from ddray.errors import ConfigError
from ddray.locations import absolute

CHECKOUT = Path(ddray.__file__).resolve().parents[1]
# What names a bucket, a registry or a region: the files of clusters, and the configs of jobs.
PARTS = ("ray-cluster.yaml", "cluster", "jobs")
BUCKET = "YOUR+BUCKET"
REGISTRY = "registry.example.com"
REGION = "us-west-2"
ACCOUNTS = ("123456789012", "000000000000")
IMAGE = f"ddray:{ddray.__version__}"
"""As every file calls it, behind a registry or without one; the variant for CPUs adds -cpu."""

# Names of S3, and of services like it: https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
_BUCKET = re.compile(
    r"(?!xn--|sthree-|amzn-s3-demo-)(?!\d+\.\d+\.\d+\.\d+$)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
)
_RESERVED_ENDINGS = ("-s3alias", "--ol-s3", ".mrap", "--x-s3", "--table-s3")
_REGISTRY = re.compile(r"[a-z0-9][a-z0-9.-]*[a-z0-9](:\d+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*")
# Of OCI's distribution, whose tags have at most 128 characters, less those of -cpu.
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,123}")
_REGION = re.compile(r"[a-z]{2,4}(-[a-z]+)+-\d+")
_OF_AMAZON = re.compile(r"(\d{12})\.dkr\.ecr\.")


def write_config(
    bucket: str,
    registry: str,
    region: str,
    out: str,
    account: str | None = None,
    tag: str = ddray.__version__,
) -> dict[str, Any]:
    """Write a copy of the files of clusters and jobs, with the names of a user in them.

    Args:
        bucket: Name of a bucket of S3, or of a service like it, without `s3://`.
        registry: Where images are pushed to, with or without the `/ddray` that they are called.
        region: Of AWS, such as eu-central-1.
        out: Folder to write, which is not there or empty.
        account: Twelve digits; None = that of the registry, if it is Amazon's. Without any, service
            accounts of Kubernetes name no role.
        tag: Of the images; -cpu is added for the variant without a GPU.

    Returns:
        What was written: `out`, `files` (their number), `image`, `bucket` (its URI), `region` and
        `account`.

    Raises:
        ConfigError: If a name cannot be one, the folder holds something, or ddray is installed
            without the files.
    """
    registry = registry.removesuffix("/ddray")
    account = account or (found[1] if (found := _OF_AMAZON.match(registry)) else None)
    _check_names(bucket, registry, region, account, tag)
    folder = _empty_folder(out)
    names = {BUCKET: bucket, REGISTRY: registry, REGION: region, IMAGE: f"ddray:{tag}"}
    names |= dict.fromkeys(ACCOUNTS, account) if account else {}
    files = list(_files())
    for path in files:
        copy = folder / path.relative_to(CHECKOUT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(_renamed(path.read_text("utf-8"), names), "utf-8")
    return {
        "out": str(folder),
        "files": len(files),
        "image": f"{registry}/ddray:{tag}",
        "bucket": f"s3://{bucket}",
        "region": region,
        "account": account,
    }


def _renamed(text: str, names: dict[str, str]) -> str:
    if not names.keys() >= {*ACCOUNTS}:
        # Such a line says which role a service account has.
        lines = text.splitlines(keepends=True)
        text = "".join(line for line in lines if not any(one in line for one in ACCOUNTS))
    # At once, since a name may hold a placeholder: a bucket is often called after its region.
    placeholders = re.compile("|".join(map(re.escape, names)))
    return placeholders.sub(lambda found: names[found[0]], text)


def _check_names(bucket: str, registry: str, region: str, account: str | None, tag: str) -> None:
    if not _BUCKET.fullmatch(bucket) or ".." in bucket or bucket.endswith(_RESERVED_ENDINGS):
        raise ConfigError(
            f"bucket={bucket!r} is no name of a bucket: give 3 to 63 of a-z, 0-9, '-' and '.', as "
            "S3 has it, without s3://"
        )
    if not _REGISTRY.fullmatch(registry):
        raise ConfigError(
            f"registry={registry!r} is no registry: give its host and what else goes before /ddray "
            "in the name of an image, such as ghcr.io/me, without https:// and without a tag"
        )
    if not _REGION.fullmatch(region):
        raise ConfigError(f"region={region!r} is no region of AWS; give one such as eu-central-1")
    if account is not None and not re.fullmatch(r"\d{12}", account):
        raise ConfigError(f"account={account!r} is no account of AWS; give its twelve digits")
    if not _TAG.fullmatch(tag):
        raise ConfigError(
            f"tag={tag!r} is no tag of an image: give 1 to 124 of a-z, A-Z, 0-9, '_', '.' and '-', "
            "not beginning with '.' or '-'"
        )


def _empty_folder(out: str) -> Path:
    where = absolute(out)
    if where.startswith("s3://"):
        raise ConfigError(f"out={out!r} must be a folder of this machine: `ray up` reads it there")
    folder = Path(where)
    if folder.is_dir() and not any(folder.iterdir()):
        return folder
    if folder.exists():
        raise ConfigError(f"out={out!r} is there and not an empty folder; give a new one")
    return folder


def _files() -> Iterator[Path]:
    for part in PARTS:
        top = CHECKOUT / part
        if not top.exists():
            raise ConfigError(
                f"the files of clusters do not travel with the installed package: there is no "
                f"{top}; clone ddray's repository, `make setup` there, and take its .venv/bin/ddray"
            )
        paths = sorted(top.rglob("*")) if top.is_dir() else [top]
        yield from (one for one in paths if one.is_file() and "__pycache__" not in one.parts)
