# SPDX-License-Identifier: Apache-2.0
"""Writes docs/soup-results.md from what benches/soup_tables.py measured; no measured number is typed by hand.

An ordering holds here if it holds for every seed. Those with a margin are what tests/paper/test_soup_claims.py asserts on
other seeds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

from harness import ROOT
from report import table
from soup_tables import (
    ALL,
    BEST,
    DIFFERENT,
    ENSEMBLE,
    EPOCHS,
    FINETUNE,
    GREEDY,
    GREEDY_E,
    GREEDY_GE,
    HELD,
    LARGEST,
    LEARNED,
    LEARNED_T,
    LOSS,
    MEAN,
    PAIR_EPOCHS,
    PRETRAIN,
    RANDOM,
    START,
    STEPS,
    UNIFORM,
)

from zipfast.demo import TRAIN

DIGITS = 1797  # of scikit-learn
PAGE = ROOT / "docs" / "soup-results.md"
WIDTH = 120
SHIFTS, NEW = "mean of shifts", "soup, new statistics"
BARRIER, BARRIER_NEW = "barrier", "barrier, new statistics"


@dataclass(frozen=True)
class Claim:
    """One number of a table is above another; `margin`: by how much the slow test wants it to be, at least."""

    part: str
    more: tuple[str, str]
    less: tuple[str, str]
    paper: str = ""
    margin: float | None = None

    def gaps(self, document: dict[str, Any]) -> list[float]:
        rows = document["parts"][self.part]["rows"]
        return [a - b for a, b in zip(rows[self.more[0]][self.more[1]], rows[self.less[0]][self.less[1]])]

    def __str__(self) -> str:
        if self.more[1] == self.less[1]:
            return f"{self.part}, {self.more[1]}: {name_of(self.more[0])} > {name_of(self.less[0])}"
        return f"{self.part}: {self.more[1]} ({name_of(self.more[0])}) > {self.less[1]} ({name_of(self.less[0])})"


def name_of(row: str) -> str:
    return {"0": "same start", "some": "a tenth shared", ALL: "pre-training shared", DIFFERENT: "different starts"}.get(
        row, row
    )


def over(part: str, column: str, more: str, less: str, paper: str = "") -> Claim:
    return Claim(part, (more, column), (less, column), paper)


def recipe_claims(part: str) -> list[Claim]:
    exact = [Claim(part, (g, "held-out"), (BEST, "held-out"), "≥, exact", 0.0) for g in (GREEDY, GREEDY_GE, RANDOM)]
    return exact + [
        over(part, "test", GREEDY, BEST, "yes"),
        over(part, SHIFTS, GREEDY, BEST, "yes"),
        over(part, "test", UNIFORM, BEST, "no"),
        over(part, SHIFTS, UNIFORM, BEST, "yes"),
        over(part, "test", UNIFORM, MEAN),
        over(part, SHIFTS, UNIFORM, MEAN),
        over(part, "test", LEARNED_T, GREEDY, "yes"),
        over(part, "test", ENSEMBLE, UNIFORM, "yes"),
        over(part, "test", GREEDY_E, GREEDY, "yes"),
        over(part, SHIFTS, GREEDY, GREEDY_E, "yes"),
        over(part, "ECE", UNIFORM, ENSEMBLE, "yes"),
    ]


START_CLAIMS = [
    Claim("starts", (ALL, "soup"), (DIFFERENT, "soup"), "yes", 20.0),
    Claim("starts", (ALL, NEW), (DIFFERENT, NEW), "yes", 20.0),
    Claim("starts", (DIFFERENT, NEW), (DIFFERENT, "soup"), "", 15.0),
    Claim("starts", (DIFFERENT, "zip"), (DIFFERENT, NEW), "", 10.0),
    Claim("starts", (DIFFERENT, "zip"), (DIFFERENT, "permute")),
    Claim("starts", ("0", BARRIER), (ALL, BARRIER), "yes", 5.0),
    Claim("starts", ("0", BARRIER_NEW), (ALL, BARRIER_NEW), "yes", 0.2),
    Claim("starts", (DIFFERENT, BARRIER_NEW), (ALL, BARRIER_NEW), "yes", 15.0),
    Claim("starts", (DIFFERENT, BARRIER_NEW), ("0", BARRIER_NEW), "", 10.0),
]
CLAIMS = [*recipe_claims("images"), *recipe_claims("text"), *START_CLAIMS]

HEAD = """# Model soups on small data

This page is generated from `benches/results/soup_tables.json`; do not edit it.

```
python benches/soup_tables.py            # measures, some minutes on one thread
python benches/soup_tables.py --report   # writes this page
```

A cell is the median over {SEEDS} seeds, with the lowest and the highest in brackets; accuracy and ECE in per cent. A seed
decides the start, the order, the hyper-parameters, and which samples are whose. Models are chosen, added and mixed on the
*held-out* samples, so that this column flatters whatever was chosen by it; *test* and the shifted tests are for the report
alone. One of the {TEST} test digits is {IMAGE} points, so that differences of less than a point may be chance.
Learning rates, epochs and sizes were set on other seeds than those reported.

- *best single, by held-out*: what one would keep without soups. *mean single*: what one of the eight gives on average.
- *greedy soup*: models by held-out accuracy, each kept if accuracy rises (*ge*: if it does not fall; *by loss*: if the
  held-out cross-entropy falls). *random order*: the best first, then in random order.
- *learned soup*: mixing weights by gradient, one for the model, or one per tensor. *ECE, β*: its ECE with the inverse
  temperature β that it learned on the held-out samples; the other rows have none, so that both columns agree.
- *ECE*: expected calibration error on the test samples, in bins of equal counts.
- *holds here*: yes or no, if all seeds agree; else open, with the number of seeds in which it does. *no difference*: 0
  for every seed; a greedy soup of one model is that model.
"""
TEXTS = {
    "images": f"""scikit-learn's digits, cut as the demo cuts them: {PRETRAIN} for pre-training, {FINETUNE} for eight
fine-tunings, {HELD} held out, the rest for tests. The network is a VGG without batch norm, so that what is measured is the
averaging, not the estimation of statistics. Fine-tuning draws its learning rate (log-uniform over the decade below
{LARGEST}, Adam), epochs ({", ".join(map(str, EPOCHS))}), augmentation (none, shifts, noise), label smoothing (0 or .1) and
order.""",
    "text": """Sentences of a toy grammar in four classes, topic and polarity, where a *not* before the adjective turns the
polarity. A transformer of one layer is pre-trained on short sentences, then fine-tuned eight times on longer ones, that have
half of the nouns and adjectives only. Shifted tests: sentences twice as long; the other half of the words; fillers that no
training has seen. Hyper-parameters as above, with dropped words as augmentation.""",
    "starts": f"""Two ResNet-8 with batch norm, each trained on all digits for {PAIR_EPOCHS} epochs in all, in different
order. They share nothing, the start, a tenth of all steps, or the pre-training (the first half). The barrier is how far
accuracy falls, on the line between the two, below the mean of both, in points; *new statistics*: batch norm re-estimated on
the training images at each point.""",
}


def cell(values: Sequence[float], digits: int = 1) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def recipe_table(part: dict[str, Any]) -> str:
    rows = []
    for name in (START, MEAN, BEST, UNIFORM, GREEDY, GREEDY_GE, RANDOM, LOSS, LEARNED, LEARNED_T, ENSEMBLE, GREEDY_E):
        rows.append([name, *[cell(values) for values in part["rows"][name].values()]])
    return table(["", *part["rows"][MEAN]], rows)


def facts(part: dict[str, Any]) -> list[str]:
    f = part["facts"]
    members = ", ".join(
        f"{cell(v, 0)} in {name.removeprefix('members of ')}" for name, v in f.items() if name.startswith("members")
    )
    text = (
        f"Of eight models: {members}. The cosine between two models' updates is {cell(f['cosine'], 2)}; the worst single "
        f"model has {cell(f['lowest held-out'])} % on the held-out samples."
    )
    return [fill(text, WIDTH), ""]


def start_tables(part: dict[str, Any]) -> list[str]:
    order = [DIFFERENT, *STEPS]
    rows = part["rows"]

    def lines(columns: dict[str, int]) -> str:
        body = [
            [
                f"{name_of(name)}, {median(rows[name]['steps']):.0f} steps",
                *[cell(rows[name][c], n) for c, n in columns.items()],
            ]
            for name in order
        ]
        return table(["shared", *columns], body)

    merged = {
        "soup": "soup",
        NEW: NEW,
        "permute": "permutation merge",
        "zip": "ZipIt! merge",
        "ensemble": "ensemble (2x cost)",
    }
    body = [[text, cell(rows[DIFFERENT][name])] for name, text in merged.items()]
    return [
        lines({"A": 1, "B": 1, "soup": 1, NEW: 1, "ensemble": 1}),
        lines({BARRIER: 1, BARRIER_NEW: 1, "cosine of updates": 2, "cosine of weights": 2, "distance": 1}),
        "What can be made of the pair from different starts:",
        "",
        table(["one model of two", "accuracy"], body),
    ]


def verdict(gaps: Sequence[float], exact: bool = False) -> str:
    right = sum(gap >= 0 if exact else gap > 0 for gap in gaps)
    if not any(gaps) and not exact:
        return "no difference"
    return "yes" if right == len(gaps) else "no" if right == 0 else f"open, {right} of {len(gaps)}"


def judged(document: dict[str, Any], claim: Claim) -> str:
    return verdict(claim.gaps(document), claim.margin == 0)


def claim_table(document: dict[str, Any]) -> str:
    rows = []
    for claim in CLAIMS:
        asserted = "–" if claim.margin is None else f"≥ {claim.margin:g}"
        text = str(claim).replace(" > ", " ≥ ") if claim.margin == 0 else str(claim)
        rows.append([text, cell(claim.gaps(document), 2), judged(document, claim), claim.paper or "–", asserted])
    return table(["ordering", "difference", "holds here", "in the papers", "asserted"], rows)


def in_short(document: dict[str, Any]) -> list[str]:
    """What the tables say, computed from them."""
    lines = []
    for part in ("images", "text"):
        rows = document["parts"][part]["rows"]

        def mid(name: str, column: str, rows: Any = rows) -> str:
            return f"{median(rows[name][column]):.1f}"

        both = [
            f"{mid(name, 'test')} / {mid(name, SHIFTS)}"
            for name in (BEST, UNIFORM, GREEDY, LEARNED, LEARNED_T, ENSEMBLE)
        ]
        others = [n for n in rows if n not in (START, MEAN, BEST, ENSEMBLE, GREEDY_E)]
        f = document["parts"][part]["facts"]
        kept = " and ".join(f"{median(f[f'members of {n}']):.0f}" for n in (GREEDY, LOSS))
        best = max(others, key=lambda n: median(rows[n][SHIFTS]))
        lines.append(
            f"- {part.capitalize()}, test / mean of shifts: best single {both[0]}, uniform soup {both[1]}, "
            f"greedy {both[2]}, learned {both[3]}, per tensor {both[4]}, logit ensemble {both[5]}. "
            f"Greedy keeps {kept} of eight models by accuracy and by loss. "
            f"Of the soups, *{best}* is best on shifts ({mid(best, SHIFTS)})."
        )
    r = {name: {c: median(v) for c, v in row.items()} for name, row in document["parts"]["starts"]["rows"].items()}
    d = r[DIFFERENT]
    lines += [
        f"- The start decides: two networks that share the pre-training average to {r[ALL][NEW]:.1f} %, two from "
        f"different starts to {d['soup']:.1f} ({d[NEW]:.1f} with new batch-norm statistics), though each has {d['A']:.1f}. "
        f"ZipIt! makes {d['zip']:.1f} of the latter, a permutation {d['permute']:.1f}.",
        "- The barrier, with new statistics, falls from "
        + " to ".join(f"{r[name][BARRIER_NEW]:.1f}" for name in (DIFFERENT, *STEPS))
        + " points as networks share nothing, the start, a tenth of all steps, the pre-training.",
    ]
    for what, wanted in (
        ("the other way round here", "no"),
        ("no difference here", "no difference"),
        ("open here", "open"),
    ):
        found = [str(c) for c in CLAIMS if c.paper == "yes" and judged(document, c).split(",")[0] == wanted]
        if found:
            lines.append(f"- In the papers, but {what}: {'; '.join(found)}.")
    return [fill(line, WIDTH, subsequent_indent="  ") for line in lines]


def text(document: dict[str, Any]) -> str:
    parts, m = document["parts"], document["machine"]
    words = {
        "SEEDS": len(document["seeds"]),
        "TEST": DIGITS - TRAIN,
        "IMAGE": f"{100 / (DIGITS - TRAIN):.1f}",
    }
    head = HEAD
    for key, value in words.items():
        head = head.replace("{" + key + "}", str(value))
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in document["seconds"].items())
    out = [head, "## In short", "", *in_short(document), "", "## Orderings", "", claim_table(document)]
    for name in ("images", "text"):
        out += [
            f"## {name.capitalize()}",
            "",
            fill(TEXTS[name], WIDTH),
            "",
            recipe_table(parts[name]),
            *facts(parts[name]),
        ]
    out += ["## One start or two", "", fill(TEXTS["starts"], WIDTH), "", *start_tables(parts["starts"])]
    out += [
        "## Time",
        "",
        fill(f"{m['cpu']}, {m['threads']} thread, torch {m['torch']}, {m['date'][:10]}: {spent}.", WIDTH),
    ]
    return "\n".join(out).rstrip("\n") + "\n"


def write(results: Path) -> None:
    PAGE.write_text(text(json.loads(results.read_text())))
