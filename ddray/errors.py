"""What can go wrong, as exceptions whose message is the whole story for the user.

Each message says what was wrong, the value, what is allowed and what to do. The command line prints
the message alone and exits with the class's `exit_code`: 2 for wrong usage or configuration, 1 for
work that failed. Imports nothing.
"""


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
