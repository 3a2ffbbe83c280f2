"""How the workers of a run find each other: on one machine by a file, on a cluster by a port.

torch's store listens on every interface and does what it is told by whoever connects, where all
else of Ray asks for a token. The workers of a cluster cannot do without; those of one machine can.
"""

import uuid
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)

from ddray.runtime.cluster.connection import private_folder


def process_group(timeout_s: int) -> TorchConfig:
    """What Train is told of the process group.

    Args:
        timeout_s: of a collective, and of the meeting.

    Returns:
        The setting for the Ray that this process is connected to.
    """
    folder = private_folder()
    if folder is None:
        return TorchConfig(timeout_s=timeout_s)
    return OneMachine(timeout_s=timeout_s, folder=folder)


@dataclass
class OneMachine(TorchConfig):
    """A process group that meets in a file.

    Attributes:
        folder: in which each group makes a file of its own.
    """

    folder: str = ""

    @property
    def backend_cls(self) -> type:
        """For Train, which asks for it."""
        return _MeetingInAFile


class _MeetingInAFile(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Bring up the process group in all workers."""
        import ray

        assert isinstance(backend_config, OneMachine)
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU") else "gloo"
        file = f"{backend_config.folder}/process-group-{uuid.uuid4().hex}"
        worker_group.execute(_set_torch_distributed_env_vars)
        meetings = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend=backend,
                world_rank=rank,
                world_size=len(worker_group),
                init_method=f"file://{file}",
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(meetings)
