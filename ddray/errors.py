"""What can go wrong, as exceptions whose message is the whole story for the user.

Each message says what was wrong, the value, what is allowed and what to do. The command line prints
the message alone and exits with the class's `exit_code`: 2 for wrong usage or configuration, 1 for
work that failed.
"""

import math
from numbers import Integral, Real


class DDRayError(Exception):
    """Base of every error that ddray raises on purpose."""

    exit_code = 1


class ConfigError(DDRayError, ValueError):
    """A value, name or combination that cannot work; raised before any work starts."""

    exit_code = 2


class ShardError(DDRayError):
    """A trajectory set that is damaged, foreign, incomplete or of another plan."""


class StorageError(DDRayError):
    """A URI that cannot be read or written."""


class CheckpointError(DDRayError):
    """A weight file that is truncated, foreign or does not fit the model."""


class ClusterError(DDRayError):
    """Ray that cannot start, or a cluster that lacks what a job asks for."""


class TrainingError(DDRayError):
    """A distillation that could not go on."""


class StoppedError(DDRayError):
    """Work that was told to end, and has left what a rerun goes on from."""

    exit_code = 143


def one_line(error: BaseException) -> str:
    """What another library's error says, on one line and not too long; its type if it is silent."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def positive_integers(sizes: object, *names: str) -> None:
    """Refuse sizes that are not positive integers.

    Raises:
        ConfigError: with the first one and its value.
    """
    for name in names:
        value = getattr(sizes, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}={value!r} must be a positive integer")


def is_integer(value: object) -> bool:
    """Whether a value is a whole number of any integer type, numpy's included; True is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether a value is a real number of any type, and not infinite or NaN."""
    return isinstance(value, Real) and math.isfinite(value)
