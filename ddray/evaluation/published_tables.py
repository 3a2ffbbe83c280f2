"""What others report of the models that the catalog knows: facts of their tables, as data.

A row is only comparable with rows of the same protocol. Seconds are those of the authors' hardware,
which neither paper of the students names beside them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ddray.models.catalog import PUBLISHED
from ddray.models.var_vq import PATCH_NUMS_256

_README = "ADM's evaluator, 50,000 images"
_PYTORCH_FID = "pytorch-fid, 50,000 images, random labels"
_LAION = "prompts of LAION-COCO"

_VAR = ("VAR's README", _README + ", 50 a class; cfg 1.5, top_k 900, top_p 0.96")
_LLAMAGEN = ("LlamaGen's README", _README)
_DD = ("arXiv 2412.17153, table 1", _PYTORCH_FID)
_DD_TEACHER_PART = ("arXiv 2412.17153, table 2", _PYTORCH_FID)
_DD_TEXT = ("arXiv 2412.17153, table 3", _LAION)
_DD2 = ("arXiv 2510.21003", _PYTORCH_FID)


class _Row(NamedTuple):
    """One line of a table; None where the table has no figure."""

    origin: tuple[str, str]  # source, protocol
    kind: str
    generator: str
    steps: int
    fid: float
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    seconds_per_image: float | None = None


# Of another model altogether, quoted by Distilled Decoding for all of its models of classes.
_MASKED = _Row(_DD, "masked", "MaskGIT, 8 steps", 8, 6.18, 182.1, 0.80, 0.51, 0.5)

# By the teacher's name in the catalog. "(DD)" and "(DD2)" mark a teacher as its students' papers
# measured it, which agree neither with its own nor with each other.
_TABLES: dict[str, tuple[_Row, ...]] = {
    "var-d16": (
        _Row(_VAR, "teacher", "VAR-d16", 10, 3.55),
        _Row(_DD, "teacher", "VAR-d16 (DD)", 10, 4.19, 230.2, 0.84, 0.48, 0.133),
        _Row(_DD2, "teacher", "VAR-d16 (DD2)", 10, 4.15, 278.7, 0.85, 0.41),
        _Row(_DD, "student", "VAR-d16-DD, 1 step", 1, 9.94, 193.6, 0.80, 0.37, 0.021),
        _Row(_DD, "student", "VAR-d16-DD, 2 steps", 2, 7.82, 197.0, 0.80, 0.41, 0.036),
        _Row(_DD_TEACHER_PART, "student", "VAR-d16-DD, 3 steps", 3, 6.54, 210.8, 0.83, 0.42, 0.045),
        _Row(_DD_TEACHER_PART, "student", "VAR-d16-DD, 4 steps", 4, 5.47, 230.5, 0.84, 0.43, 0.062),
        _Row(_DD_TEACHER_PART, "student", "VAR-d16-DD, 6 steps", 6, 5.03, 242.8, 0.84, 0.45, 0.090),
        _Row(_DD2, "student", "VAR-d16-DD2, 1 step", 1, 6.21, 213.0, 0.84, 0.39, 0.019),
        _Row(_DD2, "student", "VAR-d16-DD2, 3 steps, teacher last", 3, 5.24, 238.9),
        _Row(_DD2, "student", "VAR-d16-DD2, 4 steps, teacher last", 4, 4.88, 248.7),
        _Row(_DD2, "student", "VAR-d16-DD2, 6 steps, teacher last", 6, 4.47, 277.8),
        _Row(_DD, "skip", "VAR-d16, skip-1", 9, 9.52, 178.9, 0.68, 0.54, 0.113),
        _Row(_DD, "skip", "VAR-d16, skip-2", 8, 40.09, 56.8, 0.46, 0.50, 0.098),
        _Row(_DD, "independent", "VAR-d16, onestep*", 1, 157.5),
        _MASKED,
    ),
    "var-d20": (
        _Row(_VAR, "teacher", "VAR-d20", 10, 2.95),
        _Row(_DD, "teacher", "VAR-d20 (DD)", 10, 3.35, 301.4, 0.84, 0.51),
        _Row(_DD2, "teacher", "VAR-d20 (DD2)", 10, 3.40, 305.1, 0.84, 0.47, 0.184),
        _Row(_DD, "student", "VAR-d20-DD, 1 step", 1, 9.55, 197.2, 0.78, 0.38, 0.027),
        _Row(_DD, "student", "VAR-d20-DD, 2 steps", 2, 7.33, 204.5, 0.82, 0.40, 0.047),
        _Row(_DD2, "student", "VAR-d20-DD2, 1 step", 1, 5.43, 233.7, 0.85, 0.41, 0.023),
        _MASKED,
    ),
    "var-d24": (
        _Row(_VAR, "teacher", "VAR-d24", 10, 2.33),
        _Row(_DD, "teacher", "VAR-d24 (DD)", 10, 2.51, 312.2, 0.82, 0.53),
        _Row(_DD2, "teacher", "VAR-d24 (DD2)", 10, 2.86, 312.9, 0.82, 0.51, 0.251),
        _Row(_DD, "student", "VAR-d24-DD, 1 step", 1, 8.92, 202.8, 0.78, 0.39, 0.034),
        _Row(_DD, "student", "VAR-d24-DD, 2 steps", 2, 6.95, 222.5, 0.83, 0.43, 0.059),
        _Row(_DD2, "student", "VAR-d24-DD2, 1 step", 1, 5.06, 254.7, 0.85, 0.39, 0.031),
        _Row(_DD2, "student", "VAR-d24-DD2, 1 step, trained longer", 1, 4.91, 282.2),
        _MASKED,
    ),
    "var-d30": (_Row(_VAR, "teacher", "VAR-d30", 10, 1.97), _MASKED),
    "var-d36": (_Row(("VAR's README", "not stated; 512 pixels"), "teacher", "VAR-d36", 10, 2.63),),
    "llamagen-b-256": (
        _Row(_LLAMAGEN, "teacher", "LlamaGen-B", 256, 5.46),
        _Row(_DD, "teacher", "LlamaGen-B (DD)", 256, 5.42, 193.5, 0.83, 0.44),
        _Row(_DD, "student", "LlamaGen-B-DD, 1 step", 1, 15.50, 135.4, 0.76, 0.26),
        _Row(_DD, "student", "LlamaGen-B-DD, 2 steps", 2, 11.17, 154.8, 0.80, 0.31),
        _MASKED,
    ),
    "llamagen-l-256": (
        _Row(_LLAMAGEN, "teacher", "LlamaGen-L", 256, 3.80),
        _Row(_DD, "teacher", "LlamaGen-L (DD)", 256, 4.11, 283.5, 0.85, 0.48, 5.01),
        _Row(_DD, "student", "LlamaGen-L-DD, 1 step", 1, 11.35, 193.6, 0.81, 0.30, 0.023),
        _Row(_DD, "student", "LlamaGen-L-DD, 2 steps", 2, 7.58, 237.5, 0.84, 0.37, 0.043),
        _Row(
            _DD_TEACHER_PART,
            "student",
            "LlamaGen-L-DD, 22 steps",
            22,
            6.76,
            231.4,
            0.83,
            0.40,
            0.447,
        ),
        _Row(
            _DD_TEACHER_PART,
            "student",
            "LlamaGen-L-DD, 42 steps",
            42,
            6.20,
            233.8,
            0.83,
            0.41,
            0.880,
        ),
        _Row(
            _DD_TEACHER_PART,
            "student",
            "LlamaGen-L-DD, 81 steps",
            81,
            5.71,
            238.6,
            0.83,
            0.43,
            1.725,
        ),
        _Row(_DD2, "student", "LlamaGen-L-DD2, 1 step", 1, 8.59, 229.1, 0.77, 0.32, 0.021),
        _Row(_DD2, "student", "LlamaGen-L-DD2, 1 step, trained longer", 1, 7.58, 238.7, 0.77, 0.34),
        _Row(_DD, "skip", "LlamaGen-L, skip-106", 150, 19.14, 80.39, 0.42, 0.43, 2.94),
        _Row(_DD, "skip", "LlamaGen-L, skip-156", 100, 80.72, 12.13, 0.17, 0.20, 1.95),
        _Row(_DD, "independent", "LlamaGen-L, onestep*", 1, 220.2),
        _MASKED,
    ),
    "llamagen-b-384": (_Row(_LLAMAGEN, "teacher", "LlamaGen-B-384", 576, 6.09),),
    "llamagen-l-384": (_Row(_LLAMAGEN, "teacher", "LlamaGen-L-384", 576, 3.07),),
    "llamagen-xl-384": (_Row(_LLAMAGEN, "teacher", "LlamaGen-XL-384", 576, 2.62),),
    "llamagen-xxl-384": (_Row(_LLAMAGEN, "teacher", "LlamaGen-XXL-384", 576, 2.34),),
    "llamagen-3b-384": (_Row(_LLAMAGEN, "teacher", "LlamaGen-3B-384", 576, 2.18),),
    "llamagen-t2i-xl-256": (
        _Row(_DD_TEXT, "teacher", "LlamaGen-t2i (DD)", 256, 25.70, seconds_per_image=7.90),
        _Row(_DD_TEXT, "student", "LlamaGen-t2i-DD, 1 step", 1, 36.09, seconds_per_image=0.052),
        _Row(_DD_TEXT, "student", "LlamaGen-t2i-DD, 2 steps", 2, 28.95, seconds_per_image=0.085),
    ),
}

# What tells one model of a family from another, with the value of a config that is silent.
_SIZES: dict[str, dict[str, Any]] = {
    "var": {
        "depth": None,
        "embed_dim": 0,
        "num_classes": 1000,
        "shared_aln": False,
        "patch_nums": PATCH_NUMS_256,
    },
    "llamagen": {
        "dim": None,
        "n_layer": None,
        "n_head": None,
        "vocab_size": 16384,
        "num_classes": 1000,
        "block_size": 256,
        "cls_token_num": 1,
        "caption_dim": 0,
    },
}


def published_rows(model: str | Mapping[str, Any]) -> list[dict[str, Any]]:
    """Published rows of a teacher and its students.

    Args:
        model: name in the catalog, of either; or a config with "family" and sizes.

    Returns:
        Rows with generator, kind, steps, fid, inception_score, precision, recall,
        seconds_per_image (None where there is no figure), source and protocol; none where the
        catalog knows no such model.
    """
    if isinstance(model, str):
        if model not in PUBLISHED:
            return []
        model = PUBLISHED[model].config
    sizes = _sizes(model)
    for name, table in _TABLES.items():
        if sizes and sizes == _sizes(PUBLISHED[name].config):
            return [_as_dict(row) for row in table]
    return []


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that a teacher shares with its students and with no other model."""
    family = str(config.get("family")).removesuffix("-dd")
    sizes = {key: config.get(key, silent) for key, silent in _SIZES.get(family, {}).items()}
    if family == "var":
        # As the network reads them: 0 is the usual width, and JSON has no tuples.
        sizes["embed_dim"] = sizes["embed_dim"] or 64 * sizes["depth"]
        sizes["patch_nums"] = tuple(sizes["patch_nums"])
    return sizes


def _as_dict(row: _Row) -> dict[str, Any]:
    source, protocol = row.origin
    figures = {key: value for key, value in row._asdict().items() if key != "origin"}
    return {**figures, "source": source, "protocol": protocol}
