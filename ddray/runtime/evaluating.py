"""Evaluation on a node of the cluster that a job was submitted to."""

import torch

from ddray.config.evaluation import EvaluateConfig
from ddray.errors import ClusterError, one_line
from ddray.evaluation.evaluate import Evaluation, evaluate
from ddray.runtime.cluster.capacity import node_labels, require
from ddray.runtime.cluster.connection import connect
from ddray.runtime.cluster.doctor import preflight

_RETRIES = 2


def evaluate_on_cluster(config: EvaluateConfig) -> Evaluation:
    """As `ddray.evaluation.evaluate.evaluate`, in a task with the threads that the job asks for.

    The driver of a job runs on the head, where work has no place.

    Raises:
        ClusterError: if the cluster cannot be reached, or has no room.
        DDRayError: what `evaluate` raises.
    """
    threads = config.threads or 1

    def task() -> Evaluation:
        torch.set_num_threads(threads)
        return evaluate(config)

    models = [model for model in (config.student, config.teacher) if model]
    with connect():
        import ray

        require("evaluation", 1, threads, config.num_gpus, config.wait_s, config.node_pool)
        preflight(threads, config.num_gpus, config.node_pool, models)
        asked = {"num_cpus": threads, "num_gpus": config.num_gpus, "max_retries": _RETRIES}
        labels = node_labels(config.node_pool)
        try:
            return ray.get(ray.remote(**asked, label_selector=labels)(task).remote())
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise ClusterError(f"the evaluation was lost: {one_line(error)}") from error
