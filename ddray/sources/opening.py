"""Any source by its location: what lies there decides of which kind it is."""

from ddray.errors import ConfigError, is_integer
from ddray.sets.images.plan import ImagePlan
from ddray.sets.sharded_set import MANIFEST, manifest_kind
from ddray.sources.base import ImageSource
from ddray.sources.folder import FolderSource
from ddray.sources.image_set import GeneratedSource
from ddray.sources.listing import Listing
from ddray.sources.npz import NpzSource
from ddray.sources.parquet import ParquetSource
from ddray.sources.pixels import PixelRules
from ddray.sources.webdataset import WebDatasetSource


def open_source(
    uri: str, *, column: str | None = None, size: int | None = None, convert: bool = False
) -> ImageSource:
    """Open images for reading.

    Args:
        uri: path or s3:// URI of a folder of images (flat, or in folders by class), of a tar or
            Parquet file or a folder of them, or an .npz; or a pattern of files of one of these
            kinds (`*` within a name, `**` for any folders); or of a set of `ddray generate`.
        column: of Parquet, the one with the images; of WebDataset, the ending of the member that
            is the image. Needed only where there are several.
        size: pixels a side to which every image is cropped and resized as in ADM's preprocessing,
            which implies `convert`; None = as they are, and all must have one size.
        convert: whether transparent, CMYK and 16-bit images are converted; else each is broken.

    Raises:
        ConfigError: if there are no images, or of several kinds, or most of those looked at cannot
            be used.
        ShardError: for a set of ours that is not whole.
        StorageError: if there is nothing, or it cannot be read.
    """
    if size is not None and (not is_integer(size) or size < 1):
        raise ConfigError(f"size={size!r} must be a positive integer")
    rules = PixelRules(size, convert)
    source = _opened(uri, column, rules)
    source.look()
    return source


def _opened(uri: str, column: str | None, rules: PixelRules) -> ImageSource:
    listing = Listing.of(uri)
    is_set = MANIFEST in listing.files and manifest_kind(listing.uri) == ImagePlan.KIND
    kind = GeneratedSource.kind if is_set else listing.kind()
    if kind == ParquetSource.kind:
        return ParquetSource(listing, rules, column)
    if kind == WebDatasetSource.kind:
        return WebDatasetSource(listing, rules, column)
    if column is not None:
        raise ConfigError(
            f"column={column!r} is of Parquet files and WebDatasets, and {listing.uri} is "
            f"{'an' if kind[0] in 'in' else 'a'} {kind}"
        )
    if is_set:
        return GeneratedSource(listing.uri, rules)
    return FolderSource(listing, rules) if kind == FolderSource.kind else NpzSource(listing, rules)
