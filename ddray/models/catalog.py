"""Published models by name: sizes, files, settings and figures. Pure data.

Sizes, files and figures come from the repositories FoundationVision/VAR, FoundationVision/LlamaGen
and microsoft/distilled_decoding and their model cards. FIDs are those that the authors report, each
under its own protocol: teachers by the OpenAI evaluator, students by pytorch-fid; they are not
comparable with each other.
"""

from dataclasses import dataclass, field
from typing import Any

_VAR = "FoundationVision/var"
_LLAMAGEN = "FoundationVision/LlamaGen"
_LLAMAGEN_TEXT = "peizesun/llamagen_t2i"
_STUDENTS = "microsoft/distilled_decoding"


@dataclass(frozen=True)
class File:
    """A file on the Hugging Face Hub.

    Attributes:
        repository: owner/name.
        name: path inside the repository.
        container: where the weights lie in it.
    """

    repository: str
    name: str
    container: str

    @property
    def uri(self) -> str:
        """What `checkpoint=` and `tokenizer=` take to fetch it."""
        return f"hf://{self.repository}/{self.name}"


@dataclass(frozen=True)
class Published:
    """One published model.

    Attributes:
        config: sizes with "family" and "tokenizer", and what a card says beside them.
        checkpoint: file of the network; None where the authors released none.
        tokenizer: file of the tokenizer.
        sampling: recommended settings.
        figure: what its authors report, with the source.
        license: of the weights' repository.
    """

    config: dict[str, Any]
    checkpoint: File | None
    tokenizer: File
    sampling: dict[str, Any] = field(default_factory=dict)
    figure: str = ""
    license: str = "MIT"

    @property
    def kind(self) -> str:
        """Teacher or student."""
        return "student" if self.config["family"].endswith("-dd") else "teacher"


def _vq(downsampling: int) -> dict[str, Any]:
    return {"ch_mult": (1, 1, 2, 2, 4) if downsampling == 16 else (1, 2, 2, 4)}


def _llamagen(dim: int, n_layer: int, n_head: int, pixels: int, **others: Any) -> dict[str, Any]:
    return {
        "family": "llamagen",
        "dim": dim,
        "n_layer": n_layer,
        "n_head": n_head,
        "vocab_size": 16384,
        "num_classes": 1000,
        "block_size": (pixels // 16) ** 2,
        "tokenizer": _vq(16),
        **others,
    }


def _var(depth: int, **others: Any) -> dict[str, Any]:
    return {
        "family": "var",
        "depth": depth,
        "num_classes": 1000,
        "tokenizer": {},
        **others,
    }


# dim, layers, heads, guidance, FID by image size where weights are released.
_LLAMAGEN_SIZES: dict[str, tuple[int, int, int, float, dict[int, float]]] = {
    "b": (768, 12, 12, 2.0, {256: 5.46, 384: 6.09}),
    "l": (1024, 24, 16, 2.0, {256: 3.80, 384: 3.07}),
    "xl": (1280, 36, 20, 1.75, {384: 2.62}),
    "xxl": (1536, 48, 24, 1.75, {384: 2.34}),
    "3b": (3200, 24, 32, 1.65, {384: 2.18}),
}
_BARE = "bare state dict"
_LLAMAGEN_VQ = File(_LLAMAGEN, "vq_ds16_c2i.pt", '["model"]')
_VAR_VQ = File(_VAR, "vae_ch160v4096z32.pth", _BARE)
_VAR_FIDS = {16: 3.55, 20: 2.95, 24: 2.33, 30: 1.97}


def _llamagen_teachers() -> dict[str, Published]:
    found = {}
    for size, (dim, layers, heads, cfg, fids) in _LLAMAGEN_SIZES.items():
        for pixels in (256, 384):
            name = f"c2i_{size.upper()}_{pixels}.pt"
            container = _BARE if size in ("xxl", "3b") else '["model"]'
            figure = (
                f"FID {fids[pixels]} (50,000 images, cfg {cfg:g}, top_k off, top_p off; LlamaGen's "
                "README)"
                if pixels in fids
                else "no weights of this size are released"
            )
            found[f"llamagen-{size}-{pixels}"] = Published(
                _llamagen(dim, layers, heads, pixels, default_cfg=cfg),
                File(_LLAMAGEN, name, container) if pixels in fids else None,
                _LLAMAGEN_VQ,
                {"cfg": cfg, "top_k": 0, "top_p": 1.0, "temperature": 1.0},
                figure,
            )
    for pixels, stage in ((256, 1), (512, 2)):
        caption = {"cls_token_num": 120, "caption_dim": 2048}
        found[f"llamagen-t2i-xl-{pixels}"] = Published(
            _llamagen(1280, 36, 20, pixels, default_cfg=7.5, **caption),
            File(_LLAMAGEN_TEXT, f"t2i_XL_stage{stage}_{pixels}.pt", '["model"]'),
            File(_LLAMAGEN_TEXT, "vq_ds16_t2i.pt", '["model"]'),
            {"cfg": 7.5, "top_k": 1000, "top_p": 1.0, "temperature": 1.0},
            "captions as features of flan-t5-xl, 120 positions; no FID in LlamaGen's README",
        )
    return found


def _var_teachers() -> dict[str, Published]:
    found = {
        f"var-d{depth}": Published(
            _var(depth, default_cfg=1.5),
            File(_VAR, f"var_d{depth}.pth", _BARE),
            _VAR_VQ,
            {"cfg": 1.5, "top_k": 900, "top_p": 0.96},
            f"FID {fid} (50,000 images, 50 a class, cfg 1.5, top_k 900, top_p 0.96; VAR's README)",
        )
        for depth, fid in _VAR_FIDS.items()
    }
    scales = {"patch_nums": (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
    found["var-d36"] = Published(
        _var(36, shared_aln=True, **scales),
        File(_VAR, "var_d36.pth", _BARE),
        _VAR_VQ,
        {},
        "FID 2.63 at 512 pixels (VAR's README, which does not state the settings)",
    )
    return found


def _students() -> dict[str, Published]:
    fid = "FID {} in 1 step, {} in 2 (50,000 images, pytorch-fid; Distilled Decoding's README)"
    found = {}
    for depth, cut, figures in (
        (16, 5, (9.94, 7.82)),
        (20, 4, (9.55, 7.33)),
        (24, 4, (8.92, 6.95)),
    ):
        found[f"var-dd-d{depth}"] = Published(
            {**_var(depth), "family": "var-dd", "schedule": [0, cut], "split": cut},
            File(_STUDENTS, f"VAR-DD/var-d{depth}.pth", '["trainer"]["ema_parameters"]'),
            _VAR_VQ,
            {"schedule": f"0,{cut}", "split": cut},
            fid.format(*figures),
        )
    for size, split, figures in (("b", 80, (15.50, 11.17)), ("l", 130, (11.35, 7.58))):
        dim, layers, heads, *_ = _LLAMAGEN_SIZES[size]
        found[f"llamagen-dd-{size}-256"] = Published(
            {
                **_llamagen(dim, layers, heads, 256, codebook_dim=8),
                "family": "llamagen-dd",
                "schedule": [0, 80],
                "split": split,
            },
            File(_STUDENTS, f"LlamaGen-DD/llamagen-{size.upper()}.pt", '["ema"]'),
            _LLAMAGEN_VQ,
            {"schedule": "0,80", "split": split},
            fid.format(*figures),
        )
    return found


PUBLISHED = {**_llamagen_teachers(), **_var_teachers(), **_students()}
"""Every published model by its name here."""

BUNDLED_MODELS = {
    "digits-llamagen": "LlamaGen of 49 tokens on real digits, the teacher of the quickstart",
    "digits-llamagen-dd": "its student, distilled for one and two steps",
    "digits-var": "VAR of 88 tokens in five scales on the same digits",
    "digits-var-dd": "its student, distilled for one and two steps",
    "emoji-llamagen": "LlamaGen of 64 tokens that paints emoji from their names",
    "emoji-llamagen-dd": "its student, distilled for one and two steps",
}
"""What comes inside the package."""
