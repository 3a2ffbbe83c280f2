"""A picture of random rows of a trajectory set, decoded by its teacher's tokenizer."""

from functools import partial

from ddray.sets.picture import decode_tokens, draw_rows, picture_place
from ddray.sets.trajectories.making import planned_teacher
from ddray.sets.trajectories.trajectory_set import TrajectorySet


def write_picture(uri: str, path: str) -> None:
    """Decode random rows into a picture; see `ddray.sets.picture.draw_rows`.

    Args:
        uri: of the set.
        path: path or URI of the picture, which ends in .png.

    Raises:
        ConfigError: for another ending, or a teacher that is not here.
        ShardError: if the teacher has other weights, or there is nothing to decode.
        StorageError: if the picture cannot be written.
    """
    storage, name = picture_place(path)
    trajectories = TrajectorySet.open(uri)
    storage.check_writable()
    teacher = planned_teacher(trajectories.plan, "cpu")
    names = teacher.config.get("class_names", ())
    storage.write(
        name, draw_rows(trajectories, lambda rows: rows, partial(decode_tokens, teacher), names)
    )
