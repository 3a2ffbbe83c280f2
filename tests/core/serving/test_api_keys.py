"""Which keys open the service, and that no message repeats one."""

from pathlib import Path

import pytest

from ddray.errors import ConfigError
from ddray.serving.api_keys import VARIABLE, is_known, read_keys

FIRST, SECOND = "first-key-of-24-letters!", "0123456789abcdef"


@pytest.fixture(autouse=True)
def no_keys_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def _file(folder: Path, text: str) -> str:
    file = folder / "keys"
    file.write_text(text)
    return str(file)


def _digests(*keys: str) -> tuple[str, ...]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(VARIABLE, ",".join(keys))
        return read_keys(None)


def test_without_keys_the_service_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_keys(None) == ()
    monkeypatch.setenv(VARIABLE, " ")
    assert read_keys(None) == ()


def test_each_key_of_a_file_or_of_the_variable_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, f" {FIRST},{SECOND}\n")
    digests = read_keys(_file(tmp_path, f"{FIRST}\n\n  {SECOND}\r\n"))
    assert digests == read_keys(None)
    assert len(set(digests)) == 2
    for key in (FIRST, SECOND):
        assert is_known(f"Bearer {key}", digests)
        assert is_known(f"bearer  {key} ", digests)


def test_a_file_goes_before_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, FIRST)
    assert not is_known(f"Bearer {FIRST}", read_keys(_file(tmp_path, SECOND)))


def test_only_digests_are_kept(tmp_path: Path) -> None:
    (digest,) = read_keys(_file(tmp_path, FIRST))
    assert len(digest) == 64
    assert FIRST not in digest
    assert not is_known(f"Bearer {digest}", [digest])


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        FIRST,
        f"Basic {FIRST}",
        f"Bearer{FIRST}",
        f"Bearer {FIRST[:-1]}",
        f"Bearer {FIRST}x",
        f"Bearer {FIRST.upper()}",
        f"Bearer {FIRST},{SECOND}",
        "Bearer \udcff\u00e9",
    ],
)
def test_whatever_is_no_key_opens_nothing(header: str) -> None:
    digests = _digests(FIRST, SECOND)
    assert not is_known(header, digests)
    assert not is_known(f"Bearer {FIRST}", ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "keys holds no key; write one a line"),
        (" \n\n", "keys holds no key"),
        (f"{FIRST}\nsecret-of-15-ab\n", "key 2 in .*keys must have at least 16 characters"),
        ("secret-with-umlaut-ü", "all of them printable ASCII"),
    ],
)
def test_keys_that_cannot_be_used_are_refused_and_not_repeated(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        read_keys(_file(tmp_path, text))
    assert "secret" not in str(refusal.value)
    assert FIRST not in str(refusal.value)


def test_a_short_key_in_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "secret")
    with pytest.raises(ConfigError, match=f"key 1 in {VARIABLE} must have") as refusal:
        read_keys(None)
    assert "secret" not in str(refusal.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="api_keys_file=.*absent cannot be read: "):
        read_keys(str(tmp_path / "absent"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe secret")
    with pytest.raises(ConfigError, match="api_keys_file=.*binary cannot be read: "):
        read_keys(str(tmp_path / "binary"))
