"""ShardedOptimizer: torch.optim.Optimizer's interface over recipes, layouts and the engine."""

from collections.abc import Callable, Collection, Iterable
from copy import deepcopy
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardopt import engine
from shardopt.capture import capturing, check_capture
from shardopt.codecs import Codec
from shardopt.codecs.noise import parameter_key
from shardopt.dtensor import lazy
from shardopt.dtensor.answer import Answers
from shardopt.dtensor.layout import Layout, checked_layout
from shardopt.dtensor.loading import load_groups, load_states
from shardopt.given import check_apart, listed
from shardopt.groups import Look, check_read, complete, cycled, settled, unfit
from shardopt.item import Item, item_of
from shardopt.kernels import Above, Native, wire
from shardopt.prelude import agreed, skipped
from shardopt.recipe import Recipe
from shardopt.report import explain
from shardopt.spelling import choice
from shardopt.state import make_state
from shardopt.telling import tell

NONFINITE = ("propagate", "zero", "skip")
KEPT = ("recipe", "nonfinite", "seed", "fused", "calls", "resumed_at", "_given", "_skipped")  # by pickle and deepcopy


class Plan(NamedTuple):
    """What is known of a parameter as long as it stays where it is."""

    place: Any
    layout: Layout
    codecs: dict[str, Codec]


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer whose step is a function of the global parameter, gradient and state, never of the mesh.

    params: tensors, (name, tensor) pairs or param groups, as for every torch optimizer. A group may hold a `recipe`
    of its own, or `state`, `addons`, `rounding`, `update_from` that replace parts of the optimizer's.
    recipe: what groups without their own do. fused: None steps with native kernels where there are some, True raises
    where there are none, False never compiles; the results are the same. nonfinite: "propagate" (as torch), "zero" (an
    element that is not finite, or of 2^64 and more, whose square is not, counts as zero) or "skip" (the whole step, on
    all ranks alike; counted in `skipped_steps`). seed: of stochastic rounding. Further keywords are defaults of the
    param groups: lr, weight_decay, maximize, ...

    Every rank must hold gradients of the same parameters in a step, as for every collective of torch's.
    State appears complete on the first look at `state`, `state_dict()` or `step()`, never on meta. Raises ValueError
    for bad arguments, placements, gradients and checkpoints, before anything is written.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf; no host sync

    def __init__(
        self,
        params: Any,
        recipe: Recipe | None = None,
        *,
        fused: bool | None = None,
        nonfinite: str = "propagate",
        seed: int = 0,
        **defaults: Any,
    ) -> None:
        choice("nonfinite", nonfinite, NONFINITE)
        self._recipes: list[tuple[dict[str, Any], Recipe]] = []
        self.recipe, self.nonfinite, self.seed, self.fused = recipe, nonfinite, int(seed), fused
        self.calls = 0  # steps that went through, skipped ones included; at least 1 with loaded state
        self.resumed_at: int | None = None  # what `calls` was when state was loaded
        self.answers = Answers(coder=wire.chosen(fused))
        self.native = Native.chosen(fused)
        self._skipped: Tensor | None = None
        self._plans: dict[Tensor, Plan] = {}
        self._made_for: dict[Tensor, Any] = {}
        self._stepped: set[Tensor] = set()  # parameters whose state is no longer fresh
        self._names: dict[Tensor, str] = {}
        self._looks: dict[int, Look] = {}  # what `settle` last saw of every group
        self._given = defaults
        super().__init__(listed(params), {**(recipe.defaults() if recipe else {}), **defaults})
        self._adopt(self.state)
        check_read(defaults, self.recipes)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, on a copy: the group keeps the user's keys and gets its numbers and its recipe's key string."""
        group, recipe = complete(param_group, self.recipe, self._given)
        check_apart(group, self.param_groups)
        if self.native is not None:
            self.native.accept(recipe)
        own, self._names = {*group, "params", "param_names"}, {}
        super().add_param_group(group)
        for name in set(group) - own:
            del group[name]  # torch adds the optimizer's defaults: numbers that this group's recipe does not read
        for p in group["params"]:
            if why := unfit(recipe, p):
                name = self.name_of(p)
                self.param_groups.pop()
                raise ValueError(f"{name} {why}")
        self._recipes.append((group, recipe))
        self.defaults = cycled(self.param_groups, self.defaults)

    @property
    def recipes(self) -> list[Recipe]:
        """The recipe of every param group, in order."""
        known = {id(group): recipe for group, recipe in self._recipes}
        for i, group in enumerate(self.param_groups):
            if id(group) not in known:
                raise ValueError(f"param_groups[{i}] was not added through add_param_group, which gives it its recipe")
        return [known[id(group)] for group in self.param_groups]

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """(name, parameter) over all groups: the names given, or `param_groups[i].params[j]`."""
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for j, p in enumerate(group["params"]):
                yield (names[j] if names else f"param_groups[{i}].params[{j}]"), p

    def parameters(self) -> Iterable[tuple[Recipe, dict[str, Any], Tensor]]:
        """(recipe, group, parameter) in registration order."""
        for recipe, group in zip(self.recipes, self.param_groups):
            for p in group["params"]:
                yield recipe, group, p

    def plan(self, recipe: Recipe, p: Tensor) -> Plan:
        """Layout and codecs of p; read again whenever its device, dtype, mesh or placements changed."""
        place = lazy.place_of(p)
        known = self._plans.get(p)
        if known is None or known.place != place:
            layout = checked_layout(p, self.name_of(p))
            known = Plan(place, layout, recipe.codecs(layout.geo.view, p.dtype))
            self._plans[p] = known
        return known

    def layout(self, p: Tensor) -> Layout:
        """Where p lies now."""
        return next(self.plan(recipe, q).layout for recipe, _, q in self.parameters() if q is p)

    def make_states(self, frozen: Collection[Tensor] = ()) -> None:
        """Fill `state` for every parameter that has none, all or nothing; does nothing while any is on meta.

        Frozen parameters get theirs when they thaw, those in `frozen` now. Fresh state is made anew where its
        parameter has moved; later state gets the parts that another dtype of the parameter needs.
        """
        every = list(self.parameters())
        if any(lazy.is_meta(p) for *_, p in every):
            return
        fresh: dict[Tensor, dict[str, Tensor]] = {}
        for position, (recipe, _, p) in enumerate(every):
            present = dict.get(self.state, p)
            if present and self._made_for.get(p) == lazy.place_of(p):
                continue
            if not (present or p.requires_grad or p.grad is not None or p in frozen):
                continue
            plan = self.plan(recipe, p)
            key = parameter_key(self.seed, position) if recipe.noisy(plan.layout.geo.view, p.dtype) else None
            made = make_state(plan.codecs, plan.layout, lazy.local_device(p), key)
            if present and self.calls:
                made = {name: present.get(name, part) for name, part in made.items()}
            fresh[p] = made
        for p, state in fresh.items():
            dict.__setitem__(self.state, p, state)
            self._made_for[p] = self._plans[p].place

    def current(self, p: Tensor) -> bool:
        """Whether p has state that was made for where it is now."""
        return p in self._made_for and self._made_for[p] == lazy.place_of(p)

    def _adopt(self, state: dict[Any, Any]) -> None:
        wrapped = lazy.LazyState(state.plain() if isinstance(state, lazy.LazyState) else state)
        wrapped.fill, wrapped.current = self.make_states, self.current
        self.state: Any = wrapped

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: self.__dict__[name] for name in KEPT}
        return {**super().__getstate__(), **kept, "state": self.state.plain(), "_recipes": self.recipes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("answers", Answers(coder=wire.chosen(self.fused)))
        self.__dict__.setdefault("native", Native.chosen(self.fused))
        self._recipes = list(zip(self.param_groups, self._recipes))  # type: ignore[arg-type]
        self._plans, self._made_for, self._looks, self._names = {}, {}, {}, {}
        self._stepped = set(self.state) if self.calls else set()
        self._adopt(self.state)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, after what a scheduler wrote is in the numbers that this optimizer reads."""
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but nothing is cast: every stored tensor keeps dtype and value, bit by bit.

        ValueError, before anything is changed, where the recipe, a slot, a shape or a dtype differs.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self.settle()
        groups = load_groups(self.param_groups, self.recipes, deepcopy(state_dict["param_groups"]))
        for i, (recipe, group, new) in enumerate(zip(self.recipes, self.param_groups, groups)):
            settled(recipe, {**group, **new}, True, i, self._looks.get(i))
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        pairs = list(zip(saved_ids, (p for *_, p in self.parameters()), strict=True))
        self.make_states(frozen={p for i, p in pairs if i in state_dict["state"]})
        wanted = {p: dict.get(self.state, p) for _, p in pairs}
        loaded = load_states(pairs, state_dict["state"], wanted, dict((p, n) for n, p in self.named_parameters()))
        for p in {p for _, p in pairs} - set(loaded):  # the saved run had no state of them, so this one begins anew
            dict.pop(self.state, p, None)
        self.make_states()
        for group, new in zip(self.param_groups, groups):
            group.update(new)
        self.resumed(loaded)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def resumed(self, params: Iterable[Tensor]) -> None:
        """The state of these parameters was loaded: it is not fresh any more."""
        self.calls = self.resumed_at = max(self.calls, 1)
        self._stepped.update(params)

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all parameters that have a gradient; returns what the closure returned."""
        self.settle()
        if capturing():
            check_capture(self.param_groups, {p: bool(dict.get(self.state, p)) for *_, p in self.parameters()})
        with torch.enable_grad():
            loss = None if closure is None else closure()
        policy = engine.Policy(self.nonfinite, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        known = self.param_groups, self.recipes, self.state, policy
        above = Above(self.answers, agreed, engine.abreast)
        if self.native is not None and (again := self.native.again(*known, above)):
            self._went(*again)
            return loss
        self.make_states()
        items = self.items()
        if self.calls == 0:
            if not items and (warning := lazy.check_not_stale(self.named_parameters())):
                tell(warning)
            if engine.only_initialises(items, self.param_groups, self.answers):
                return loss
        taken = engine.run(items, self.answers, policy, self.native)
        self._stepped.update(p for *_, p in self.parameters() if p.grad is not None)
        if self.native is not None:
            self.native.remember(items, *known)
        self._went(taken)
        return loss

    def _went(self, taken: Tensor | None) -> None:
        """Count a step that went through. taken: whether it was not skipped, see `shardopt.prelude.agreed`."""
        self.calls += 1
        for recipe, group in zip(self.recipes, self.param_groups):
            recipe.rule.stepped(group)
        self._skipped = skipped(self._skipped, taken)

    def settle(self) -> None:
        """Check the groups' numbers, and let a group's recipe follow them while it has taken no step."""
        for i, (group, recipe) in enumerate(zip(self.param_groups, self.recipes)):
            look = self._looks.get(i)
            if look is not None and look.holds(recipe, group):
                continue
            now = settled(recipe, group, any(p in self._stepped for p in group["params"]), i, look)
            if now is not recipe:
                self._recipes = [(g, now if g is group else r) for g, r in self._recipes]
                group["recipe"] = now.key()
                for p in group["params"]:
                    self._made_for.pop(p, None)
                    self._plans.pop(p, None)
            self._looks[i] = Look(now, group)

    def items(self) -> list[Item]:
        """What the engine needs of every parameter with a gradient; checks all of them before any is touched."""
        return [
            item_of(p, layout, recipe, codecs, dict.get(self.state, p), group)
            for recipe, group, p in self.parameters()
            if p.grad is not None
            for _, layout, codecs in (self.plan(recipe, p),)
        ]

    def name_of(self, p: Tensor) -> str:
        if p not in self._names:
            self._names = {q: name for name, q in self.named_parameters()}
        return self._names[p]

    def explain(self) -> str:
        """Per group: recipe, what runs it and why, the formats of its parameters; and the communication so far."""
        self.settle()
        return explain(self)

    @property
    def skipped_steps(self) -> int:
        """Steps skipped so far, by nonfinite="skip" or GradScaler. Reading it waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)
