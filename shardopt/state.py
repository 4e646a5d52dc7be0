"""Slots bound to their parts: how one parameter's state is named, made, read and, once certain, written."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shardopt.asks import Asking, together
from shardopt.codecs import Codec
from shardopt.codecs.base import Noise, Parts
from shardopt.codecs.geometry import Geometry
from shardopt.codecs.noise import draw, stream_of

STEP, KEY = "step", "key"


def part_name(slot: str, suffix: str) -> str:
    """The name of a part in state dicts and checkpoints: a file format."""
    return f"{slot}.{suffix}" if suffix else slot


def part_specs(codecs: Mapping[str, Codec], layout: Any) -> dict[str, Any]:
    """name -> Part of everything that a parameter of this layout stores, in order."""
    return {
        part_name(slot, part.suffix): part for slot, codec in codecs.items() for part in codec.parts(layout.geo.view)
    }


def make_state(codecs: Mapping[str, Codec], layout: Any, device: torch.device, key: int | None) -> dict[str, Tensor]:
    """Fresh state of one parameter: a step count, a noise key where noise is drawn, and every part of every slot."""
    state: dict[str, Tensor] = {STEP: torch.zeros((), dtype=torch.float32, device=device)}
    if key is not None:
        state[KEY] = torch.tensor(key, dtype=torch.int64, device=device)
    for name, part in part_specs(codecs, layout).items():
        state[name] = layout.new(part, device)
    return state


class Slot:
    """One slot during one step. `recur` and `set` register a value; nothing is written before `Slots.encode`."""

    def __init__(self, codec: Codec, parts: Parts, geo: Geometry, noise: Noise, stored: bool) -> None:
        self.codec, self.parts, self.geo, self.noise, self.stored = codec, parts, geo, noise, stored
        self.new: Any = None

    def read(self) -> Asking:
        """The value before this step, fp32, local view."""
        return (yield from self.codec.read(self.parts, self.geo))

    def recur(self, decay: Any, x: Tensor, floor: float = 1e-30) -> Asking:
        """s <- decay s + x; returns the value that this step uses. floor: see `Codec.recur`."""
        value, self.new = yield from self.codec.recur(self.parts, decay, x, self.geo, floor)
        if self.stored and not self.codec.projects:
            parts = yield from self.codec.encode(self.new, self.geo, self.noise)
            value = yield from self.codec.read(parts, self.geo)
        return value

    def set(self, value: Tensor) -> None:
        """s <- value."""
        self.new = value

    def encode(self) -> Asking:
        return (yield from self.codec.encode(self.new, self.geo, self.noise))


class Slots:
    """All slots of one parameter during one step: `s.exp_avg`, `s["kahan.compensation"]`.

    noise: stream -> int32 noise of the local view's shape.
    """

    def __init__(
        self,
        codecs: Mapping[str, Codec],
        local: Callable[[str], Tensor],
        geo: Geometry,
        noise: Callable[[int], Tensor],
        stored: bool,
    ) -> None:
        self.local = local
        self.slots = {
            name: Slot(
                codec,
                {part.suffix: local(part_name(name, part.suffix)) for part in codec.parts(geo.view)},
                geo,
                partial(noise, stream_of(name)),
                stored,
            )
            for name, codec in codecs.items()
        }

    def __getattr__(self, name: str) -> Slot:
        try:
            return self.__dict__["slots"][name]
        except KeyError:
            raise AttributeError(name) from None

    __getitem__ = __getattr__

    def encode(self) -> Asking:
        """Generator: [(stored local tensor, its new content)] of every slot that was registered."""
        changed = {name: slot for name, slot in self.slots.items() if slot.new is not None}
        encoded = yield from together(*(slot.encode() for slot in changed.values()))
        return [
            (slot.parts[suffix], content)
            for slot, parts in zip(changed.values(), encoded)
            for suffix, content in parts.items()
        ]


def noise_of(state: Mapping[str, Tensor], t: Tensor, geo: Geometry) -> Callable[[int], Tensor]:
    """stream -> noise of the step t of the parameter with this state."""
    return lambda stream: draw(state[KEY], t, stream, geo)
