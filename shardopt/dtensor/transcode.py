"""State of one storage format into another, bucket by bucket: old parts are read, decoded, encoded anew and freed.

Old parts are DTensors laid out like the parameter, so that every rank reads its own share; where the old format
cannot be cut the way this parameter is (a packed byte would lie on two ranks), a rank reads it whole and keeps its
piece.
"""

from collections.abc import Iterable, Iterator, Sequence
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
from shardopt.state import STEP, noise_of, part_name

BUCKET_ELEMENTS = 1 << 26  # local elements whose old parts are in memory at once; slots count one by one


class Job(NamedTuple):
    """One slot of one parameter.

    prefix: of its entries in the checkpoint. layout: the parameter's; source: the one in which old parts are read.
    state: the parameter's, complete. device: where its local state is.
    """

    prefix: str
    slot: str
    old: Codec
    new: Codec
    layout: Layout
    source: Layout
    state: dict[str, Tensor]
    device: torch.device


def run(jobs: Iterable[Job], stored: Stored, channel: Channel, answers: Answers) -> None:
    """Do all jobs, in order; every rank has the same ones. `step` and `key` must be loaded."""
    jobs = list(jobs)
    fits = [all(each) for each in zip(*channel.everywhere(lambda: [fits_layout(job) for job in jobs]))]
    jobs = [job if fit else job._replace(source=whole_layout(job.layout.shape)) for job, fit in zip(jobs, fits)]
    for bucket in buckets(jobs):
        read = [old_parts(job) for job in bucket]
        stored.read(entries(bucket, read), channel)
        for job in bucket:
            write(job, read.pop(0), answers)


def entries(bucket: Sequence[Job], read: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Entry of the checkpoint -> old part."""
    return {
        job.prefix + part_name(job.slot, suffix): part
        for job, parts in zip(bucket, read)
        for suffix, part in parts.items()
    }


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


def old_parts(job: Job) -> dict[str, Tensor]:
    """Empty parts of the old format, to be read into."""
    specs = job.old.parts(job.layout.geo.view)
    return {part.suffix: job.source.new(part, job.device) for part in specs}


def fits_layout(job: Job) -> bool:
    """Whether the old format can be cut the way this parameter is, as far as this rank sees."""
    try:
        old_parts(job._replace(device=torch.device("meta")))
    except ValueError:
        return False
    return True


def whole_layout(shape: tuple[int, ...]) -> Layout:
    geo = Geometry.whole(shape)
    return Layout(shape, None, (), geo, ((),) * len(geo.view), shape)


def write(job: Job, parts: dict[str, Tensor], answers: Answers) -> None:
    """Decode the old parts and encode their value into the parameter's state."""
    contents = {suffix: viewed(local_of(part), job.source) for suffix, part in parts.items()}
    value = drive(job.old.read(contents, job.source.geo), job.source, answers)
    if job.source is not job.layout:
        value = piece(value, job.layout.geo)
    geo = job.layout.geo
    noise = noise_of(job.state, job.state[STEP], geo)
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
