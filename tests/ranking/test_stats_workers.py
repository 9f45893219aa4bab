# SPDX-License-Identifier: Apache-2.0
"""Two processes over gloo: the statistics of their shards are those of all data, on both, also where one has none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
import torch
from zipfast import FeatureStats, distributed

torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
y = torch.arange(400) % 4
x = torch.randn(400, 70, generator=g, dtype=torch.float64) + torch.randn(4, 70, generator=g).double()[y]
x += torch.where(y < 2, 0.0, 5.0)[:, None]  # shards have shifts of their own
order = y.argsort(stable=True)  # classes 0 and 1 are rank 0's, 2 and 3 rank 1's
shards = [order[:200], order[200:]]
values = torch.stack([torch.sin(x[:, 0]), y.double()], 1)
found, refused = {}, {}

def keep(name, stats):
    found[f"{name}/gram"], found[f"{name}/cross"], found[f"{name}/square"] = stats.gram(), stats.cross(), stats.square()
    found[f"{name}/scores"] = torch.tensor([stats.score(mode=m) for m in ("exact", "corrected", "reference")]).double()
    facts = (stats.count, stats.seen, stats.outputs, stats.features, stats.dtype == torch.float64)
    found[f"{name}/facts"] = torch.tensor(facts, dtype=torch.float64)
    if stats.task == "classification":
        found[f"{name}/fourth"] = torch.tensor(stats.summary().fourth).double()

with distributed.process_group() as (rank, world):
    mine = shards[rank] if world > 1 else order
    first = FeatureStats(ignore_index=255)
    ignored = torch.where(mine % 10 == 0, 255, y[mine])
    keep("ignoring", first.update(x[mine], ignored).all_reduce())
    before = FeatureStats("regression").update(x[mine], values[mine])
    keep("values", before.all_reduce())
    assert before.count == len(mine)  # its own
    keep("single", FeatureStats(precision="auto").update(x[mine].float(), y[mine]).all_reduce())
    last = FeatureStats(classes=4)
    if rank == world - 1:  # rank 0 has no samples
        last.update(x, y)
    keep("one has none", last.all_reduce())
    nothing = FeatureStats(ignore_index=255)
    nothing.update(x[:3], torch.full((3,), 255))
    nothing = nothing.all_reduce()
    assert (nothing.count, nothing.seen) == (0, 3 * world)
    if world > 1:
        cases = {
            "features": FeatureStats().update(x[:, : 3 + rank], y),
            "targets": FeatureStats("regression").update(x, values[:, : 1 + rank]),
        }
        for name, stats in cases.items():
            try:
                stats.all_reduce()
            except ValueError as e:
                refused[name] = str(e)
    torch.save({"found": found, "refused": refused}, f"{sys.argv[1]}.{rank}.pt")
"""


def run(tmp_path: Path, name: str, world: int) -> list[dict[str, dict]]:
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(world):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if world > 1:
            env |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / name)]
        started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
    return [torch.load(tmp_path / f"{name}.{rank}.pt", weights_only=True) for rank in range(world)]


def test_two_workers_have_the_statistics_of_all(tmp_path):
    (alone,) = run(tmp_path, "one", 1)
    both = run(tmp_path, "two", 2)
    for worker in both:
        assert worker["found"].keys() == alone["found"].keys()
        for key, want in alone["found"].items():
            tolerance = 1e-6 if key.startswith("single") else 1e-12
            scale = 1 if key.endswith(("scores", "facts")) else float(want.abs().max())
            torch.testing.assert_close(
                worker["found"][key], want, rtol=0, atol=tolerance * scale, msg=lambda m, key=key: f"{key}: {m}"
            )
        assert worker["refused"] == {
            "features": "FeatureStats: all processes must have the same features, got [3, 4]",
            "targets": "FeatureStats: all processes must have the same targets, got [1, 2]",
        }
    assert all(torch.equal(both[0]["found"][key], both[1]["found"][key]) for key in alone["found"])
