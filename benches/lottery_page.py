# SPDX-License-Identifier: Apache-2.0
"""Writes docs/lottery-results.md from what benches/lottery_tables.py measured; no measured number is typed by hand.

Claims with a margin are what tests/paper/test_lottery_claims.py asserts on other seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from textwrap import fill
from typing import Any

from harness import ROOT
from lottery_tables import EVERY, ITERATIONS, LEVELS, LINES, POINTS, PRESET, REWIND, SHOWN, SIZES, percent_left
from report import table

PAGE = ROOT / "docs" / "lottery-results.md"
WIDTH = 120
DOWN_TO_FOUR = 15  # the level of 3.9 per cent
WITHIN, SAFE = 1.0, 1.5  # points
TWO, ONE = 18, 21  # levels of about 2 and 1 per cent
KINDS = {"ticket": "ticket", "reinit": "re-initialised", "random": "random mask", "oneshot": "one-shot"}
Document = dict[str, Any]


def values(document: Document, kind: str, level: int, name: str = "end_test") -> list[float]:
    """Of the seeds, in order; level 0 is the dense network for every kind."""
    return document["levels"]["ticket" if level == 0 else kind][str(level)][name]


def paired(document: Document, level: int, other: str, name: str = "end_test") -> list[float]:
    """Ticket minus another kind at a level, or ``"dense"``, per seed."""
    theirs = values(document, "ticket", 0, name) if other == "dense" else values(document, other, level, name)
    return [a - b for a, b in zip(values(document, "ticket", level, name), theirs)]


def ratios(document: Document, level: int, other: str) -> list[float]:
    """Early-stop iteration of another kind, or of the dense network, over the ticket's."""
    theirs = values(document, "ticket", 0, "early") if other == "dense" else values(document, other, level, "early")
    return [b / a for a, b in zip(values(document, "ticket", level, "early"), theirs)]


def heights(document: Document, kind: str, level: int, rewind: int = 0) -> list[float]:
    return document["connectivity"][str(rewind)][f"{kind} {level}"]["height"]


def per_cent(level: int) -> str:
    """P_m of a level."""
    return f"{percent_left(level):.1f} %"


def wrapped(plain: str, indent: str = "") -> str:
    """In lines of the page; a number stays with its sign of per cent."""
    lines = fill(plain.replace(" %", "\u00a0%"), WIDTH, subsequent_indent=indent, break_on_hyphens=False)
    return lines.replace("\u00a0", " ")


@dataclass(frozen=True)
class Claim:
    """Numbers that are above 0 if something holds.

    Attributes:
        text: what holds; with {0} for P_m at `level`.
        gaps: of each seed, or of each level over all seeds.
        over: ``"seeds"``, ``"mean"`` (of the seeds, the rest as there) or ``"levels"``.
        paper: whether the papers have it.
        margin: what the slow test wants: of the least seed, of the mean, of the least level.
    """

    text: str
    gaps: Callable[[Document], list[float]]
    over: str = "seeds"
    paper: str = ""
    margin: float | None = None
    level: int | None = None
    digits: int = 2

    def worst(self, document: Document) -> float:
        gaps = self.gaps(document)
        return fmean(gaps) if self.over == "mean" else min(gaps)

    def __str__(self) -> str:
        return self.text.format(per_cent(self.level or 0))


def tested(document: Document, first: int = 1, last: int = LEVELS) -> list[int]:
    """Levels that the controls have."""
    return [level for level in map(int, document["levels"]["reinit"]) if first <= level <= last]


def above(other: str, level: int, paper: str = "yes", margin: float | None = None, name: str = "end_test") -> Claim:
    what = "accuracy" if name == "end_test" else "accuracy at early stop"
    them = "dense network" if other == "dense" else KINDS[other]
    return Claim(
        f"{what} at {{0}}: ticket > {them}", lambda d: paired(d, level, other, name), "seeds", paper, margin, level
    )


def within(points: float, margin: float | None = None, *, normalised: bool = False) -> Claim:
    """All tickets down to 3.9 % lose less."""

    def gaps(document: Document) -> list[float]:
        found = {**document, "levels": document["normalised"]} if normalised else document
        return [points + fmean(paired(found, level, "dense")) for level in range(1, DOWN_TO_FOUR + 1)]

    text = f"accuracy at all levels down to {{0}}: mean of tickets > dense network - {points:g}"
    paper = "yes" if points == WITHIN else ""
    return Claim(text + ", inputs normalised" * normalised, gaps, "levels", paper, margin, DOWN_TO_FOUR)


def sooner(level: int) -> Claim:
    return Claim(
        "early stop at {0}: ticket earlier than dense network (iterations)",
        lambda d: [-gap for gap in paired(d, level, "dense", "early")],
        "seeds", "yes", None, level, 0,
    )  # fmt: skip


def late(document: Document, level: int) -> list[float]:
    return [a - b for a, b in zip(document["rewound"][str(level)]["end_test"], values(document, "ticket", level))]


def tickets_height(document: Document) -> list[float]:
    """Mean over the levels, of each seed."""
    return [fmean(column) for column in zip(*(heights(document, "ticket", level) for level in LINES))]


CLAIMS = [
    sooner(3),
    sooner(7),
    above("dense", 9),
    above("dense", 9, name="early_test"),
    within(WITHIN),
    within(SAFE, margin=0.0),
    within(WITHIN, margin=0.0, normalised=True),
    above("reinit", 6),
    above("reinit", TWO),
    above("reinit", ONE),
    Claim(
        "early stop at all levels from {0} on: ticket earlier than re-initialised (median, iterations)",
        lambda d: [-median(paired(d, level, "reinit", "early")) for level in tested(d, 3)],
        "levels", "yes", EVERY, 3, 0,
    ),
    Claim(
        "accuracy at {0}: dense network > re-initialised",
        lambda d: [a - b for a, b in zip(values(d, "ticket", 0), values(d, "reinit", 7))],
        "seeds", "yes", None, 7,
    ),
    above("random", 9, ""),
    above("random", TWO, "yes", 4.0),
    above("random", ONE, "yes", 30.0),
    Claim(
        "accuracy at all levels from {0} on: mean of re-initialised > random mask",
        lambda d: [
            fmean(values(d, "reinit", level)) - fmean(values(d, "random", level))
            for level in tested(d, DOWN_TO_FOUR + 1)
        ],
        "levels", "", None, DOWN_TO_FOUR + 1,
    ),
    above("oneshot", 9),
    above("oneshot", DOWN_TO_FOUR),
    above("oneshot", TWO, "yes", 1.0),
    above("oneshot", ONE, "yes", 4.0),
    Claim(
        "stable from the start: 2 > barrier of the dense network", lambda d: [2 - h for h in heights(d, "ticket", 0)],
        "seeds", "yes", 0.0,
    ),
    Claim(
        "barrier: dense network > tickets (mean of three levels)",
        lambda d: [a - b for a, b in zip(heights(d, "ticket", 0), tickets_height(d))],
        "mean", "", 0.05,
    ),
    Claim(
        f"barrier: dense network > dense network after {REWIND} iterations",
        lambda d: [a - b for a, b in zip(heights(d, "ticket", 0), heights(d, "ticket", 0, REWIND))],
        "mean", "yes", 0.0,
    ),
    Claim(
        "barrier at {0}: random mask > ticket",
        lambda d: [a - b for a, b in zip(heights(d, "random", TWO), heights(d, "ticket", TWO))],
        "mean", "yes", 1.0, TWO,
    ),
    Claim(
        "barrier at {0}: re-initialised > ticket",
        lambda d: [a - b for a, b in zip(heights(d, "reinit", TWO), heights(d, "ticket", TWO))],
        "seeds", "yes", None, TWO,
    ),
    Claim(f"accuracy at {{0}}: rewound to {REWIND} > rewound to 0", lambda d: late(d, TWO), "seeds", "", None, TWO),
]  # fmt: skip

HEAD = """# Lottery tickets on scikit-learn's digits

This page is generated from `benches/results/lottery_tables.json`; do not edit it.

```
make lottery                                # the figures for three seeds, into lottery-out
python benches/lottery_tables.py            # measures the tables, some minutes on one thread
python benches/lottery_tables.py --report   # writes this page
```
"""


def setting(document: Document) -> str:
    train, validation, test = SIZES.values()
    return wrapped(
        f"LeNet-300-100 on 8x8 images (50 200 weights), as Frankle & Carbin 2019 (arXiv 1803.03635) have it: Adam with "
        f"{PRESET.lr:g}, batches of {PRESET.batch_size}, a fifth of the survivors of each layer pruned per round, a tenth "
        f"of the output layer's; but {ITERATIONS} iterations, and {train}, {validation} and {test} digits for training, "
        f"validation and test, one split for all. There are {len(document['seeds'])} seeds: of the initial weights and the "
        f"order of the data. One digit of the test is {100 / test:.2f} points; seeds share the test digits, so that a "
        f"standard error (s.e., over seeds) tells of other seeds, not of other digits."
    )


WORDS = f"""
- *early stop*: the iteration of least validation loss, looked at every {EVERY} iterations and decided afterwards; accuracy
  is that of the last iteration on the test digits, in per cent. Where the loss falls to the end, the early stop is the last
  iteration, and ratios against it are lower bounds.
- *dense network*: level 0. *re-initialised*: the ticket's mask, other weights. *random mask*: as many survivors in each
  layer, elsewhere, with the ticket's weights. *one-shot*: the trained dense network pruned at once, rewound likewise.
- Differences are paired: within a seed, ticket minus the other.
"""


def error(numbers: Sequence[float]) -> float:
    return stdev(numbers) / math.sqrt(len(numbers))


def mean_cell(numbers: Sequence[float], sign: str = "") -> str:
    return f"{fmean(numbers):{sign}.2f} ± {error(numbers):.2f}"


def spread_cell(numbers: Sequence[float], digits: int = 0) -> str:
    return f"{median(numbers):.{digits}f} ({min(numbers):.{digits}f}..{max(numbers):.{digits}f})"


def difference_table(document: Document) -> str:
    rows = []
    for level in SHOWN:
        row = [per_cent(level), f"{median(1 / v for v in ratios(document, level, 'dense')):.2f}"]
        row.append(mean_cell(paired(document, level, "dense", "early_test"), "+"))
        for other in ("dense", "reinit", "random", "oneshot"):
            row.append(mean_cell(paired(document, level, other), "+"))
            if other == "reinit":
                row.append(f"{median(ratios(document, level, other)):.2f}x")
        rows.append(row)
    head = ["P_m", "early stop / dense", "- dense, at early stop", "- dense", "- re-initialised", "sooner than it"]
    head += ["- random mask", "- one-shot"]
    return table(head, rows)


def normalised_table(document: Document) -> str:
    other = {**document, "levels": document["normalised"]}
    rows = []
    for level in SHOWN:
        row = [per_cent(level), mean_cell(values(other, "ticket", level))]
        rows.append(row + [mean_cell(paired(other, level, kind), "+") for kind in ("dense", *list(KINDS)[1:])])
    return table(["P_m", "ticket", "- dense", *(f"- {name}" for name in list(KINDS.values())[1:])], rows)


def level_table(document: Document) -> str:
    rows = []
    for level in range(LEVELS + 1):
        ticket = values(document, "ticket", level)
        row = [
            str(level), f"{percent_left(level):.2f}", f"{document['density'][str(level)]:.2f}",
            mean_cell(ticket), f"{min(ticket):.1f}..{max(ticket):.1f}",
        ]  # fmt: skip
        row += [mean_cell(values(document, kind, level)) if level else "" for kind in list(KINDS)[1:]]
        row.append(mean_cell(document["rewound"][str(level)]["end_test"]))
        rows.append(row)
    head = ["level", "ladder", "P_m", "ticket", "of seeds", *list(KINDS.values())[1:], f"rewound to {REWIND}"]
    return table(head, rows)


def early_table(document: Document) -> str:
    rows = []
    dense = median(values(document, "ticket", 0, "seconds"))
    for level in (0, *SHOWN):
        row = [per_cent(level)]
        row += [
            spread_cell(values(document, kind, level, "early")) if level or kind == "ticket" else "" for kind in KINDS
        ]
        seconds = median(values(document, "ticket", level, "seconds"))
        rows.append([*row, f"{seconds:.2f}", f"{dense / seconds:.1f}x"])
    return table(["P_m", *KINDS.values(), "s", "faster than dense"], rows)


def seed_table(document: Document) -> str:
    columns = {
        "dense, accuracy": [f"{v:.1f}" for v in values(document, "ticket", 0)],
        "dense, early stop": [f"{v:.0f}" for v in values(document, "ticket", 0, "early")],
        f"early stop / dense, {per_cent(7)}": [f"{1 / v:.2f}" for v in ratios(document, 7, "dense")],
        f"sooner than re-initialised, {per_cent(7)}": [f"{v:.2f}x" for v in ratios(document, 7, "reinit")],
        **{f"- dense, {per_cent(level)}": [f"{v:+.1f}" for v in paired(document, level, "dense")]
           for level in (9, DOWN_TO_FOUR, ONE)},
        **{f"- {KINDS[kind]}, {per_cent(ONE)}": [f"{v:+.1f}" for v in paired(document, ONE, kind)]
           for kind in ("reinit", "random", "oneshot")},
    }  # fmt: skip
    return table(["seed", *columns], [[str(s), *cells] for s, *cells in zip(document["seeds"], *columns.values())])


def line_table(document: Document) -> str:
    rows = []
    for rewind, found in document["connectivity"].items():
        for name, row in found.items():
            kind, level = name.split()
            what = "dense network" if level == "0" else f"{KINDS[kind]}, {per_cent(int(level))}"
            h = row["height"]
            rows.append(
                [what, rewind, mean_cell(h), f"{min(h):.2f}..{max(h):.2f}", f"{sum(v < 2 for v in h)} of {len(h)}",
                 mean_cell(row["ends"])]
            )  # fmt: skip
    return table(["", "from iteration", "barrier", "of seeds", "stable (< 2)", "accuracy of the copies"], rows)


def verdict(gaps: Sequence[float], over: str) -> str:
    """All levels; seven of eight seeds."""
    right = sum(gap > 0 for gap in gaps)
    if over == "levels":
        return "yes" if right == len(gaps) else "no" if right == 0 else f"in part, {right} of {len(gaps)} levels"
    if 8 * right >= 7 * len(gaps):
        return "yes"
    wrong = sum(gap < 0 for gap in gaps)
    return "no" if 8 * wrong >= 7 * len(gaps) else f"open, {right} of {len(gaps)}"


def claim_table(document: Document) -> str:
    rows = []
    for claim in CLAIMS:
        gaps = claim.gaps(document)
        shown = f"{spread_cell(gaps, claim.digits)}" + (f", mean {fmean(gaps):.2f}" if claim.over == "mean" else "")
        asserted = "–" if claim.margin is None else f"≥ {claim.margin:g}" + (" (mean)" if claim.over == "mean" else "")
        rows.append([str(claim), shown, verdict(gaps, claim.over), claim.paper or "–", asserted])
    return table(["claim", "by how much", "holds here", "in the papers", "asserted"], rows)


def smallest(document: Document, kind: str) -> str:
    """P_m of the last level up to which the mean stays within a point of the dense network's."""
    dense = fmean(values(document, "ticket", 0))
    kept = 0
    while kept < LEVELS and fmean(values(document, kind, kept + 1)) >= dense - WITHIN:
        kept += 1
    return per_cent(kept)


def in_short(document: Document) -> list[str]:
    """What the tables say, computed from them."""
    dense = [100 * (1 - 1 / v) for v in ratios(document, 7, "dense")]
    low = {kind: f"{fmean(values(document, kind, ONE)):.1f}" for kind in KINDS}
    last = sum(e >= 0.95 * ITERATIONS for kind in KINDS for e in values(document, kind, ONE, "early"))
    other = {**document, "levels": document["normalised"]}
    plain, rest = document["connectivity"]["0"], document["connectivity"][str(REWIND)]

    def barrier(name: str) -> str:
        return f"{fmean(plain[name]['height']):.2f}"

    def low_loss(found: Document) -> float:
        return -fmean(paired(found, DOWN_TO_FOUR, "dense"))

    def barriers(kind: str) -> str:
        return ", ".join(barrier(f"{kind} {level}") for level in LINES)

    def named(wanted: str) -> str:
        found = [str(c) for c in CLAIMS if c.paper == "yes" and verdict(c.gaps(document), c.over).startswith(wanted)]
        return "; ".join(found) or "none"

    texts = [
        f"At {per_cent(ONE)} the mean accuracy is {low['ticket']} % for "
        f"tickets, {low['reinit']} re-initialised, {low['oneshot']} one-shot, {low['random']} with a random mask; the dense "
        f"network has {fmean(values(document, 'ticket', 0)):.1f}.",
        f"The mean stays within {WITHIN:g} point of the dense network down to {smallest(document, 'ticket')} for tickets, "
        f"{smallest(document, 'oneshot')} for one-shot pruning, {smallest(document, 'reinit')} re-initialised, "
        f"{smallest(document, 'random')} with a random mask.",
        f"The paper's 38 % earlier than the dense network at 21 % is here {median(dense):.0f} % in the median, from "
        f"{min(dense):.0f} to {max(dense):.0f}; its 2.51 times sooner than re-initialised there is "
        f"{median(ratios(document, 7, 'reinit')):.2f} times; its gain of 0.3 points at 13.5 % (of "
        f"accuracy at early stop) is {mean_cell(paired(document, 9, 'dense', 'early_test'), '+')} at {per_cent(9)}, and "
        f"{mean_cell(paired(document, 9, 'dense'), '+')} at the end.",
        f"At {per_cent(ONE)} {last} of {len(KINDS) * len(document['seeds'])} trainings have their least validation loss in "
        f"the last twentieth: {ITERATIONS} iterations end them before they are done.",
        f"Barriers at {', '.join(per_cent(level) for level in LINES)}, mean: tickets {barriers('ticket')}, re-initialised "
        f"{barriers('reinit')}, random masks {barriers('random')} points; the dense network has {barrier('ticket 0')}, and "
        f"{fmean(rest['ticket 0']['height']):.2f} after {REWIND} iterations.",
        f"With inputs of mean 0 and variance 1 tickets are {low_loss(other):.2f} points below the dense network at "
        f"{per_cent(DOWN_TO_FOUR)} instead of {low_loss(document):.2f}, and random masks "
        f"{fmean(paired(other, TWO, 'random')):.1f} below tickets at {per_cent(TWO)} instead of "
        f"{fmean(paired(document, TWO, 'random')):.1f}; see below.",
        f"In the papers, but the other way round here: {named('no')}.",
        f"In the papers, but open here: {named('open')}.",
        f"In the papers, but in part here: {named('in part')}.",
    ]  # fmt: skip
    return [wrapped(f"- {line}", "  ") for line in texts]


def text(document: Document) -> str:
    m = document["machine"]
    seconds = document["seconds"]
    spent = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items() if name != "figure")
    time = f"{m['cpu']}, {m['threads']} thread, torch {m['torch']}, {m['date'][:10]}: {spent}."
    if "figure" in seconds:
        time += f" `make lottery` (three seeds, all levels and controls): {seconds['figure']:.0f} s."
    trainer = (
        f"Trainer: {', '.join(document['trainers'])}; layers below a density of {document['sparse_below']:.2f} are computed "
        f"on their survivors. The seconds of the tables are those of the iterations, without evaluations."
    )
    rule = (
        "*By how much*: median, least and most of the seeds, or of the levels where all levels are claimed; in points of "
        "accuracy, or in iterations. *Holds here*: yes, if above 0 in seven of eight seeds, or at all levels; no, if "
        "below 0 in as many; else open. *Asserted*: what a test asks of other seeds, of the least one or of the mean."
    )
    lines = (
        f"Two copies of one start see the training data in other orders; the barrier is how far the test accuracy falls, at "
        f"the worst of {POINTS} points on the line between the two, below the mean of both (Frankle et al. 2020, arXiv "
        f"1912.05671), in points; mean ± s.e."
    )
    inputs = (
        f"The tables above are of pixels in [0, 1]. With the mean and the variance of all training pixels made 0 and 1, the "
        f"dense network has {mean_cell(document['normalised']['ticket']['0']['end_test'])} %; mean of paired differences ± "
        f"s.e., in points of accuracy:"
    )
    return "\n".join(
        [
            HEAD, setting(document), WORDS, "## In short", "", *in_short(document), "",
            "## Tickets against the others", "",
            "Mean of paired differences ± s.e., in points of accuracy; early stop as median of paired ratios.", "",
            difference_table(document), "## Claims", "", wrapped(rule), "", claim_table(document),
            "## Accuracy at every level", "",
            "Mean ± s.e. of the accuracy at the end; *ladder*: P_m before rounds are cut to whole weights.", "",
            level_table(document), "## Early stop and time", "",
            "Median over seeds, with the least and the most; seconds of one training of the ticket.", "",
            early_table(document), wrapped(trainer), "", "## Seed by seed", "", seed_table(document),
            "## Linear mode connectivity", "",
            wrapped(lines), "",
            line_table(document), "## Normalised inputs", "", wrapped(inputs), "", normalised_table(document),
            "## Time", "", wrapped(time),
        ]
    ).rstrip("\n") + "\n"  # fmt: skip


def write(results: Path) -> None:
    PAGE.write_text(text(json.loads(results.read_text())))
