"""What is made of a set of images once its shards are there: files that other tools look for."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from ddray.sets.captions import read_texts
from ddray.sets.images.image_set import CAPTIONS, RESULT, SAMPLES, ImageSet
from ddray.sets.images.samples import write_samples
from ddray.sets.images.shard import image_name, metadata_name


def finish(images: ImageSet, lacking: Collection[str]) -> None:
    """Write what a set lacks beside its shards, the same bytes for the same set.

    Args:
        images: the set.
        lacking: what `ImageSet.lacking` told.

    Raises:
        ShardError: if shards or captions are missing or damaged.
        StorageError: if they cannot be read, or the files not written.
    """
    if SAMPLES in lacking:
        write_samples(images)
    elif images.plan.encoding == "coco" and lacking:
        _write_captions(images)
    elif lacking:
        _write_metadata(images, lacking)


def _write_captions(images: ImageSet) -> None:
    """A caption a line, and JSON lines that name its image, as LlamaGen leaves them for COCO."""
    captions = [text for text, _ in _rows(images)]
    # A caption of two lines would move all behind it.
    lines = (" ".join(text.split()) for text in captions)
    images.storage.write(CAPTIONS, "".join(f"{line}\n" for line in lines).encode())
    results = (
        json.dumps({"text": text, "image_path": image_name(images.plan, i, text)})
        for i, text in enumerate(captions)
    )
    images.storage.write(RESULT, "".join(f"{line}\n" for line in results).encode())


def _write_metadata(images: ImageSet, lacking: Collection[str]) -> None:
    """Beside the images of each prompt its own record, as GenEval's evaluation reads it."""
    each = images.plan.samples_per_prompt
    for i, (_, record) in enumerate(_rows(images)):
        if i % each == 0 and metadata_name(i // each) in lacking:
            images.storage.write(metadata_name(i // each), record.encode())


def _rows(images: ImageSet) -> Iterator[tuple[str, str]]:
    """Caption and record of every row; where the captions came without one, the caption alone."""
    plan = images.plan
    for k in range(plan.num_shards):
        part = read_texts(images.storage, k, len(plan.shard_range(k)))
        records = part.records or [json.dumps({"prompt": text}) for text in part.captions]
        yield from zip(part.captions, records, strict=True)
