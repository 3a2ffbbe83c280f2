"""A critic with a network of its own: its step, and what a later run needs to go on."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def _leave(gradients: Iterable[Tensor]) -> None:
    """What one worker alone does with its gradients: nothing."""


class LearningCritic:
    """Moves a network by the gradients that `loss` of the subclass accumulates.

    One per worker; all hold the same network, as they average its gradients.

    Args:
        name: of the network in the state.
        network: the critic's own.
        optimizer: of its parameters.
        grad_clip: largest norm of the averaged gradients; None = any.

    Attributes:
        step: steps that the network has taken.
    """

    def __init__(
        self, name: str, network: nn.Module, optimizer: Optimizer, grad_clip: float | None = None
    ):
        self._name, self._network = name, network
        self._optimizer, self._grad_clip = optimizer, grad_clip
        self.step = 0

    def update(self, average: Callable[[Iterable[Tensor]], None] = _leave) -> None:
        """One step of the network on the gradients since the last one.

        Args:
            average: averages gradients over the workers in place.
        """
        average([p.grad for p in self._network.parameters() if p.grad is not None])
        if self._grad_clip is not None:
            nn.utils.clip_grad_norm_(self._network.parameters(), self._grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1

    def discard(self) -> None:
        """Forget the gradients since the last step."""
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """All that a later run needs to go on."""
        return {
            self._name: self._network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._network.load_state_dict(state[self._name])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
