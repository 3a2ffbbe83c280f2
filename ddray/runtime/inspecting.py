"""What `ddray inspect` does, as it is asked for on the command line."""

import argparse
import contextlib
import sys
from importlib import import_module

from ddray.config.base import PoolConfig
from ddray.config.loading import load_config
from ddray.errors import ConfigError
from ddray.report.terminal import print_json
from ddray.sets.images.plan import ImagePlan
from ddray.sets.inspection import describe, verify
from ddray.sets.sharded_set import manifest_kind

_ROWS_RECOMPUTED = 100


def inspect(arguments: argparse.Namespace) -> int:
    """Tell what a set holds; check it and mend it, if asked to.

    Args:
        arguments: uri, picture, verify, recompute, repair, workers, num_gpus, as the command line
            has them.

    Returns:
        Exit status: 0 if all that was looked at is well, 1 if not.

    Raises:
        DDRayError: for flags that do not go together, no set, or a set that cannot be read.
    """
    needs = {"recompute": "verify", "workers": "repair", "num_gpus": "repair"}
    for name, needed in needs.items():
        if getattr(arguments, name) is not None and not getattr(arguments, needed):
            raise ConfigError(f"--{name.replace('_', '-')} has no effect without --{needed}")
    if arguments.recompute is not None and arguments.recompute < 0:
        raise ConfigError(f"--recompute {arguments.recompute}: a number of rows is 0 or more")
    flags = {"workers": arguments.workers or "1:1", "num_gpus": arguments.num_gpus or 0}
    pool = load_config(PoolConfig, flags=flags)
    if arguments.picture:
        _draw(arguments.uri, arguments.picture)
    print_json(describe(arguments.uri))
    if arguments.repair:
        from ddray.runtime.pools.repair import repair

        with contextlib.redirect_stdout(sys.stderr):
            lines = repair(arguments.uri, pool)
        print("\n".join(lines), flush=True)
    return _verify(arguments) if arguments.verify else 0


def _draw(uri: str, path: str) -> None:
    """A picture of random rows of a set of either kind."""
    kind = "images" if manifest_kind(uri) == ImagePlan.KIND else "trajectories"
    import_module(f"ddray.sets.{kind}.picture").write_picture(uri, path)


def _verify(arguments: argparse.Namespace) -> int:
    of_images = manifest_kind(arguments.uri) == ImagePlan.KIND
    if of_images and arguments.recompute:
        raise ConfigError(f"--recompute is for trajectories; {arguments.uri} is a set of images")
    problems = verify(arguments.uri)
    print("\n".join(problems) or "verified: every index once, every hash right", flush=True)
    if of_images or arguments.recompute == 0:
        return 1 if problems else 0
    from ddray.sets.trajectories.recompute import recompute

    try:
        outcome = recompute(arguments.uri, arguments.recompute or _ROWS_RECOMPUTED)
    except ConfigError as error:
        if arguments.recompute:
            raise
        # Nobody asked for it, and shards can be checked where there is no teacher.
        print(f"not recomputed: {error}")
        return 1 if problems else 0
    print("\n".join(outcome.lines()))
    return 0 if outcome.ok and not problems else 1
