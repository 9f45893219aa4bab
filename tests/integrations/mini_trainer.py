# SPDX-License-Identifier: Apache-2.0
"""A model and data for Trainer callbacks, and a small trainer that calls them like transformers' own.

The Trainer needs accelerate. Without it the callbacks are tested on `MiniTrainer`, which has its order of events (of version
5.23: step begin, clipping, pre-optimiser step, step, step end, log, evaluate, save) and its checkpoints' trainer_state.json;
with it, on both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from transformers.trainer_callback import (  # noqa: E402
    CallbackHandler,
    DefaultFlowCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

WORDS, LENGTH, SAMPLES = 20, 5, 48
TINY = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)  # with dropout, so that whoever draws a random number more changes the training
    config = transformers.BertConfig(**TINY, vocab_size=WORDS, max_position_embeddings=8, num_labels=2)
    return transformers.BertForSequenceClassification(config)


def samples(seed: int = 0, count: int = SAMPLES) -> list[dict[str, Any]]:
    words = torch.randint(WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": int(row[0] < WORDS // 2)} for row in words]


def loader(seed: int = 1, **options: Any) -> DataLoader:
    return DataLoader(samples(seed), batch_size=16, collate_fn=transformers.default_data_collator, **options)


def compute_metrics(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    """What a killed process looks like from inside."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed


DEFAULTS: dict[str, Any] = {
    "max_steps": 12, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3,
    "logging_strategy": "steps", "logging_steps": 3, "learning_rate": 5e-3, "max_grad_norm": 0.5,
    "per_device_train_batch_size": 8, "metric_for_best_model": None, "load_best_model_at_end": False,
}  # fmt: skip


class MiniTrainer:
    def __init__(self, folder: Path, callbacks: list[Any], options: dict[str, Any], net: nn.Module) -> None:
        given = {**DEFAULTS, **options}
        fixed = {
            "output_dir": str(folder), "world_size": 1, "deepspeed": None, "fsdp": None, "eval_delay": 0,
            "logging_first_step": False, "resume_from_checkpoint": None,
        }  # fmt: skip
        self.args = SimpleNamespace(**fixed, **given)
        self.model, self.compute_metrics = net, compute_metrics
        self.optimizer = torch.optim.AdamW(net.parameters(), self.args.learning_rate)
        self.control = TrainerControl()
        self.callback_handler = CallbackHandler([DefaultFlowCallback(), *callbacks], net, None, self.optimizer, None)
        self.state = TrainerState()

    def _tell(self, event: str, *more: Any) -> None:
        self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control, *more)

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        self.state = TrainerState(max_steps=self.args.max_steps)
        self.state.eval_steps, self.state.save_steps = self.args.eval_steps, self.args.save_steps
        self.state.logging_steps = self.args.logging_steps
        data = list(loader(0))
        torch.manual_seed(42)
        if resume_from_checkpoint:
            kept = torch.load(Path(resume_from_checkpoint) / "training.pt", weights_only=True)
            self.state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
            self.model.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
        self._tell("on_train_begin")
        if resume_from_checkpoint:
            torch.set_rng_state(kept["rng"])
        while self.state.global_step < self.state.max_steps:
            self.model.train()
            self._tell("on_step_begin")
            batch = data[self.state.global_step % len(data)]
            self.model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            self._tell("on_pre_optimizer_step")
            self.optimizer.step()
            self._tell("on_optimizer_step")
            self.model.zero_grad()
            self.state.global_step += 1
            self.state.epoch = self.state.global_step / len(data)
            self._tell("on_step_end")
            if self.state.global_step % len(data) == 0:
                self._tell("on_epoch_end")
            if self.control.should_log:
                self.log({"loss": 0.0})
            if self.control.should_evaluate:
                self._best(self.evaluate())
            if self.control.should_save:
                self._save()
            if self.control.should_training_stop:
                break
        if self.args.load_best_model_at_end:
            kept = torch.load(Path(str(self.state.best_model_checkpoint)) / "training.pt", weights_only=True)
            self.model.load_state_dict(kept["model"])
        self._tell("on_train_end")

    def _best(self, metrics: dict[str, float]) -> None:
        name = self.args.metric_for_best_model
        if name is not None and metrics[f"eval_{name}"] > (self.state.best_metric or -math.inf):
            self.state.best_metric, self.state.best_global_step = metrics[f"eval_{name}"], self.state.global_step
            self.state.best_model_checkpoint = f"{self.args.output_dir}/checkpoint-{self.state.global_step}"

    def _save(self) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        kept = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        torch.save(kept, folder / "training.pt")
        self.state.save_to_json(str(folder / "trainer_state.json"))
        self._tell("on_save")

    def log(self, logs: dict[str, float]) -> None:
        logs["epoch"] = self.state.epoch
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._tell("on_log", logs)

    def get_eval_dataloader(self, dataset: Any = None) -> DataLoader:
        return loader(1)

    def evaluation_loop(self, data: Any, description: str, metric_key_prefix: str, **_: Any) -> Any:
        self.model.eval()
        with torch.no_grad():
            batches = list(data)
            logits = torch.cat([self.model(**batch).logits for batch in batches])
        labels = torch.cat([batch["labels"] for batch in batches])
        found = compute_metrics(SimpleNamespace(predictions=logits.numpy(), label_ids=labels.numpy()))
        found["loss"] = float(nn.functional.cross_entropy(logits, labels))
        return SimpleNamespace(metrics={f"{metric_key_prefix}_{name}": value for name, value in found.items()})

    def evaluate(self) -> dict[str, float]:
        metrics = self.evaluation_loop(self.get_eval_dataloader(), "", "eval").metrics
        self.log(dict(metrics))
        self._tell("on_evaluate", metrics)
        return metrics


def real_trainer(folder: Path, callbacks: list[Any], options: dict[str, Any], net: nn.Module) -> Any:
    pytest.importorskip("accelerate", reason="accelerate is not installed, which transformers' Trainer needs")
    given = {**DEFAULTS, **options}
    args = transformers.TrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, seed=0, dataloader_pin_memory=False, **given
    )
    return transformers.Trainer(
        net,
        args,
        train_dataset=samples(0),
        eval_dataset=samples(1),
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )


TRAINERS = {"mini": MiniTrainer, "transformers": real_trainer}


def read_state(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())


@pytest.fixture(name="start", params=list(TRAINERS))
def start_fixture(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """``start(folder, callbacks, net, **options)``: a trainer."""

    def make(folder: Path, callbacks: list[Any], net: nn.Module | None = None, **options: Any) -> Any:
        return TRAINERS[request.param](folder, callbacks, options, model() if net is None else net)

    return make
