"""Memory of messages in host memory, reserved once: a step's first touch of new pages costs more than copying does.

A GPU's comes from torch's caching allocator, which reserves once too, and lends it to the forward pass between steps.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class Reserve:
    """As many buffers as were ever taken at once, none larger than the largest that was asked for.

    free: those that nobody uses.
    """

    def __init__(self) -> None:
        self.free: list[Tensor] = []

    def take(self, size: int, device: torch.device) -> Tensor:
        """uint8 (size or more,) of any content: the smallest that will do, of these the latest given.

        In place of the largest free buffer if even that is too small.
        """
        if device.type != "cpu":
            return torch.empty(size, dtype=torch.uint8, device=device)
        fit = [buffer for buffer in reversed(self.free) if len(buffer) >= size]
        chosen = min(fit, key=len) if fit else max(self.free, key=len, default=None)
        self.free = [buffer for buffer in self.free if buffer is not chosen]
        return chosen if chosen is not None and fit else torch.empty(size, dtype=torch.uint8)

    def give(self, buffer: Tensor, readers: Iterable[Tensor] = ()) -> None:
        """Nobody uses it any more, unless a reader is a view of it: then it is the reader's for good."""
        if buffer.device.type == "cpu" and all(place(reader) != place(buffer) for reader in readers):
            self.free.append(buffer)


def place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
