# SPDX-License-Identifier: Apache-2.0
"""Writes docs/zipit-results.md from what benches/zipit_tables.py measured; no measured number is typed by hand.

An ordering is judged by the medians and by the share of pairs in which it holds. Those marked `asserted` are what
tests/paper/test_digits.py checks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

from harness import ROOT
from report import table
from zipit_tables import (
    APART,
    AVERAGE,
    ENSEMBLE,
    ENSEMBLE_BN,
    KMEANS,
    MIX,
    OPTIMAL,
    PERMUTE,
    REBASIN,
    STALE,
    ZIP,
    ZIP_PAPER,
    cut,
    repaired,
)

PAGE = ROOT / "docs" / "zipit-results.md"
WIDTH = 120
COMMAND = "python benches/zipit_tables.py"
S2, S1, S0 = "stages.2", "stages.1", "stages.0"


@dataclass(frozen=True)
class Claim:
    """One row's accuracy is below another's.

    paper: what Stoica et al. 2024 find. asserted: `make slow` checks it; only where any five of the ten pairs on the page
    agree, with a margin that survives networks trained on another machine.
    """

    less: str
    more: str
    column: str = "joint"
    paper: str = ""
    asserted: bool = False


def ladder(method: str, column: str, *, prefix: str = "", whole: bool = True) -> list[Claim]:
    """The fewer layers are merged, the better, up to the ensemble; the paper's tables hold no step of 19 layers."""
    steps = [*([method] if whole else []), *(cut(method, stop) for stop in (S2, S1, S0)), ENSEMBLE]
    last = cut(method, S2)
    return [Claim(a, b, prefix + column, "" if last in (a, b) else "yes") for a, b in pairwise(steps)]


# Not asserted: the last step of the ladder, 7 layers < ensemble, by the joint accuracies, where the medians are a point or
# two apart (per task it is clear); all that compares permute with ZipIt! at a cut; k-means and optimal pairs. The steps of
# 13 layers hold as well, and are left out to save time.
CLAIMS = {
    "two": [
        Claim(AVERAGE.name, ZIP, paper="yes", asserted=True),
        Claim(REBASIN, ZIP, paper="yes", asserted=True),
        Claim(PERMUTE, ZIP, paper="yes", asserted=True),
        Claim(ZIP_PAPER, ZIP, asserted=True),
        Claim(STALE, ZIP_PAPER, asserted=True),
        Claim(ZIP, ENSEMBLE, paper="yes", asserted=True),
        Claim(ZIP_PAPER, cut(ZIP_PAPER, S2), "joint by head", asserted=True),
        Claim(cut(ZIP_PAPER, S2), cut(ZIP_PAPER, S1), "joint by head"),
        Claim(cut(ZIP_PAPER, S2), cut(ZIP_PAPER, S0), "joint by head", asserted=True),
        Claim(cut(ZIP_PAPER, S1), ENSEMBLE, "joint by head", "yes"),
        Claim(cut(ZIP_PAPER, S0), ENSEMBLE, "per task", "yes", asserted=True),
        Claim(cut(ZIP_PAPER, S1), cut(ZIP_PAPER, S0), "joint by head", "yes"),
        Claim(cut(ZIP_PAPER, S0), ENSEMBLE, "joint by head", "yes"),
        *ladder(ZIP, "per task"),
        Claim("model A", ZIP, paper="CIFAR-10"),
        Claim(AVERAGE.name, PERMUTE, paper="yes"),
        Claim(REBASIN, PERMUTE, paper="yes"),
        Claim(PERMUTE, ZIP_PAPER, paper="at 4x width"),
        Claim(KMEANS, ZIP, paper="yes"),
        Claim(ZIP, OPTIMAL, paper="by 0.6"),
        Claim(ZIP, MIX),
        Claim(APART, ZIP),
        Claim(PERMUTE, APART),
        *(Claim(cut(PERMUTE, s), cut(ZIP, s), "joint by head") for s in (S2, S1, S0)),
        *(Claim(cut(PERMUTE, s), cut(ZIP, s), "per task") for s in (S2, S1, S0)),
        Claim(ENSEMBLE, ENSEMBLE_BN),
    ],
    "four": [
        claim
        for group in ("pairs, ", "all four, ")
        for claim in (
            Claim(AVERAGE.name, PERMUTE, f"{group}joint"),
            Claim(AVERAGE.name, ZIP, f"{group}joint"),
            Claim(PERMUTE, ZIP, f"{group}joint", "yes"),
            Claim(ZIP_PAPER, ZIP, f"{group}joint"),
            Claim(APART, ZIP, f"{group}joint"),
            Claim(ZIP, ENSEMBLE, f"{group}joint", "yes"),
            *ladder(ZIP, "per task", prefix=group),
        )
    ],
    "cross": [
        Claim("weight average, 19 of 20 layers", cut(PERMUTE, S2), "per task"),
        *(Claim(cut(PERMUTE, s), cut(ZIP, s), "per task") for s in (S2, S1, S0)),
        *(Claim(cut(ZIP_PAPER, s), cut(ZIP, s), "per task") for s in (S2, S1, S0)),
        *ladder(ZIP, "per task", whole=False),
        Claim(ENSEMBLE_BN, ENSEMBLE, "per task"),
    ],
    "vgg": [
        Claim(AVERAGE.name, ZIP, paper="yes", asserted=True),
        Claim(PERMUTE, ZIP, paper="yes", asserted=True),
        Claim(ZIP_PAPER, ZIP, asserted=True),
        Claim(AVERAGE.name, repaired(AVERAGE.name), asserted=True),
        *(Claim(name, repaired(name)) for name in (PERMUTE, ZIP_PAPER, ZIP)),
        *(Claim(name, repaired(name), "per task") for name in (AVERAGE.name, PERMUTE, ZIP_PAPER, ZIP)),
        Claim(ZIP, f"{ZIP}, convolutions only", "joint by head", "yes"),
        Claim(f"{ZIP}, convolutions only", ENSEMBLE, "per task", "yes"),
    ],
}

HEAD = """\
# ZipIt! on small real data

This page is generated from `benches/results/zipit_tables.json`; do not edit it. Under each heading stands the command
that measures its table anew. It needs `pip install -e '.[demo,optimal]'`; `--report` writes this page.

## How to read it

Networks are trained apart, from different seeds, each on some of the classes only, and then merged by one call of
`zipfast.merge`, without training. Merging sees the training images of all classes without their labels: for correlations,
and to re-estimate batch norm. Accuracy is in per cent on test images that neither training nor merging has seen. A cell is
the median over the pairs of networks, with the lowest and the highest in brackets: single pairs differ by ten points and
more, so that no single pair shows anything.

- *joint*: all ten classes at once. Where there are several heads (a part merged, or the ensemble): by the mean of their
  logits.
- *joint by head*: the same, but each class by the logit of the head that was trained on it. One says which head knows which
  class, and nothing of the image.
- *per task*: the classes of one task among themselves, by the head of that task; the mean over the tasks.
- *inside each model only*: a control. No feature may merge with one of another model: the result is the networks side by
  side, each squeezed into its share of the width.
- *ZipIt! (α, β)*: (1, 1) is zipfast's default, (.3, .125) the first choice of the public code (§4.3 of the paper).
- *n of 20 layers*: so many are merged, the rest stays a head per model (§4.2). Without this: everything.
- *holds here*: yes, if the medians say so and at least 80 % of the pairs; no, if they say the opposite; else open.
- *FLOPs*: of one image (torch.utils.flop_counter), and relative to one of the networks.

Networks trained on another machine or with another number of threads (`--threads`) differ in their last bits, and so in
everything: expect medians to move by some points.

A whole merge and one of 19 layers have the same *joint* accuracy, up to rounding: the last layer is linear, so that the
merged layer gives the mean of the heads' logits. The two columns that ask a head by itself show what a head adds.
"""

# Stoica et al. 2024, arXiv 2305.03053 v3: accuracy in %, joint or joint / task average; in brackets the layers merged.
PAPER_HEAD = ["", "CIFAR-10, R20x4", "CIFAR-100, R20x8", "cross-entropy", "CIFAR-10, VGG11", "ImageNet, ResNet-50"]
PAPER = [
    ["model A", "48.2", "", "37.9 / 36.4", "44.6 / 55.1", "37.2 / 37.4"],
    ["weight average", "43.0", "", "2.7 / 4.9", "10.2 / 20.9", "0.3 / 0.6"],
    ["Git Re-Basin", "46.2", "40.9", "3.1 / 5.6", "", "3.1 / 5.5"],
    ["permute", "58.4", "42.8", "20.0 / 31.8", "25.4 / 47.8", "8.6 / 12.7"],
    ["ZipIt!, everything", "79.1", "54.9", "27.9 / 39.9", "33.2 / 56.5", "8.6 / 13.5"],
    ["ZipIt!, the first part", "83.8 (13)", "70.2 (13)", "38.6 / 51.9 (13)", "35.2 / 58.4 (14)", "33.1 / 42.0 (37)"],
    ["ZipIt!, less", "", "", "47.0 / 60.6 (7)", "44.5 / 65.5 (7)", "55.8 / 65.0 (22)"],
    ["ZipIt!, still less", "", "", "", "", "60.9 / 69.9 (10)"],
    ["ensemble", "87.4", "73.5", "60.5 / 74.7", "66.6 / 88.6", "63.3 / 72.4"],
]
PAPER_TEXT = """\
## In the paper

Stoica et al. 2024 (arXiv 2305.03053, version 3), to compare with, in per cent: joint accuracy, or joint / mean per task; in
brackets the number of merged layers. *R20x4* is a ResNet-20 of four times the usual width; the third column is the second
one, trained with cross-entropy. Two models, each of half of the classes (ImageNet: of 200).
"""
PAPER_MORE = """\
Matching, CIFAR-10 joint: k-means 29.1, feature k with k 43.0, permute 58.4, greedy 79.0, optimal pairs 79.6. Four data sets,
ResNet-50, task average in pairs / all four: permute 35.7 / 15.3, ZipIt! (49 layers) 37.1 / 16.8, (22) 62.4 / 45.5, (10)
68.7 / 65.3, ensemble 75.5. Below four times the usual width the paper finds ZipIt! about as good as permute.
"""

TITLES = {
    "two": (
        "Two halves of the digits",
        "Two ResNet-20 of the usual width with ten outputs, cross-entropy; model A knows scikit-learn's digits 0-4, model B "
        "5-9. The last row shows what re-estimating batch norm on all ten classes does without any merge.",
    ),
    "four": (
        "Four tasks",
        "Four ResNet-20 that know the digits 0-2, 3-4, 5-6 and 7-9, with ten outputs each. *Pairs*: the mean over the six "
        "pairs, each merged and tested on its own classes only. *All four*: merged in one step. FLOPs are those of all "
        "four.",
    ),
    "cross": (
        "Two data sets",
        "One ResNet-20 on all ten digits, one on twelve capital letters drawn with eight DejaVu fonts in random size, "
        "angle, place and brightness, with noise (`benches/glyphs.py`). The heads have 10 and 12 outputs, so that the last "
        "layer cannot be merged; each data set is tested on its own head. Statistics are of batches that hold both.",
    ),
    "vgg": (
        "Without batch norm",
        "As the first table, with a VGG of four convolutions and two linear layers without batch norm. REPAIR "
        "(`repair=True`) rescales merged features to the mean and spread of their parents (Jordan et al. 2023).",
    ),
    "sweep": (
        "Alpha and beta",
        "The pairs of the first table, everything merged: joint accuracy over the budget beta for merges inside a model and "
        "the factor alpha for each time that a feature merges (§4.3). In brackets the share of merges inside a model.",
    ),
}
COLUMNS = {
    "two": ["joint", "joint by head", "task A", "task B", "per task"],
    "four": [f"{group}, {c}" for group in ("pairs", "all four") for c in ("joint", "joint by head", "per task")],
    "cross": ["digits", "letters", "per task"],
    "vgg": ["joint", "joint by head", "task A", "task B", "per task"],
}


def spread(values: Sequence[float]) -> str:
    return f"{median(values):.1f} ({min(values):.0f}..{max(values):.0f})"


def accuracy_table(name: str, document: dict[str, Any]) -> str:
    body = []
    for row in document["rows"]:
        cells = [row["row"], f"{row['flops'] / 1e6:.1f} M, {row['relative']:.2f}x"]
        body.append([*cells, *(spread(row["values"][column]) for column in COLUMNS[name])])
    return table(["", "FLOPs", *COLUMNS[name]], body)


CLEAR = 0.8  # of the pairs


def verdict(less: Sequence[float], more: Sequence[float]) -> str:
    """Whether less < more: by the medians and by 80 % of the pairs, or open."""
    if median(less) < median(more) and sum(a < b for a, b in zip(less, more)) >= CLEAR * len(less):
        return "yes"
    if median(less) > median(more) and sum(a > b for a, b in zip(less, more)) >= CLEAR * len(less):
        return "**no**"
    return "**open**"


def claims_table(name: str, document: dict[str, Any]) -> str:
    rows = {row["row"]: row["values"] for row in document["rows"]}
    body = []
    for claim in CLAIMS[name]:
        if claim.less not in rows or claim.more not in rows:
            continue  # not measured
        less, more = rows[claim.less][claim.column], rows[claim.more][claim.column]
        body.append(
            [
                f"{claim.less} < {claim.more}",
                claim.column,
                f"{median(less):.1f} / {median(more):.1f}",
                verdict(less, more),
                f"{sum(a < b for a, b in zip(less, more))} of {len(less)}",
                claim.paper,
                "asserted" if claim.asserted else "",
            ]
        )
    return table(["ordering", "accuracy", "medians", "holds here", "in pairs", "in the paper", "`make slow`"], body)


def sweep_table(document: dict[str, Any]) -> str:
    body = []
    for i, alpha in enumerate(document["alphas"]):
        cells = [f"α = {alpha:g}"]
        for j in range(len(document["betas"])):
            scores = [pair[i][j] for pair in document["values"]]
            inside = median(pair[i][j] for pair in document["in_model"])
            cells.append(f"{median(scores):.1f} ({100 * inside:.0f} %)")
        body.append(cells)
    return table(["", *(f"β = {beta:g}" for beta in document["betas"])], body)


def section(name: str, document: dict[str, Any]) -> list[str]:
    title, text = TITLES[name]
    many = "fours" if name == "four" else "pairs"
    command = f"{COMMAND} {name} --pairs {document['pairs']} --epochs {document['epochs']}"
    lines = [f"## {title}", "", fill(text, WIDTH), "", "```", command, "```", ""]
    if name == "sweep":
        lines += [sweep_table(document)]
    else:
        lines += [accuracy_table(name, document), "Which orderings hold:", "", claims_table(name, document)]
    facts = (
        f"{document['pairs']} {many}, {document['epochs']} epochs, {document['threads']} thread"
        f"{'s' * (document['threads'] > 1)}; torch {document['torch']}, Python {document['python']}, commit "
        f"{document['commit'][:12]}{'+' * ('+' in document['commit'])}, {document['date']}."
    )
    return [*lines, facts, ""]


def summary(tables: dict[str, Any]) -> list[str]:
    """What the tables say, in sentences whose figures and conclusions are read off the results."""
    middle = {
        name: {r["row"]: {c: median(v) for c, v in r["values"].items()} for r in document["rows"]}
        for name, document in tables.items()
        if name != "sweep"
    }
    points = []
    if "two" in middle:
        m = {row: {c: f"{value:.0f}" for c, value in values.items()} for row, values in middle["two"].items()}
        points.append(
            f"Everything merged, ZipIt! (1, 1) reaches {m[ZIP]['joint']} % on all ten digits; each network alone "
            f"{m['model A']['joint']} and {m['model B']['joint']}, the weight average {m[AVERAGE.name]['joint']}, permute "
            f"{m[PERMUTE]['joint']}, ZipIt! (.3, .125) {m[ZIP_PAPER]['joint']}, the ensemble {m[ENSEMBLE]['joint']} "
            "(at twice the cost)."
        )
        how = f"inside each model only it reaches {m[APART]['joint']}"
        if _judge(tables["two"], Claim(APART, ZIP)) != "yes":
            how += ", not clearly less: at this width and with these tasks, features shared by the models add little"
        if "sweep" in tables:
            s = tables["sweep"]
            share = median(pair[s["alphas"].index(1.0)][s["betas"].index(1.0)] for pair in s["in_model"])
            how = f"{100 * share:.0f} % of its merges are inside a model, and {how}"
        points.append(f"How ZipIt! (1, 1) does it: {how}.")
        points.append(
            f"Where a head can be asked by itself, stopping early helps: per task {m[ZIP]['per task']} % with all layers, "
            f"{m[cut(ZIP, S2)]['per task']} with 19 at the same cost, {m[cut(ZIP, S1)]['per task']} with 13, "
            f"{m[cut(ZIP, S0)]['per task']} with 7, {m[ENSEMBLE]['per task']} for the ensemble."
        )
        points.append(f"Without new batch-norm statistics a merge is near chance ({m[STALE]['joint']} %).")
    other = [
        f"{claim.less} < {claim.more} ({claim.column}; {TITLES[name][0].lower()})"
        for name in middle
        for claim in CLAIMS[name]
        if claim.paper == "yes" and _judge(tables[name], claim) not in (None, "yes")
    ]
    if other:
        points.append(f"In the paper, but open or not so here: {'; '.join(other)}.")
    return [fill(point, WIDTH, initial_indent="- ", subsequent_indent="  ") for point in points]


def _judge(document: dict[str, Any], claim: Claim) -> str | None:
    rows = {row["row"]: row["values"] for row in document["rows"]}
    if claim.less not in rows or claim.more not in rows:
        return None  # not measured
    return verdict(rows[claim.less][claim.column], rows[claim.more][claim.column])


def page(document: dict[str, Any]) -> str:
    tables = {name: document["tables"][name] for name in TITLES if name in document["tables"]}
    lines = [HEAD, "## In short", "", *summary(tables), ""]
    for name, found in tables.items():
        lines += section(name, found)
    return "\n".join([*lines, PAPER_TEXT, table(PAPER_HEAD, PAPER), PAPER_MORE]).rstrip("\n") + "\n"


def write(results: Path, target: Path = PAGE) -> None:
    target.write_text(page(json.loads(results.read_text())))
