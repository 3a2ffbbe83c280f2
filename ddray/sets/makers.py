"""What made the bits of a set, beside its plan: the device, and the libraries that compute there.

It stands in the set's `summary.json` and not in its plan: who made a shard decides last bits, and
is known only once it is made.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ddray.file_kind import json_value
from ddray.storage.base import NotFoundError, Storage
from ddray.storage.run_folder import SUMMARY_FILE, write_json


@dataclass(frozen=True, order=True)
class Maker:
    """What the bits of a product depend on; texts, empty where there is no such thing.

    Attributes:
        kind: "cpu" or "cuda".
        device: name of the GPU; of a CPU the instructions that torch takes there.
        torch: version and build.
        cuda: version.
        cudnn: version.
        attention: kernels that torch may take for it.
    """

    kind: str
    device: str
    torch: str
    cuda: str = ""
    cudnn: str = ""
    attention: str = ""

    def is_like(self, other: "Maker") -> bool:
        """Whether it is another of the same model."""
        return (self.kind, self.device) == (other.kind, other.device)

    def differences(self, other: "Maker") -> list[str]:
        """What else is not the same, as "torch 2.12 there, 2.13 here", if the other is here."""
        return [
            f"{name} {there or 'none'} there, {here or 'none'} here"
            for name in ("torch", "cuda", "cudnn", "attention")
            if (there := getattr(self, name)) != (here := getattr(other, name))
        ]


def maker_on(device: torch.device) -> Maker:
    """What computes on a device of this process."""
    if device.type != "cuda":
        instructions = torch.backends.cpu.get_cpu_capability()
        return Maker(device.type, f"{device.type.upper()} {instructions}", torch.__version__)
    kernels = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
    }
    return Maker(
        device.type,
        torch.cuda.get_device_name(device),
        torch.__version__,
        torch.version.cuda or "",
        str(torch.backends.cudnn.version() or ""),
        ", ".join(name for name, allowed in kernels.items() if allowed),
    )


class MakersOfSet:
    """Takes note of who makes the shards of a set, over all of its runs.

    Of shards that nobody took note of nothing is known, and no later run can mend that.

    Args:
        storage: the set's.
        begun: whether it has shards already.
    """

    def __init__(self, storage: Storage, begun: bool):
        self._storage, self._makers = storage, {*makers_of(storage)}
        self._is_known = bool(self._makers) or not begun

    def note(self, maker: Maker | None) -> None:
        """Write down who has made a shard; None is somebody who does not say.

        Where that is news it is written at once: a run that is killed later has made some too.

        Raises:
            StorageError: if it cannot be written.
        """
        before = self.known
        if maker is None:
            self._is_known = False
        else:
            self._makers.add(maker)
        if self.known != before:
            write_json(
                self._storage, SUMMARY_FILE, {**_summary(self._storage), "made_by": self.known}
            )

    @property
    def known(self) -> list[dict[str, str]]:
        """All of them, as JSON values; [] if that is not known."""
        return [dataclasses.asdict(m) for m in sorted(self._makers)] if self._is_known else []


def makers_of(storage: Storage) -> list[Maker]:
    """Who made a set's shards, as its summary says; [] if unknown.

    Raises:
        StorageError: if the storage cannot be read.
    """
    listed = _summary(storage).get("made_by")
    names = {field.name for field in dataclasses.fields(Maker)}
    if not isinstance(listed, list):
        return []
    try:
        return sorted(Maker(**{k: str(v) for k, v in one.items() if k in names}) for one in listed)
    except (AttributeError, TypeError):  # by other hands
        return []


def kinds_of(storage: Storage) -> list[str]:
    """Kinds of device ("cpu", "cuda") that made a set's shards, as its summary says; [] if unknown.

    Raises:
        StorageError: if the storage cannot be read.
    """
    devices = _summary(storage).get("devices")
    return sorted(map(str, devices)) if isinstance(devices, list) else []


def _summary(storage: Storage) -> dict[str, Any]:
    try:
        summary: Any = json_value(storage.read(SUMMARY_FILE))
    except (NotFoundError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}
