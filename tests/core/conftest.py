"""Shared by the core tests."""

from collections.abc import Iterator

import pytest
import torch

from tests.s3_server import s3_environment, s3_server

# On tiny tensors a second thread only waits for a busy core.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """A real S3 service on loopback, to which the environment points."""
    with s3_server() as endpoint, pytest.MonkeyPatch.context() as environment:
        for name, value in s3_environment(endpoint).items():
            environment.setenv(name, value)
        yield endpoint
