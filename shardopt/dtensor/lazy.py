"""State that comes into being complete and at once, the first time anybody looks, and never on meta."""

import gc
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class LazyState(dict):
    """`optimizer.state`: filled by `fill` at the first look, so that DCP finds it complete on every rank.

    A dict and a plain attribute, never a property: pickle, deepcopy and torch's own load must see it.
    """

    fill: Callable[[], None] | None = None
    current: Callable[[Any], bool] | None = None  # whether what is there of a key needs no look at the others

    def __init__(self, content: Any = ()) -> None:
        super().__init__(content)
        self.lock = threading.RLock()  # an asynchronous save may look too

    def look(self) -> "LazyState":
        with self.lock:
            if self.fill is not None:
                self.fill()
        return self

    def __getitem__(self, key: Any) -> Any:
        """As torch's defaultdict, but what has no state leaves no empty one behind."""
        if self.current is None or not self.current(key):
            self.look()
        return dict.get(self, key) if dict.__contains__(self, key) else {}

    def __len__(self) -> int:
        return dict.__len__(self.look())

    def __iter__(self) -> Any:
        return dict.__iter__(self.look())

    def __contains__(self, key: Any) -> bool:
        return dict.__contains__(self.look(), key)

    def get(self, key: Any, default: Any = None) -> Any:
        if self.current is None or not self.current(key):
            self.look()
        return dict.get(self, key, default)

    def keys(self) -> Any:
        return dict.keys(self.look())

    def values(self) -> Any:
        return dict.values(self.look())

    def items(self) -> Any:
        return dict.items(self.look())

    def plain(self) -> dict[Any, Any]:
        """What is there, without looking."""
        return dict(dict.items(self))

    def __reduce__(self) -> Any:
        return (dict, (self.plain(),))


def is_meta(tensor: Tensor) -> bool:
    return local_device(tensor).type == "meta"


def local_device(tensor: Tensor) -> torch.device:
    """Where the local data is: for an offloaded DTensor not where its mesh is."""
    return tensor._local_tensor.device if isinstance(tensor, DTensor) else tensor.device


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Device, dtype, shape, mesh and placements: what fresh state was made for."""
    mesh = (id(tensor.device_mesh), tensor.placements) if isinstance(tensor, DTensor) else ()
    return (local_device(tensor), tensor.dtype, tuple(tensor.shape), *mesh)


def owned_by_a_module(tensor: Tensor) -> bool:
    """Whether some module still holds this parameter. Slow: asks the garbage collector."""
    return any(
        isinstance(owner, dict) and any(v is tensor for v in owner.values()) for owner in gc.get_referrers(tensor)
    )


def check_not_stale(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """For a first step in which nothing has a gradient: raises for meta, returns a warning where none has an owner.

    `to_empty` replaces plain meta parameters, and `fully_shard` replaces plain ones by DTensors: an optimizer built
    before holds what nobody trains any more.
    """
    orphans = []
    for name, tensor in named:
        if is_meta(tensor):
            raise ValueError(
                f"{name} is still on the meta device and has no gradient: the optimizer was built before to_empty "
                "replaced its parameters. Build it after to_empty (or after fully_shard, whose DTensor parameters "
                "to_empty keeps)"
            )
        orphans.append(not owned_by_a_module(tensor))
    if orphans and all(orphans):
        return (
            "no parameter has a gradient, and no module holds any of them: this optimizer was built before "
            "fully_shard or to_empty replaced its parameters and trains nothing. Build it afterwards"
        )
    return None
