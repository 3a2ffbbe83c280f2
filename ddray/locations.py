"""Where things lie: one spelling of a path or URI, which means the same in every process.

Workers run in other folders than the command that started them, YAML and quotes keep `~` from the
shell, and two spellings of one folder must not make two runs of it.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

from ddray.errors import ConfigError

HUB = "hf://"
S3 = "s3://"
_FILE = "file://"
BUNDLED = Path(__file__).parent / "models" / "bundled"
_FORMS = "give a path, file:///path or s3://bucket/prefix"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
# Without a slash it may be the name of a file, but hardly is.
_KNOWN_SCHEME = re.compile(r"(s3[an]?|file):(/*)(.*)", re.IGNORECASE | re.DOTALL)
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def absolute(location: str | os.PathLike[str]) -> str:
    """A location in the one spelling that ddray keeps, whatever it was spelled like.

    Args:
        location: A path, relative to the current folder or with `~`; `file:///path`, in which
            %20 is a space; or `s3://bucket/prefix`, in which nothing is escaped.

    Returns:
        An absolute path, or the s3 URI; without a slash at the end, or `.` and `..` inside.

    Raises:
        ConfigError: If it is empty, malformed or of another scheme, with what to write.
    """
    text = os.fsdecode(location)
    if text.startswith(S3):
        return _checked_s3(text)
    path, problem = text, _problem(text)
    if not problem and text.startswith(_FILE):
        path, problem = _path_of(text)
    problem = problem or _unprintable(path)
    if not problem and path.startswith("~"):
        path, problem = _at_home(path)
    if problem:
        raise ConfigError(f"uri {text!r} {problem}" if text else f"uri {problem}")
    return _from_the_root(path)


def model_location(model: str | os.PathLike[str]) -> str:
    """A model's folder as `absolute` has it; the name of a model as it is.

    A word without a slash is a folder if there is one and no bundled model of the name.

    Raises:
        ConfigError: As `absolute`.
    """
    text = os.fsdecode(model)
    is_path = "/" in text or text.startswith(("~", ".")) or not text.strip()
    if is_path and not text.startswith(HUB):
        return absolute(text)
    return absolute(text) if os.path.isdir(text) and not is_bundled(text) else text


def hub_location(source: str | os.PathLike[str]) -> str:
    """A folder as `absolute` has it; `owner/name` of the Hugging Face Hub as it is.

    Raises:
        ConfigError: As `absolute`.
    """
    text = os.fsdecode(source)
    is_path = text.startswith(("/", "~", ".", _FILE)) or not text.strip()
    return absolute(text) if is_path or os.path.isdir(text) else text


def local_file(path: str | os.PathLike[str]) -> str:
    """A file of this machine, or of a file system that all machines share, as `absolute` has it.

    Raises:
        ConfigError: As `absolute`, and for one on S3.
    """
    file = absolute(path)
    if file.startswith(S3):
        raise ConfigError(f"uri {file!r} must be a file on disk; copy it to one, and give its path")
    return file


def is_bundled(name: str) -> bool:
    """Whether a name is that of a model inside the package."""
    is_word = name and "/" not in name and not name.startswith(".")
    return bool(is_word) and (BUNDLED / name / "tokenizer.safetensors").is_file()


def same_place(earlier: object, now: object) -> bool:
    """Whether two values of a setting are one location.

    Args:
        earlier: As an earlier run wrote it, perhaps relative to a folder that nobody knows now.
        now: As `absolute` gives it.
    """
    if not isinstance(earlier, str) or not isinstance(now, str) or not now.startswith(("/", S3)):
        return False
    try:
        place = absolute(earlier)
    except ConfigError:
        return False
    relative = not (earlier.startswith(("/", "~", S3, _FILE)) or is_bundled(earlier))
    ends_alike = relative and f"{now}/".endswith(f"/{os.path.normpath(earlier)}/")
    return now == place or ends_alike or os.path.realpath(place) == os.path.realpath(now)


def _problem(text: str) -> str | None:
    """What is wrong with a location that is no s3 URI, seen before anything is taken apart."""
    if not text.strip():
        return f"is empty; {_FORMS}"
    if _WINDOWS.match(text):
        return "is a path of Windows; give the path that this machine has for it, as /data/set"
    known = _KNOWN_SCHEME.match(text)
    if known and not text.startswith(_FILE):
        is_file, is_relative, rest = known[1].lower() == "file", not known[2], known[3]
        form = f"{S3}{rest}" if not is_file else rest if is_relative else f"{_FILE}/{rest}"
        or_path = f", or {'./' + text!r} for a path of that name" if is_relative else ""
        return f"has the scheme {known[1]!r} in a form that is not read; write {form!r}{or_path}"
    scheme = _SCHEME.match(text)
    if scheme and not text.startswith(_FILE):
        return f"has the scheme {scheme[1]!r}; {_FORMS}"
    return None


def _path_of(uri: str) -> tuple[str, str | None]:
    """The path that a file URI names, and what is wrong with it."""
    path = uri.removeprefix(_FILE).removeprefix("localhost")
    if not path.startswith("/"):
        return path, "names a host or a relative path; use file:///path"
    return os.fsdecode(unquote_to_bytes(path)), None


def _unprintable(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is no UTF-8 text; rename what it names"
    control = next((letter for letter in text if ord(letter) < 32 or ord(letter) == 127), None)
    return control and f"holds {control!r}, which no location may; check quotes and line ends"


def _at_home(path: str) -> tuple[str, str | None]:
    expanded = os.path.expanduser(path)
    if expanded != path:
        return expanded, None
    user = path.partition("/")[0].removeprefix("~")
    why = f"there is no user {user!r} here" if user else "this user has no home folder"
    return path, f"cannot be found: {why}; write './{path}' for a path of that name"


def _from_the_root(path: str) -> str:
    """A path without `.` and `..`: unlike os.path.abspath, what is above a link is its target's."""
    try:
        place = "/" if path.startswith("/") else os.getcwd()
    except FileNotFoundError:
        raise ConfigError(
            f"uri {path!r} is relative to the current folder, which is no longer there; "
            "give a full path"
        ) from None
    for part in path.split("/"):
        if part == "..":
            place = os.path.dirname(os.path.realpath(place) if os.path.islink(place) else place)
        elif part not in ("", "."):
            place = os.path.join(place, part)
    return place


def _checked_s3(uri: str) -> str:
    bucket, _, rest = uri.removeprefix(S3).partition("/")
    prefix = rest.strip("/")
    if "@" in bucket:
        # The URI is not repeated: it may hold a secret.
        raise ConfigError(
            "an s3 uri holds credentials; give them by AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, and s3://bucket/prefix as the uri"
        )
    problem = _unprintable(uri)
    if not bucket or "?" in uri:
        problem = "is not s3://bucket/prefix; an endpoint goes into AWS_ENDPOINT_URL"
    elif prefix and any(part in ("", ".", "..") for part in prefix.split("/")):
        problem = "has an empty part, '.' or '..' in its key; write it without, as s3://bucket/a/b"
    if problem:
        raise ConfigError(f"uri {uri!r} {problem}")
    return f"{S3}{bucket}/{prefix}".rstrip("/")
