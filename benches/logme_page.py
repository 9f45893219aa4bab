# SPDX-License-Identifier: Apache-2.0
"""Writes docs/logme-results.md from what benches/logme_tables.py measured; no measured number is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

from harness import ROOT
from report import table

PAGE = ROOT / "docs" / "logme-results.md"
HEAD = """# Ranking on small real data

This page is generated from `benches/results/logme_tables.json`; do not edit it.

```
python benches/logme_tables.py            # measures, some minutes on one thread
python benches/logme_tables.py --report   # writes this page
```

The question: does a score of *frozen* features foretell which extractor is best after *fine-tuning*? {EXTRACTORS} small
extractors per data set: the raw inputs, principal components, random-feature networks, an auto-encoder, and networks trained
on other samples with 0 to 100 % of their labels drawn at random. Each is scored on the target samples, then fine-tuned on
them (all weights and a new head, the better of two learning rates), and tested on samples that nothing else has seen. Scores
and accuracies are means over {SPLITS} random splits.

How to read it: τ_w is the weighted Kendall correlation of scores with accuracies over the extractors (1: the same order, 0:
none; mistakes among the best count most), with a 95 % interval of resampled extractors. With thirteen extractors, whose
accuracies differ by a few points, the intervals are wide: a metric is not shown to be better than another unless their
intervals say so. *features D* and *parameters* are no metrics, but what a ranking by size would give.
"""


def agreement_table(sets: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for s in sets for name in s["agreement"]))
    rows = []
    for name in names:
        cells = [name]
        for s in sets:
            a = s["agreement"].get(name)
            cells.append("–" if a is None else f"{a['tau']:.2f} [{a['low']:.2f}, {a['high']:.2f}]")
        rows.append(cells)
    return table(["τ_w", *[f"{s['name']}, {s['target_samples']} samples" for s in sets]], rows)


def time_table(sets: list[dict[str, Any]]) -> str:
    rows = []
    for s in sets:
        score, seconds = s["seconds"]["score"], s["seconds"]
        rank = seconds["extract"] + score["logme exact"]
        rows.append(
            [s["name"], f"{seconds['fine-tune']:.1f}", f"{1e3 * rank:.0f}", f"{seconds['fine-tune'] / rank:.0f}x"]
        )
    return table(["all extractors", "fine-tuning, s", "features and LogME, ms", "ratio"], rows)


def extractor_table(s: dict[str, Any]) -> str:
    rows = sorted(s["rows"].items(), key=lambda pair: -pair[1]["accuracy"])
    metrics = [name for name in rows[0][1]["scores"] if name != "logme corrected"]
    head = ["extractor", "R², %" if s["name"] == "diabetes" else "accuracy, %", "D", *metrics]
    return table(
        head,
        [
            [name, f"{r['accuracy']:.1f}", str(r["features"]), *[f"{r['scores'][m]:.3f}" for m in metrics]]
            for name, r in rows
        ],
    )


def in_short(sets: list[dict[str, Any]]) -> list[str]:
    """What the table says, computed from it."""

    def taus(name: str) -> list[float]:
        return [s["agreement"][name]["tau"] for s in sets if name in s["agreement"]]

    def row(name: str) -> str:
        return ", ".join(f"{tau:.2f}" for tau in taus(name))

    classes = [s for s in sets if "hscore" in s["agreement"]]
    others = [n for n in classes[0]["agreement"] if not n.startswith("logme") and n not in ("features D", "parameters")]
    best = max(others, key=lambda n: median(taus(n)))
    wide = [s for s in sets if any(r["features"] >= s["target_samples"] for r in s["rows"].values())]
    lines = [
        f"- LogME (exact) orders the extractors with τ_w = {row('logme exact')} ({', '.join(s['name'] for s in sets)}).",
        f"- The public formula: {row('logme reference')}. They part where an extractor has more features than there are "
        f"samples ({', '.join(s['name'] for s in wide) or 'nowhere here'}): there the formula's score grows with D.",
        f"- By size alone: {row('features D')} (D), {row('parameters')} (parameters).",
        f"- Of the other metrics, which need classes, {best} has the best median: {row(best)}.",
    ]
    first = [max(s["rows"].items(), key=lambda p: p[1]["accuracy"]) for s in sets]
    for s, (name, r) in zip(sets, first):
        chosen, own = max(s["rows"].items(), key=lambda p: p[1]["scores"]["logme exact"])
        lines.append(
            f"- {s['name']}: LogME picks *{chosen}*, {own['accuracy']:.1f} % after fine-tuning; the best is *{name}*, "
            f"{r['accuracy']:.1f} %."
        )
    return [fill(line, 120, subsequent_indent="  ") for line in lines]


def text(document: dict[str, Any]) -> str:
    sets, m = document["sets"], document["machine"]
    head = HEAD.replace("{EXTRACTORS}", str(len(sets[0]["rows"]))).replace("{SPLITS}", str(sets[0]["splits"]))
    out = [
        head,
        "## In short",
        "",
        *in_short(sets),
        "",
        "## Agreement with fine-tuned accuracy",
        "",
        agreement_table(sets),
    ]
    out += ["## Time", "", f"{m['cpu']}, {m['threads']} thread, torch {m['torch']}, {m['date'][:10]}.", ""]
    out += [time_table(sets)]
    for s in sets:
        out += [f"## {s['name'].capitalize()}", "", extractor_table(s)]
    return "\n".join(out).rstrip("\n") + "\n"


def write(results: Path) -> None:
    PAGE.write_text(text(json.loads(results.read_text())))
