"""Statistics of real images, as the files of the field hold them, and what each is good for.

ADM's evaluator: `mu sigma mu_s sigma_s arr_0`. pytorch-fid and MAR: `mu sigma`. The authors of
Distilled Decoding: a `.pth` with `m s`. A bare `arr_0` is images alone. Ours: all of these, the
features of some images (float16), the count, and the network that made them, by name and sha256.

Shapes: M images, D features of a layer.
"""

import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddray.errors import ConfigError, StorageError, one_line
from ddray.file_kind import explained
from ddray.locations import S3, absolute, local_file
from ddray.metrics.frechet import FeatureStatistics, FeatureSums, add_layers, check_moments
from ddray.metrics.network import POOL, SPATIAL, FeatureNetwork
from ddray.storage import open_beside
from ddray.storage.image_array import IMAGES, image_shape
from ddray.storage.weights_only import load_weights_only

MOMENTS = {POOL: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
"""The names of mean and covariance of each layer."""
_FEATURES = "features"
_BLOCK_IMAGES = 500


@dataclass(frozen=True)
class Reference:
    """Real images, as far as a file tells of them.

    Attributes:
        uri: where the file lies.
        statistics: mean and covariance of the layers "pool" and "spatial"; a count of 0 if the
            file does not say of how many images.
        extractor: sha256 of the network's weights; None if the file does not say.
        network: its name; None likewise.
        features: pooled features float16 [M, D] of some images, if the file has them.
        num_images: images in the file, M of `arr_0`.
    """

    uri: str
    statistics: Mapping[str, FeatureStatistics]
    extractor: str | None = None
    network: str | None = None
    features: npt.NDArray[np.float16] | None = None
    num_images: int = 0
    # The whole file, where it does not lie on a disk of this machine.
    _data: bytes | None = field(default=None, repr=False)

    @classmethod
    def load(cls, uri: str) -> "Reference":
        """Read any of the files; of images only their number, `images` reads them.

        Raises:
            ConfigError: if it is none of them, or damaged.
            StorageError: if it cannot be read.
        """
        if str(uri).endswith((".pth", ".pt")):
            return _read_torch(uri)
        place = absolute(uri)
        data = None
        if place.startswith(S3):
            storage, name = open_beside(uri)
            data = storage.read(name)
        elif not Path(place).is_file():
            raise StorageError(f"{place} does not exist or is no file")
        source: Any = data if data is not None else Path(place)
        try:
            with np.load(io.BytesIO(data) if data is not None else place) as file:
                return _read_numpy(cls, place, file, data)
        except Exception as error:  # one flipped bit makes np.load fail in any way
            refusal = f"{place} is no reference (.npz with mu and sigma, or arr_0)"
            raise ConfigError(explained(refusal, source, error, "(.npz)")) from error

    def lacks(self, layer: str | None, *, images: int = 0) -> str | None:
        """Why the reference cannot serve a metric; None if it can.

        Args:
            layer: whose mean and covariance the metric takes; None for none.
            images: of how many real images it takes features.
        """
        if layer is not None and layer not in self.statistics and not self._only_images:
            names = " and ".join(MOMENTS[layer])
            held = [name for known in self.statistics for name in MOMENTS[known]]
            return f"it has no {names}" + (f", only {', '.join(held)}" if held else "")
        there = len(self.features) if self.features is not None else self.num_images
        if images and not there:
            return "it holds no images (arr_0) and no features of them, only statistics"
        if images > there:
            return f"it holds {there} images, and {images} are needed"
        return None

    @property
    def _only_images(self) -> bool:
        return self.num_images > 1 and not self.statistics

    def completed(self, network: FeatureNetwork) -> "Reference":
        """With statistics of its images where the file has none at all, as ADM's evaluator does.

        A file that has some keeps what it has: they may be of far more images than it holds.

        Raises:
            ConfigError: as `check` and `images`.
        """
        self.check(network)
        if not self._only_images:
            return self
        sums: dict[str, FeatureSums] = {}
        rows = []
        for block in self.images():
            found = network(torch.from_numpy(block.copy()))
            rows.append(found[POOL].half().cpu().numpy())
            layers = MOMENTS.keys() & found.keys()
            add_layers(sums, {layer: FeatureSums.of(found[layer]) for layer in layers})
        return replace(
            self,
            statistics={layer: sums[layer].statistics() for layer in MOMENTS if layer in sums},
            features=np.concatenate(rows),
        )

    def check(self, network: FeatureNetwork) -> None:
        """Refuse a reference of another network.

        Raises:
            ConfigError: if the file names another one, or has other numbers of features.
        """
        made_by = (self.network or network.name, self.extractor or network.fingerprint)
        if made_by != (network.name, network.fingerprint):
            raise ConfigError(
                f"{self.uri} was made by {made_by[0]} ({made_by[1][:12]}), and the images are "
                f"judged by {network.name} ({network.fingerprint[:12]}): features of two networks "
                "cannot be compared"
            )
        sizes = {layer: len(found.mean) for layer, found in self.statistics.items()}
        if self.features is not None:
            sizes.setdefault(POOL, self.features.shape[1])
        for layer, size in sizes.items():
            if layer in network.layers and network.layers[layer] != size:
                raise ConfigError(
                    f"{self.uri} has {size} {layer} features, and {network.name} gives "
                    f"{network.layers[layer]}: it was made by another network"
                )

    def images(self, size: int = _BLOCK_IMAGES) -> Iterator[npt.NDArray[np.uint8]]:
        """The images uint8 [size, H, W, 3], block by block: ADM's are 2 GB.

        Raises:
            ConfigError: if the file holds none, or is damaged.
        """
        if not self.num_images:
            raise ConfigError(f"{self.uri} holds no images (arr_0)")
        with (
            self._open() as file,
            zipfile.ZipFile(file) as archive,
            archive.open(f"{IMAGES}.npy") as array,
        ):
            shape = image_shape(array)
            one = int(np.prod(shape[1:]))
            for start in range(0, shape[0], size):
                count = min(size, shape[0] - start)
                try:
                    data = array.read(count * one)
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise ConfigError(f"{self.uri} is damaged: {one_line(error)}") from error
                if len(data) < count * one:
                    raise ConfigError(f"{self.uri} is damaged: arr_0 ends within image {start}")
                yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])

    def pool_features(self, network: FeatureNetwork) -> npt.NDArray[np.float16]:
        """Pooled features float16 [M, D] of the images: those of the file, or computed here.

        Raises:
            ConfigError: as `check`, and for a file without images or features.
        """
        self.check(network)
        if self.features is not None:
            return self.features
        parts = [
            network(torch.from_numpy(block.copy()))[POOL].half().cpu().numpy()
            for block in self.images()
        ]
        return np.concatenate(parts)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What an .npz holds that `load` reads, and with `arr_0` beside it ADM's evaluator, too."""
        found: dict[str, npt.NDArray[Any]] = {}
        for layer, statistics in self.statistics.items():
            mean, covariance = MOMENTS[layer]
            found |= {mean: statistics.mean, covariance: statistics.covariance}
            if statistics.count:
                found["count"] = np.array(statistics.count)
        for name, note in (("extractor", self.extractor), ("network", self.network)):
            if note is not None:
                found[name] = np.array(note)
        if self.features is not None:
            found[_FEATURES] = self.features
        return found

    def to_bytes(self) -> bytes:
        """The .npz of `arrays`."""
        stream, arrays = io.BytesIO(), dict[str, Any](self.arrays())
        np.savez(stream, **arrays)
        return stream.getvalue()

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        if self._data is not None:
            yield io.BytesIO(self._data)
        else:
            with open(self.uri, "rb") as file:
                yield file


def _read_numpy(cls: type[Reference], uri: str, file: Any, data: bytes | None) -> Reference:
    if not hasattr(file, "files"):
        raise ValueError("it is a single array (.npy)")
    count = int(file["count"]) if "count" in file.files else 0
    statistics = {
        layer: _statistics(count, file[mean], file[covariance])
        for layer, (mean, covariance) in MOMENTS.items()
        if mean in file.files and covariance in file.files
    }
    features = file[_FEATURES] if _FEATURES in file.files else None
    if features is not None and (features.ndim != 2 or features.dtype != np.float16):
        raise ValueError(f"features are {features.dtype} {features.shape}, not float16 [M, D]")
    if features is not None and POOL not in statistics:
        statistics[POOL] = FeatureStatistics.from_features(torch.from_numpy(features).float())
    num_images = 0
    if IMAGES in file.files:
        with file.zip.open(f"{IMAGES}.npy") as array:
            num_images = image_shape(array)[0]
    if not statistics and not num_images:
        raise ValueError(f"it holds {', '.join(file.files[:5]) or 'nothing'}")
    extractor, network = (
        str(file[name]) if name in file.files else None for name in ("extractor", "network")
    )
    return cls(uri, statistics, extractor, network, features, num_images, data)


def _read_torch(uri: str) -> Reference:
    path = Path(local_file(uri))
    if not path.is_file():
        raise StorageError(f"{path} does not exist or is no file")
    found = load_weights_only(path)
    try:
        mean, covariance = (
            value.numpy() if isinstance(value, Tensor) else np.asarray(value)
            for value in (found["m"], found["s"])
        )
        return Reference(str(path), {POOL: _statistics(0, mean, covariance)})
    except (KeyError, TypeError, ValueError) as error:
        refusal = f"{path} is no reference (.pth with m and s)"
        raise ConfigError(f"{refusal}: {error}") from error


def _statistics(count: int, mean: np.ndarray, covariance: np.ndarray) -> FeatureStatistics:
    check_moments(mean, covariance)
    return FeatureStatistics(count, mean.astype(np.float64), covariance.astype(np.float64))
