"""Which codecs a wire may use: those that give every mesh the same bits."""

from functools import cache

from shardopt.codecs import Codec, codec


@cache
def wire_codec(spec: str) -> Codec:
    """The codec of this name. ValueError unless it stores signed values, element by element, without noise."""
    found = codec(spec).for_slot(True)
    if not found.signed or found.noisy or found.projects:
        raise ValueError(
            f"{spec!r} cannot be sent: a wire has a deterministic format of signed elements, so that every mesh gets "
            "the same bits. Use fp32, bf16, fp16, int8, sqrt8, dyn8, fp8, int4 or dyn4, with rounding='nearest'"
        )
    return found
