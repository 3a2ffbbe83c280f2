"""Features of captions at scale: texts cut to shards, a pool of encoders."""

from typing import Any

import torch

from ddray import __version__
from ddray.config.base import reserved_device
from ddray.config.encoding import EncodeConfig
from ddray.errors import ConfigError
from ddray.runtime.pools.device import SHARDS_AT_ONCE, Device
from ddray.runtime.pools.pool import Crew, fill, tell_found
from ddray.sets.caption_features import CaptionFeatures, EncodingPlan, Features, encoded
from ddray.sets.captions import left_out
from ddray.sets.conditions import caption_file
from ddray.sets.makers import maker_on
from ddray.sets.sharded_set import SHARDS
from ddray.storage.run_folder import CONFIG_FILE, SUMMARY_FILE, write_json
from ddray.text.loading import features_width, load_text_encoder


class EncodingWorker:
    """An actor's encoder, which takes up the next shard while the last one is written.

    Args:
        uri: of the features.
        device: "cpu" or "cuda".
    """

    def __init__(self, uri: str, device: str):
        self._features = CaptionFeatures.open(uri)
        plan = self._features.plan
        self._device = Device(plan.threads)
        self._encode = self._device.load(
            lambda: load_text_encoder(plan.text_encoder, length=plan.length, device=device)
        )
        self.maker = maker_on(torch.device(device))

    def do(self, shard: int) -> int:
        """Encode and write one shard."""
        texts = self._features.texts(shard)

        def batch(rows: range) -> Features:
            return encoded(self._encode, [texts[row] for row in rows])

        batches = self._device.batches(batch, self._features.plan.batches(shard))
        self._features.write_shard(shard, texts, [row for rows in batches for row in rows])
        return len(texts)


def encode(config: EncodeConfig) -> dict[str, Any]:
    """Store the features of captions; a rerun fills gaps only.

    Args:
        config: the job.

    Returns:
        Summary: what to give to `--captions`, what was made, and how fast.

    Raises:
        ConfigError: for captions, an encoder or a plan at the URI that do not fit.
        StorageError: the URI cannot be written, or the captions not read.
        CheckpointError: the encoder is not there.
        ClusterError: Ray cannot start, or the pool keeps failing.
        ShardError: shards are missing although the pool finished.
    """
    if config.captions is None:
        raise ConfigError("there is nothing to encode; give --captions FILE")
    captions = caption_file(
        config, config.captions, length=config.length, width=features_width(config.text_encoder)
    )
    if captions.has_features:
        raise ConfigError(f"{captions.uri} has features already")
    plan = EncodingPlan(
        count=config.count,
        shard_rows=config.shard_rows,
        text_encoder=config.text_encoder,
        length=config.length,
        batch_size=config.batch_size,
        threads=config.threads,
    )
    features = CaptionFeatures.create(config.out, plan, captions)
    write_json(features.storage, CONFIG_FILE, config.model_dump(mode="json"))
    missing = features.missing()
    tell_found(plan, missing)
    crew = Crew(
        EncodingWorker,
        {"device": reserved_device(config.num_gpus)},
        config.threads,
        config.num_gpus,
        config.node_pool,
        shards_at_once=SHARDS_AT_ONCE,
    )
    filled = fill("captions", features, crew, config)
    summary = {
        "captions": features.storage.join(SHARDS.rstrip("/")),
        "ddray_version": __version__,
        "text_encoder": plan.text_encoder,
        "rows": plan.count,
        "megabytes": round(sum(features.storage.list(SHARDS).values()) / 1e6, 2),
        **left_out(captions),
        **filled.summary(),
    }
    # A rerun that finds all there does not take the place of the one that made it.
    if missing or not features.storage.exists(SUMMARY_FILE):
        write_json(features.storage, SUMMARY_FILE, summary)
    return summary
