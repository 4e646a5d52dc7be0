"""Names, options and errors of codecs."""

from dataclasses import replace

import pytest

from shardopt.codecs import CODECS, check_slot, codec
from shardopt.codecs.block import Int8, Root4
from tests.codec_kit import ELEMENTWISE, SLOTS

# Names, options, errors


def test_names_and_parts():
    order = "fp32 bf16 fp16 int8 sqrt8 dyn8 root4 log8 log16 int4 dyn4 log4 fp8 factored"
    assert " ".join(CODECS) == order
    seen = {}
    for name, cls in CODECS.items():
        for part in cls().parts((64, 512)):
            assert part.suffix not in seen
            seen[part.suffix] = name
            assert part.reducible == part.suffix.endswith(("_scale", "_lo", "_range"))
    assert seen[""] == "fp32"


@pytest.mark.parametrize("name", CODECS)
def test_describe_is_parsed_back(name):
    cls = CODECS[name]
    for c in (cls(), cls().for_slot(cls.signed)):
        assert c.describe() == name and codec(name) == cls()
    if "block" in cls.__dataclass_fields__:
        c = cls(block=64)
        assert c.describe() == f"{name}(block=64)" and codec(c.describe()) == c and codec(c) is c
    if "rounding" in cls.__dataclass_fields__:
        c = cls(rounding="stochastic")
        assert codec(c.describe()) == c and codec(c.for_slot(False).describe()).for_slot(False) == c.for_slot(False)


def test_auto_rounding():
    noisy = {(name, signed) for name, signed in SLOTS if CODECS[name]().for_slot(signed).noisy}
    assert noisy == {(name, False) for name in ("bf16", "fp16", "root4", "log8", "log4", "fp8")}
    assert not replace(Root4(), rounding="nearest").noisy


def test_gate():
    assert codec("fp32").fits((3,)) and codec("factored").fits((2, 2)) and not codec("factored").fits((9,))
    for name in ELEMENTWISE[1:]:
        c = codec(name)
        assert c.fits((128, 32)) and not c.fits((8192,)) and not c.fits((64, 32)) and not c.fits((512, 31))


@pytest.mark.parametrize(
    "make_one, words",
    [
        (lambda: codec("int9"), "'int9'.*Use one of fp32, bf16"),
        (lambda: codec("int8(blok=3)"), "'blok'.*has the options block"),
        (lambda: codec("fp32(block=8)"), "has no options"),
        (lambda: codec("int8(_signed=True)"), "'_signed'"),
        (lambda: codec("int8(128)"), "name\\(option=value"),
        (lambda: codec("int8(block=__import__('os'))"), "name\\(option=value"),
        (lambda: codec("int8(**{})"), "name\\(option=value"),
        (lambda: codec(8), "got 8"),
        (lambda: Int8(block=100), "block=100.*power of two"),
        (lambda: codec("log4(block=2)"), "log4 got block=2"),
        (lambda: codec("int8(block=True)"), "block=True"),
        (lambda: codec("log8(rounding='up')"), "rounding='up'.*'nearest', 'stochastic' or 'auto'"),
        (
            lambda: check_slot(codec("log8"), "exp_avg", True, "AdamW"),
            "log8 stores non-negative slots; slot exp_avg of AdamW is signed. "
            "Use fp32, bf16, fp16, int8, sqrt8, dyn8, int4, dyn4 or fp8.",
        ),
        (lambda: check_slot(codec("int4"), "exp_avg_sq", False, "AdamW"), "stores signed slots.*log8.*or factored"),
    ],
)
def test_errors_say_what_to_do(make_one, words):
    with pytest.raises(ValueError, match=words):
        make_one()


def test_every_codec_takes_the_slots_it_says():
    for name, signed in SLOTS:
        check_slot(codec(name), "s", signed, "Rule")
