# SPDX-License-Identifier: Apache-2.0
"""Two processes over gloo find what one does: shards of the data, shifts of the first, one sum."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys
import torch
import zipfast
from zipfast import distributed, zoo

out, batches = sys.argv[1], int(sys.argv[2])

def net(seed):
    torch.manual_seed(seed)
    model = zoo.resnet(1, width=0.5).train()
    with torch.no_grad():
        for x in data:
            model(x)
    return model.eval()

generator = torch.Generator().manual_seed(0)
data = [torch.randn(8, 1, 12, 12, generator=generator) + 30 for _ in range(batches)]  # large means: the shift matters
torch.set_num_threads(1)
models = [net(0), net(1)]
with distributed.process_group() as (rank, world):
    merged = zipfast.merge(models, (data[0],), data[rank::world], out=f"{out}.safetensors")
    stats = zipfast.merging.gather_moments(
        zipfast.find_spaces(models[0], (data[0],)), [m.state_dict() for m in models], data[rank::world]
    )
    found = {f"groups/{k}": g.index for k, g in merged.groups.items()}
    found |= {f"similarity/{k}": s for k, s in stats.correlations().items()}
    found |= {f"state/{k}": v for k, v in merged.state_dict.items()}
    found |= {f"count/{k}": torch.tensor([own[0].count]) for k, own in stats.items()}
    torch.save(found, f"{out}.{rank}.pt")
"""


def run(tmp_path: Path, name: str, world: int, batches: int) -> list[dict[str, torch.Tensor]]:
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(world):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if world > 1:
            env |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / name), str(batches)]
        started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
    return [torch.load(tmp_path / f"{name}.{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.parametrize("batches", [5, 1])  # one worker has no data in the second case
def test_two_workers_find_the_same_plan(tmp_path, batches):
    (alone,) = run(tmp_path, "one", 1, batches)
    both = run(tmp_path, "two", 2, batches)
    for found in both:
        assert found.keys() == alone.keys()
        for key, want in alone.items():
            if key.startswith(("groups/", "count/")):
                assert torch.equal(found[key], want), key
            elif want.is_floating_point():
                torch.testing.assert_close(found[key], want, atol=2e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert all(torch.equal(both[0][key], both[1][key]) for key in alone)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == ["one.safetensors", "two.safetensors"]
