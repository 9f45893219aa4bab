# SPDX-License-Identifier: Apache-2.0
"""The drop-in for torch.nn.utils.prune: what it refuses, in which words, and where torch refuses it in the same way."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn

import zipfast.compat.prune as prune
from zipfast.compat import _kept

NAN = torch.tensor([[1.0, 2.0], [float("nan"), 3.0]])
ERRORS: list[tuple[Callable[[Any, nn.Module], Any], type, str, bool]] = [  # the last: torch raises the same type
    (lambda p, m: p.l1_unstructured(m, "weight", 1.5),
     ValueError, "must be a fraction in [0, 1], or an int of 0 or more, got 1.5", True),
    (lambda p, m: p.l1_unstructured(m, "weight", -1),
     ValueError, "must be a fraction in [0, 1], or an int of 0 or more, got -1", True),
    (lambda p, m: p.random_unstructured(m, "weight", "half"),
     TypeError, "'amount' must be a number, got str", True),
    (lambda p, m: p.l1_unstructured(m, "weight", 5),
     ValueError, "'amount' must be at most the 4 that are left, got 5", True),
    (lambda p, m: p.random_unstructured(m, "weight", 5),
     ValueError, "'amount' must be at most the 4 that are left, got 5", True),
    (lambda p, m: p.random_structured(m, "weight", 3, 0),
     ValueError, "'amount' must be at most the 2 that are left, got 3", True),
    (lambda p, m: p.ln_structured(m, "bias", 1, 2, 0),
     ValueError, "a tensor must have channels (two dimensions or more), got [2]", True),
    (lambda p, m: p.ln_structured(m, "weight", 1, 2, 2),
     IndexError, "'dim' must be a dimension of a tensor of shape [2, 2], got 2", True),
    (lambda p, m: p.random_structured(m, "weight", 1, -3),
     IndexError, "'dim' must be a dimension of a tensor of shape [2, 2], got -3", True),
    (lambda p, m: p.l1_unstructured(m, "wieght", 1),
     AttributeError, "'name' must be a parameter of Linear (weight, bias), got 'wieght'", True),
    (lambda p, m: p.l1_unstructured(m, "in_features", 1),
     TypeError, "'in_features' of Linear must be a parameter, got int", False),
    (lambda p, m: p.l1_unstructured(nn.BatchNorm1d(2), "running_mean", 1),
     TypeError, "'running_mean' of BatchNorm1d must be a parameter, got a buffer", False),
    (lambda p, m: p.l1_unstructured(m, "weight", 1, torch.ones(3)),
     AssertionError, "must have the shape [2, 2] of 'weight', got [3]", True),
    (lambda p, m: p.l1_unstructured(m, "weight", 1, NAN),
     ValueError, "scores must be numbers, got NaN at flat index 2", False),
    (lambda p, m: p.ln_structured(m, "weight", 1, 2, 0, NAN),
     ValueError, "scores must be numbers, got NaN at flat index 1", False),
    (lambda p, m: p.custom_from_mask(m, "weight", torch.ones(3)),
     ValueError, "must have the shape [2, 2] of the parameter, got [3]", False),
    (lambda p, m: p.custom_from_mask(m, "weight", torch.full((2, 2), 2.0)),
     ValueError, "'mask' must hold 0 and 1 only", False),
    (lambda p, m: p.custom_from_mask(m, "weight", [[1, 0]]),
     TypeError, "'mask' must be a tensor, got list", False),
    (lambda p, m: p.remove(m, "weight"),
     ValueError, "'name' must be pruned in Linear (nothing is), got 'weight'", True),
    (lambda p, m: p.L1Unstructured(1).remove(m),
     AssertionError, "Linear must be pruned by this method, got one that is not", False),
    (lambda p, m: p.L1Unstructured(1).apply_mask(m),
     AssertionError, "Linear must be pruned by this method, got one that is not", False),
    (lambda p, m: p.global_unstructured(3, p.L1Unstructured, amount=1),
     TypeError, "'parameters' must be pairs (module, name), got int", True),
    (lambda p, m: p.global_unstructured([m], p.L1Unstructured, amount=1),
     TypeError, "'parameters' must hold pairs (module, name), got Linear", True),
    (lambda p, m: p.global_unstructured([(m, "weight")], p.L1Unstructured, [NAN], amount=1),
     TypeError, "must be a dict by (module, name), got list", True),
    (lambda p, m: p.global_unstructured([(m, "weight")], p.LnStructured, amount=1, n=2),
     TypeError, "must be of PRUNING_TYPE 'unstructured', got 'structured'", True),
    (lambda p, m: p.global_unstructured([], p.L1Unstructured, amount=1),
     ValueError, "'parameters' must hold a pair (module, name), got none", False),
    (lambda p, m: p.global_unstructured([(m, "weight"), (nn.Linear(2, 2).to("meta"), "weight")], p.L1Unstructured, amount=1),
     ValueError, "'parameters' must be on one device, got cpu, meta", False),
    (lambda p, m: p.identity(nn.Linear(2, 2, device="meta"), "weight"),
     RuntimeError, "prune: 'weight' must have values, got one on the device meta; load them first", False),
    (lambda p, m: p.global_unstructured([(m, "bias"), (m, "weight")], p.L1Unstructured, {(m, "weight"): NAN}, amount=1),
     ValueError, "got NaN at flat index 2 of tensor 1", False),
    (lambda p, m: p.PruningContainer().add_pruning_method(3),
     TypeError, "'method' must be a BasePruningMethod of this module, got int", True),
    (lambda p, m: p.l1_unstructured(nn.Conv2d(1, 1, 1, dtype=torch.complex64), "weight", 1),
     TypeError, "must be a plain floating-point tensor, got Tensor of torch.complex64", False),
    (lambda p, m: p.l1_unstructured(torch.jit.script(m), "weight", 1),
     TypeError, "must be a plain module, got a scripted", False),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("case", ERRORS, ids=range(len(ERRORS)))
def test_errors(case: tuple[Callable[[Any, nn.Module], Any], type, str, bool]) -> None:
    call, kind, message, same = case
    layer = nn.Linear(2, 2)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(kind, match=re.escape(message)) as error:
        call(prune, layer)
    assert type(error.value) is kind
    assert not prune.is_pruned(layer) and type(layer) is nn.Linear and _kept.guard_of(layer.weight) is None
    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())
    if same:
        with pytest.raises(kind):
            call(torch_prune, nn.Linear(2, 2))


def test_errors_of_containers_and_kinds() -> None:
    one, two = prune.Identity(), prune.Identity()
    one._tensor_name, two._tensor_name = "weight", "bias"
    with pytest.raises(ValueError, match="'method' must act on 'weight', got one for 'bias'"):
        prune.PruningContainer(one, two)

    class Odd(prune.Identity):
        PRUNING_TYPE = "odd"

    class NoDim(prune.Identity):
        PRUNING_TYPE = "structured"

    layer = nn.Linear(2, 2)
    prune.identity(layer, "weight")
    with pytest.raises(
        ValueError, match="PRUNING_TYPE of Odd must be 'unstructured', 'structured' or 'global', got 'odd'"
    ):
        Odd.apply(layer, "weight")
    with pytest.raises(AttributeError, match="NoDim must have the attribute 'dim', as it is structured"):
        NoDim.apply(layer, "weight")
    theirs = torch_prune.identity(nn.Linear(2, 2), "weight")
    with pytest.raises(
        TypeError, match=r"'weight' of Linear must be a parameter, got Tensor; undo torch\.nn\.utils\.prune"
    ):
        prune.identity(theirs, "weight")
    with pytest.raises(TypeError, match="'bias' of Linear must be a parameter, got NoneType"):
        prune.identity(nn.Linear(2, 2, bias=False), "bias")


PAGE = Path(__file__).resolve().parents[2] / "docs" / "compat" / "prune.md"
LISTED = re.findall(r"^\| `(prune\..*?)` \| (\w+): (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("call,kind,message", LISTED, ids=range(len(LISTED)))
def test_errors_of_the_page(call: str, kind: str, message: str) -> None:
    with pytest.raises(Exception) as error:
        eval(call, {"prune": prune, "layer": nn.Linear(2, 2)})
    assert (type(error.value).__name__, str(error.value)) == (kind, message)


def test_the_page_has_errors() -> None:
    assert len(LISTED) >= 4
