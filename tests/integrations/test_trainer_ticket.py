# SPDX-License-Identifier: Apache-2.0
"""TicketCallback in transformers' Trainer (and, without accelerate, in one like it): what is dead stays dead."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mini_trainer import KillAt, Killed, TrainerCallback, model, read_state, start_fixture  # noqa: F401
from torch import nn

import zipfast
from zipfast.integrations.transformers import TicketCallback
from zipfast.tickets import gradual

Start = Callable[..., Any]


def sparse(net: nn.Module, amount: float = 0.6) -> zipfast.Masks:
    return zipfast.Masks.ones(net, ignore="classifier").prune(net, amount)


class Watch(TrainerCallback):
    """Whether anything dead moves, and the norm of the gradient after clipping."""

    def __init__(self, callback: TicketCallback) -> None:
        self.callback, self.norms = callback, list[float]()

    def dead(self, net: nn.Module) -> list[tuple[nn.Parameter, torch.Tensor]]:
        assert self.callback.masks is not None
        weights = self.callback.masks.check(net)
        return [(weights[name], ~alive) for name, alive in self.callback.masks.dense().items()]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        for weight, dead in self.dead(model):
            assert weight.grad is not None and not weight.grad[dead].any()

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        for weight, dead in self.dead(model):
            assert not weight[dead].any() and bool(weight.any()) != bool(dead.all())
            for value in optimizer.state[weight].values():
                if value.shape == weight.shape:
                    assert not value[dead].any()


def test_what_is_dead_stays_dead(start: Start, tmp_path: Path) -> None:
    net = model()
    callback = TicketCallback(sparse(net))
    watch = Watch(callback)
    start(tmp_path, [callback, watch], net, max_grad_norm=0.05).train()
    assert len(watch.norms) == 12
    # Clipped to 0.05 without what is dead: if that had entered the norm, less would be left.
    torch.testing.assert_close(torch.tensor(watch.norms), torch.full((12,), 0.05), rtol=1e-3, atol=0)
    assert callback.masks is not None and callback.masks == sparse(model())
    net.zero_grad()
    net(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, dtype=torch.long)).loss.backward()
    weight = net.bert.encoder.layer[0].output.dense.weight
    assert weight.grad is not None and weight.grad[weight == 0].any(), "no hook stays on the model"


def test_modes_agree_on_survivors(start: Start, tmp_path: Path) -> None:
    found = []
    for mode in ("grad", "post", "forward"):
        net = model()
        masks = sparse(net)
        start(tmp_path / mode, [TicketCallback(masks, mode=mode)], net, max_grad_norm=0, save_strategy="no").train()
        masks.apply_(net)
        found.append(net.state_dict())
    for other in found[1:]:
        for key, value in found[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-6)


def test_a_schedule_prunes_while_training(start: Start, tmp_path: Path) -> None:
    callback = TicketCallback(schedule={2: 0.5, 5: 0.5, 8: {".*query.*": 1.0}}, ignore="classifier")
    watch = Watch(callback)
    trainer = start(tmp_path, [callback, watch], logging_steps=1)
    trainer.train()
    assert [step for step, _ in callback.history] == [2, 5, 8]
    assert [round(density, 2) for _, density in callback.history[:2]] == [0.5, 0.25]
    assert callback.masks is not None and callback.masks.alive["bert.encoder.layer.0.attention.self.query.weight"] == 0
    logged = [(e["step"], e["ticket_density"]) for e in trainer.state.log_history if "ticket_density" in e]
    assert logged == callback.history
    kept = {step: zipfast.Masks.load(tmp_path / f"checkpoint-{step}" / "masks.safetensors") for step in (3, 6, 9, 12)}
    assert [round(kept[step].density, 2) for step in (3, 6)] == [0.5, 0.25] and kept[12] == kept[9] == callback.masks
    assert kept[6].within(kept[3]) and kept[6].facts["step"] == 5
    assert read_state(tmp_path, 6)["stateful_callbacks"]["zipfast.TicketCallback"]["hash"] == kept[6].hash()


@pytest.mark.parametrize("killed, step", [(8, 6), (7, 6), (4, 3)])
def test_a_killed_run_goes_on(start: Start, tmp_path: Path, killed: int, step: int) -> None:
    def callback() -> TicketCallback:
        return TicketCallback(schedule={2: 0.5, 6: 40, 7: 0.3, 10: 0.2}, scope="global", ignore="classifier")

    whole, again = model(), model(seed=3)
    first = callback()
    start(tmp_path / "whole", [first], whole).train()
    with pytest.raises(Killed):
        start(tmp_path / "run", [callback(), KillAt(killed)]).train()
    second = callback()
    start(tmp_path / "run", [second], again).train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert second.masks == first.masks and second.history == first.history
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_masks_are_found_or_asked_for(start: Start, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        start(tmp_path / "run", [TicketCallback(schedule={2: 0.5}), KillAt(4)]).train()
    saved = tmp_path / "run" / "checkpoint-3"
    masks = zipfast.Masks.load(saved / "masks.safetensors")
    (saved / "masks.safetensors").unlink()  # killed between the checkpoint and its masks
    callback = TicketCallback(schedule={2: 0.5})
    start(tmp_path / "run", [callback]).train(resume_from_checkpoint=str(saved))
    assert callback.masks == masks
    shutil.move(str(saved), tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"TicketCallback: the masks of step 3 must be in .*got none .* masks=zipfast.Masks.load"
    ):
        start(tmp_path / "new", [TicketCallback()]).train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    callback = TicketCallback(masks)
    start(tmp_path / "new", [callback]).train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    assert callback.masks == masks


class Scripted(TrainerCallback):
    """A metric that is best at step 3."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        metrics["eval_best"] = -float(state.global_step)


def test_the_best_model_has_its_own_masks(start: Start, tmp_path: Path) -> None:
    net, callback = model(), TicketCallback(schedule={2: 0.5, 5: 0.5})
    options = {"load_best_model_at_end": True, "metric_for_best_model": "best"}
    start(tmp_path, [callback, Scripted()], net, **options).train()
    assert callback.masks == zipfast.Masks.load(tmp_path / "checkpoint-3" / "masks.safetensors")
    assert callback.masks is not None and round(callback.masks.density, 2) == 0.5
    assert all(not weight[~callback.masks.dense()[n]].any() for n, weight in callback.masks.check(net).items())

    class Lost(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            (Path(state.best_model_checkpoint) / "masks.safetensors").unlink()

    with pytest.warns(UserWarning, match=r"TicketCallback: the best model, .*, has no masks.safetensors"):
        start(tmp_path / "lost", [Lost(), TicketCallback(), Scripted()], **options).train()


def test_a_second_training_begins_with_the_first_masks(start: Start, tmp_path: Path) -> None:
    net = model()
    masks = sparse(net, 0.3)
    callback = TicketCallback(masks, schedule={4: 0.5})
    trainer = start(tmp_path, [callback], net, save_strategy="no", max_steps=5)
    for _ in range(2):
        trainer.train()
        assert [step for step, _ in callback.history] == [4]
        assert callback.history[0][1] == pytest.approx(0.35, abs=0.01)


def test_levels_of_iterative_pruning_are_a_loop(start: Start, tmp_path: Path) -> None:
    theta = {key: value.clone() for key, value in model().state_dict().items()}
    masks, densities = zipfast.Masks.ones(model(), ignore="classifier"), []
    for level in range(3):
        net = model()
        masks.rewind_(net, theta)
        start(tmp_path / str(level), [TicketCallback(masks)], net, save_strategy="no", max_steps=4).train()
        densities.append(masks.density)
        masks = masks.prune(net, 0.5)
    assert [round(density, 3) for density in densities] == [1.0, 0.5, 0.25]


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_schedule_beyond_the_end(start: Start, tmp_path: Path) -> None:
    callback = TicketCallback(schedule={2: 0.5, 900: 0.5})
    with pytest.warns(
        UserWarning, match=r"TicketCallback: 'schedule' prunes at step 900, but the training ends at \d+"
    ):
        start(tmp_path, [callback]).train()
    assert [step for step, _ in callback.history] == [2]


def test_bad_arguments() -> None:
    net = model()
    with pytest.raises(TypeError, match=r"TicketCallback: 'masks' must be zipfast.Masks, got str; see Masks.load"):
        TicketCallback("masks.safetensors")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'only' and 'ignore' must be left out with masks"):
        TicketCallback(sparse(net), ignore="classifier")
    with pytest.raises(ValueError, match="TicketCallback: 'scope' must be one of layer, global, got 'row'"):
        TicketCallback(scope="row")
    with pytest.raises(ValueError, match="TicketCallback: 'mode' must be one of grad, post, forward, got 'hard'"):
        TicketCallback(mode="hard")
    for step in (0, 0.5, "1"):
        with pytest.raises(ValueError, match=f"'schedule' must name steps, whole numbers from 1, got {step!r}"):
            TicketCallback(schedule={step: 0.5})  # type: ignore[dict-item]


def test_masks_of_another_network(start: Start, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the masks must be those of this network, got no '0.weight'"):
        start(tmp_path, [TicketCallback(zipfast.Masks.ones(nn.Sequential(nn.Linear(2, 2))))]).train()


@pytest.mark.parametrize("what", ["deepspeed", "fsdp"])
def test_weights_that_are_cut_up(what: str) -> None:
    args = SimpleNamespace(**{"deepspeed": None, "fsdp": None, what: "on"})
    with pytest.raises(ValueError, match=rf"must train whole weights on each device .*, got {what}"):
        TicketCallback().on_train_begin(args, SimpleNamespace(), None)
    args = SimpleNamespace(deepspeed=None, fsdp=[], save_strategy="steps")
    with pytest.raises(ValueError, match=r"a hyper-parameter search must have save_strategy='no', .* got 'steps'"):
        TicketCallback().on_train_begin(args, SimpleNamespace(is_hyper_param_search=True), None)


# ------------------------------------------------------------------------------------------------------------- schedule


def test_gradual_pruning_follows_the_cubic_curve() -> None:
    for initial, density, times in ((1.0, 0.1, 10), (0.5, 0.02, 3), (1.0, 1.0, 2)):
        rates, left = gradual(density, 10, 110, times, initial=initial), initial
        for step, rate in rates.items():
            left *= 1 - rate
            assert left == pytest.approx(density + (initial - density) * (1 - (step - 10) / 100) ** 3, abs=5e-3)
        assert max(rates) == 110 and len(rates) == times and left == pytest.approx(density)


def test_gradual_refuses() -> None:
    for arguments, message in (
        ((0.0, 0, 10, 2), "gradual: 'density' must be above 0 and at most 1, got 0.0"),
        ((1.5, 0, 10, 2), "'density' must be above 0 and at most 1, got 1.5"),
        ((0.5, 10, 10, 2), "'start' and 'stop' must be steps, 0 <= start < stop, got 10 and 10"),
        ((0.5, 0, 10, 11), "'times' must be from 1 to 10, got 11"),
    ):
        with pytest.raises(ValueError, match=message):
            gradual(*arguments)
    with pytest.raises(ValueError, match="gradual: 'initial' must be above 0 and at most 1, got 2"):
        gradual(0.5, 0, 10, 2, initial=2)
