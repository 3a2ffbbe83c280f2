"""Shared by the core tests."""

import gc
import os
import re
from collections.abc import Iterator

import pytest

from tests.s3_server import s3_environment, s3_server

# On tiny tensors a second thread only waits for a busy core. By the environment, so that the
# process that only deals the tests out need not load torch to say so.
os.environ["OMP_NUM_THREADS"] = "1"
# What torch and matplotlib consist of is no garbage; looking through it was 6 % of the tier.
gc.set_threshold(100_000, 50, 50)


@pytest.hookimpl(tryfirst=True)  # before -m picks
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """What asks a server runs beside the tests that wait anyway."""
    for item in items:
        # Either by the fixture, or as one of the places that a test goes through.
        if "s3_service" in item.fixturenames or "s3" in re.split(r"\W", item.name):
            item.add_marker("slow")


@pytest.fixture(scope="session")
def s3_service() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def s3_endpoint(s3_service: str) -> Iterator[str]:
    """A real S3 service on loopback, to which the environment points."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in s3_environment(s3_service).items():
            environment.setenv(name, value)
        yield s3_service
