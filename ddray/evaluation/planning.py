"""From a config to a plan: which rows there are, and what each metric needs; refusals come here.

All that can be known without work is known here, on the driver, before a GPU is held.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ddray.config.evaluation import EvaluateConfig
from ddray.config.sampling import SampleConfig
from ddray.errors import ConfigError
from ddray.evaluation.feature_set import FeatureSet
from ddray.evaluation.making import source_settings
from ddray.evaluation.plan import EvaluationPlan, Extractor, Generator
from ddray.evaluation.rows import SAMPLES, Rows
from ddray.method.model import Model
from ddray.metrics.fd_digits import DigitsNetwork, makes_digits
from ddray.metrics.loading import load_network
from ddray.metrics.measurement import METRICS, check_metrics
from ddray.metrics.network import FeatureNetwork
from ddray.metrics.reference import Reference
from ddray.models.zoo import METRIC_FOLDER, load_masked, load_student, load_teacher
from ddray.sets.batch_size import batch_size
from ddray.sets.captions import Cut, cut_captions
from ddray.sets.conditions import check_encoder, encoder_name, open_captions
from ddray.sets.labels import with_block
from ddray.sets.trajectories.trajectory_set import TrajectorySet
from ddray.sources import ImageSource, open_source
from ddray.storage import open_storage
from ddray.storage.caption_file import CaptionFile

_REFERENCE_FILES = (".npz", ".pth", ".pt")


@dataclass(frozen=True)
class Judge:
    """A feature network, its metrics, and the real images that they compare with.

    Attributes:
        extractor: the network, as workers load it.
        metrics: names of METRICS.
        reference: as far as a file tells; None where no metric takes one, or it is images alone.
        measured: the generator whose images are the reference, or the sample of them that some
            metrics compare with; None where the file has all that is needed.
    """

    extractor: Extractor
    metrics: tuple[str, ...]
    reference: Reference | None = None
    measured: Generator | None = None


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
        self.judges = self._judges()
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
        return any("teacher" in schedule for schedule in self.config.schedules)

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
        return rows.all(self.trajectories, self.is_digits)

    def _sample_count(self) -> int:
        assert self.source is not None
        there, asked = self.source.count, self.config.count
        if asked is not None and asked > there:
            raise ConfigError(f"{self.source.uri} holds {there} images, and count={asked}")
        return asked or there

    def _open(self, uri: str) -> ImageSource:
        config = self.config
        return open_source(uri, column=config.column, size=config.size, convert=config.convert)

    def _of_source(self, name: str, kind: Any, source: ImageSource, count: int) -> Generator:
        config = self.config
        options = {"column": config.column, "size": config.size, "convert": config.convert}
        return Generator(name, kind, count, None, source_settings(source, **options))

    @cached_property
    def is_digits(self) -> bool:
        """Whether images are the grey digits that the bundled classifier judges."""
        return bool(self.models) and makes_digits(self.model)

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        if self.config.metrics:
            return self.config.metrics
        if self.is_digits and not self.config.reference:
            return ("fd_digits", "class_accuracy")
        return ("fid", "is")

    def _network(self, name: str) -> tuple[str, str | None]:
        """Name of a metric's network as `load_network` has it, and where its weights lie."""
        config = self.config
        if name == "inception":
            full = "inception" if config.resize == "pytorch-fid" else "inception-tensorflow"
            return full, config.inception
        if name == "digits":
            return name, str(METRIC_FOLDER)
        return name, getattr(config, name)

    def _judges(self) -> list[Judge]:
        for name in self.metrics:
            if name not in METRICS:
                raise ConfigError(f"metric {name!r} is not one of {', '.join(METRICS)}")
        found = []
        for network in dict.fromkeys(METRICS[name].network for name in self.metrics):
            metrics = tuple(name for name in self.metrics if METRICS[name].network == network)
            full, source = self._network(network)
            if network == "digits" and not self.is_digits and self.source is None:
                raise ConfigError(
                    f"{self.model.name} does not make grey 28x28 digits of ten classes; "
                    f"{metrics[0]} is defined on those"
                )
            if "class_accuracy" in metrics and self.source is not None:
                raise ConfigError("class_accuracy is of models, which are asked for classes")
            loaded = load_network(full, source, any_weights=self.config.any_inception)
            found.append(self._judge(loaded, source, metrics))
        return found

    def _judge(
        self, network: FeatureNetwork, source: str | None, metrics: tuple[str, ...]
    ) -> Judge:
        """What the metrics of a network need, refused where it is not there."""
        kinds = {METRICS[name].kind for name in metrics}
        extractor = Extractor(
            *(network.name, source, self.config.any_inception, network.fingerprint),
            tuple(sorted({METRICS[name].layer for name in metrics})),
        )
        reference, images = None, None
        if kinds & {"frechet", "kernel", "manifold"}:
            reference, images = self._reference_of(network)
        count = self.config.num_images if self.source is None else self._sample_count()
        check_metrics(metrics, network.name, count, reference)
        if reference is None or images is None:
            return Judge(extractor, metrics, reference)
        if reference.statistics and not kinds & {"kernel", "manifold"}:
            return Judge(extractor, metrics, reference)
        return Judge(extractor, metrics, reference, self._measured(images))

    def _measured(self, images: ImageSource) -> Generator:
        return self._of_source(f"reference {images.uri}", "reference", images, images.count)

    def _reference_of(self, network: FeatureNetwork) -> tuple[Reference | None, ImageSource | None]:
        """The reference that fits a network, and its images where they are to be measured."""
        if not self.config.reference and isinstance(network, DigitsNetwork):
            return network.reference, None
        refusal: ConfigError | None = None
        for uri in self.config.reference:
            if not uri.endswith(_REFERENCE_FILES):
                return self._only_images(uri)
            reference = Reference.load(uri)
            if not reference.statistics:
                return self._only_images(uri)
            try:
                reference.check(network)
            except ConfigError as error:
                refusal = error
                continue
            has_images = reference.features is None and reference.num_images
            return reference, self._open(uri) if has_images else None
        if refusal is not None:
            raise refusal
        return None, None

    def _only_images(self, uri: str) -> tuple[Reference, ImageSource]:
        images = self._open(uri)
        return Reference(images.uri, {}, num_images=images.count), images

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
            text_encoder=encoder_name(config, self.captions),
            seed=config.seed,
            dtype=config.network_dtype,
            decode_dtype=config.pixel_dtype,
            threads=config.threads or torch.get_num_threads(),
            batch_size=self._batch_size(),
            shard_rows=config.shard_rows,
        )

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
