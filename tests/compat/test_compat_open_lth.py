# SPDX-License-Identifier: Apache-2.0
"""Folders and pruning steps of open_lth, against what its code made; set ZIPFAST_OPEN_LTH to a checkout to run it here.

The recorded facts are from github.com/facebookresearch/open_lth at 2ce732f, run under torch 2.13 and NumPy 2 (with
np.product put back): its LotteryRunner for the folder of a LeNet 784-12-8-10, and its sparse_global strategy for the masks.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zipfast.checkpoint import read_metadata
from zipfast.compat import open_lth
from zipfast.tickets import Masks

SHAPES = {"fc_layers.0.weight": (12, 784), "fc_layers.1.weight": (8, 12), "fc.weight": (10, 8)}
# (fraction, ignored) -> per level the survivors of each tensor and a hash of the bits, as its code made them
MADE: dict[tuple[float, str | None], list[tuple[list[int], str]]] = {
    (0.2, None): [
        ([7525, 77, 64], "82012e2750b13368"), ([6018, 60, 51], "b5112e5004e88743"), ([4809, 50, 42], "6413e8fd507fb6fc"),
    ],
    (0.2, "fc.weight"): [
        ([7509, 76, 80], "5171039ed6b0f67e"), ([5990, 60, 80], "d5f04ea36df1982d"), ([4773, 49, 80], "2cd4a28bd4348658"),
    ],
    (0.5, "fc.weight,fc_layers.1.weight"): [
        ([4615, 96, 80], "b234275b5e6360c2"), ([2217, 96, 80], "ffbdaf1fcb66009c"), ([1018, 96, 80], "c926bf229ecafd99"),
    ],
    (0.0, None): [
        ([9407, 96, 80], "e6ce77fb3d7b77b7"), ([9406, 96, 80], "0631845cd329fe96"), ([9404, 96, 80], "ab3d97b94fc5778d"),
    ],
}  # fmt: skip
UNPRUNED = [9584, 7666, 6131, 4903]  # of its runner: 20 % a level, fc.weight ignored
LOG = "test_loss,0,3.058914794921875\ntest_accuracy,0,0.095\ntest_examples,0,200.0\ntest_loss,8,2.28\ntest_accuracy,8,0.19"


def weights() -> dict[str, Tensor]:
    """Whole numbers over 1000 in an order of their own, with many equal magnitudes."""
    found = {}
    for t, (name, shape) in enumerate(SHAPES.items()):
        i = np.arange(int(np.prod(shape)), dtype=np.int64)
        found[name] = torch.from_numpy((((i * 7919 + t * 131) % 10007 - 5003) / 1000).astype(np.float32).reshape(shape))
    return found


def short_hash(masks: Masks) -> str:
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(name.encode())
        digest.update(np.packbits(masks.dense()[name].numpy().reshape(-1), bitorder="little").tobytes())
    return digest.hexdigest()[:16]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two levels in the layout of its runner."""
    masks, state = Masks.ones(weights()), {**weights(), "fc.bias": torch.ones(10)}
    for level in range(2):
        folder = tmp_path / "lottery_1a7d" / "replicate_1" / f"level_{level}" / "main"
        open_lth.write_masks(masks, folder)
        torch.save(state, folder / "model_ep0_it0.pth")
        torch.save({name: value + 1 for name, value in state.items()}, folder / "model_ep10_it3.pth")
        torch.save({name: value + 2 for name, value in state.items()}, folder / "model_ep9_it7.pth")
        torch.save({"ep": 2, "model_state_dict": state}, folder / "checkpoint.pth")
        (folder / "logger").write_text(LOG)
        (folder / "hparams.log").write_text("Dataset Hyperparameters\n    * dataset_name => mnist")
        masks = open_lth.prune(masks, weights())
    (tmp_path / "lottery_1a7d" / "replicate_1" / "level_pretrain" / "main").mkdir(parents=True)
    return tmp_path / "lottery_1a7d"


# -------------------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize("case", MADE, ids=str)
def test_prune_makes_the_masks_of_its_code(case: tuple[float, str | None]) -> None:
    fraction, ignored = case
    masks = Masks.ones(weights())
    for level, (alive, digest) in enumerate(MADE[case], 1):
        masks = open_lth.prune(masks, weights(), fraction, ignored)
        assert (list(masks.alive.values()), short_hash(masks)) == (alive, digest)
        assert masks.facts["level"] == level


def test_counts_of_its_runner() -> None:
    """One more than a fifth goes where no magnitudes are equal, and what is ignored counts."""
    torch.manual_seed(0)
    distinct = torch.randperm(9584) + 1.0
    state = {n: part.reshape(SHAPES[n]) for n, part in zip(SHAPES, distinct.split([9408, 96, 80]))}
    masks = Masks.ones(state)
    for unpruned in UNPRUNED:
        assert sum(masks.alive.values()) == unpruned
        masks = open_lth.prune(masks, state, 0.2, "fc.weight")
        assert masks.alive["fc.weight"] == 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.5,), "'pruning_fraction' must be in [0, 1], got 1.5"),
        ((1.0,), "must leave a survivor to compare with, got 1.0: 9584 of the 9584 that may go; use Masks.prune"),
        ((0.5, "fc_layers.0.weight"), "got 0.5: 4792 of the 176 that may go"),
        ((0.2, "fc"), "must name masks (fc_layers.0.weight, fc_layers.1.weight, fc.weight), got 'fc'"),
    ],
)
def test_prune_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        open_lth.prune(Masks.ones(weights()), weights(), *arguments)


def test_prune_refuses_nan_and_other_networks() -> None:
    wrong = weights()
    wrong["fc.weight"][1, 1] = float("nan")
    with pytest.raises(
        ValueError, match=r"open_lth\.prune: weights must be numbers, got NaN in 'fc.weight' at flat index 9"
    ):
        open_lth.prune(Masks.ones(wrong), wrong)
    with pytest.raises(ValueError, match=r"open_lth\.prune: the masks must be those of this network"):
        open_lth.prune(Masks.ones(weights()), nn.Linear(2, 2))


# -------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("place", ["mask.pth", ".", ".."])
def test_masks_are_read(run: Path, place: str) -> None:
    level = run / "replicate_1" / "level_1" / "main"
    masks = open_lth.read_masks(level / place)
    assert list(masks.alive.values()) == MADE[0.2, None][0][0] and masks.facts == {"rule": "open_lth", "level": 1}
    assert masks == open_lth.prune(Masks.ones(weights()), weights())
    theirs = torch.load(level / "mask.pth", weights_only=True)
    assert {m.dtype for m in theirs.values()} == {torch.int32} and type(theirs) is dict  # as its Mask.save writes it
    assert json.loads((level / "sparsity_report.json").read_text()) == {"total": 9584.0, "unpruned": 7666.0}


def test_levels(run: Path) -> None:
    found = open_lth.levels(run)
    assert found == open_lth.levels(run / "replicate_1") and [level.number for level in found] == [0, 1]
    level = found[1]
    assert level.steps == ((0, 0), (9, 7), (10, 3))
    dead = ~level.masks().dense()["fc.weight"]
    assert not level.state()["fc.weight"][dead].any() and not level.start()["fc.weight"][dead].any()
    assert torch.equal(level.state()["fc.weight"][~dead], weights()["fc.weight"][~dead] + 1)
    assert torch.equal(level.state((9, 7))["fc.weight"][~dead], weights()["fc.weight"][~dead] + 2)
    assert torch.equal(level.start()["fc.bias"], torch.ones(10))
    assert level.log()["test_accuracy"] == [(0, 0.095), (8, 0.19)] and next(iter(level.log())) == "test_loss"


def test_levels_of_branches(run: Path) -> None:
    masks = open_lth.levels(run)[1].masks().shuffled(0)
    open_lth.write_masks(masks, run / "replicate_1" / "level_1" / "randomly_prune_ab12")
    (level,) = open_lth.levels(run, "randomly_prune_ab12")
    assert (level.number, level.steps) == (1, ()) and level.masks() == masks
    with pytest.raises(ValueError, match=r"must hold a model of its end, got models of none"):
        level.state()
    with pytest.raises(ValueError, match=r"Level\.start: .* must hold a model of its start, got none"):
        level.start()


def test_export(run: Path, tmp_path: Path) -> None:
    level = open_lth.levels(run)[1]
    state, beside = open_lth.export(level, tmp_path / "ticket.safetensors", start=True)
    assert beside == tmp_path / "ticket.masks.safetensors" and Masks.load(beside) == level.masks()
    from safetensors.torch import load_file

    assert all(torch.equal(value, level.start()[name]) for name, value in load_file(state).items())
    about = read_metadata(state)
    assert (about["level"], about["epoch"], about["iteration"], about["source"]) == (1, 0, 0, "open_lth")
    open_lth.export(level, tmp_path / "end.safetensors")
    assert read_metadata(tmp_path / "end.safetensors")["epoch"] == 10


def test_what_cannot_be_read(run: Path, tmp_path: Path) -> None:
    main = run / "replicate_1" / "level_1" / "main"
    with pytest.raises(FileNotFoundError, match=r"read_masks: .*none.* must be a mask.pth of open_lth, or hold one"):
        open_lth.read_masks(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="read_masks"):
        open_lth.read_masks(tmp_path)
    with pytest.raises(FileNotFoundError, match="levels: no folder at"):
        open_lth.levels(tmp_path / "none")
    with pytest.raises(ValueError, match=r"levels: .* must hold level_0/other/mask.pth and so on, got none"):
        open_lth.levels(run, "other")
    with pytest.raises(
        ValueError, match=r"must hold a model of step \(1, 2\), got models of \(0, 0\), \(9, 7\), \(10, 3\)"
    ):
        open_lth.levels(run)[0].state((1, 2))
    with pytest.raises(ValueError, match=r"line 2 of .*logger must be 'name,iteration,value', got 'a,b'"):
        (main / "logger").write_text("x,1,2\na,b")
        open_lth.read_log(main / "logger")

    report = (main / "sparsity_report.json").read_text()
    for text, message in (
        (report.replace("7666", "7667"), r"must have the 7667 survivors of 9584 that it tells, got 7666 of 9584"),
        ("{}", r"sparsity_report.json is damaged \(KeyError: 'total'\); delete it to read the mask alone"),
    ):
        (main / "sparsity_report.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            open_lth.read_masks(main)
    (main / "sparsity_report.json").unlink()
    open_lth.read_masks(main)

    torch.save({"w": torch.full((2, 2), 2)}, main / "mask.pth")
    with pytest.raises(ValueError, match=r"must hold masks of 0 and 1, got other values in 'w'"):
        open_lth.read_masks(main)
    torch.save({}, main / "mask.pth")
    with pytest.raises(ValueError, match=r"must hold a mask, got none"):
        open_lth.read_masks(main)
    torch.save(nn.Linear(2, 2), main / "mask.pth")
    with pytest.raises(
        ValueError, match=r"cannot be read as plain tensors \(it would run torch\.nn\.modules\.linear\.Linear\)"
    ):
        open_lth.read_masks(main)
    open_lth.write_masks(Masks.ones(weights()), run / "replicate_2" / "level_0" / "main")
    with pytest.raises(
        ValueError, match=r"must be one replicate, got .* with replicate_1, replicate_2; name one of them"
    ):
        open_lth.levels(run)


# ------------------------------------------------------------------------------------------------------------- its code


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.SimpleNamespace:
    """Its own modules, with stand-ins for the two that a new torch cannot import (torchvision, DistributedDataParallel)."""
    if not (folder := os.environ.get("ZIPFAST_OPEN_LTH")):
        pytest.skip("ZIPFAST_OPEN_LTH does not name a checkout of github.com/facebookresearch/open_lth")
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    models = types.ModuleType("models")
    models.base = types.ModuleType("models.base")
    models.base.Model = nn.Module
    for name, module in (("models", models), ("models.base", models.base)):
        monkeypatch.setitem(sys.modules, name, module)
    platform = importlib.import_module("platforms.platform")
    place = types.SimpleNamespace(
        is_primary_process=True, exists=os.path.exists, makedirs=os.makedirs, open=open, save_model=torch.save,
        load_model=torch.load,
    )  # fmt: skip
    monkeypatch.setattr(platform, "_PLATFORM", place)
    strategy = importlib.import_module("pruning.sparse_global")
    mask = importlib.import_module("pruning.mask")
    yield types.SimpleNamespace(Strategy=strategy.Strategy, PruningHparams=strategy.PruningHparams, Mask=mask.Mask)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
            del sys.modules[name]


@pytest.mark.parametrize("case", MADE, ids=str)
def test_its_code_makes_the_same(case: tuple[float, str | None], theirs: types.SimpleNamespace, tmp_path: Path) -> None:
    fraction, ignored = case
    model = types.SimpleNamespace(prunable_layer_names=list(SHAPES), state_dict=weights)
    hparams = theirs.PruningHparams(
        pruning_strategy="sparse_global", pruning_fraction=fraction, pruning_layers_to_ignore=ignored
    )
    ours, mask = Masks.ones(weights()), None
    for level in range(1, 4):
        mask = theirs.Strategy.prune(hparams, model, mask)
        mask.save(str(tmp_path / f"level_{level}" / "main"))
        ours = open_lth.prune(ours, weights(), fraction, ignored)
        assert open_lth.read_masks(tmp_path / f"level_{level}") == ours
        assert short_hash(ours) == MADE[case][level - 1][1]
        open_lth.write_masks(ours, tmp_path / f"ours_{level}")
        mask = theirs.Mask.load(str(tmp_path / f"ours_{level}"))  # and it goes on with ours
