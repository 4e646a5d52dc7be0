"""Every option of the pretraining job: a flat dataclass filled from defaults, a TOML file, then `--key value`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, get_type_hints

from shardopt.spelling import near

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    # model
    vocab: int = option(256, "vocabulary size; 256 for bytes")
    dim: int = option(96, "width of the residual stream")
    layers: int = option(3, "number of blocks")
    heads: int = option(4, "query heads")
    kv_heads: int = option(0, "key and value heads (grouped-query attention); 0: as many as heads")
    hidden: int = option(0, "width of the SwiGLU layer; 0: 8/3 of dim, rounded up to a multiple of 32")
    context: int = option(96, "tokens a sequence")
    rope_base: float = option(10000.0, "base of the rotary frequencies")
    qk_norm: bool = option(True, "normalise queries and keys")
    zero_init: bool = option(True, "start the output projections of attention and MLP at zero")
    zero_head: bool = option(True, "start the head at zero (without effect when tied)")
    tied: bool = option(False, "share the embedding with the head")
    # data
    data: str = option("", "folder of text files or one .bin token file; empty: the Python standard library's sources")
    glob: str = option("", "file pattern in the data folder; empty: *.py for the default corpus, else all files")
    token_dtype: str = option("uint16", "type of the tokens in a .bin file", ("uint8", "uint16"))
    val_fraction: float = option(0.08, "share of the files (of the tail of a .bin file) kept for validation")
    # training
    steps: int = option(300, "updates")
    global_batch: int = option(16, "sequences an update, over all ranks; any number of ranks may share them")
    micro_batch: int = option(0, "sequences a rank runs at once (gradient accumulation); 0: its whole share")
    seed: int = option(0, "seed of weights, data order and sample")
    param_dtype: str = option("fp32", "type in which parameters are stored and updated", ("fp32", "bf16"))
    compute_dtype: str = option(
        "auto", "type of the forward and backward pass; auto: as the parameters", ("auto", "fp32", "bf16")
    )
    reduce_dtype: str = option("fp32", "type in which gradients are reduced", ("fp32", "bf16"))
    clip: float = option(1.0, "largest global gradient norm; 0: no clipping")
    # optimizer
    optimizer: str = option("AdamW", "any optimizer of shardopt, or torch-adamw for comparison")
    state: str | dict[str, str] = option(  # noqa: RUF009
        "",
        "storage: fp32, bf16, int8, int4, factored, a codec, or exp_avg=int8,exp_avg_sq=log8; --state.SLOT CODEC; "
        "empty: the optimizer's own",
    )
    rounding: str = option("", "how parameters are written (nearest, stochastic, kahan); empty: shardopt's default")
    addons: str = option("", "comma-separated add-ons: cautious,orthograd")
    lr: float = option(3e-3, "learning rate")
    embed_lr: float = option(3e-2, "learning rate of embedding and head; 0: as lr")
    weight_decay: float = option(0.1, "weight decay of the matrices inside blocks")
    betas: str = option("", "two comma-separated numbers; empty: the optimizer's default")
    optimizer_args: str = option("", 'further arguments as JSON: {"momentum": 0.9}')
    warmup: int = option(20, "updates of linear warm-up")
    schedule: str = option("cosine", "decay after the warm-up", ("cosine", "linear", "constant"))
    decay_from: float = option(0.0, "share of the steps after which the decay begins")
    min_lr: float = option(0.0, "share of the learning rate left at the end")
    # mesh
    device: str = option("auto", "auto: cuda where there is one", ("auto", "cpu", "cuda"))
    tp: int = option(1, "tensor-parallel ranks")
    replicate: int = option(1, "replicas of the sharded model (HSDP)")
    # run
    out: str = option("runs/pretrain", "folder of log, checkpoints and plot")
    resume: str = option("auto", "auto: go on from the latest checkpoint in out; never: refuse to", ("auto", "never"))
    eval_every: int = option(100, "updates between evaluations; 0: only at the end")
    eval_batches: int = option(32, "validation windows, in global batches")
    checkpoint_every: int = option(100, "updates between checkpoints; 0: none but the one of a SIGTERM and at the end")
    first_checkpoint: int = option(10, "update after which a new run saves first, if checkpoint_every is more; 0: none")
    keep: int = option(2, "checkpoints to keep")
    sample: int = option(200, "tokens to generate at the end; 0: none")
    prompt: str = option("def ", "the sample's beginning")
    plot: bool = option(True, "draw the loss curve to loss.png")

    def __post_init__(self) -> None:
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim {self.dim} over {self.heads} heads does not give an even head size")
        if self.micro_batch < 0:
            raise ValueError(f"micro_batch is {self.micro_batch}; give the sequences of a pass, or 0 for all at once")
        if min(self.steps, self.global_batch, self.context, self.tp, self.replicate, self.keep) < 1:
            raise ValueError("steps, global_batch, context, tp, replicate and keep are at least 1")
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            if choices and getattr(self, field.name) not in choices:
                raise ValueError(f"{field.name} is {getattr(self, field.name)!r}; allowed: {', '.join(choices)}")


def parse_state(value: str | dict[str, str]) -> Any:
    """A preset's name as it is; JSON or `slot=codec,slot=codec` as a dict."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return json.loads(value)
    if isinstance(value, str) and "=" in value:
        pairs = (item.split("=", 1) for item in value.split(","))
        return {slot.strip(): codec.strip() for slot, codec in pairs}
    return value


def to_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The options of a TOML file; tables other than [state] only group them."""
    if not Path(path).is_file():
        raise ValueError(f"--config is {path}, where there is no file")
    flat: dict[str, Any] = {}
    for key, value in tomllib.loads(Path(path).read_text(encoding="utf-8")).items():
        flat.update(value if isinstance(value, dict) and key != "state" else {key: value})
    names = [field.name for field in dataclasses.fields(Config)]
    hints = get_type_hints(Config)
    for key, value in flat.items():
        if key not in names:
            meant = near(key, names) or f"; there are {', '.join(names)}"
            raise ValueError(f"{path}: unknown option {key!r}{meant}")
        kind = hints[key]
        if kind is float and type(value) is int:
            flat[key] = float(value)
        elif type(value) is not kind and not (key == "state" and isinstance(value, (str, dict))):
            raise ValueError(f"{path}: {key} = {value!r} is not of type {getattr(kind, '__name__', kind)}")
    return flat


def parse(argv: list[str]) -> Config:
    """The configuration of a command line; `--key value`, dashes and underscores alike."""
    parser = argparse.ArgumentParser(prog="pretrain", allow_abbrev=False, description="FSDP2 pretraining with shardopt")
    parser.add_argument("--config", help="TOML file with any of the options below")
    hints = get_type_hints(Config)
    for field in dataclasses.fields(Config):
        flags = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
        hint = hints[field.name]
        kind = hint if hint in (int, float) else to_bool if hint is bool else str
        parser.add_argument(
            *flags,
            type=kind,
            default=argparse.SUPPRESS,
            choices=field.metadata["choices"],
            metavar=None if field.metadata["choices"] else "VALUE",
            help=f"{field.metadata['help']} (default: {field.default!r})".replace("%", "%%"),
        )
    known, rest = parser.parse_known_args(argv)
    given = vars(known)
    slots = {}
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not key.startswith("--state.") or not (equals or rest):
            parser.error(f"unknown argument {key}{near(key, [f'--{name}' for name in hints])}")
        slots[key.removeprefix("--state.")] = value if equals else rest.pop(0)
    config = given.pop("config", None)
    options = (read_toml(config) if config else {}) | given
    options["state"] = parse_state(options.get("state", Config.state))
    if slots:
        if isinstance(options["state"], str) and "state" in given:
            parser.error("--state.SLOT refines a dict; give either --state PRESET or slots")
        options["state"] = (options["state"] if isinstance(options["state"], dict) else {}) | slots
    return Config(**options)
