"""Routes a model's parameters by role: matrices to the optimizer asked for, the rest to one that suits them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from shardopt.codecs import view_shape
from shardopt.optimizer import ShardedOptimizer
from shardopt.presets import PRESETS
from shardopt.presets.base import arguments_of
from shardopt.recipe import Recipe
from shardopt.spelling import choice, near
from shardopt.telling import tell

ROLES = ("matrix", "embedding", "head", "vector")
EMBEDDINGS, POSITIONS = ("embed", "wte"), ("position", "pos_embed", "wpe", "time")
HEADS = (
    "lm_head", "head", "output", "output_head", "unembed", "unembedding", "embed_out", "logits", "to_logits",
    "classifier", "score",
)  # fmt: skip
WRAPPERS = ("module", "model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
NARROWEST, LONGEST = 4, 128  # orthogonalized: at least so many rows and columns, at most so many times longer than wide
OF_THE_OPTIMIZER = ("fused", "nonfinite", "seed")
USUAL = {role: {"weight_decay": 0.0, "state": "fp32"} for role in ("embedding", "head", "vector")}


def roles(model: nn.Module, overrides: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name of every parameter that needs a gradient -> its role, by name, owner module and GLOBAL shape.

    vector: at most one dim, a bias, whatever a normalisation owns, what is too narrow or too long to be orthogonalized,
    and what its view would misread: a stack of matrices narrower than 32, a convolution whose kernel is 32 or longer.
    embedding: of nn.Embedding, or named like one (not a position's). head: named like one (lm_head, head, output,
    unembed, classifier, logits, ...), or, where none is, the only nn.Linear near the top of the model that has as many
    rows as an nn.Embedding. matrix: the rest, stacks and convolutions included. Tied weights are embeddings. overrides:
    patterns of names ("layers.*.gate.weight") -> role, the first that matches wins; ValueError for one that matches
    nothing, or for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}; give the module itself, whose names and modules tell roles"
        )
    every = [entry for entry in owned(model) if entry[1].requires_grad]
    found = {name: role_of(name, p, owner) for name, p, owner in every}
    if "head" not in found.values():
        vocabularies = {p.shape[0] for _, p, owner in every if isinstance(owner, nn.Embedding)}
        tops = [(name, p) for name, p, owner in every if isinstance(owner, nn.Linear) and len(words_of(name)) <= 2]
        heads = [name for name, p in tops if found[name] == "matrix" and p.shape[0] in vocabularies]
        if len(heads) == 1:
            found[heads[0]] = "head"
    for pattern, role in (overrides or {}).items():
        choice(f"the role of {pattern!r}", role, ROLES)
    return found | matched(found, overrides or {}, "parameter")


def matched(names: Collection[str], patterns: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Name -> the value of the first pattern that it matches, for those that match one. ValueError for a pattern that
    is no name's first."""
    found, unused = {}, dict.fromkeys(patterns)
    for name in names:
        for pattern, value in patterns.items():
            if fnmatchcase(name, pattern):
                unused.pop(pattern, None)
                found[name] = value
                break
    if unused:
        words = f"no {what} is named like {', '.join(map(repr, unused))}; a pattern is of whole names, as '*.gate.*'"
        first = next(iter(unused))
        longer = f"{first.rstrip('.*')}.*"
        if any(fnmatchcase(name, longer) for name in names):
            raise ValueError(f"{words}; did you mean {longer!r}?")
        raise ValueError(words + near(first, names))
    return found


def owned(model: nn.Module) -> Iterable[tuple[str, Tensor, nn.Module]]:
    """(name, parameter, the module that owns it), shared ones once, under the name that an embedding gave them."""
    every = [
        (f"{prefix}.{name}".lstrip("."), p, module)
        for prefix, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False)
    ]
    owner: dict[nn.Parameter, nn.Module] = {}
    for _, p, module in every:
        if p not in owner or isinstance(module, nn.Embedding):
            owner[p] = module
    names = {p: name for name, p in model.named_parameters()}
    return [(names[p], p, module) for p, module in owner.items()]


def words_of(name: str) -> list[str]:
    return [word for word in name.lower().split(".") if word not in WRAPPERS]


def role_of(name: str, p: Tensor, owner: nn.Module) -> str:
    words = words_of(name)
    if p.ndim <= 1 or words[-1] == "bias" or "norm" in type(owner).__name__.lower():
        return "vector"
    last = words[-2:]  # the module and its tensor: what lies deeper in an "embedder" is no embedding
    named = any(word in part for part in last for word in EMBEDDINGS)
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if "lm_head" in words or (words[0] in HEADS and len(words) <= 2):
        return "head"
    if named and not any(w in part for part in last for w in POSITIONS):
        return "embedding"
    view = view_shape(tuple(p.shape))
    if p.ndim > 2 and (len(view) == 2) != isinstance(owner, nn.modules.conv._ConvNd):
        return "vector"  # a stack too narrow to be seen as one, or a convolution with so large a kernel that it is
    rows, cols = view[-2:]
    fits = min(rows, cols) >= NARROWEST and max(rows, cols) <= LONGEST * min(rows, cols)
    return "matrix" if fits else "vector"


def build_optimizer(
    model: nn.Module,
    name: str = "muon",
    *,
    lr: Any,
    weight_decay: Any = 0.1,
    aux: str = "adamw",
    overrides: Mapping[str, str] | None = None,
    **options: Any,
) -> ShardedOptimizer:
    """One optimizer for a whole model: matrices are stepped by the preset `name`, every other role by `aux`.

    options: of the preset `name`; `<role>_<option>` of one role's ("embedding_lr", "head_state", "vector_betas"),
    `aux_<option>` of all but the matrices; fused, nonfinite, seed of the optimizer. Where nothing is said, all roles
    share lr (Muon's is then scaled to AdamW's RMS: adjust_lr_fn="match_rms_adamw"), and embeddings, heads and vectors
    have no weight decay and fp32 states. overrides: see `roles`. split, Muon's blocks of rows, may be patterns of names
    too, {"*.wqkv.weight": (4096, 1024, 1024), "*.wq.weight": 128}, the first that matches: a group of matrices for each
    split. Every group holds its `role`. ValueError for what no preset reads; a warning for options of a role that no
    parameter has.
    """
    name, aux = name.lower(), aux.lower()
    shared = {key: options.pop(key) for key in OF_THE_OPTIMIZER if key in options}
    given: dict[str, dict[str, Any]] = {"matrix": {"weight_decay": weight_decay}, "aux": {}}
    given.update({role: {} for role in ROLES[1:]})
    for option, value in options.items():
        role, _, rest = option.partition("_")
        role, rest = (role, rest) if role in given and rest else ("matrix", option)
        given[role][rest] = value
    if name in ("muon", "normuon") and "adjust_lr_fn" not in given["matrix"]:
        given["matrix"]["adjust_lr_fn"] = "match_rms_adamw"
    members: dict[str, list[tuple[str, Tensor]]] = {role: [] for role in ROLES}
    found = roles(model, overrides)
    parameters = dict(model.named_parameters())
    for parameter, role in found.items():
        members[role].append((parameter, parameters[parameter]))
    for preset in (name, aux):
        if preset not in PRESETS:
            raise ValueError(
                f"no optimizer is named {preset!r}; use one of {', '.join(PRESETS)}{near(preset, PRESETS)}"
            )
    groups = []
    for role in ROLES:
        chosen = {"lr": lr, **USUAL.get(role, {}), **(given["aux"] if role != "matrix" else {}), **given[role]}
        if role != "matrix" and given[role] and not members[role]:
            tell_unread(role, given[role], aux)
        for asked, some in by_split(members[role], chosen):
            group, recipe = group_of(name if role == "matrix" else aux, some, asked)
            groups.append({**group, "params": some, "recipe": recipe, "role": role})
    return ShardedOptimizer(groups, **shared)


def by_split(
    members: Sequence[tuple[str, Tensor]], options: Mapping[str, Any]
) -> list[tuple[Mapping[str, Any], list[tuple[str, Tensor]]]]:
    """(options, members) of every group: one, or where `split` is patterns one a split, those without first."""
    split = options.get("split")
    if not members or not isinstance(split, Mapping):
        return [(options, list(members))] if members else []
    found = matched(dict(members), split, "matrix")
    groups: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, p in sorted(members, key=lambda member: member[0] in found):
        blocks = found.get(name)
        groups.setdefault(tuple(blocks) if isinstance(blocks, list) else blocks, []).append((name, p))
    return [({**options, "split": blocks}, some) for blocks, some in groups.items()]


def group_of(
    preset: str, members: list[tuple[str, Tensor]], options: Mapping[str, Any]
) -> tuple[dict[str, Any], Recipe]:
    """The numbers and the recipe of a preset with these options."""
    check_options(preset, options)
    made = PRESETS[preset](members, **options)
    of_the_members = ("params", "param_names", "recipe")
    group = {key: value for key, value in made.param_groups[0].items() if key not in of_the_members}
    return group, made.recipes[0]


def check_options(preset: str, options: Iterable[str]) -> None:
    """ValueError for the first that the preset does not take."""
    known = arguments_of(PRESETS[preset])
    for name in options:
        if name not in known:
            longer = [f"{role}_{option}" for role in (*ROLES[1:], "aux") for option in ("lr", "weight_decay", "state")]
            roles = f"<role>_<option> with the roles {', '.join(ROLES)}, or aux_<option> for all but matrices"
            words = f"{name!r} is neither an option of {preset} nor one of a role: {roles}. {preset} takes "
            raise ValueError(f"{words}{', '.join(known)}{near(name, [*known, *longer])}")


def tell_unread(role: str, options: Collection[str], preset: str) -> None:
    """Of a role that no parameter has: a warning, or a ValueError for what the preset would not take."""
    check_options(preset, options)
    said = ", ".join(f"{role}_{option}" for option in options)
    tell(
        f"no parameter has the role {role}, so nothing reads {said}; shardopt.roles(model) tells them, and "
        f"overrides={{'a pattern of names': {role!r}}} gives it"
    )
