"""Shared by all tiers: what Ray needs to know in tests, and the one local Ray of the ray tier."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest

# Read when ray is first imported, which any test module may do: hence here and not in the fixture.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_worker_niceness"] = "0"  # Ray's default, 15, starves the workers on a busy machine
os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"  # by default a run ends up to 2 s late
os.environ.pop("RAY_ADDRESS", None)  # never a cluster that happens to run
# A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """Start one small Ray at its first use; it serves the whole session."""
    import ray

    from ddray.runtime.cluster.connection import start_here

    # Not tmp_path: below it, the names of Ray's sockets would pass the 107 bytes that Linux allows.
    temp_dir = tempfile.mkdtemp(prefix="ddr", dir="/tmp")
    try:
        start_here(
            temp_dir,
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=120 * 2**20,
            logging_level="error",
            log_to_driver=False,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(temp_dir, ignore_errors=True)
