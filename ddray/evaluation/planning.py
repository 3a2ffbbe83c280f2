"""From a config to a plan: which rows there are, and what each metric needs; refusals come here.

All that can be known without work is known here, on the driver, before a GPU is held.
"""

from functools import cached_property
from typing import Any

import numpy as np
import torch

from ddray.config.evaluation import EvaluateConfig
from ddray.config.sampling import SampleConfig
from ddray.errors import ConfigError
from ddray.evaluation.feature_set import FeatureSet
from ddray.evaluation.judges import Judges
from ddray.evaluation.making import source_settings
from ddray.evaluation.plan import EvaluationPlan, Generator
from ddray.evaluation.rows import SAMPLES, Rows
from ddray.method.model import Model
from ddray.models.zoo import load_masked, load_student, load_teacher
from ddray.sets.batch_size import batch_size
from ddray.sets.captions import Cut, cut_captions
from ddray.sets.conditions import check_encoder, encoder_name, open_captions
from ddray.sets.labels import with_block
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.sources import ImageSource, open_source
from ddray.storage import open_storage
from ddray.storage.caption_file import CaptionFile


class Preparation:
    """Everything about an evaluation that is decided before work begins.

    Args:
        config: the job.
        device: where models are loaded, as far as the driver needs them.

    Raises:
        ConfigError: for models that do not belong together, metrics that cannot come out.
        DDRayError: for models, weights, references or images that cannot be read.
    """

    def __init__(self, config: EvaluateConfig, device: str | None = None):
        self.config = config
        self._device = device or "cpu"
        self.models: dict[str, Model] = {}
        self.source: ImageSource | None = None
        if config.samples is not None:
            self.source = self._open(config.samples)
        else:
            self._load()
        model = None if self.source is not None else self.model
        count = config.num_images if self.source is None else self._sample_count()
        judges = Judges(config, count, model, self._real)
        self.judges, self._is_digits = judges.all(), judges.is_digits
        self.plan = self._plan()

    def _load(self) -> None:
        config = self.config
        dtypes = {"dtype": config.network_dtype, "decode_dtype": config.pixel_dtype}
        wanted = {*config.rows} or {"student", "teacher"}
        if wanted & {"student"}:
            self.models["student"] = load_student(config.student, device=self._device, **dtypes)
        if wanted - {"student", "masked"} or self._schedules_have_teacher():
            name = self._teacher_name()
            self.models["teacher"] = load_teacher(name, device=self._device, **dtypes)
        if config.masked is not None:
            self.models["masked"] = load_masked(config.masked, device=self._device, **dtypes)
        first = next(iter(self.models.values()))
        for role, model in self.models.items():
            if model.tokenizer.fingerprint != first.tokenizer.fingerprint:
                raise ConfigError(f"{first.name} and {model.name} have different tokenizers")
            if (model.conditioning, model.num_classes) != (first.conditioning, first.num_classes):
                raise ConfigError(
                    f"the {role} {model.name} takes other conditions than {first.name}"
                )

    def _schedules_have_teacher(self) -> bool:
        return any("teacher" in schedule for schedule in self.config.student_schedules)

    def _teacher_name(self) -> str:
        config = self.config
        if config.teacher is not None:
            return config.teacher
        student = self.models.get("student")
        if student is None:
            student_config = load_student(config.student, device="cpu").config
        else:
            student_config = student.config
        name = student_config.get("teacher")
        if not name:
            raise ConfigError(f"{config.student} does not name its teacher; give teacher=")
        return str(name)

    @cached_property
    def model(self) -> Model:
        """Any of the models: they share conditions and images."""
        return self.models.get("student") or next(iter(self.models.values()))

    @cached_property
    def trajectories(self) -> TrajectorySet | None:
        """The set for the rows that need one; None where none is given."""
        config, teacher = self.config, self.models.get("teacher")
        if config.data is None or teacher is None:
            return None
        found = TrajectorySet.open(config.data)
        fingerprint = teacher.fingerprint
        if found.plan.dtype != config.network_dtype:
            # A fingerprint is of the weights in the dtype that computes.
            fingerprint = load_teacher(
                teacher.name, device="cpu", dtype=found.plan.dtype
            ).fingerprint
        if found.plan.teacher_fingerprint != fingerprint:
            raise ConfigError(f"{config.data} was not sampled from {teacher.name}")
        if found.plan.count < 2:
            raise ConfigError(
                f"{config.data} has one row, and a Frechet distance needs at least 2 images"
            )
        return found

    @cached_property
    def captions(self) -> CaptionFile | None:
        """Of a text model's images."""
        if self.source is not None:
            return None
        found = open_captions(self.config, self.model)
        if found is not None:
            found.check(self.config.num_images)
        return found

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """That images are asked for by, in turn: of the config, of the set, or all."""
        model = self.model
        if model.conditioning != "class":
            return ()
        if self.config.classes:
            wrong = [c for c in self.config.classes if c >= model.num_classes]
            if wrong:
                raise ConfigError(
                    f"classes holds {wrong[0]}; those of {model.name} are 0 to "
                    f"{model.num_classes - 1}"
                )
            return self.config.classes
        if self.trajectories is not None:
            # It may lack classes, or be too short to have them all.
            plan = self.trajectories.plan
            turn = min(len(plan.classes) or plan.num_classes, plan.count)
            return tuple(plan.label(np.arange(turn)).tolist())
        return tuple(range(model.num_classes))

    def _rows(self) -> tuple[Generator, ...]:
        if self.source is not None:
            return (self._of_source(SAMPLES, "samples", self.source, self._sample_count()),)
        rows = Rows(self.config, self.models, self.classes)
        return rows.all(self.trajectories, self._is_digits)

    def _sample_count(self) -> int:
        assert self.source is not None
        there, asked = self.source.count, self.config.count
        if asked is not None and asked > there:
            raise ConfigError(f"{self.source.uri} holds {there} images, and count={asked}")
        return asked or there

    def _open(self, uri: str) -> ImageSource:
        config = self.config
        return open_source(uri, column=config.column, size=config.size, convert=config.convert)

    def _real(self, uri: str) -> Generator:
        images = self._open(uri)
        return self._of_source(f"reference {images.uri}", "reference", images, images.count)

    def _of_source(self, name: str, kind: Any, source: ImageSource, count: int) -> Generator:
        config = self.config
        options = {"column": config.column, "size": config.size, "convert": config.convert}
        return Generator(name, kind, count, None, source_settings(source, **options))

    def _plan(self) -> EvaluationPlan:
        config = self.config
        measured = [judge.measured for judge in self.judges if judge.measured is not None]
        references = {generator.name: generator for generator in measured}
        extractors = tuple(judge.extractor for judge in self.judges)
        rows, classes = self._rows(), self.classes if self.models else ()
        uris = {role: getattr(config, role) or self.models[role].name for role in self.models}
        fingerprints = {role: model.fingerprint for role, model in self.models.items()}
        if self.trajectories is not None:
            uris["data"] = config.data
            fingerprints["data"] = self.trajectories.plan.hash
        return EvaluationPlan(
            generators=(*references.values(), *rows),
            extractors=extractors,
            models=uris,
            fingerprints=fingerprints,
            conditioning=self.model.conditioning if self.models else "",
            classes=classes,
            labels=with_block(config.labels, config.num_images, classes) if classes else "balanced",
            text_encoder=encoder_name(config, self.captions, self._model_config),
            seed=config.seed,
            dtype=config.network_dtype,
            decode_dtype=config.pixel_dtype,
            threads=config.threads or torch.get_num_threads(),
            batch_size=self._batch_size(),
            shard_rows=config.shard_rows,
        )

    @property
    def _model_config(self) -> dict[str, Any]:
        """Of what is conditioned; empty where images of anyone are judged."""
        return self.model.config if self.models else {}

    def _batch_size(self) -> int:
        config = self.config
        if config.batch_size != "auto":
            return config.batch_size
        like = SampleConfig(num_gpus=config.num_gpus, gpu_gb=config.gpu_gb)
        return batch_size(like, self.model.model) if self.models else 100

    def begin(self) -> FeatureSet:
        """The set of features, with captions beside them.

        Raises:
            ConfigError: for captions that do not fit.
            StorageError: if the URI cannot be written.
        """
        if self.captions is not None:
            check_encoder(self.plan, self.model)
            cut = Cut(self.config.num_images, self.plan.shard_rows)
            cut_captions(self.captions, open_storage(self.config.out), cut)
        return FeatureSet.create(self.config.out, self.plan)
