"""The matrices that Muon steps in well-known models, by name; embeddings, heads and vectors are another optimizer's."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

from shardopt.codecs import view_shape
from shardopt.codecs.sendable import wire_codec
from shardopt.dtensor.member import Member
from shardopt.dtensor.wire import Format
from shardopt.rules.muon import wire_of
from shardopt.spelling import near

Shapes = Mapping[str, tuple[int, ...]]


def attention(width: int, kv: int) -> dict[str, tuple[int, ...]]:
    return {"attn.q": (width, width), "attn.k": (kv, width), "attn.v": (kv, width), "attn.o": (width, width)}


def feed_forward(width: int, hidden: int, name: str = "mlp") -> dict[str, tuple[int, ...]]:
    return {f"{name}.gate": (hidden, width), f"{name}.up": (hidden, width), f"{name}.down": (width, hidden)}


def llama3(layers: int, width: int, kv: int, hidden: int) -> Shapes:
    """Llama 3 (arXiv 2407.21783): grouped-query attention and SwiGLU, all layers alike."""
    layer = attention(width, kv) | feed_forward(width, hidden)
    return {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}


def deepseek_moe() -> Shapes:
    """DeepSeekMoE 16B (arXiv 2401.06066), 16.0e9 elements without embeddings.

    28 layers of width 2048; the first has a dense feed-forward of 10944, the others 64 routed experts of 1408, as
    stacks of matrices, beside 2 shared ones, which are one of 2816.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(28):
        layer = attention(2048, 2048)
        if i == 0:
            layer |= feed_forward(2048, 10944)
        else:
            layer |= {"router": (64, 2048)} | feed_forward(2048, 2816, "shared")
            layer |= {name: (64, *shape) for name, shape in feed_forward(2048, 1408, "experts").items()}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


MODELS = {
    "llama3-8b": lambda: llama3(32, 4096, 1024, 14336),
    "llama3-70b": lambda: llama3(80, 8192, 1024, 28672),
    "llama3-405b": lambda: llama3(126, 16384, 1024, 53248),
    "deepseek-moe": deepseek_moe,
}


def shapes_of(model: str) -> Shapes:
    """Shapes of a known model, or of a JSON file {name: [..., rows, cols]}."""
    if model in MODELS:
        return MODELS[model]()
    path = Path(model)
    if not path.is_file():
        raise ValueError(f"--model {model}: neither a file nor one of {', '.join(MODELS)}{near(model, MODELS)}")
    try:
        shapes = {name: tuple(shape) for name, shape in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"--model {model}: not a JSON object of name to shape ({error})") from error
    if not shapes:
        raise ValueError(f"--model {model}: holds no shapes; give at least one matrix, as {{name: [rows, cols]}}")
    for name, shape in shapes.items():
        if any(type(n) is not int or n < 1 for n in shape):
            raise ValueError(f"--model {model}: {name} has shape {list(shape)}; sizes are integers of at least 1")
        if len(shape) < 2:
            raise ValueError(f"--model {model}: {name} is no matrix; leave out what Muon does not step")
    return shapes


def members_of(shapes: Shapes, shards: int, wire: str) -> list[Member]:
    """As FSDP2 cuts them: along the first dim, so that stacks of at least as many matrices as shards stay whole.

    Shorter stacks are cut along the rows of every matrix. wire: as Muon's.
    """
    codecs = [wire_codec(spec) for spec in wire_of(wire)]
    members = []
    for shape in shapes.values():
        *stack, rows, cols = view_shape(shape)  # a convolution is one matrix
        count = prod(stack)
        chunk = -(-count // shards)
        holders = tuple(i // chunk for i in range(count)) if stack and count >= shards > 1 else None
        there, back = (Format(codec, rows, cols).element_bytes for codec in codecs)
        members.append(Member(rows=rows, cols=cols, count=count, holders=holders, there=there, back=back))
    return members
