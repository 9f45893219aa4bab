# SPDX-License-Identifier: Apache-2.0
"""What a whole merge costs beside the forward passes that it cannot avoid: two ResNet-50 (random weights) on 224x224.

Pairs, A B A B: the forward passes of both models on four batches, then the same batches gathered (forward passes up to the
last tap, and the moments). What the gathering takes longer is the price of the statistics. Planning, matching, applying and
writing are timed in one merge; peak memory is that of a process of its own; ViT-B says what export and walk take.

``python benches/merge_cost.py`` writes merge_cost.json into the results; `report.py` puts it on the page.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import bench_threads, commit, machine, results_folder, spread, threads

import zipfast
from zipfast.merging import statistics as statistics_module
from zipfast.merging.graph import export
from zipfast.merging.reading import Region, read_plan
from zipfast.merging.spaces import walk

BATCHES, SIZE, PIXELS = 4, 16, 224


def resnet50(seed: int) -> torch.nn.Module:
    import transformers

    torch.manual_seed(seed)
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000)).eval()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SIZE, 3, PIXELS, PIXELS, generator=generator) for _ in range(BATCHES)]


def seconds(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(rounds: int) -> dict[str, Any]:
    models, data = [resnet50(0), resnet50(1)], batches()
    graph = zipfast.find_spaces(models[0], (data[0][:2],))
    states = [dict(m.state_dict()) for m in models]
    spent = [0.0]
    inner = statistics_module.update_all

    def timed(*args: Any) -> None:
        spent[0] += seconds(lambda: inner(*args))

    def forward(x: torch.Tensor) -> None:
        with torch.no_grad():
            for model in models:
                model(x)

    statistics_module.update_all = timed  # type: ignore[assignment]
    try:
        forward(data[0])
        zipfast.merging.gather_moments(graph, states, data[:1])
        spent[0] = 0.0
        rows = []
        for _ in range(rounds):
            plain = seconds(lambda: [forward(x) for x in data])
            before = spent[0]
            gathered = seconds(lambda: zipfast.merging.gather_moments(graph, states, data))
            rows.append((plain, gathered, spent[0] - before))
    finally:
        statistics_module.update_all = inner
    passes, *_ = spread([plain for plain, _, _ in rows])
    with tempfile.TemporaryDirectory() as folder:
        merged = zipfast.merge(models, (data[0][:2],), data, reestimate=False)
        writing = seconds(lambda: merged.save(Path(folder) / "a.safetensors"))
    exported = export(models[0], (data[0][:2],))
    planning = seconds(lambda: read_plan(walk(exported, "error", Region(exported)), Region(exported)))
    rest = {
        "planning": planning,
        "match": merged.seconds["match"],
        "apply": merged.seconds["apply"],
        "writing": writing,
    }
    return {
        "forward_s": passes,
        "moments_of_forward": spread([op / plain for plain, _, op in rows])[0],
        "gathering_of_forward": spread([(gathered - plain) / plain for plain, gathered, _ in rows])[0],
        "gathering_of_forward_quartiles": spread([(g - p) / p for p, g, _ in rows])[1:],
        "rest_s": rest,
        "rest_of_forward": sum(rest.values()) / passes,
        "export_s": merged.seconds["export"],
        "pairs": len(rows),
    }


def memory() -> dict[str, float]:
    """MB: the process before, with the models and data, and at its peak; what the moments and one batch's features hold."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def now() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    models, data = [resnet50(0), resnet50(1)], batches()
    graph = zipfast.find_spaces(models[0], (data[0][:2],))
    states = [dict(m.state_dict()) for m in models]
    base = now()
    stats = zipfast.merging.gather_moments(graph, states, data)
    values = zipfast.merging.Tapped(graph).values(states[0], data[0])
    with torch.no_grad():
        models[0](data[0])
    held = sum(t.numel() * t.element_size() for m in stats.flat() for t in (*m.sums(), m.shift) if t is not None)
    features = 2 * sum(v.numel() * v.element_size() for v in values.values())
    return {"before_mb": base, "peak_mb": peak(), "moments_mb": held / 2**20, "features_mb": features / 2**20}


def vit() -> dict[str, float]:
    import transformers

    model = transformers.ViTForImageClassification(transformers.ViTConfig()).eval()
    x = torch.zeros(2, 3, PIXELS, PIXELS)
    begin = time.perf_counter()
    exported = export(model, (x,))
    middle = time.perf_counter()
    read_plan(walk(exported, "error", Region(exported)), Region(exported))
    return {"export_s": middle - begin, "walk_s": time.perf_counter() - middle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="print the memory of this process alone")
    args = parser.parse_args()
    with threads(bench_threads()):
        if args.memory:
            print(json.dumps(memory()))
            return
        result = {"what": "merge_cost", "machine": machine("cpu"), "commit": commit(), "threads": bench_threads()}
        result["vit_b"] = vit()
        result["resnet50"] = measure(args.rounds)
        own = subprocess.run([sys.executable, __file__, "--memory"], capture_output=True, text=True, check=True)
        result["resnet50"]["memory"] = json.loads(own.stdout.splitlines()[-1])
    path = results_folder() / "merge_cost.json"
    with zipfast.checkpoint.atomic_write(path, "w") as file:
        json.dump(result, file, indent=1)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
