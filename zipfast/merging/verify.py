# SPDX-License-Identifier: Apache-2.0
"""Checking on one very model, with its own weights and data, what its plan promises.

* permuted: every mergeable space in a random order gives the same outputs;
* left out: the orders are noticed where one parameter axis does not follow them, so that *permuted* says something;
* roles: a feature that repeats another one folds into it where it is consumed, after which nothing of it matters;
* recovered: `merge` of the model and its permuted copy finds every order again and computes the model's function;
* cuts: the value at a valid cut, taken from other inputs, gives the other inputs' outputs.

All is done on a copy, in double precision where the model runs in it.
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

    def __getitem__(self, name: str) -> Check:
        return {check.name: check for check in self.checks}[name]

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

    What says nothing is counted apart. In "left out" that is an axis whose order alone makes no difference to these samples:
    key biases, which softmax cancels, equal entries, weights of dead features. In "recovered" it is a feature that is dead
    at every tap or correlates with another one of the model by more than 1 - 1e-6: nothing tells which is which.

    Args:
        model: left as it is, train mode included.
        example_inputs, example_kwargs: arguments of a forward call, for the export.
        data: batches as for :func:`zipfast.merge`; the first 8 are read for the statistics, 4 samples for all else.
        unknown: see :func:`zipfast.find_spaces`.
        seed: of the orders and the noise.
        most: try so many parameter axes in "left out", spread evenly over all.

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
    copies = [case.state, moved if permuted.ok else case.state]
    statistics = gather_moments(case.graph, copies, case.data, taps="all")
    left_out = _left_out(case, orders, moved, permuted.worst, most)
    recovered = Check("recovered", False, math.inf, case.limit, "not tried, as the permuted copy is another model")
    if permuted.ok:
        recovered = _recovered(case, orders, moved, statistics)
    checks = (permuted, left_out, _roles(case, statistics), recovered, _cuts(case))
    return Verification(checks, str(case.dtype).removeprefix("torch."), len(case.plan.mergeable), case.features)


class _Case:
    """A copy of the model in eval mode with its graph, a few samples, and what it computes for them."""

    def __init__(
        self, model: nn.Module, args: Any, kwargs: dict[str, Any], data: list[Any], unknown: Any, seed: int
    ) -> None:
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
        types = {value.dtype for value in _floating([node.meta["val"] for node in self.graph.exported.flows])}
        self.dtype = max(types, key=lambda dtype: torch.finfo(dtype).eps)  # some norms compute in float32 always
        self.limit = TOLERANCE[self.dtype]
        self.state: State = {name: value.detach() for name, value in self.model.state_dict().items()}
        self.samples = tree_map_only(Tensor, lambda v: v[:SAMPLES] if v.dim() else v, calls[0])
        self.others = tree_map_only(Tensor, lambda v: v.flip(0) if v.dim() else v, self.samples)
        self.outputs = self.run(self.state)
        if not all(bool(torch.isfinite(output).all()) for output in self.outputs):
            raise ValueError("verify: 'model' must give finite outputs for 'data', got NaN or infinity")
        if _difference(self.run(self.state, self.others), self.outputs) <= self.limit:
            raise ValueError(
                "verify: 'data' must begin with a batch of samples that the model tells apart, got "
                f"{len(tree_leaves(self.samples)[0])} with equal outputs"
            )

    def run(self, state: Mapping[str, Tensor], inputs: Any = None) -> list[Tensor]:
        """All floating-point outputs of the model with these weights."""
        args, kwargs = self.samples if inputs is None else inputs
        with torch.no_grad():
            return _floating(torch.func.functional_call(self.model, dict(state), args, kwargs, tie_weights=False))

    def error(self, state: Mapping[str, Tensor]) -> float:
        """How far the outputs with these weights are from the model's own."""
        return _difference(self.run(state), self.outputs)


def _copy(model: nn.Module, example: Any) -> tuple[nn.Module, bool]:
    """(a copy in eval mode, whether in double precision): so unless it has e.g. tensors that are no buffers."""
    for double in (True, False):
        made = copy.deepcopy(model)
        for module in made.modules():
            module.training = False  # the flag alone: a module may override eval()
        if not double:
            break
        args, kwargs = tree_map_only(Tensor, _as_double, example)
        try:
            with torch.no_grad():
                made.double()(*args, **kwargs)
            break
        except Exception:  # whatever the model's own code says to it
            continue
    return made, double


def _as_double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _floating(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _difference(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference, relative to each output's largest value; infinite where it is NaN."""
    pairs = [(a, b) for a, b in zip(outputs, wanted, strict=True) if b.numel()]
    found = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs]
    return max((value if math.isfinite(value) else math.inf for value in found), default=0.0)


def _most(errors: Mapping[str, float]) -> str:
    return repr(max(errors, key=lambda name: errors[name]))


# ------------------------------------------------------------------------------------------ the checks


def _permuted(case: _Case, moved: State) -> Check:
    error, detail = case.error(moved), "all spaces at once, in random orders"
    if not error <= case.limit:
        names = [space.name for space in case.plan.mergeable]
        orders = {name: random_permutations(case.plan, case.seed, only=[name]) for name in names}
        alone = {name: case.error(permute(case.plan, orders[name], case.state)) for name in names}
        detail = f"of single spaces {_most(alone)} changes the outputs most"
    return Check("permuted", error <= case.limit, error, case.limit, detail)


def _left_out(case: _Case, orders: Mapping[str, Groups], moved: State, rounding: float, most: int) -> Check:
    axes = sorted({(use.param, use.axis) for space in case.plan.mergeable for use in space.uses})
    axes = axes[:: math.ceil(len(axes) / most)]
    limit = max(NOTICED * torch.finfo(case.dtype).eps, min(10 * rounding, case.limit))

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
    picked = [space for space in case.plan.mergeable if not space.flags and space.params("consume")]
    if not picked:
        return Check("roles", True, 0.0, case.limit, "no space in which features of one model may merge")

    def errors(spaces: Sequence[Space]) -> tuple[float, float]:
        """(error of folding, change by copying)"""
        copied = _surgery(case, spaces, statistics, case.state, "copy")
        folded = _surgery(case, spaces, statistics, copied, "fold")
        noisy = _surgery(case, spaces, statistics, folded, "noise")
        wanted = case.run(copied)
        return max(_difference(case.run(s), wanted) for s in (folded, noisy)), _difference(wanted, case.outputs)

    error, change = errors(picked)
    detail = f"one feature of each of {len(picked)} spaces copied, folded and disturbed"
    if not error <= case.limit:
        detail = f"of single spaces {_most({space.name: errors([space])[0] for space in picked})} folds worst"
    elif not change > case.limit:
        detail += ", but the copies alone made no difference"
    return Check("roles", error <= case.limit < change, error, case.limit, detail)


def _surgery(case: _Case, spaces: Sequence[Space], statistics: SpaceMoments, state: State, how: str) -> State:
    """Feature j becomes a copy of i where it is made ("copy"), is added to i where it is read ("fold"), or disturbed."""
    changed, generator = dict(state), torch.Generator().manual_seed(case.seed)
    for space in spaces:
        alive = statistics[space.name][0].alive()[: space.total].view(space.blocks, space.size).sum(0)
        i, j = alive.argsort(descending=True, stable=True)[:2].tolist()
        features = torch.arange(space.total)
        groups = as_groups(torch.where(features % space.size == j, features + i - j, features))
        for use in space.uses:
            if (use.role == "consume") != (how == "fold"):
                continue
            value = changed[use.param].movedim(use.axis, -1)
            to = axis_targets(value.shape[-1], 1, [entry_of(case.plan, space, use, groups)])[0]
            noise = torch.rand(len(to), generator=generator) * (to != torch.arange(len(to)))
            if how == "noise":
                value = value * (1 + noise).to(value)
            elif how == "fold":
                value = torch.zeros_like(value).index_add(-1, to.to(value.device), value)
            else:
                value = value.index_select(-1, to.to(value.device))
            changed[use.param] = value.movedim(-1, use.axis)
    for name, others in case.plan.aliases.items():
        changed |= {other: changed[name] for other in others if other in changed and name in changed}
    return changed


def _recovered(case: _Case, orders: Mapping[str, Groups], moved: State, statistics: SpaceMoments) -> Check:
    other = copy.deepcopy(case.model)
    other.load_state_dict(moved)
    unclear = _unclear(case.plan, statistics)
    merged = merge(
        [case.model, other],
        case.args,
        case.data,
        example_kwargs=case.kwargs,
        statistics=statistics,
        # What is alike merges inside the model, at the cost of merges elsewhere; without a budget it does not.
        beta={name: 0.0 for name, mask in unclear.items() if bool(mask.any())},
        reestimate=False,
        unknown=case.unknown,
    )
    missed: dict[str, float] = {}
    for name, groups in merged.groups.items():
        apart = groups.of_model(0) != groups.of_model(1)[orders[name].index]
        missed[name] = int((apart & ~unclear[name]).sum())
    args, kwargs = case.samples
    with torch.no_grad():
        error = _difference(_floating(merged.module(*args, **kwargs)), case.outputs)
    unsure, wrong = sum(int(mask.sum()) for mask in unclear.values()), int(sum(missed.values()))
    detail = f"{case.features - unsure - wrong} of {case.features} features found again"
    detail += f", {unsure} apart as dead or alike, so that the outputs are not judged" if unsure else ""
    detail += f"; most are missed in {_most(missed)}" if wrong else ""
    return Check("recovered", not wrong and (unsure > 0 or error <= case.limit), error, case.limit, detail)


def _unclear(plan: Plan, statistics: SpaceMoments) -> dict[str, Tensor]:
    """By space, bool [total]: features that are dead wherever they are read, or have a double in their block."""
    unclear = {}
    for space in statistics.spaces:
        alive = torch.stack([moments.alive()[: space.total].cpu() for moments in statistics[space.name]]).any(0)
        own = statistics.correlation(space.name)[: space.total, : space.total].cpu().fill_diagonal_(0)
        blocks = own.view(space.blocks, space.size, space.blocks, space.size).diagonal(dim1=0, dim2=2)
        unclear[space.name] = ~alive | (blocks > TIE).any(1).T.reshape(-1)
    for space in plan.mergeable:
        if space.name not in unclear:  # a block is told by what lies inside it
            inside = [unclear[child.name].view(space.total, -1).all(1) for child in plan.children(space.name)]
            unclear[space.name] = torch.stack(inside).all(0)
    return unclear


class _Flow(Interpreter):
    """Runs the graph; at node `at` it notes the value and all that inputs alone decide, or puts such notes in place."""

    def __init__(self, case: _Case, at: Node, notes: Mapping[Node, Any] | None = None) -> None:
        super().__init__(case.graph.program.graph_module)
        self.at, self.notes, self.seen = at, notes, dict[Node, Any]()
        self.flows = case.graph.exported.flows
        self.filled = {memory_of(node) for node in self.flows if only_writes(node)}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n is self.at and self.notes is None:
            given = {k: v for k, v in self.env.items() if k not in self.flows and memory_of(k) not in self.filled}
            self.seen = tree_map_only(Tensor, Tensor.clone, given | {n: value})
        elif n is self.at and self.notes is not None:
            for node in self.notes.keys() & self.env.keys():
                if not _same(self.env[node], self.notes[node]):  # what is equal may share memory: it stays
                    self.env[node] = self.notes[node]
            return self.notes[n]
        return value


def _same(a: Any, b: Any) -> bool:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def _cuts(case: _Case) -> Check:
    valid = cuts(case.graph)
    tapped, device, errors = Tapped(case.graph), device_of(case.state), {}
    for cut in valid[:: math.ceil(len(valid) / CUTS) or 1]:
        node, outputs, notes = case.graph.exported.by_name[cut.node], [], None
        for args, kwargs in (case.samples, case.others):
            flow = _Flow(case, node, notes)
            with torch.no_grad():
                outputs.append(_floating(flow.run(*tapped.placeholders(case.state, device, args, kwargs))))
            notes = flow.seen
        errors[cut.node] = _difference(outputs[1], outputs[0])
    worst, detail = max(errors.values(), default=0.0), f"{len(errors)} of {len(valid)}"
    if not worst <= case.limit:
        detail = f"the value at {_most(errors)} does not decide the outputs"
    return Check("cuts", worst <= case.limit, worst, case.limit, detail)
