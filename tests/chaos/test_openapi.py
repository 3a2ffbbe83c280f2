"""The schema of the real `ddray serve`, checked by Schemathesis against what the service does."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.service import Service
from tests.patience import PATIENCE_S

pytest.importorskip("schemathesis", reason="needs schemathesis")
pytestmark = pytest.mark.chaos

KEY = "a-key-of-the-tests-0123"


@pytest.fixture(scope="module")
def service(serve: Callable[..., Service], tmp_path_factory: pytest.TempPathFactory) -> Service:
    """With a key, so that it is seen whether it is asked for where the schema says."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    return serve("--api-keys-file", str(keys))


@pytest.mark.parametrize(
    ("examples", "least"), [pytest.param(10, 150, marks=pytest.mark.smoke), (1200, 5000)]
)
def test_the_schema_is_true(service: Service, tmp_path: Path, examples: int, least: int) -> None:
    """No 5xx, nothing undocumented, nothing valid refused, nothing invalid taken."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json"]
    options = ["--checks", "all", "--max-examples", str(examples), "--seed", "1", "--workers", "2"]
    waits = ["--request-timeout", str(PATIENCE_S), "--header", f"Authorization: Bearer {KEY}"]
    done = subprocess.run(
        [*command, *options, *waits, "--no-color"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-6000:]
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert found is not None
    assert found[1] == found[2]
    assert int(found[1]) >= least
