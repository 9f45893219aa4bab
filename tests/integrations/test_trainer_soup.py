# SPDX-License-Identifier: Apache-2.0
"""GreedySoupCallback in transformers' Trainer (and, without accelerate, in one like it)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mini_trainer import KillAt, Killed, loader, model, samples, start_fixture  # noqa: F401
from torch import nn

import zipfast
from zipfast.integrations.transformers import GreedySoupCallback, metric_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
Start = Callable[..., Any]


class Scores:
    """Scores in the order of asking, and the weights that were asked about."""

    def __init__(self, scores: list[float]) -> None:
        self.left, self.seen = list(scores), list[dict[str, torch.Tensor]]()

    def __call__(self, net: nn.Module) -> float:
        assert not net.training and not torch.is_grad_enabled()
        torch.rand(3)  # as loaders do
        self.seen.append({key: value.clone() for key, value in net.state_dict().items()})
        return self.left.pop(0)


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.BertForSequenceClassification.from_pretrained(folder).state_dict()


def ingredients(out: Path) -> list[str]:
    return sorted(file.name for file in (out / "ingredients").iterdir())


@pytest.mark.parametrize("at", ["evaluate", "save"])
def test_a_soup_of_what_rises(start: Start, tmp_path: Path, at: str) -> None:
    scores = Scores([0.5, 0.4, 0.7, 0.7])
    out = tmp_path / "soup"
    callback = GreedySoupCallback(scores, out, at=at)
    trainer = start(tmp_path / "run", [callback])
    trainer.train()
    assert callback.members == [3, 9] and callback.score == 0.7
    assert [(t.model, t.score, t.best, t.accepted) for t in callback.tried] == [
        (3, 0.5, 0.5, True), (6, 0.4, 0.5, False), (9, 0.7, 0.5, True), (12, 0.7, 0.7, False),
    ]  # fmt: skip
    assert ingredients(out) == ["step-00000003.safetensors", "step-00000009.safetensors"]
    soup = zipfast.uniform_soup([out / "ingredients" / name for name in ingredients(out)]).state
    assert soup is not None and same(loaded(out), soup) and same(scores.seen[2], soup)
    assert same(scores.seen[0], zipfast.checkpoint.load(out / "ingredients" / "step-00000003.safetensors"))
    logged = [(e["step"], e["soup_score"], e["soup_accepted"]) for e in trainer.state.log_history if "soup_score" in e]
    assert logged == [(t.model, t.score, t.accepted) for t in callback.tried]
    record = json.loads((out / "greedy.json").read_text())
    assert record["members"] == [3, 9] and record["score"] == 0.7


def test_a_tie_stays_with_ge_and_early_weights_are_left_out(start: Start, tmp_path: Path) -> None:
    callback = GreedySoupCallback(Scores([0.5, 0.5, 0.4]), tmp_path / "soup", accept="ge", start=4)
    start(tmp_path / "run", [callback]).train()
    assert callback.members == [6, 9] and [t.model for t in callback.tried] == [6, 9, 12]


def test_at_epochs(start: Start, tmp_path: Path) -> None:
    callback = GreedySoupCallback(Scores([0.5] * 9), tmp_path / "soup", at="epoch")
    trainer = start(tmp_path / "run", [callback], eval_strategy="no", save_strategy="no")
    trainer.train()
    assert len(callback.tried) == round(trainer.state.epoch)


def test_the_training_is_not_disturbed(start: Start, tmp_path: Path) -> None:
    found = []
    for name in ("alone", "souped"):
        net = model()
        callbacks = [GreedySoupCallback(Scores([0.5, 0.4, 0.7, 0.7]), tmp_path / "soup")] if name == "souped" else []
        start(tmp_path / name, callbacks, net, save_strategy="no").train()
        found.append(net.state_dict())
    assert same(*found)


def by_weights(net: nn.Module) -> float:
    """A score that depends on nothing else."""
    return float(net.classifier.weight.double().sum() * 1e3 % 7)


@pytest.mark.parametrize("at", ["evaluate", "save"])
@pytest.mark.parametrize("killed, step", [(11, 6), (10, 9), (4, 3)])
def test_a_killed_run_ends_alike(start: Start, tmp_path: Path, at: str, killed: int, step: int) -> None:
    options = {"eval_steps": 2} if at == "evaluate" else {"save_steps": 3}
    whole = GreedySoupCallback(by_weights, tmp_path / "whole-soup", at=at)
    start(tmp_path / "whole", [whole], **options).train()
    with pytest.raises(Killed):
        killer = [GreedySoupCallback(by_weights, tmp_path / "soup", at=at), KillAt(killed)]
        start(tmp_path / "run", killer, **options).train()
    again = GreedySoupCallback(by_weights, tmp_path / "soup", at=at)
    if at == "save":  # killed after the checkpoint and before the soup has tried it
        record = json.loads((tmp_path / "soup" / "greedy.json").read_text())
        record["tried"] = [one for one in record["tried"] if one["model"] < step]
        (tmp_path / "soup" / "greedy.json").write_text(json.dumps(record))
    trainer = start(tmp_path / "run", [again], model(3), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert again.tried == whole.tried and same(loaded(tmp_path / "soup"), loaded(tmp_path / "whole-soup"))
    assert ingredients(tmp_path / "soup") == ingredients(tmp_path / "whole-soup")


def test_resuming_before_the_first_ingredient(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "soup"
    with pytest.raises(Killed):
        callbacks = [GreedySoupCallback(by_weights, out), KillAt(7)]
        start(tmp_path / "run", callbacks, eval_steps=6).train()
    assert (out / "model.safetensors").exists()
    with pytest.raises(Killed):
        again = start(tmp_path / "run", [GreedySoupCallback(by_weights, out), KillAt(3)], eval_steps=6)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert not (out / "model.safetensors").exists() and ingredients(out) == []


def test_a_failed_evaluation_leaves_weights_and_folder(start: Start, tmp_path: Path) -> None:
    net, seen = model(), []

    def evaluate(given: nn.Module) -> float:
        seen.append({key: value.clone() for key, value in given.state_dict().items()})
        return float("nan") if len(seen) == 2 else 1.0

    with pytest.raises(ValueError, match="GreedySoupCallback: 'evaluate' must return a number, got NaN"):
        start(tmp_path / "run", [GreedySoupCallback(evaluate, tmp_path / "soup")], net).train()
    assert ingredients(tmp_path / "soup") == ["step-00000003.safetensors"] and same(loaded(tmp_path / "soup"), seen[0])
    first, mean = seen
    key = "classifier.weight"
    torch.testing.assert_close(net.state_dict()[key], 2 * mean[key] - first[key])  # its own weights again


def test_a_second_run_must_say_so(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "soup"
    start(tmp_path / "run", [GreedySoupCallback(Scores([0.5] * 4), out)]).train()
    with pytest.raises(
        ValueError, match=r"'out' must be free for a new run, got .*soup with a soup of another; resume"
    ):
        start(tmp_path / "other", [GreedySoupCallback(Scores([]), out)]).train()
    callback = GreedySoupCallback(Scores([0.1, 0.2, 0.1, 0.1]), out, overwrite=True)
    start(tmp_path / "other", [callback]).train()
    assert callback.members == [3, 6] and ingredients(out)[1] == "step-00000006.safetensors"


def test_batch_norm_is_estimated_again(tmp_path: Path) -> None:
    """Of a soup of two ResNets the statistics are those of its own features, not averages."""
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=2)
    nets = [transformers.ResNetForImageClassification(config) for _ in range(2)]
    data = [torch.randn(8, 3, 16, 16) for _ in range(2)]
    state = SimpleNamespace(global_step=0, log_history=[], epoch=0.0, max_steps=9)
    callback = GreedySoupCallback(Scores([0.1, 0.2]), tmp_path / "soup", at="save", recalibrate=data)
    callback.on_train_begin(SimpleNamespace(world_size=1), state, None, model=nets[0])
    for state.global_step, net in enumerate(nets, 1):
        callback.on_save(None, state, None, model=net)
    found = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "soup")
    want = transformers.ResNetForImageClassification(config)
    files = [tmp_path / "soup" / "ingredients" / name for name in ingredients(tmp_path / "soup")]
    soup = zipfast.uniform_soup(files, int_policy="first").state
    assert soup is not None and len(files) == 2
    want.load_state_dict(soup)
    assert not same(found.state_dict(), want.state_dict())
    zipfast.reestimate_batchnorm(want, data)
    for key, value in want.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, msg=key)


# ------------------------------------------------------------------------------------------------------------ metric_of


def test_a_metric_of_the_trainer(start: Start, tmp_path: Path) -> None:
    net = model()
    trainer = start(tmp_path / "run", [], net)
    accuracy, loss = metric_of(trainer, "eval_accuracy"), metric_of(trainer, "loss")
    found = trainer.evaluate()
    logged = len(trainer.state.log_history)
    assert accuracy(net) == found["eval_accuracy"] and loss(net) == -found["eval_loss"]
    assert metric_of(trainer, "loss", greater_is_better=True)(net) == found["eval_loss"]
    assert len(trainer.state.log_history) == logged, "nothing is logged"
    with pytest.raises(
        ValueError, match=r"metric_of: 'metric' must be one of the trainer's \(.*accuracy.*\), got 'f1'"
    ):
        metric_of(trainer, "f1")(net)
    with pytest.raises(ValueError, match="metric_of: 'model' must be the trainer's own, got another"):
        accuracy(model(1))


def test_in_a_trainer_by_its_own_metric(start: Start, tmp_path: Path) -> None:
    trainer = start(tmp_path / "run", [], save_strategy="no")
    callback = GreedySoupCallback(metric_of(trainer, "loss"), tmp_path / "soup")
    (trainer.add_callback if hasattr(trainer, "add_callback") else trainer.callback_handler.add_callback)(callback)
    trainer.train()
    single = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert callback.tried[0].score == pytest.approx(-single[0]) and len(single) == 4
    assert callback.score == max(t.score for t in callback.tried if t.accepted)
    trainer.evaluate()  # afterwards it is of other weights, and not tried
    assert len(callback.tried) == 4


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"'evaluate' must be a function of the model, got str; see metric_of\(trainer"):
        GreedySoupCallback("accuracy", tmp_path / "soup")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="GreedySoupCallback: 'at' must be one of evaluate, save, epoch, got 'step'"):
        GreedySoupCallback(len, tmp_path / "soup", at="step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="GreedySoupCallback: 'accept' must be one of gt, ge, got 'lt'"):
        GreedySoupCallback(len, tmp_path / "soup", accept="lt")  # type: ignore[arg-type]
    with pytest.raises(OSError, match=r"cannot write .*nowhere.*: No such file"):
        GreedySoupCallback(by_weights, tmp_path / "nowhere" / "soup")
    callback = GreedySoupCallback(by_weights, tmp_path)
    with pytest.raises(
        ValueError, match=r"must train in one process, got 2; keep the checkpoints .* zipfast.greedy_soup"
    ):
        callback.on_train_begin(SimpleNamespace(world_size=2), SimpleNamespace(global_step=0), None)
    for text in ("[]", '{"format": 9}', '{"format": 1, "tried": [{"a": 1}]}', "no"):
        (tmp_path / "greedy.json").write_text(text)
        with pytest.raises(ValueError, match=r"greedy.json must be the record of a soup of format 1, got another file"):
            callback.on_train_begin(SimpleNamespace(world_size=1), SimpleNamespace(global_step=0), None)
    assert len(list(loader(0))) == len(samples(0)) // 16


def test_a_model_of_the_users_stays(start: Start, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    model(9).save_pretrained(mine)
    before = (mine / "model.safetensors").read_bytes()
    with pytest.raises(
        ValueError, match=r"'out' must be free for a new run, got .*mine with model.safetensors; name anoth"
    ):
        start(tmp_path / "run", [GreedySoupCallback(lambda _: 0.0, mine)]).train()
    assert (mine / "model.safetensors").read_bytes() == before
    callback = GreedySoupCallback(lambda _: 0.0, mine, overwrite=True)
    start(tmp_path / "run", [callback]).train()
    assert callback.members and (mine / "model.safetensors").read_bytes() != before
