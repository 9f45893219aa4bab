# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose tensors have other names in memory: the Trainer does not load them, and no callback goes on then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mini_trainer import KillAt, Killed, transformers
from safetensors import safe_open
from torch import nn

import zipfast
from zipfast.integrations.transformers import GreedySoupCallback, LogMECallback, TicketCallback

pytest.importorskip("accelerate", reason="accelerate is not installed, which transformers' Trainer needs")
SIZES = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.ViTConfig(**SIZES, image_size=4, patch_size=2, num_labels=2, hidden_dropout_prob=0.1)
    return transformers.ViTForImageClassification(config)


def rows(seed: int = 0) -> list[dict[str, Any]]:
    images = torch.randn(24, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": image, "labels": int(image[0].mean() > 0)} for image in images]


def trainer(folder: Path, net: nn.Module, *callbacks: Any, **options: Any) -> Any:
    args = transformers.TrainingArguments(
        str(folder), max_steps=6, save_steps=2, logging_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=4, learning_rate=1e-2, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return transformers.Trainer(net, args, train_dataset=rows(), eval_dataset=rows(1), callbacks=list(callbacks))


@pytest.fixture(name="saved")
def saved_fixture(tmp_path: Path) -> Path:
    """A checkpoint of step 4, its masks beside it."""
    with pytest.raises(Killed):
        trainer(tmp_path / "run", vit(), TicketCallback(schedule={2: 0.5}), KillAt(5)).train()
    folder = tmp_path / "run" / "checkpoint-4"
    with safe_open(folder / "model.safetensors", "pt") as file:
        if set(file.keys()) == set(vit().state_dict()):
            pytest.skip(f"transformers {transformers.__version__} has the same names of ViT in memory and in files")
    return folder


@pytest.mark.parametrize("kind", ["TicketCallback", "LogMECallback", "GreedySoupCallback"])
def test_a_run_that_was_not_loaded_is_refused(saved: Path, tmp_path: Path, kind: str) -> None:
    probe = [(torch.randn(8, 3, 4, 4), torch.arange(8) % 2)]
    callback = {
        "TicketCallback": lambda: TicketCallback(schedule={2: 0.5}),
        "LogMECallback": lambda: LogMECallback(probe),
        "GreedySoupCallback": lambda: GreedySoupCallback(lambda _: 0.0, tmp_path / "soup"),
    }[kind]()
    wanted = rf"{kind}: the model must hold the weights of .*checkpoint-4, got another 'vit.*; give it ViTForImage"
    with pytest.raises(ValueError, match=wanted):
        trainer(saved.parent, vit(3), callback).train(resume_from_checkpoint=str(saved))
    assert not (tmp_path / "soup").exists()


def test_a_model_of_the_checkpoint_goes_on(saved: Path, tmp_path: Path) -> None:
    whole, again = vit(), transformers.ViTForImageClassification.from_pretrained(saved)
    first, second = TicketCallback(schedule={2: 0.5}), TicketCallback(schedule={2: 0.5})
    trainer(tmp_path / "whole", whole, first).train()
    trainer(saved.parent, again, second).train(resume_from_checkpoint=str(saved))
    assert second.masks == first.masks
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_a_best_model_that_was_not_loaded(saved: Path, tmp_path: Path) -> None:
    class Rising(transformers.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            metrics["eval_loss"] = float(state.global_step)

    callback = TicketCallback(schedule={2: 0.5, 5: 0.5})
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.warns(UserWarning, match=r"TicketCallback: the Trainer has not loaded the best model, .*checkpoint-2"):
        trainer(tmp_path / "best", vit(), callback, Rising(), **options).train()
    last = zipfast.Masks.load(tmp_path / "best" / "checkpoint-6" / "masks.safetensors")
    assert callback.masks == last  # as the weights are
