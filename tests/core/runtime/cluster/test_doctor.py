"""What the doctor says without a cluster."""

import pytest

from ddray.runtime.cluster.doctor import _readable_token


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o604])
def test_a_token_that_others_can_read_is_told_of(mode, tmp_path, monkeypatch):
    file = tmp_path / "auth_token"
    file.write_text("secret")
    file.chmod(mode)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert _readable_token() == ""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    told = f"others on this machine can read {file}, and then run code as you: chmod 600"
    assert _readable_token() == (told if mode != 0o600 else "")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    assert _readable_token() == ""
