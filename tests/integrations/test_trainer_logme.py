# SPDX-License-Identifier: Apache-2.0
"""LogMECallback in transformers' Trainer (and, without accelerate, in one like it): a metric that disturbs nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_trainer import KillAt, Killed, TrainerCallback, loader, model, samples, start_fixture  # noqa: F401
from torch import nn

import zipfast
from zipfast.integrations.transformers import LogMECallback

Start = Callable[..., Any]
PROBE = list(loader(7))


class Scripted(LogMECallback):
    """A callback whose monitor is told its scores; of a step, so that a resumed run is told the same."""

    def __init__(self, scores: list[float], **options: Any) -> None:
        super().__init__(PROBE, **options)
        self.given, self.step = scores, 0
        self.monitor.score = lambda _: self.given[self.step]  # type: ignore[method-assign,assignment]

    def _score(self, state: Any, control: Any, model: nn.Module) -> float:
        self.step = state.global_step
        return super()._score(state, control, model)


def test_a_metric_of_every_evaluation(start: Start, tmp_path: Path) -> None:
    net, callback, seen = model(), LogMECallback(PROBE), []

    class Look(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any, metrics: Any, **_: Any) -> None:
            with torch.no_grad():
                features = torch.cat([model.eval().bert(batch["input_ids"]).pooler_output for batch in PROBE])
            labels = torch.cat([batch["labels"] for batch in PROBE])
            seen.append((state.global_step, zipfast.logme(features, labels), metrics["eval_logme"]))

    trainer = start(tmp_path, [callback, Look()], net)
    trainer.train()
    assert [step for step, *_ in seen] == [3, 6, 9, 12] == [step for step, _ in callback.monitor.history]
    for (_, want, got), (_, kept) in zip(seen, callback.monitor.history):
        assert got == kept == pytest.approx(want, rel=1e-5)
    logged = [entry["eval_logme"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged == [score for _, score in callback.monitor.history]
    metrics = trainer.evaluate()  # afterwards it is a metric, too, but does not count
    assert metrics["eval_logme"] == pytest.approx(logged[-1]) and len(callback.monitor.history) == 4


def test_the_best_model_by_logme(start: Start, tmp_path: Path) -> None:
    callback = Scripted([0, 0, 0, 0.1, 0, 0, 0.4, 0, 0, 0.2, 0, 0, 0.3])
    trainer = start(tmp_path, [callback], metric_for_best_model="logme", load_best_model_at_end=True)
    trainer.train()
    assert trainer.state.best_metric == 0.4 and trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    assert callback.monitor.best_step == 6


def weights_after(start: Start, folder: Path, callbacks: list[Any]) -> dict[str, torch.Tensor]:
    net = model()
    start(folder, callbacks, net, save_strategy="no").train()
    return net.state_dict()


def test_the_training_is_not_disturbed(start: Start, tmp_path: Path) -> None:
    shuffled = loader(7, shuffle=True)  # draws a random number, as any DataLoader does
    alone = weights_after(start, tmp_path / "alone", [])
    watched = weights_after(start, tmp_path / "watched", [LogMECallback(shuffled, every=2)])
    assert all(torch.equal(alone[key], watched[key]) for key in alone)


def test_between_evaluations(start: Start, tmp_path: Path) -> None:
    callback = LogMECallback(PROBE, every=2, name="probe")
    trainer = start(tmp_path, [callback], eval_steps=4, save_strategy="no")
    trainer.train()
    assert [step for step, _ in callback.monitor.history] == [2, 4, 6, 8, 10, 12]  # 4, 8 and 12 once each
    logged = [(entry["step"], entry["probe"]) for entry in trainer.state.log_history if "probe" in entry]
    assert logged == callback.monitor.history
    evaluated = [(entry["step"], entry["eval_probe"]) for entry in trainer.state.log_history if "eval_probe" in entry]
    assert evaluated == [pair for pair in logged if pair[0] % 4 == 0]


def test_scores_reach_whoever_the_trainer_logs_to(start: Start, tmp_path: Path) -> None:
    seen = []

    class Board(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append((state.global_step, sorted(set(logs) & {"logme", "loss"})))

    callback = LogMECallback(PROBE, every=3)
    trainer = start(tmp_path, [callback, Board()], eval_strategy="no", save_strategy="no", max_steps=6)
    callback.log = trainer.log
    trainer.train()
    names = [(step, found) for step, found in seen if found]
    assert names == [(3, ["logme"]), (3, ["loss"]), (6, ["logme"]), (6, ["loss"])]
    assert [entry["step"] for entry in trainer.state.log_history if "logme" in entry] == [3, 6]


def test_patience(start: Start, tmp_path: Path) -> None:
    scores = [0.0, 0.1, 0.3, 0.2, 0.3004, 0.1, 0.1, 0.1]
    callback = Scripted(scores, every=1, patience=3)
    trainer = start(tmp_path, [callback], eval_strategy="no", save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 5 and callback.monitor.best_step == 2  # 0.3004 is no better by min_delta


def test_a_killed_run_remembers(start: Start, tmp_path: Path) -> None:
    scores = [0.0, 0.1, 0.3, *([0.2] * 10)]
    options = {"eval_strategy": "no", "save_steps": 3}
    whole = Scripted(scores, every=1, patience=5)
    start(tmp_path / "whole", [whole], **options).train()
    with pytest.raises(Killed):
        start(tmp_path / "run", [Scripted(scores, every=1, patience=5), KillAt(5)], **options).train()
    again = Scripted(scores, every=1, patience=5)
    trainer = start(tmp_path / "run", [again], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert again.monitor.history == whole.monitor.history and trainer.state.global_step == 7
    trainer = start(tmp_path / "new", [again], **{**options, "save_strategy": "no"}, max_steps=2)
    trainer.train()
    assert len(again.monitor.history) == 2, "a new run begins anew"


def test_any_task_and_layer(start: Start, tmp_path: Path) -> None:
    probe = [(batch["input_ids"], batch["input_ids"][:, 1].double()) for batch in PROBE]
    callback = LogMECallback(probe, task="regression", layers=["bert.embeddings"], pool="mean")
    start(tmp_path, [callback], max_steps=3, save_strategy="no").train()
    assert len(callback.monitor.history) == 1


def test_refusals() -> None:
    for what in ("every", "patience"):
        with pytest.raises(ValueError, match=f"LogMECallback: '{what}' must be at least 1 or None, got 0"):
            LogMECallback(PROBE, **{what: 0})
    with pytest.raises(TypeError, match="LogMEMonitor: 'batches' must be readable more than once, got an iterator"):
        LogMECallback(iter(PROBE))
    assert len(samples(0, 3)) == 3
