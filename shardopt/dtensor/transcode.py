"""State of one storage format into another, bucket by bucket: old parts are read, decoded, encoded anew and freed.

Old parts are DTensors laid out like the parameter, so that every rank reads its own share; where the old format
cannot be cut the way this parameter is (a packed byte would lie on two ranks), a rank reads it whole and keeps its
piece.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardopt.asks import Asking, as_tuple, is_group
from shardopt.codecs import Codec, Geometry
from shardopt.codecs.noise import stream_of
from shardopt.dtensor.answer import Answers
from shardopt.dtensor.channel import Channel
from shardopt.dtensor.layout import Layout, local_of
from shardopt.dtensor.stored import Stored, put
from shardopt.state import noise_of, part_name

BUCKET_ELEMENTS = 1 << 26  # local elements whose old parts are in memory at once; slots count one by one


class Job(NamedTuple):
    """One slot of one parameter. prefix: of its entries in the checkpoint; state: the parameter's, complete."""

    prefix: str
    slot: str
    old: Codec
    new: Codec
    layout: Layout
    state: dict[str, Tensor]
    device: torch.device


def run(jobs: Iterable[Job], stored: Stored, channel: Channel, answers: Answers) -> None:
    """Do all jobs, in order; every rank has the same ones. `step` and `key` must be loaded."""
    for bucket in buckets(jobs):
        read = [old_parts(job) for job in bucket]
        wanted = {}
        for job, (_, parts) in zip(bucket, read):
            wanted.update({job.prefix + part_name(job.slot, suffix): part for suffix, part in parts.items()})
        stored.read(wanted, channel)
        del wanted
        for job in bucket:
            layout, parts = read.pop(0)
            write(job, layout, parts, answers)
            del parts


def buckets(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Cut from global facts, so that all ranks cut alike; a job larger than a bucket is one by itself."""
    bucket: list[Job] = []
    elements = 0
    for job in jobs:
        share = job.layout.numel // max(1, job.layout.ranks)
        if bucket and elements + share > BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append(job)
        elements += share
    if bucket:
        yield bucket


def old_parts(job: Job) -> tuple[Layout, dict[str, Tensor]]:
    """Empty parts of the old format to be read into, and the layout that they have."""
    specs = job.old.parts(job.layout.geo.view)
    try:
        return job.layout, {part.suffix: job.layout.new(part, job.device) for part in specs}
    except ValueError:
        whole = whole_layout(job.layout.shape)
        return whole, {part.suffix: whole.new(part, job.device) for part in specs}


def whole_layout(shape: tuple[int, ...]) -> Layout:
    geo = Geometry.whole(shape)
    return Layout(shape, None, (), geo, ((),) * len(geo.view), shape)


def write(job: Job, layout: Layout, parts: dict[str, Tensor], answers: Answers) -> None:
    """Decode the old parts and encode their value into the parameter's state."""
    locals_ = {suffix: viewed(local_of(part), layout) for suffix, part in parts.items()}
    value = drive(job.old.read(locals_, layout.geo), layout, answers)
    if layout is not job.layout:
        value = piece(value, job.layout.geo)
    geo = job.layout.geo
    state = {name: local_of(tensor) for name, tensor in job.state.items() if tensor.ndim == 0}
    step = state["step"].double()
    noise = noise_of(state, step, geo)
    stream = stream_of(job.slot)
    encoded = drive(job.new.encode(value, geo, lambda: noise(stream)), job.layout, answers)
    for suffix, content in encoded.items():
        put(job.state[part_name(job.slot, suffix)], content)


def viewed(local: Tensor, layout: Layout) -> Tensor:
    return layout.view(local) if tuple(local.shape) == layout.local_shape else local


def piece(value: Tensor, geo: Geometry) -> Tensor:
    """What of a whole tensor, in the view, is local."""
    for dim, runs in enumerate(geo.runs):
        value = torch.cat([value.narrow(dim, first, length) for first, length in runs], dim)
    return value


def drive(asking: Asking, layout: Layout, answers: Answers) -> Any:
    """Run one generator to its end, answering what it asks; returns its result."""
    reply: Any = None
    while True:
        try:
            asked = asking.send(reply)
        except StopIteration as stop:
            return stop.value
        got = answers.start([(layout, ask) for ask in as_tuple(asked)]).finish()
        reply = tuple(got) if is_group(asked) else got[0]
