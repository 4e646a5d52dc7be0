"""Cuts of one dim by any chain of mesh axes: a partition, in torch.chunk's sizes, with every boundary known."""

from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardopt.dtensor.cut import Cut, boundaries, pieces_of

axes = st.lists(st.tuples(st.integers(1, 4), st.sampled_from((1, 1, 2, 3))), min_size=1, max_size=3)


def chunked(held, size):
    """torch.chunk, empty pieces included."""
    pieces = list(held.chunk(size)) if len(held) else []
    return pieces + [held[:0]] * (size - len(pieces))


def by_torch(length, cuts, where):
    held = torch.arange(length)
    for cut in cuts:
        stripes = chunked(held, cut.split)
        held = torch.cat([chunked(stripe, cut.size)[where[cut.axis]] for stripe in stripes])
    return held


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 97), axes)
def test_any_cut_is_torchs(length, drawn):
    """Kills: chunk sizes by floor, a strided axis taken as a plain one, boundaries of this rank alone."""
    cuts = tuple(Cut(axis, size, split) for axis, (size, split) in enumerate(drawn))
    owner = torch.full((length,), -1)
    for number, where in enumerate(product(*(range(cut.size) for cut in cuts))):
        coordinates = dict(enumerate(where))
        runs = pieces_of(length, cuts, coordinates)
        mine = torch.tensor([i for first, n in runs for i in range(first, first + n)], dtype=torch.long)
        assert mine.equal(by_torch(length, cuts, coordinates))
        assert (owner[mine] == -1).all()
        owner[mine] = number
    assert (owner >= 0).all()
    assert boundaries(length, cuts) == tuple((owner.diff() != 0).nonzero().flatten().add(1).tolist())
