"""What Hugging Face's `datasets` is told of a shard's columns: which are images, what classes are.

It reads this from the metadata of a Parquet schema, and takes it for a column whose Arrow type is
the one that it would write itself.
"""

import json
from collections import Counter
from typing import Any

from ddray.sets.images.plan import ImagePlan


def hugging_face_metadata(plan: ImagePlan) -> dict[str, str]:
    """The key `huggingface` of a Parquet schema. Tokens are not named: their type says it all."""
    features: dict[str, Any] = {"index": _value("int64")}
    if plan.conditioning == "class":
        features["label"] = {"names": label_names(plan), "_type": "ClassLabel"}
    else:
        features["caption"] = _value("string")
    features["seed"] = _value("int64")
    if plan.content == "images":
        features["image"] = {"_type": "Image"}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def label_names(plan: ImagePlan) -> list[str]:
    """A name for each class, no two alike; its number where the student has no names."""
    names = plan.class_names or [*map(str, range(plan.num_classes))]
    # ImageNet has two cranes.
    often = Counter(names)
    return [f"{name} ({i})" if often[name] > 1 else name for i, name in enumerate(names)]


def _value(dtype: str) -> dict[str, str]:
    return {"dtype": dtype, "_type": "Value"}
