# SPDX-License-Identifier: Apache-2.0
"""The drop-in for torch.nn.utils.prune: the same masks as torch on the same calls, exact counts, every error and class."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn

import zipfast.compat.prune as prune
from zipfast.compat import _kept
from zipfast.tickets import Masks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compat" / "prune.md"


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = OrderedDict(conv=nn.Conv2d(3, 6, 3), flat=nn.Flatten(), hidden=nn.Linear(54, 10), out=nn.Linear(10, 4))
    return nn.Sequential(layers)


def both(call: Callable[[Any, nn.Sequential], None]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The masks that a call leaves in one network, from torch and from here, under one seed."""
    found = []
    for library in (torch_prune, prune):
        model = network()
        torch.manual_seed(7)
        call(library, model)
        names = [(n, own) for n, m in model.named_modules() for own in ("weight", "bias") if hasattr(m, f"{own}_mask")]
        found.append({f"{n}.{own}": getattr(model.get_submodule(n), f"{own}_mask") for n, own in names})
    assert found[0], "the call pruned nothing"
    return found[0], found[1]


def pairs(model: nn.Sequential) -> list[tuple[nn.Module, str]]:
    return [(model.conv, "weight"), (model.hidden, "weight"), (model.out, "weight"), (model.hidden, "bias")]


def uniform(t: Tensor, seed: int) -> Tensor:
    return torch.rand(t.shape, generator=torch.Generator().manual_seed(seed))


class Middle(prune.BasePruningMethod):
    """A method of one's own, as scripts write them: the survivors nearest to their median go."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float) -> None:
        prune._validate_pruning_amount_init(amount)
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        count = prune._compute_nparams_toprune(self.amount, t.nelement())
        prune._validate_pruning_amount(count, t.nelement())
        mask = default_mask.clone()
        mask.view(-1)[(t - t.median()).abs().view(-1).argsort()[:count]] = 0
        return mask


class TorchMiddle(torch_prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"
    __init__ = Middle.__init__
    compute_mask = Middle.compute_mask


def middle(library: Any) -> Any:
    return TorchMiddle if library is torch_prune else Middle


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "l1 fraction": lambda p, m: p.l1_unstructured(m.conv, "weight", 0.3),
    "l1 count": lambda p, m: p.l1_unstructured(m.hidden, name="bias", amount=4),
    "l1 none": lambda p, m: p.l1_unstructured(m.out, "weight", 0),
    "l1 all": lambda p, m: p.l1_unstructured(m.out, "weight", 1.0),
    "l1 half to even": lambda p, m: p.l1_unstructured(m.hidden, "bias", 0.25),
    "l1 scores": lambda p, m: p.l1_unstructured(m.conv, "weight", 0.3, importance_scores=uniform(m.conv.weight, 3)),
    "l1 scores of whole numbers": lambda p, m: p.l1_unstructured(
        m.hidden, "bias", 3, importance_scores=torch.randperm(10, generator=torch.Generator().manual_seed(1))
    ),
    "random": lambda p, m: p.random_unstructured(m.hidden, "weight", amount=0.6),
    "random count": lambda p, m: p.random_unstructured(m.out, "weight", 11),
    "random none": lambda p, m: p.random_unstructured(m.out, "weight", 0.0),
    "identity": lambda p, m: p.identity(m.out, "bias"),
    "random structured": lambda p, m: p.random_structured(m.conv, "weight", 0.5, dim=0),
    "random structured none": lambda p, m: p.random_structured(m.conv, "weight", 0, dim=0),
    "ln 1": lambda p, m: p.ln_structured(m.conv, "weight", 0.4, n=1, dim=0),
    "ln 2": lambda p, m: p.ln_structured(m.hidden, "weight", amount=0.4, n=2, dim=1),
    "ln inf": lambda p, m: p.ln_structured(m.conv, "weight", 1, n=float("inf"), dim=1),
    "ln -inf": lambda p, m: p.ln_structured(m.conv, "weight", 0.3, n=-float("inf"), dim=-1),
    "ln fro": lambda p, m: p.ln_structured(m.hidden, "weight", 0.3, n="fro", dim=0),
    "ln none": lambda p, m: p.ln_structured(m.hidden, "weight", 0, n=2, dim=0),
    "ln scores": lambda p, m: p.ln_structured(m.hidden, "weight", 3, 2, 0, importance_scores=uniform(m.hidden.weight, 4)),
    "custom": lambda p, m: p.custom_from_mask(m.conv, "weight", mask=(uniform(m.conv.weight, 5) > 0.4).float()),
    "custom boolean": lambda p, m: p.custom_from_mask(m.conv, "weight", uniform(m.conv.weight, 6) > 0.4),
    "global": lambda p, m: p.global_unstructured(pairs(m), pruning_method=p.L1Unstructured, amount=0.35),
    "global count": lambda p, m: p.global_unstructured(pairs(m), p.L1Unstructured, amount=100),
    "global random": lambda p, m: p.global_unstructured(pairs(m), p.RandomUnstructured, amount=0.35),
    "global own": lambda p, m: p.global_unstructured(pairs(m), middle(p), amount=0.2),
    "global scores": lambda p, m: p.global_unstructured(
        pairs(m), p.L1Unstructured, importance_scores={(m.out, "weight"): uniform(m.out.weight, 8)}, amount=0.35
    ),
    "own": lambda p, m: middle(p).apply(m.hidden, "weight", amount=0.2),
    "class": lambda p, m: p.L1Unstructured.apply(m.out, "weight", 0.4),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("name", CALLS)
def test_same_masks_as_torch(name: str) -> None:
    theirs, ours = both(CALLS[name])
    assert theirs.keys() == ours.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


@pytest.mark.parametrize("first", ["l1 fraction", "ln 1", "random structured", "custom", "global", "identity"])
@pytest.mark.parametrize("second", ["l1 fraction", "l1 scores", "random", "random structured", "ln 1", "ln inf",
                                    "custom", "global", "global random", "global scores", "own", "global own"])  # fmt: skip
def test_same_masks_in_rounds(first: str, second: str) -> None:
    def call(p: Any, m: nn.Sequential) -> None:
        for name in (first, second, second):
            CALLS[name](p, m)

    theirs, ours = both(call)
    assert theirs.keys() == ours.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    weight = torch.randperm(120, generator=torch.Generator().manual_seed(0)).reshape(12, 10).to(dtype) + 1
    found = []
    for p in (torch_prune, prune):
        layer = nn.Linear(10, 12, dtype=dtype)
        layer.weight.data.copy_(weight)
        p.l1_unstructured(layer, "weight", 0.5)
        assert layer.weight_mask.dtype == dtype
        found.append(layer.weight_mask)
    assert torch.equal(*found)


def test_ties_go_by_the_lowest_index_and_counts_are_exact() -> None:
    layers = [nn.Linear(10, 4, bias=False), nn.Linear(10, 6, bias=False)]
    for layer in layers:
        nn.init.constant_(layer.weight, -0.5)
    prune.global_unstructured([(m, "weight") for m in layers], prune.L1Unstructured, amount=45)
    assert layers[0].weight_mask.sum() == 0
    assert layers[1].weight_mask.reshape(-1).tolist() == [0.0] * 5 + [1.0] * 55
    prune.l1_unstructured(layers[1], "weight", 5)
    assert layers[1].weight_mask.reshape(-1).tolist() == [0.0] * 10 + [1.0] * 50

    theirs, conv = nn.Linear(10, 6, bias=False), nn.Conv2d(2, 5, 3)
    nn.init.constant_(theirs.weight, -0.5)
    torch_prune.l1_unstructured(theirs, "weight", 7)
    assert int(theirs.weight_mask.sum()) == 53  # as many there, which ones is open
    nn.init.constant_(conv.weight, 1.0)
    prune.ln_structured(conv, "weight", 2, n=2, dim=0)
    assert conv.weight_mask[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 1]


def test_what_is_ranked_is_the_weight_now() -> None:
    """torch ranks what the last forward pass left in ``weight``, before the optimiser's last step."""
    found = {}
    for p in (torch_prune, prune):
        layer = nn.Linear(4, 1, bias=False)
        layer.weight.data.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
        p.l1_unstructured(layer, "weight", 1)
        (layer.weight_orig if p is torch_prune else layer.weight).data.copy_(torch.tensor([[1.0, 2.0, 3.0, 9.0]]))
        p.l1_unstructured(layer, "weight", 1)
        found[p.__name__] = layer.weight_mask.tolist()
    assert found == {torch_prune.__name__: [[1, 1, 0, 0]], prune.__name__: [[0, 1, 1, 0]]}


def test_what_is_ranked_is_masked() -> None:
    layer = nn.Linear(3, 3, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, 1, 9], [2, 2, 2], [3, 3, 3]]))
    prune.custom_from_mask(layer, "weight", torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]]))
    layer.weight.data[0, 2] = 9  # unseen, and yet not counted
    prune.ln_structured(layer, "weight", 1, n=2, dim=0)
    assert layer.weight_mask.sum(1).tolist() == [0, 3, 3]


def test_generators_and_parameters_given_twice() -> None:
    model, again, theirs = network(), network(), network()
    with pytest.raises((ValueError, RuntimeError)):  # it goes over them three times
        torch_prune.global_unstructured((pair for pair in pairs(theirs)), torch_prune.L1Unstructured, amount=101)
    prune.global_unstructured((pair for pair in pairs(model)), prune.L1Unstructured, amount=101)
    prune.global_unstructured([*pairs(again), *pairs(again)], prune.L1Unstructured, amount=101)
    assert prune.masks(model) == prune.masks(again)
    found = prune.masks(model)
    assert sum(found.alive.values()) == sum(found.sizes.values()) - 101


def test_masks_that_are_given_are_not_kept() -> None:
    layer = nn.Linear(2, 2)
    prune.custom_from_mask(layer, "weight", torch.eye(2))
    prune.custom_from_mask(layer, "weight", torch.ones(2, 2))
    (container,) = layer._forward_pre_hooks.values()
    assert [method.mask for method in container] == [None, None] and layer.weight_mask.sum() == 2


def test_shared_weights_stay_shared() -> None:
    one, two = nn.Linear(6, 6), nn.Linear(6, 6)
    two.weight = one.weight
    prune.l1_unstructured(one, "weight", 12)
    assert two.weight is one.weight
    prune.l1_unstructured(two, "weight", 12)  # on top of the first: 12 of the 24 that are left
    assert one.weight_mask.sum() == two.weight_mask.sum() == 12 == int((one.weight != 0).sum())
    both_layers = nn.ModuleList([one, two])
    prune.global_unstructured([(one, "weight"), (two, "weight")], prune.L1Unstructured, amount=0.5)
    assert prune.masks(both_layers).alive == {"0.weight": 6}
    prune.remove(two, "weight")
    one.train()
    with torch.no_grad():
        one.weight += 1
    one(torch.zeros(1, 6))
    assert int((one.weight != 0).sum()) == 6 == int(one.weight_mask.sum())


# ------------------------------------------------------------------------------------------------------ hooks and history


def test_history_and_hooks_are_where_scripts_look() -> None:
    model = network()
    assert prune.random_unstructured(model.conv, "weight", 0.3) is model.conv
    assert [type(h) for h in model.conv._forward_pre_hooks.values()] == [prune.RandomUnstructured]
    prune.ln_structured(model.conv, "weight", amount=0.5, n=2, dim=0)
    prune.l1_unstructured(model.conv, "weight", 1)
    prune.l1_unstructured(model.conv, "bias", 1)
    for hook in model.conv._forward_pre_hooks.values():
        if hook._tensor_name == "weight":
            break
    assert isinstance(hook, prune.PruningContainer) and len(hook) == 3
    kinds = [prune.RandomUnstructured, prune.LnStructured, prune.L1Unstructured]
    assert [type(h) for h in hook] == kinds and isinstance(hook[1], prune.LnStructured)
    assert len(model.conv._forward_pre_hooks) == 2
    torch.testing.assert_close(hook.apply_mask(model.conv), model.conv.weight, rtol=0, atol=0)
    assert hook.apply_mask(model.conv).requires_grad


def test_prune_of_a_tensor_alone() -> None:
    t = torch.tensor([1.0, -4.0, 3.0, -2.0])
    for p in (torch_prune, prune):
        assert p.L1Unstructured(2).prune(t).tolist() == [0, -4, 3, 0]
        kept = p.L1Unstructured(2).prune(t, default_mask=torch.tensor([1.0, 0.0, 1.0, 1.0]))
        assert kept.tolist() == [0, 0, 3, 0]
        assert p.L1Unstructured(1).prune(t, importance_scores=torch.tensor([4.0, 1.0, 2.0, 3.0])).tolist() == [
            1,
            0,
            3,
            -2,
        ]


class Structured(prune.BasePruningMethod):
    PRUNING_TYPE = "structured"

    def __init__(self, dim: int = -1) -> None:
        self.dim = dim

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        self.shape = tuple(t.shape)
        mask = default_mask.clone()
        mask.select(self.dim, 0).zero_()
        return mask


def test_methods_of_ones_own_see_what_is_left() -> None:
    layer, seen = nn.Linear(5, 4), []
    for method in (Structured(), Structured()):
        seen.append(method)
        prune.BasePruningMethod.apply.__func__(lambda method=method: method, layer, "weight")
    assert [m.shape for m in seen] == [(4, 5), (4, 4)]
    assert layer.weight_mask[0].tolist() == [0, 0, 1, 1, 1]

    class Returns(prune.BasePruningMethod):
        PRUNING_TYPE = "unstructured"

        def __init__(self, mask: Any) -> None:
            self.mask = mask

        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Any:
            return self.mask

    before = layer.weight.clone()
    with pytest.raises(ValueError, match="the mask of Returns must hold 0 and 1 only"):
        Returns.apply(nn.Linear(2, 1), "weight", torch.full((1, 2), 0.5))
    with pytest.raises(ValueError, match=r"the mask of Returns must have the shape \[1, 2\] of the scores, got \[2\]"):
        Returns.apply(nn.Linear(2, 1), "weight", torch.ones(2))
    with pytest.raises(TypeError, match="the mask of Returns must be a tensor, got NoneType"):
        Returns.apply(nn.Linear(2, 1), "weight", None)
    with pytest.raises(RuntimeError, match="shape mismatch"):  # of torch, in the second round: nothing is changed
        Returns.apply(layer, "weight", torch.ones(7))
    assert torch.equal(layer.weight, before) and len(layer._forward_pre_hooks) == 1

    class All(Returns):
        PRUNING_TYPE = "global"

        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
            assert (t.dtype, default_mask.dtype) == (torch.int64, torch.float32)
            return self.mask

    scores = torch.ones(4, 5, dtype=torch.int64)
    All.apply(nn.Linear(5, 4), "weight", torch.ones(4, 5), importance_scores=scores)
    All.apply(layer, "weight", torch.ones(4, 5), importance_scores=scores)  # what is pruned stays pruned
    assert layer.weight_mask.sum() == 12
    everything = Returns.apply(layer, "weight", torch.ones(12))  # ones: nothing more is pruned, nothing comes back
    assert layer.weight_mask.sum() == 12 and len(everything) == 4


def test_remove_and_is_pruned() -> None:
    model = network()
    assert not prune.is_pruned(model)
    prune.global_unstructured(pairs(model), prune.L1Unstructured, amount=0.5)
    assert prune.is_pruned(model) and prune.is_pruned(model.conv) and not prune.is_pruned(model.flat)
    weight = model.hidden.weight
    prune.remove(model.hidden, "weight")
    assert prune.is_pruned(model.hidden) and model.hidden.weight is weight  # the bias is
    assert not hasattr(model.hidden, "weight_mask") and hasattr(model.hidden, "bias_mask")
    for module, name in pairs(model)[:1] + pairs(model)[2:]:
        assert prune.remove(module, name) is module
    assert not prune.is_pruned(model) and type(model.conv) is nn.Conv2d and not model.conv._forward_pre_hooks
    assert (model.conv.weight == 0).any() and not model.conv.weight._backward_hooks
    with torch.no_grad():
        model.conv.weight.fill_(1)
    model(torch.ones(1, 3, 5, 5))
    assert bool((model.conv.weight == 1).all())  # free again


# ---------------------------------------------------------------------------------------------- masks and checkpoints


def test_masks_are_those_of_tickets(tmp_path: Path) -> None:
    model = network()
    prune.global_unstructured(pairs(model), prune.L1Unstructured, amount=0.5)
    found = prune.masks(model)
    assert list(found) == ["conv.weight", "hidden.weight", "hidden.bias", "out.weight"]
    assert found == Masks.from_zeros({n: p for n, p in model.named_parameters() if n in found})
    found.save(tmp_path / "masks.safetensors")
    other = network(1)
    assert prune.apply_masks(other, Masks.load(tmp_path / "masks.safetensors")) is other
    assert prune.masks(other) == found
    prune.apply_masks(other, Masks.ones({n: p for n, p in other.named_parameters()}))  # nothing comes back
    assert {n: prune.masks(other).alive[n] for n in found} == found.alive
    with pytest.raises(
        ValueError, match=r"apply_masks: the masks must be those of this network, got no 'conv\.weight'"
    ):
        prune.apply_masks(nn.Linear(2, 2), found)
    with pytest.raises(ValueError, match="masks: 'source' must be pruned, got one that is not"):
        prune.masks(network())


def test_masks_travel_with_states(tmp_path: Path) -> None:
    """As torch's do: a script that calls identity and loads a checkpoint goes on with the masks of that checkpoint."""
    model = network()
    prune.global_unstructured(pairs(model), prune.L1Unstructured, amount=0.5)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert set(state) == set(network().state_dict()) and prune.masks(state) == prune.masks(model)
    fresh = network(1)
    for module, name in pairs(fresh):
        prune.identity(module, name)
    fresh.load_state_dict(state)
    assert prune.masks(fresh) == prune.masks(model)
    prune.l1_unstructured(fresh.conv, "weight", 0.5)
    fresh.load_state_dict(model.state_dict())  # the masks of that time, too
    assert prune.masks(fresh) == prune.masks(model)
    dense = network(2).state_dict()
    fresh.load_state_dict(dense)  # of a network that is not pruned: masks stay, what is dead is 0
    assert (
        prune.masks(fresh) == prune.masks(model)
        and (fresh.conv.weight == 0).any()
        and not (dense["conv.weight"] == 0).any()
    )
    again = network(3)
    again.load_state_dict(state)  # where nothing is pruned, they are not looked at
    assert not prune.is_pruned(again)
    assert prune.masks(prune.apply_masks(again, prune.masks(state))) == prune.masks(model)

    metadata = state._metadata["conv"][_kept.METADATA]
    whole = metadata["weight"]
    for bits, message in (
        (whole[:32], r"must be the packed bits of \[6, 3, 3, 3\], got torch.uint8 \[32\]"),
        (None, r"must be the packed bits of \[6, 3, 3, 3\], got NoneType"),
        (torch.full_like(whole, 255), r"must be .* got some behind the last of its 162 weights"),
    ):
        metadata["weight"] = bits
        with pytest.raises(RuntimeError, match=r"load_state_dict: the mask of 'conv.weight' " + message):
            fresh.load_state_dict(state)
        with pytest.raises(ValueError, match=r"masks: the mask of 'conv.weight' " + message):
            prune.masks(state)


def test_states_of_torch_are_read(tmp_path: Path) -> None:
    theirs = network()
    torch_prune.global_unstructured(pairs(theirs)[:2], torch_prune.L1Unstructured, amount=0.5)
    wanted = {name: getattr(theirs, name).weight_mask for name in ("conv", "hidden")}
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    for source in (theirs.state_dict(), tmp_path / "theirs.pt"):
        state, found = prune.from_torch(source)
        plain = network(1)
        plain.load_state_dict(state)
        for name, mask in wanted.items():
            assert torch.equal(found.dense()[f"{name}.weight"].float(), mask)
            torch.testing.assert_close(plain.get_submodule(name).weight, getattr(theirs, name).weight, rtol=0, atol=0)

    ours = network(2)
    prune.identity(ours.conv, "weight")
    prune.identity(ours.hidden, "weight")
    ours.load_state_dict(theirs.state_dict())  # the mask comes along
    assert all(torch.equal(ours.get_submodule(n).weight_mask, mask) for n, mask in wanted.items())
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(ours(x), theirs(x))

    half = {**theirs.state_dict(), "conv.weight_mask": torch.full((6, 3, 3, 3), 0.5)}
    with pytest.raises(RuntimeError, match=r"load_state_dict: the mask of 'conv\.weight' must hold 0 and 1 only"):
        ours.load_state_dict(half)
    with pytest.raises(ValueError, match=r"from_torch: 'conv\.weight_mask' must hold 0 and 1 only"):
        prune.from_torch(half)
    with pytest.raises(
        ValueError, match="from_torch: 'source' must hold pairs such as weight_orig and weight_mask, got none"
    ):
        prune.from_torch(network().state_dict())


# ----------------------------------------------------------------------------------------------------------------- docs


def test_the_page_lists_every_call_of_torch() -> None:
    rows = re.findall(r"^\| `([\w.]+)[^|]*\| (same|same, and fixed where [^|]+|not offered, because [^|]+) \|$",
                      PAGE.read_text(encoding="utf-8"), re.MULTILINE)  # fmt: skip
    listed = dict(rows)
    theirs = {
        n
        for n in vars(torch_prune)
        if not n.startswith("_") and getattr(vars(torch_prune)[n], "__module__", "") == torch_prune.__name__
    }
    methods = {f"BasePruningMethod.{n}" for n in ("apply", "compute_mask", "apply_mask", "prune", "remove")}
    assert theirs | methods <= set(listed)
    for name in theirs:
        assert hasattr(prune, name) == (not listed[name].startswith("not offered")), name
