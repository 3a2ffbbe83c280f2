"""Facts about room on a node: it is counted as Ray packs it, in parts of 1e-4."""

import pytest

from ddray.config.sampling import SampleConfig
from ddray.cost import estimate_sample
from ddray.runtime.cluster.capacity import _fits


def _node(cpus: float, gpus: float = 0) -> dict[str, dict[str, float]]:
    return {"Resources": {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}}


@pytest.mark.parametrize("parts", range(1, 101))
def test_as_many_parts_of_a_gpu_fit_as_ray_packs(parts: int) -> None:
    for gpus in (1, 4):
        assert _fits(_node(64 * 100, gpus), 1, 1 / parts) == gpus * parts


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.25, 0.5])
def test_shares_that_divide_a_gpu_use_all_of_it(share: float) -> None:
    assert _fits(_node(64, 1), 1, share) * share == pytest.approx(1)


@pytest.mark.parametrize(
    ("cpus", "gpus", "num_cpus", "num_gpus", "fits"),
    [
        (4, 0, 1, 0, 4),
        (4, 0, 3, 0, 1),
        (0.3, 0, 0.1, 0, 3),  # 0.3 // 0.1 is 2
        (2, 0, 0.4, 0, 5),  # CPUs are no devices: a worker may lie across them
        (64, 0, 1, 0.1, 0),
        (64, 2, 1, 0.6, 2),  # one a GPU: a part lies on one
        (64, 3, 1, 2, 1),
        (64, 8, 1, 1, 8),
        (2, 8, 1, 0.1, 2),
        (64, 0.5, 1, 0.1, 5),
    ],
)
def test_a_worker_lies_on_one_node_and_a_part_of_a_gpu_on_one(
    cpus: float, gpus: float, num_cpus: float, num_gpus: float, fits: int
) -> None:
    assert _fits(_node(cpus, gpus), num_cpus, num_gpus) == fits


def test_parts_of_gpus_add_up_in_what_a_job_costs() -> None:
    # 100 times 0.07 is a little more than 7 in binary fractions.
    config = SampleConfig.model_validate({"workers": 100, "num_gpus": 0.07})
    assert "h on 7)" in estimate_sample(config)["gpu_hours"]
