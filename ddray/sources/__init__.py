"""Images of anyone, in one fixed order, from any place: folders, tars, Parquet, arrays, our sets.

`opening` is the way in; a file for each kind of source says how its images are found and fetched,
`base` decodes them ahead of the reader, `pixels` alone says what becomes of colours and sizes.
"""

from ddray.sources.base import BrokenImage, ImageSource
from ddray.sources.opening import open_source

__all__ = ["BrokenImage", "ImageSource", "open_source"]
