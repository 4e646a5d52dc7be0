"""The native codecs of messages: bit by bit what the reference encodes and decodes, whatever is local of a matrix."""

from functools import cache

import pytest
import torch

import shardopt
from shardopt.asks import result_of
from shardopt.codecs import Geometry
from shardopt.codecs.sendable import wire_codec
from shardopt.dtensor.wire import Format, Local
from shardopt.kernels import cpu, cuda, wire
from shardopt.kernels.cache import NoCompiler
from shardopt.kernels.wire import Coder
from tests.fake_gpu import FakeDriver
from tests.small import params, same, train

pytestmark = pytest.mark.shipped
CODECS = (
    "int8(block=128)", "int8", "int4(block=64)", "int4(block=8)", "bf16", "fp16", "fp8", "sqrt8(block=64)",
    "dyn8(block=64)", "dyn4(block=32)",
)  # fmt: skip
SHAPES = ((1, 1), (3, 7), (2, 64), (5, 129), (4, 383), (2, 3, 300), (70, 1024))


def values(shape, seed=0):
    """Rows of many magnitudes: zeros, subnormals, ties between codes, NaN and infinities among them."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=made) * torch.exp2(torch.randint(-40, 40, (*shape[:-1], 1), generator=made))
    flat = x.view(-1)
    for i, value in enumerate((0.0, -0.0, 1e-44, -1e-39, 3.3e38, 65519.9, 0.5, 1.5, torch.nan, torch.inf, -torch.inf)):
        flat[i * 37 :: 997] = value
    x[..., :: max(2, shape[-1] // 3)] *= 3
    if shape[0] > 2:
        x[1], x[2] = 0, torch.arange(shape[-1]) * 0.5 - 7
    return x


def geometry(shape, first=0, last=None):
    """Of whole rows, or of columns first..last-1 of them."""
    last = shape[-1] if last is None else last
    runs = (*(((0, n),) for n in shape[:-1]), ((first, last - first),))
    return Local(shape, runs, (*((),) * (len(shape) - 1), tuple({first, last} - {0, shape[-1]})))


def alike(a, b):
    """Bit by bit; a number is NaN where the other is, whatever its bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    same = a.contiguous().view(torch.uint8) == b.contiguous().view(torch.uint8)
    both = a.float().isnan() & b.float().isnan()
    return bool((same | both.unsqueeze(-1).expand(*a.shape, a.itemsize).reshape(same.shape)).all())


@pytest.fixture(params=["cpu", "emulated"])
def coder(request, monkeypatch):
    """On the CPU, and a GPU's warps on an emulated one, whose moves must be aligned."""
    if request.param == "emulated":
        monkeypatch.setattr(wire, "native", on_emulated_gpu)
    return Coder()


@cache
def on_emulated_gpu(codec, device):
    if codec.name == "fp32":
        return None
    return wire.OnGpu(FakeDriver(library=cpu.library(wire.source_of(codec), "emulated")), codec)


@pytest.mark.parametrize("spec", CODECS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encodes_and_decodes_as_the_reference(coder, spec, shape):
    """Kills: a short block's length, a zero nibble that is not the codec's, rows of another width, a root or a tie
    rounded elsewhere, a scale that loses a NaN."""
    codec, x, geo = wire_codec(spec), values(shape), geometry(shape)
    expected = result_of(codec.encode(x, geo, None))
    found = coder.encode(codec, x, geo)
    assert list(found) == list(expected) and all(alike(found[k], expected[k]) for k in found)
    assert alike(coder.decode(codec, found, geo), codec.decode(expected, geo))


@pytest.mark.parametrize("spec", ["int8(block=128)", "int4(block=64)", "dyn8(block=64)", "bf16"])
@pytest.mark.parametrize("first, last", [(0, 128), (128, 300), (128, 512), (384, 512)])
def test_encodes_columns_that_begin_with_a_block(coder, spec, first, last):
    """Kills: numbers of blocks of the whole row where only some are here."""
    codec, geo = wire_codec(spec), geometry((6, 512), first, last)
    x = values((6, 512))[:, first:last]  # not contiguous
    if geo.straddles(getattr(codec, "block", 1)):
        assert coder.encode(codec, x, geo) is None
        return
    expected, found = result_of(codec.encode(x, geo, None)), coder.encode(codec, x, geo)
    assert all(alike(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("spec", ["int8(block=128)", "int4(block=64)", "fp8", "sqrt8(block=64)", "bf16"])
@pytest.mark.parametrize(
    "first, last", [(0, 1), (2, 301), (126, 130), (8, 300), (128, 256), (130, 512), (255, 257), (511, 512)]
)
def test_decodes_any_columns(coder, spec, first, last):
    """What a rank gets of a matrix that is cut between its columns. Kills: blocks that begin where the piece does."""
    codec, format = wire_codec(spec), Format(wire_codec(spec), 6, 512)
    rows, cols = ((0, 6),), ((first, last - first),)
    piece = format.cut(format.encode(values((1, 6, 512))), ((0, 1),), rows, cols)
    found = format.decode(piece, rows, cols, coder)
    assert alike(found, format.decode(piece, rows, cols))
    parts = dict(zip((part.suffix for part in format.parts), piece))
    native = coder.decode(codec, parts, geometry((1, 6, 512), first, last))
    odd = first % getattr(codec, "block", 1) % 8 if wire.native is on_emulated_gpu else 0  # a lane's 8 in two blocks
    assert (native is None) == bool(odd or (spec.startswith("int4") and first % 2))


def test_threads_do_not_change_a_bit():
    """Kills: a row that two threads share."""
    codec, x, geo = wire_codec("int4(block=64)"), values((700, 129)), geometry((700, 129))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = Coder().encode(codec, x, geo)
            results.append([*found.values(), Coder().decode(codec, found, geo)])
    finally:
        torch.set_num_threads(before)
    assert all(alike(a, b) for a, b in zip(*results))


def test_what_it_cannot_do_is_left_to_the_reference(monkeypatch):
    """Two runs of columns, a block on two ranks, fp32, nothing at all, no compiler (which is said once)."""
    codec, x = wire_codec("int8(block=128)"), values((4, 200))
    strided = Geometry((4, 400), (((0, 4),), ((0, 100), (200, 100))), ((), ()))
    assert Coder().encode(codec, x, strided) is None
    assert Coder().encode(codec, x, geometry((4, 400), 100, 300)) is None
    assert Coder().encode(wire_codec("fp32"), x, geometry((4, 200))) is None
    assert Coder().encode(codec, x[:0], geometry((0, 200))) is None

    def refuse(*args):
        raise NoCompiler("there is no C++ compiler")

    monkeypatch.setattr(cpu, "library", refuse)
    monkeypatch.setattr("shardopt.kernels.native.SAID", set())
    wire.native.cache_clear()
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        assert Coder().encode(codec, x, geometry((4, 200))) is None
    assert Coder().encode(codec, x, geometry((4, 200))) is None
    wire.native.cache_clear()


@pytest.mark.parametrize("options", [{}, {"wire": "int8+int4"}, {"wire": "bf16"}])
def test_an_optimizer_sends_what_it_would_without_a_compiler(options, monkeypatch):
    """Kills: a native wire under fused=False; one that is not used otherwise."""
    ran = []
    encode = Coder.encode
    monkeypatch.setattr(Coder, "encode", lambda *args: ran.append(encode(*args)) or ran[-1])
    results = []
    for fused in (False, None):
        ran.clear()
        ps = params(((64, 96), (130, 70)))
        train(shardopt.Muon(ps, fused=fused, **options), ps, 3)
        results.append(ps)
        assert len(ran) == (0 if fused is False else 2 * 2 * 3) and all(parts is not None for parts in ran)
    assert same(*results)


@pytest.mark.parametrize("spec, arch", list(zip(CODECS, ("sm_80", "sm_90", "sm_100") * 4)))
def test_compiles_for_gpus_without_spills(spec, arch):
    """Kills: a header of the host, an index of a register array that is not constant."""
    try:
        cuda.bindings()
    except NoCompiler as why:
        pytest.skip(str(why))
    source = wire.source_of(wire_codec(spec))
    cuda.compiled(source, arch)
    report = cuda.entry_of(source, arch).facts()["report"]
    assert not (report["stack"] or report["spill_stores"] or report["spill_loads"]) and report["registers"] <= 64
