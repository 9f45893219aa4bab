# SPDX-License-Identifier: Apache-2.0
"""Checking on one very model, with its own weights and data, what its plan promises.

* permuted: every mergeable space in a random order gives the same outputs;
* left out: the orders are noticed where one parameter axis does not follow them, so that *permuted* says something;
* roles: a feature that repeats another one folds into it where it is consumed, after which nothing of it matters;
* recovered: `merge` of the model and its permuted copy finds every order again and computes the model's function;
* cuts: the value at a valid cut, taken from other inputs, gives the other inputs' outputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map_only

from ..features import batch_inputs, device_of
from .apply import axis_targets, entry_of
from .cuts import cuts
from .match import Groups
from .merge import check_data, merge
from .parts import memory_of, only_writes
from .permute import as_groups, permute, random_permutations
from .plan import Plan, Space
from .spaces import find_spaces
from .statistics import SpaceMoments, gather_moments
from .taps import Tapped

# Relative to the largest output, by the coarsest floating type among the values of the graph.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}
NOTICED = 100  # times the type's resolution, and 10 times what permuting everything moves: a change, not rounding
TIE = 1 - 1e-6  # features of one model that correlate more than this cannot be told apart
SAMPLES, BATCHES, CUTS = 4, 8, 6  # samples for single forward passes, batches for statistics, cuts that are tried
State = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """One promise. worst: the largest relative error, at most `limit`; of "left out" the least change, more than it."""

    name: str
    ok: bool
    worst: float
    limit: float
    detail: str


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found. dtype: the coarsest that the copy computes in. spaces, features: mergeable ones."""

    checks: tuple[Check, ...]
    dtype: str
    spaces: int
    features: int

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        rows = [("check", "ok", "worst", "limit", "what was checked")]
        rows += [(c.name, "yes" if c.ok else "NO", f"{c.worst:.1e}", f"{c.limit:.0e}", c.detail) for c in self.checks]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        failed = ", ".join(check.name for check in self.checks if not check.ok)
        end = f"{self.spaces} mergeable spaces with {self.features} features, in {self.dtype}: "
        return "\n".join([*table, end + (f"NOT ok: {failed}" if failed else "ok")])


def verify(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    data: Iterable[Any],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    unknown: Literal["error", "freeze"] = "error",
    seed: int = 0,
    most: int = 40,
) -> Verification:
    """Check that the plan of a model is right, on the model itself.

    What says nothing is counted apart. In "left out" that is an axis whose order alone makes no difference to the samples:
    key biases, which softmax cancels, equal entries, weights of dead features. In "recovered" it is a feature that is dead
    at every tap, or correlates with another one of the model by more than 1 - 1e-6: nothing tells which is which.

    Args:
        model: left as it is, train mode included; a copy is checked, in double precision where the model runs in it.
        example_inputs, example_kwargs, unknown: see :func:`zipfast.find_spaces`.
        data: batches as for :func:`zipfast.merge`; the first 8 are read for the statistics, 4 samples for all else.
        seed: of the orders and the noise. most: parameter axes that "left out" tries, spread evenly over all.

    Raises:
        ValueError: data for which the outputs are all equal or not finite, or in which no feature of some space varies;
            nothing to merge; see also :func:`zipfast.find_spaces`. TypeError: `data` that can be read only once.

    Cost: up to 2·`most` + 25 forward passes of 4 samples and one merge on up to 8 batches; where a check fails, three
    more passes per space. Memory for some six copies of the weights, in double precision. Deterministic like the model.

    Example:
        >>> import torch, zipfast
        >>> from zipfast.merging.verify import verify
        >>> net = zipfast.zoo.mlp(8, (16,), 3)
        >>> verify(net, (torch.randn(2, 8),), [torch.randn(32, 8)]).ok
        True
    """
    check_data("verify", data, None)
    if most < 1:
        raise ValueError(f"verify: 'most' must be at least 1, got {most}")
    case = _Case(model, example_inputs, dict(example_kwargs or {}), list(islice(data, BATCHES)), unknown, seed)
    orders = random_permutations(case.plan, seed)
    moved = permute(case.plan, orders, case.state)
    permuted = _permuted(case, moved)
    statistics = gather_moments(case.graph, [case.state, moved if permuted.ok else case.state], case.data, taps="all")
    checks = (
        permuted,
        _left_out(case, orders, moved, permuted.worst, most),
        _roles(case, statistics),
        _recovered(case, orders, moved if permuted.ok else None, statistics),
        _cuts(case),
    )
    return Verification(checks, str(case.dtype).removeprefix("torch."), len(case.plan.mergeable), case.features)


class _Case:
    """A copy of the model in eval mode with its graph, a few samples, and what it computes for them."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any, data: list[Any], unknown: Any, seed: int) -> None:
        if not data:
            raise ValueError("verify: 'data' must hold at least one batch, got none")
        device = device_of(model)
        calls = [batch_inputs(batch, device) for batch in data]
        example = tree_map_only(Tensor, lambda v: v.to(device), (args, kwargs))
        self.model, double = _copy(model, example)
        if double:
            example, calls = tree_map_only(Tensor, _as_double, (example, calls))
        (self.args, self.kwargs), self.data = example, [keywords or inputs[0] for inputs, keywords in calls]
        self.unknown, self.seed = unknown, seed
        self.graph = find_spaces(self.model, self.args, self.kwargs, unknown=unknown)
        self.plan: Plan = self.graph.plan
        if not self.plan.mergeable:
            raise ValueError("verify: 'model' must have something to merge, got a plan of frozen spaces only")
        self.features = sum(space.total for space in self.plan.mergeable)
        types = {v.dtype for v in _tensors([node.meta["val"] for node in self.graph.exported.flows])}
        self.dtype = max(types & TOLERANCE.keys(), key=TOLERANCE.__getitem__)  # some norms always compute in float32
        self.limit = TOLERANCE[self.dtype]
        self.state: State = {name: value.detach() for name, value in self.model.state_dict().items()}
        self.samples = tree_map_only(Tensor, lambda v: v[:SAMPLES] if v.dim() else v, calls[0])
        self.others = tree_map_only(Tensor, lambda v: v.flip(0) if v.dim() else v, self.samples)
        self.outputs = self.run(self.state)
        apart = _difference(self.run(self.state, self.others), self.outputs)
        if not self.limit < apart < math.inf:
            raise ValueError(f"verify: 'data' must begin with samples of different finite outputs, got {apart:g} apart")

    def run(self, state: State, inputs: Any = None) -> Any:
        """What the model computes with these weights."""
        args, kwargs = self.samples if inputs is None else inputs
        with torch.no_grad():
            return torch.func.functional_call(self.model, state, args, kwargs, tie_weights=False)

    def error(self, state: State) -> float:
        """How far the outputs with these weights are from the model's own."""
        return _difference(self.run(state), self.outputs)


def _copy(model: nn.Module, example: Any) -> tuple[nn.Module, bool]:
    """(a copy in eval mode, whether in double precision): only if it runs so, e.g. has no tensors beside buffers."""
    made, (args, kwargs) = copy.deepcopy(model), tree_map_only(Tensor, _as_double, example)
    for module in made.modules():
        module.training = False  # the flag alone: a module may override eval()
    plain = copy.deepcopy(made)
    try:
        with torch.no_grad():
            made.double()(*args, **kwargs)
    except Exception:  # whatever the model's own code says to it
        return plain, False
    return made, True


def _as_double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _difference(outputs: Any, wanted: Any) -> float:
    """The largest difference of floating-point tensors, relative to the largest value in each; infinite where NaN."""
    pairs = [(a, b) for a, b in zip(_tensors(outputs), _tensors(wanted), strict=True) if b.is_floating_point()]
    found = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs if b.numel()]
    return max((value if math.isfinite(value) else math.inf for value in found), default=0.0)


def _permuted(case: _Case, moved: State) -> Check:
    error, detail = case.error(moved), "all spaces at once, in random orders"
    if not error <= case.limit:
        single = {s.name: random_permutations(case.plan, case.seed, only=[s.name]) for s in case.plan.mergeable}
        alone = {name: case.error(permute(case.plan, orders, case.state)) for name, orders in single.items()}
        detail = f"of single spaces {max(alone, key=alone.__getitem__)!r} changes the outputs most"
    return Check("permuted", error <= case.limit, error, case.limit, detail)


def _left_out(case: _Case, orders: Mapping[str, Groups], moved: State, rounding: float, most: int) -> Check:
    axes = sorted({(use.param, use.axis) for space in case.plan.mergeable for use in space.uses})
    axes = axes[:: math.ceil(len(axes) / most)]
    limit = min(max(NOTICED * torch.finfo(case.dtype).eps, 10 * rounding), case.limit)

    def change(param: str, axis: int, alone: bool) -> float:
        """Of the outputs, if this axis alone follows the orders, or all but this one."""
        uses = [[u for u in s.uses if ((u.param, u.axis) == (param, axis)) == alone] for s in case.plan.spaces]
        spaces = tuple(replace(space, uses=tuple(own)) for space, own in zip(case.plan.spaces, uses))
        names = {param, *case.plan.aliases.get(param, ())} & case.state.keys()
        own = permute(replace(case.plan, spaces=spaces), orders, {name: case.state[name] for name in names})
        return case.error({**(case.state if alone else moved), **own})

    changes = {at: change(*at, alone=False) for at in axes}
    quiet = [at for at in axes if not changes[at] > limit]
    missed = [at for at in quiet if change(*at, alone=True) > limit]
    detail = f"{len(axes) - len(quiet)} of {len(axes)} axes noticed"
    for what, some in (("no order matters to", [at for at in quiet if at not in missed]), ("not noticed", missed)):
        names = ", ".join(f"{param} axis {axis}" for param, axis in some[:3])
        detail += f"; {what}: {names}{f' and {len(some) - 3} more' if some[3:] else ''}" if some else ""
    least = 0.0 if missed else min((changes[at] for at in axes if at not in quiet), default=0.0)
    return Check("left out", least > limit, least, limit, detail)


def _roles(case: _Case, statistics: SpaceMoments) -> Check:
    picked = [space for space in case.plan.mergeable if not space.flags and statistics.get(space.name)]
    if not picked:
        return Check("roles", True, 0.0, case.limit, "no space in which features of one model may merge")
    error, change = _folding(case, picked, statistics)
    detail = f"one feature of each of {len(picked)} spaces copied, folded and disturbed"
    if not error <= case.limit:
        alone = {space.name: _folding(case, [space], statistics)[0] for space in picked}
        detail = f"of single spaces {max(alone, key=alone.__getitem__)!r} folds worst"
    elif not change > case.limit:
        detail += ", but the copies alone made no difference"
    return Check("roles", error <= case.limit < change, error, case.limit, detail)


def _folding(case: _Case, spaces: Sequence[Space], statistics: SpaceMoments) -> tuple[float, float]:
    """How far outputs move by folding and disturbing, and by copying: feature j becomes a copy of i where it is made, is
    added to i where it is read, and is disturbed where it is made."""
    state, outputs, generator = dict(case.state), [], torch.Generator().manual_seed(case.seed)
    for how in ("copy", "fold", "noise"):
        for space, use in [(s, u) for s in spaces for u in s.uses if (u.role == "consume") == (how == "fold")]:
            alive = statistics[space.name][0].alive()[: space.total].view(space.blocks, space.size).sum(0)
            i, j = alive.argsort(descending=True, stable=True)[:2].tolist()
            features, value = torch.arange(space.total), state[use.param].movedim(use.axis, -1)
            groups = as_groups(torch.where(features % space.size == j, features + i - j, features))
            to = axis_targets(value.shape[-1], 1, [entry_of(case.plan, space, use, groups)])[0]
            noise = torch.rand(len(to), generator=generator) * (to != torch.arange(len(to)))
            if how == "noise":
                value = value * (1 + noise).to(value)
            elif how == "fold":
                value = torch.zeros_like(value).index_add(-1, to.to(value.device), value)
            else:
                value = value.index_select(-1, to.to(value.device))
            state[use.param] = value.movedim(-1, use.axis)
        for name, others in case.plan.aliases.items():
            state |= {other: state[name] for other in others if other in state and name in state}
        outputs.append(case.run(state))
    return max(_difference(o, outputs[0]) for o in outputs[1:]), _difference(outputs[0], case.outputs)


def _recovered(case: _Case, orders: Mapping[str, Groups], moved: State | None, statistics: SpaceMoments) -> Check:
    if moved is None:
        return Check("recovered", False, math.inf, case.limit, "not tried, as the permuted copy is another model")
    other = copy.deepcopy(case.model)
    other.load_state_dict(moved)
    unclear = _unclear(case.plan, statistics)
    options: dict[str, Any] = {"example_kwargs": case.kwargs, "unknown": case.unknown, "reestimate": False}
    # What is alike merges inside the model, at the cost of merges elsewhere; without a budget it does not.
    beta = {name: 0.0 for name, mask in unclear.items() if bool(mask.any())}
    merged = merge([case.model, other], case.args, case.data, statistics=statistics, beta=beta, **options)
    missed: dict[str, float] = {}
    for name, groups in merged.groups.items():
        apart = groups.of_model(0) != groups.of_model(1)[orders[name].index]
        missed[name] = int((apart & ~unclear[name]).sum())
    args, kwargs = case.samples
    with torch.no_grad():
        error = _difference(merged.module(*args, **kwargs), case.outputs)
    unsure, wrong = sum(int(mask.sum()) for mask in unclear.values()), int(sum(missed.values()))
    detail = f"{case.features - unsure - wrong} of {case.features} features found again"
    detail += f", {unsure} apart as dead or alike, so that the outputs are not judged" if unsure else ""
    detail += f"; most are missed in {max(missed, key=missed.__getitem__)!r}" if wrong else ""
    return Check("recovered", not wrong and (unsure > 0 or error <= case.limit), error, case.limit, detail)


def _unclear(plan: Plan, statistics: SpaceMoments) -> dict[str, Tensor]:
    """By space, bool [total]: features that are dead wherever they are read, or have a double in their block."""
    unclear = {}
    for space in filter(lambda space: statistics[space.name], statistics.spaces):
        alive = torch.stack([moments.alive()[: space.total].cpu() for moments in statistics[space.name]]).any(0)
        own = statistics.correlation(space.name)[: space.total, : space.total].cpu().fill_diagonal_(0)
        blocks = own.view(space.blocks, space.size, space.blocks, space.size).diagonal(dim1=0, dim2=2)
        unclear[space.name] = ~alive | (blocks > TIE).any(1).T.reshape(-1)
    for space in plan.mergeable:
        if space.name not in unclear:  # a block is told by what lies inside it
            inside = [unclear[child.name].view(space.total, -1).all(1) for child in plan.children(space.name)]
            unclear[space.name] = torch.stack(inside).all(0) if inside else torch.zeros(space.total, dtype=torch.bool)
    return unclear


class _Flow(Interpreter):
    """Runs the graph; at node `at` it notes the value and all that inputs alone decide, or puts such notes in place."""

    def __init__(self, case: _Case, at: Node, notes: Mapping[Node, Any] | None) -> None:
        super().__init__(case.graph.program.graph_module)
        self.at, self.notes, self.seen, self.flows = at, notes, dict[Node, Any](), case.graph.exported.flows
        self.filled = {memory_of(node) for node in self.flows if only_writes(node)}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n is not self.at:
            return value
        if self.notes is None:
            given = {k: v for k, v in self.env.items() if k not in self.flows and memory_of(k) not in self.filled}
            self.seen = tree_map_only(Tensor, Tensor.clone, given | {n: value})
            return value
        for node in self.notes.keys() & self.env.keys():  # what is equal may share memory with others: it stays
            if not all(map(torch.equal, _tensors(self.env[node]), _tensors(self.notes[node]))):
                self.env[node] = self.notes[node]
        return self.notes[n]


def _cuts(case: _Case) -> Check:
    valid, tapped, errors = cuts(case.graph), Tapped(case.graph), dict[str, float]()
    for cut in valid[:: math.ceil(len(valid) / CUTS) or 1]:
        outputs, notes = [], None
        for args, kwargs in (case.samples, case.others):
            flow = _Flow(case, case.graph.exported.by_name[cut.node], notes)
            with torch.no_grad():
                outputs.append(flow.run(*tapped.placeholders(case.state, device_of(case.state), args, kwargs)))
            notes = flow.seen
        errors[cut.node] = _difference(outputs[1], outputs[0])
    worst, detail = max(errors.values(), default=0.0), f"{len(errors)} of {len(valid)}"
    if not worst <= case.limit:
        detail = f"the value at {max(errors, key=errors.__getitem__)!r} does not decide the outputs"
    return Check("cuts", worst <= case.limit, worst, case.limit, detail)
