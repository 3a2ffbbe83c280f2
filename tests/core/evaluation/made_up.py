"""Summaries as an evaluation writes them, with figures that nobody measured."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ddray.evaluation.published_tables import published_rows

Pictures = list[tuple[str, npt.NDArray[np.float32]]]

SETTINGS: dict[str, Any] = {
    "count": 5000,
    "labels": "balanced",
    "seed": 1_000_003,
    "network": "inception",
    "extractor": "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    "reference": "VIRTUAL_imagenet256_labeled.npz",
    "reference_sha256": "f98e0bb3e9d1a0d0dc2bdac53d6c0ed62b2cd1e0d9b4f3a9f1b7f0d1c3a5b7e9",
    "resize": "bilinear between pixel corners, as TensorFlow 1",
    "rounding": "to the nearest of 256 levels",
    "dtype": "float32",
    "device": "cpu",
    "gpu": None,
    "threads": 2,
    "ddray_version": "0.3.0",
}
_SINGULAR = (
    "500 images for 2048 pool features: the covariance is singular and the distance too large; "
    "compare it only at the same count"
)
_FEW = "precision and recall of 500 images; published ones take 10000 real images at least"


def _row(generator: str, kind: str, steps: int | None, **figures: Any) -> dict[str, Any]:
    plain = {"images": 5000, "settings": {}, "seconds_per_image": None, "warnings": []}
    return {"generator": generator, "kind": kind, "steps": steps, **plain, **figures}


def _whole(**parts: Any) -> dict[str, Any]:
    plain = {
        "speed": [],
        "transport": None,
        "worst_classes": {},
        "published": [],
        "protocol": ["5000 images of every generator, classes in turn.", "Nothing was measured."],
        "settings": dict(SETTINGS),
        "seconds": 123.4,
    }
    return plain | parts


def _speed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = [row for row in rows if row["seconds_per_image"]]
    return [
        {
            "generator": row["generator"],
            "steps": row["steps"],
            "batch_1": 0.4 / row["seconds_per_image"],
            "batch_64": 1 / row["seconds_per_image"],
        }
        for row in timed
    ]


def digits() -> dict[str, Any]:
    """Seven rows by fd_digits."""
    figures = [
        ("tokenizer reconstruction", "reconstruction", None, 0.19, 0.987, None),
        ("teacher, autoregressive", "teacher", 49, 1.45, 0.994, 1 / 111),
        ("teacher, by transport", "transport", 49, 1.55, 0.993, 1 / 77),
        ("student, 1 step", "student", 1, 2.15, 0.990, 1 / 238),
        ("student, 2 steps", "student", 2, 2.09, 0.990, 1 / 185),
        ("masked decoding, 4 steps", "masked", 4, 9.31, 0.95, 1 / 150),
        ("independent tokens", "independent", 1, 38.01, 0.619, 1 / 400),
    ]
    rows = [
        _row(
            name,
            kind,
            steps,
            fd_digits=distance,
            ratio=distance / 1.45,
            class_accuracy=accuracy,
            seconds_per_image=seconds,
            images=2000 if kind == "reconstruction" else 5000,
        )
        for name, kind, steps, distance, accuracy, seconds in figures
    ]
    transport = {"solver": "ab4", "num_evals": 24, "tokens": 19600}
    transport |= {"agreement": 0.9978, "cost_ratio": 1.43}
    return _whole(quality=rows, leading="fd_digits", speed=_speed(rows), transport=transport)


def imagenet() -> dict[str, Any]:
    """Twelve rows of a VAR of depth 16: all of ADM's metrics, published rows, worst classes."""
    figures = [
        ("tokenizer reconstruction", "reconstruction", None, 1.92, None, {}),
        ("teacher, autoregressive", "teacher", 10, 3.95, 0.142, {"cfg": 1.5}),
        ("teacher, by transport", "transport", 10, 4.08, 0.171, {"cfg": 1.5}),
        ("student, 1 step", "student", 1, 9.71, 0.0212, {"schedule": "0"}),
        ("student, 2 steps", "student", 2, 7.66, 0.0371, {"schedule": "0,5"}),
        ("student, 0,teacher:3-5,5", "student", 4, 5.52, 0.0612, {"schedule": "0,teacher:3-5,5"}),
        ("student, 0,teacher:8-10", "student", 3, 5.31, 0.0512, {"schedule": "0,teacher:8-10"}),
        ("skip-1", "skip", 9, 9.43, 0.118, {"cfg": 1.5}),
        ("skip-2", "skip", 8, 39.2, 0.101, {"cfg": 1.5}),
        ("masked decoding, 4 steps", "masked", 4, 17.2, 0.0433, {}),
        ("masked decoding, 8 steps", "masked", 8, 11.8, 0.0831, {}),
        ("independent tokens", "independent", 1, 158.0, 0.0124, {}),
    ]
    rows = [
        _row(
            name,
            kind,
            steps,
            fid=fid,
            sfid=fid * 1.9,
            inception_score=300 / fid**0.5,
            kid=fid / 4000,
            precision=1 - fid / 200,
            recall=0.6 - fid / 400,
            ratio=fid / 3.95,
            seconds_per_image=seconds,
            settings=settings,
            images=500,
            warnings=[_SINGULAR] if kind == "reconstruction" else [_SINGULAR, _FEW],
        )
        for name, kind, steps, fid, seconds, settings in figures
    ]
    names = ["golden retriever", "tench, Tinca tinca", "great white shark, white shark", None]
    worst = {
        row["generator"]: [
            {"class": 100 + k, "name": names[k % 4], "distance": 0.9 - 0.05 * k, "images": 50}
            for k in range(10)
        ]
        for row in rows[1:]
    }
    return _whole(
        quality=rows,
        leading="fid",
        speed=_speed(rows),
        worst_classes=worst,
        published=published_rows("var-d16"),
        settings={**SETTINGS, "count": 500, "device": "cuda", "gpu": "NVIDIA H200"},
    )


def samples() -> dict[str, Any]:
    """Images of anyone: one row, no model."""
    row = _row("samples", "samples", None, fid=12.34, sfid=20.1, inception_score=151.2)
    row |= {"precision": 0.71, "recall": 0.52, "ratio": None, "images": 50_000}
    return _whole(quality=[row], leading="fid")


def pictures(summary: dict[str, Any], channels: int, side: int, columns: int = 10) -> Pictures:
    """Noise in the place of every row's images."""
    generator = np.random.default_rng(0)
    return [
        (row["generator"], generator.random((columns, channels, side, side), np.float32))
        for row in summary["quality"]
    ]
