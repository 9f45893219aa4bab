# SPDX-License-Identifier: Apache-2.0
"""Callbacks beside each other, in several processes, and in a Trainer with other settings."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_trainer import TrainerCallback, loader, model, real_trainer, start_fixture  # noqa: F401

import zipfast
from zipfast.integrations.transformers import GreedySoupCallback, LogMECallback, TicketCallback

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
from pathlib import Path
from mini_trainer import loader, model, real_trainer
import zipfast
from zipfast.integrations.transformers import GreedySoupCallback, LogMECallback, TicketCallback

out, net = Path(sys.argv[1]), model()
ticket, logme = TicketCallback(schedule={2: 0.5, 5: 0.5}, ignore="classifier"), LogMECallback(loader(7))
trainer = real_trainer(out / "run", [ticket, logme], {}, net)
trainer.train()
try:
    real_trainer(out / "no", [GreedySoupCallback(len, out / "soup")], {}, model()).train()
    refused = ""
except ValueError as e:
    refused = str(e)
zeros = all(not w[~ticket.masks.dense()[name]].any() for name, w in ticket.masks.check(net).items())
found = {
    "processes": trainer.args.world_size, "masks": ticket.masks.hash(), "zeros": zeros, "refused": refused,
    "weights": zipfast.checkpoint.state_hash(net.state_dict()), "history": logme.monitor.history,
}
(out / f"rank-{trainer.args.process_index}.json").write_text(json.dumps(found))
"""


def ticket() -> TicketCallback:
    return TicketCallback(schedule={2: 0.5, 5: 0.5}, ignore="classifier")


def test_all_three_at_once(start: Callable[..., Any], tmp_path: Path) -> None:
    nets, tickets = [model(), model()], [ticket(), ticket()]
    start(tmp_path / "one", [tickets[0]], nets[0]).train()
    scores = iter([0.1, 0.2, 0.3, 0.3])
    soup = GreedySoupCallback(lambda _: next(scores), tmp_path / "soup", at="save")
    start(tmp_path / "all", [soup, LogMECallback(loader(7), every=1), tickets[1]], nets[1]).train()
    states = [net.state_dict() for net in nets]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert tickets[0].masks == tickets[1].masks and soup.members == [3, 6, 9]


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"bf16": True}, {"optim": "sgd"}], ids=str)
def test_other_settings_of_the_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    callback, steps = ticket(), []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            assert callback.masks is not None
            weights = callback.masks.check(model)
            for name, alive in callback.masks.dense().items():
                grad = weights[name].grad
                assert grad is not None and not grad[~alive].any() and not weights[name][~alive].any()
            steps.append(state.global_step)

    net = model()
    real_trainer(tmp_path, [callback, Watch()], {"per_device_train_batch_size": 4, **options}, net).train()
    assert len(steps) == 12 and callback.masks is not None and round(callback.masks.density, 2) == 0.25


def test_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed, which transformers' Trainer needs")
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(2):
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "integrations")])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
        started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True))
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
    one, two = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert one == two and one["processes"] == 2 and one["zeros"]
    assert "GreedySoupCallback: 'args' must train in one process, got 2" in one["refused"]
    kept = zipfast.Masks.load(tmp_path / "run" / "checkpoint-12" / "masks.safetensors")
    assert kept.hash() == one["masks"] and [step for step, _ in one["history"]] == [3, 6, 9, 12]
