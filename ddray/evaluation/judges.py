"""Who judges images: feature networks, each with its metrics and the real images they compare with.

All that can refuse, refuses here, before any image is made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ddray.config.metrics import MetricsConfig
from ddray.errors import ConfigError
from ddray.evaluation.plan import Extractor, Generator
from ddray.method.model import Model
from ddray.metrics.fd_digits import DigitsNetwork, makes_digits
from ddray.metrics.loading import load_network
from ddray.metrics.measurement import METRICS, OF_CAPTIONS, check_metrics
from ddray.metrics.network import FeatureNetwork
from ddray.metrics.reference import Reference
from ddray.models.zoo import BUNDLED_JUDGES, EMOJI_REFERENCE
from ddray.text.loading import makes_emoji

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


class Judges:
    """The judges of some images.

    Args:
        config: metrics and references.
        count: of the images.
        model: that makes them; None for images of anyone.
        real: the row of real images at a URI, whose features are then taken; None where only what
            a file tells can be compared with.
    """

    def __init__(
        self,
        config: MetricsConfig,
        count: int,
        model: Model | None,
        real: Callable[[str], Generator] | None = None,
    ):
        self.config, self.count, self._model, self._real = config, count, model, real

    @cached_property
    def is_digits(self) -> bool:
        """Whether images are the grey digits that the bundled classifier judges."""
        return self._model is not None and makes_digits(self._model)

    @property
    def are_bundled(self) -> bool:
        """Whether metrics and real images come with the package, so that none need be named."""
        return self.is_digits or self.is_emoji

    @property
    def is_emoji(self) -> bool:
        """Whether images are the emoji that the bundled judge knows."""
        return self._model is not None and makes_emoji(self._model.config)

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        if self.config.metrics:
            return self.config.metrics
        if self.is_digits and not self.config.reference:
            return ("fd_digits", *("class_accuracy",) * self._has_classes)
        if self.is_emoji and not self.config.reference:
            return ("fd_efficientnet", "retrieval_emoji", "coverage_efficientnet")
        return ("fid", "is")

    @property
    def _has_classes(self) -> bool:
        return self._model is not None and self._model.conditioning == "class"

    def all(self) -> list[Judge]:
        """One judge a network.

        Raises:
            ConfigError: for metrics that cannot come out, weights or a reference that do not fit.
            DDRayError: for weights, references or images that cannot be read.
        """
        for name in self.metrics:
            if name not in METRICS:
                raise ConfigError(f"metric {name!r} is not one of {', '.join(METRICS)}")
        found = []
        for name in dict.fromkeys(METRICS[name].network for name in self.metrics):
            metrics = tuple(metric for metric in self.metrics if METRICS[metric].network == name)
            full, source = self._network(name)
            if name == "digits" and self._model is not None and not self.is_digits:
                raise ConfigError(
                    f"{self._model.name} does not make grey 28x28 digits of ten classes; "
                    f"{metrics[0]} is defined on those"
                )
            if "class_accuracy" in metrics and not self._has_classes:
                raise ConfigError("class_accuracy is of models that are asked for classes")
            self._refuse_without_captions(metrics)
            network = load_network(full, source, any_weights=self.config.any_inception)
            found.append(self._judge(network, source, metrics))
        return found

    def _refuse_without_captions(self, metrics: tuple[str, ...]) -> None:
        for name in metrics:
            of_captions = self._model is not None and self._model.conditioning == "text"
            if METRICS[name].kind in OF_CAPTIONS and not of_captions:
                raise ConfigError(f"{name} is of models that are asked for captions")

    def _network(self, name: str) -> tuple[str, str | None]:
        """Name of a metric's network as `load_network` has it, and where its weights lie."""
        config = self.config
        if name == "inception":
            full = "inception" if config.resize == "pytorch-fid" else "inception-tensorflow"
            return full, config.inception
        if name in BUNDLED_JUDGES:
            return name, str(BUNDLED_JUDGES[name])
        return name, getattr(config, name)

    def _judge(
        self, network: FeatureNetwork, source: str | None, metrics: tuple[str, ...]
    ) -> Judge:
        """What the metrics of a network need, refused where it is not there."""
        kinds = {METRICS[name].kind for name in metrics}
        extractor = Extractor(
            *(network.name, source, self.config.any_inception, network.fingerprint),
            tuple(sorted({METRICS[name].layer for name in metrics})),
        )
        reference, measured = None, None
        if kinds & {"frechet", "kernel", "manifold"}:
            reference, measured = self._reference_of(network, bool(kinds & {"kernel", "manifold"}))
        check_metrics(metrics, network.name, self.count, reference)
        return Judge(extractor, metrics, reference, measured)

    def _reference_of(
        self, network: FeatureNetwork, takes_images: bool
    ) -> tuple[Reference | None, Generator | None]:
        """The reference that fits a network, and its images where they are to be measured."""
        if isinstance(network, DigitsNetwork):
            # To the held-out digits, unless a file says that it is of this network.
            files = [uri for uri in self.config.reference if uri.endswith(_REFERENCE_FILES)]
            known = [found for found in map(Reference.load, files) if found.network == network.name]
            chosen = next(iter(known), network.reference)
            chosen.check(network)
            return chosen, None
        refusal: ConfigError | None = None
        of_emoji = (str(EMOJI_REFERENCE),) * self.is_emoji
        for uri in self.config.reference or of_emoji:
            reference = Reference.load(uri) if uri.endswith(_REFERENCE_FILES) else None
            if reference is None or not reference.statistics:
                images = self._measured(uri)
                place = str(images.settings["source"])
                return Reference(place, {}, num_images=images.count), images
            try:
                reference.check(network)
            except ConfigError as error:
                refusal = error
                continue
            measured = takes_images and reference.features is None and reference.num_images
            return reference, self._measured(uri) if measured else None
        if refusal is not None:
            raise refusal
        return None, None

    def _measured(self, uri: str) -> Generator:
        if self._real is None:
            raise ConfigError(
                f"the features of the images in {uri} would be taken anew at every evaluation; "
                "give the .npz that `ddray reference` makes of them"
            )
        return self._real(uri)


def leading_of(judges: Sequence[Judge]) -> str:
    """Key of the metric that rows are compared by: the first Frechet distance, or the first."""
    metrics = [METRICS[name] for judge in judges for name in judge.metrics]
    return next((m.key for m in metrics if m.kind == "frechet"), metrics[0].key)
