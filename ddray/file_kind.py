"""What a file is by its first bytes, for messages about one that is not what its name says.

A clone without large files, a login page saved under the name of the weights, a download that was
cut: each is told in the words of what it is, with what to do. Readers ask when theirs has failed.
"""

import codecs
import io
import json
import re
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ddray.errors import one_line

# Of a text, what the message shows.
_SHOWN = 40
_HEAD_BYTES = 4096
# A protocol's number, or how protocol 0 begins, which is text.
_PICKLE = re.compile(rb"\x80[\1-\5]|c[A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n|\([dl]p\d+\n")
PICKLE = "a pickle of Python"


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    Attributes:
        name: with its article, such as "a git-lfs pointer".
        advice: what to do about it.
    """

    name: str
    advice: str


_ANOTHER = "give another file"
_DOWNLOAD = "download or copy it again"
_UNPACK = "unpack it first"

# What files begin with. The longer of two that share a beginning comes first.
_BEGINNINGS: Sequence[tuple[bytes, str, str]] = (
    (b"version https://git-lfs.github.com/", "a git-lfs pointer", "run `git lfs pull` where it is"),
    (b"# xet version", "a git-xet pointer", "fetch the file itself, by the Hub's own client"),
    (b"/annex/objects/", "a git-annex pointer", "run `git annex get` where it is"),
    (b"\x1f\x8b", "gzip data", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "zstd data", _UNPACK),
    (b"\xfd7zXZ\0", "xz data", _UNPACK),
    (b"BZh91AY&SY", "bzip2 data", _UNPACK),
    (b"\x04\x22\x4d\x18", "lz4 data", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes", _ANOTHER),
    (b"GGUF", "a GGUF file, as llama.cpp reads", _ANOTHER),
    (b"\x93NUMPY", "a NumPy array (.npy)", _ANOTHER),
    (b"PAR1", "a Parquet file", _ANOTHER),
    (b"ARROW1", "an Arrow file", "write it as Parquet"),
    (b"Obj\x01", "an Avro file", "write it as Parquet"),
    (b"ORC", "an ORC file", "write it as Parquet"),
    (b"SQLite format 3\0", "an SQLite database", _ANOTHER),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", _ANOTHER),
    (b"\xff\xd8\xff", "a JPEG image", _ANOTHER),
    (b"GIF8", "a GIF image", _ANOTHER),
    (b"RIFF", "a RIFF file, such as WebP", _ANOTHER),
    (b"%PDF-", "a PDF document", _ANOTHER),
    (b"\x7fELF", "a program", _ANOTHER),
    (b"MZ\x90\0", "a program of Windows", _ANOTHER),
    (b"\xd0\xcf\x11\xe0", "a document of an old Microsoft Office", _ANOTHER),
    (b"\0\x05\x16\x07", "what macOS keeps beside a file (._NAME)", "give the file NAME itself"),
    (b"Salted__", "encrypted by openssl", "decrypt it first"),
    (b"age-encryption.org/", "encrypted by age", "decrypt it first"),
    (b"-----BEGIN PGP", "encrypted or signed by PGP", "decrypt it first"),
    (codecs.BOM_UTF32_LE, "text in UTF-32", "save it as UTF-8"),
    (codecs.BOM_UTF16_LE, "text in UTF-16", "save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "text in UTF-16", "save it as UTF-8"),
)

# Of archives in zip's format: a name in it, and what such an archive is.
_IN_ZIP: Sequence[tuple[str, str, str]] = (
    (
        r"(^|/)constants\.pkl$",
        "a TorchScript archive, which holds code",
        "where you trust it, save torch.jit.load(FILE).state_dict() by torch.save",
    ),
    (r"(^|/)data\.pkl$", "a PyTorch checkpoint", "give it a name that ends in .pt"),
    (r"^\[Content_Types\]\.xml$", "a document of Microsoft Office", _ANOTHER),
    (r"^mimetype$", "a document of OpenOffice, or an e-book", _ANOTHER),
    (r"\.weights\.h5$|^saved_model\.pb$", "a model of Keras", _ANOTHER),
    (r"\.npy$", "a NumPy archive (.npz)", _ANOTHER),
    (r"^META-INF/|^AndroidManifest", "an archive of Java", _ANOTHER),
    (r"\.dist-info/", "a Python wheel", _ANOTHER),
)


def kind_of(source: bytes | str | Path) -> FileKind | None:
    """What a file is; None if that cannot be told.

    Args:
        source: its content, or the beginning of it, or where it lies.
    """
    if isinstance(source, bytes):
        return _kind(source[:_HEAD_BYTES], lambda: io.BytesIO(source))
    try:
        with open(source, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except (OSError, ValueError):
        return None
    return _kind(head, lambda: open(source, "rb"))


def explained(
    refusal: str, source: bytes | str | Path, problem: object = "", expected: str = ""
) -> str:
    """The refusal of a file, with what it is instead, or else with what its reader said.

    Args:
        refusal: such as "weights.pt is damaged or no PyTorch checkpoint".
        source: as for `kind_of`.
        problem: what the reader said.
        expected: a part of the name of the kind that it should be, which explains nothing.
    """
    kind = kind_of(source)
    if kind is not None and not (expected and expected in kind.name):
        return f"{refusal}: it is {kind.name}; {kind.advice}"
    said = one_line(problem) if isinstance(problem, BaseException) else str(problem)
    return f"{refusal}: {said}" if said else refusal


def json_value(data: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: for whatever is none, and for one that is nested too deep.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins as safetensors do: the header's length, and its first brace."""
    return len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 10**8


def _kind(head: bytes, opened: Callable[[], IO[bytes]]) -> FileKind | None:
    if not head:
        return FileKind("empty", _DOWNLOAD)
    if not any(head):
        return FileKind("nothing but zero bytes", _DOWNLOAD)
    for beginning, name, advice in _BEGINNINGS:
        if head.startswith(beginning):
            return FileKind(name, advice)
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return _kind_of_zip(opened)
    if head[257:262] == b"ustar":
        return FileKind("a tar archive", _UNPACK)
    if is_safetensors(head):
        return FileKind("a safetensors file", "give it a name that ends in .safetensors")
    if _PICKLE.match(head):
        return FileKind(PICKLE, "save the weights by torch.save, or as safetensors")
    return _kind_of_text(head)


def _kind_of_zip(opened: Callable[[], IO[bytes]]) -> FileKind | None:
    try:
        with opened() as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # one flipped bit makes zipfile fail in any way
        return FileKind(
            "a zip archive, as PyTorch writes, whose end is missing or damaged", _DOWNLOAD
        )
    for pattern, name, advice in _IN_ZIP:
        if any(re.search(pattern, inside) for inside in names):
            return FileKind(name, advice)
    inside = f" ({one_line(ValueError(names[0]))[:_SHOWN]} ...)" if names else ""
    return FileKind(f"a zip archive of something else{inside}", _UNPACK)


def _kind_of_text(head: bytes) -> FileKind | None:
    text = _as_text(head)
    if text is None:
        return None
    start = text.lstrip("\ufeff \t\r\n")
    lower = start.lower()
    if lower.startswith(("<!doctype html", "<html", "<head", "<body")) or "<html" in lower:
        return FileKind(
            "an HTML page, such as a login or an error",
            "open its address in a browser to see, then download the file itself",
        )
    if lower.startswith(("<?xml", "<error")):
        code = re.search(r"<Code>([^<]*)</Code>", start)
        said = f" that says {code[1]}" if code else ""
        return FileKind(f"an XML document{said}", _DOWNLOAD)
    if start.startswith(("{", "[")):
        return FileKind(
            f"JSON text ({_shown(start)})", "if a server has sent an error, download it again"
        )
    if re.match(r"outs:\s*-\s+(md5|hash)", start):
        return FileKind("a DVC pointer", "run `dvc pull` where it is")
    return FileKind(f"text ({_shown(start)})", _ANOTHER)


def _as_text(head: bytes) -> str | None:
    """Text in UTF-8, of which the last character may be cut; None if it is not."""
    text = None
    with suppress(UnicodeDecodeError):
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    printable = text is not None and all(c.isprintable() or c in "\t\r\n\f\ufeff" for c in text)
    return text if printable else None


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
