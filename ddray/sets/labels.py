"""Which class each image of a set is of: a function of the rule, the index and the seed alone.

Shapes: N indices.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ddray.errors import ConfigError

RULES = ("balanced", "random", "in-order")
_IN_ORDER = re.compile(r"in-order:([1-9][0-9]{0,17})")


def label_of(
    rule: str, index: npt.ArrayLike, classes: Sequence[int] | int, seed: int = 0
) -> npt.NDArray[np.int32]:
    """The class of each index.

    "balanced" takes the classes in turn: any run of as many indices holds the list once. "random"
    draws each of them with equal chances, as the published students were judged. "in-order:M"
    takes blocks of M, and begins again behind the last class. In a list that gives weights, such
    as (0, 0, 1), class 0 comes twice as often as class 1.

    Args:
        rule: "balanced", "random" or "in-order:M".
        index: int [N], 0 and above.
        classes: which classes; a number is all of so many.
        seed: of "random".

    Returns:
        int32 [N].

    Raises:
        ConfigError: for another rule.
    """
    known = np.arange(classes) if isinstance(classes, int) else np.asarray(classes)
    number = np.asarray(index, dtype=np.int64)
    check_rule(rule)
    if rule == "random":
        place = _random_places(number.reshape(-1), len(known), seed).reshape(number.shape)
    elif rule == "balanced":
        place = number % len(known)
    else:
        place = number // int(rule.partition(":")[2]) % len(known)
    return known[place].astype(np.int32)


def check_rule(rule: str) -> None:
    """Refuse what is no rule of `label_of`.

    Raises:
        ConfigError: with those that are.
    """
    if rule not in ("balanced", "random") and not _IN_ORDER.fullmatch(rule):
        raise ConfigError(
            f"labels={rule!r} must be balanced, random or in-order:M, blocks of M images of a class"
        )


def with_block(rule: str, count: int, classes: Sequence[int] | int) -> str:
    """The rule of `label_of`: of "in-order" with the blocks that share out `count` images.

    Rounded up, so that of a count which the classes do not divide the last ones get fewer or none.
    """
    if rule != "in-order":
        return rule
    number = classes if isinstance(classes, int) else len(classes)
    return f"in-order:{-(-count // number)}"


def _random_places(index_N: npt.NDArray[np.int64], count: int, seed: int) -> npt.NDArray[np.int64]:
    import torch  # whoever asks for other labels need not load it

    from ddray.method.seeding import LABEL_STREAM, uniforms

    uniform_N = uniforms(seed, torch.from_numpy(index_N.copy()), 1, LABEL_STREAM)[:, 0].numpy()
    # A product next to the count may round to it.
    return np.minimum((uniform_N * count).astype(np.int64), count - 1)
