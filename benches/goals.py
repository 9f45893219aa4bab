# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels are to reach on an H200, as data, and what the results say about each.

A goal names a case of a bench and what is asked of it.  It is met or missed only by exactly one row that our CUDA kernel
served on such a GPU; whatever is missing (the file, the case, the peer, a ceiling) makes it "not measured".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

GPU = "H200"
MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
BEGIN = "<!-- goals: written by benches/report.py -->"
END = "<!-- end of goals -->"


@dataclass(frozen=True)
class Goal:
    """``quantity`` is "ratio" (a peer's time over ours), "ms", "floors" (ours over the time that the bytes take at the
    copy rate) or "percent" (the reverse, of 100).

    ``case``: the row that is called so, or, where none is, the one that begins so.  ``peer``: words, of which the first
    that some peers have in their names (in upper or lower case) count; of those peers, the fastest.
    """

    op: str
    case: str
    quantity: str
    limit: float
    sentence: str
    peer: tuple[str, ...] = ()

    @property
    def at_least(self) -> bool:
        return self.quantity in ("ratio", "percent")

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Outcome:
    goal: Goal
    status: str
    why: str = ""  # where nothing was measured
    value: float | None = None
    percent_of_ceiling: float | None = None
    bound: str | None = None
    machine: dict[str, Any] | None = None


def at_least(op: str, case: str, limit: float, peer: tuple[str, ...], whom: str) -> Goal:
    return Goal(op, case, "ratio", limit, f"≥ {limit:g}x {whom}", peer)


def of_copy(op: str, case: str) -> Goal:
    return Goal(op, case, "percent", 85, "≥ 85 % of copy bandwidth")


PUBLIC = ("ZipIt", "reference update")
GOALS = (
    at_least("moments", "ResNet-50, 37 spaces, float16", 15, PUBLIC, "the public reference's update"),
    at_least("moments", "ResNet-50, 37 spaces, float32", 8, PUBLIC, "the public reference's update"),
    *(
        Goal("moments", f"ResNet-50, 37 spaces, {t}", "floors", 3.5, "≤ 3.5x the byte floor")
        for t in ("float16", "float32")
    ),
    *(
        at_least("moments", f"n={n} float16", 1.5, ("mm(half, half",), "mm(half, half, out_dtype=float32)")
        for n in (1024, 2048, 4096)
    ),
    *(Goal("zip_match", f"n=4096 {how}", "ms", 1.0, "≤ 1 ms") for how in ("strict", "compat", "no budget")),
    *(
        at_least("zip_match", f"n=4096 {how}", 10, ("sequential",), "a sequential kernel of one block")
        for how in ("strict", "no budget")
    ),
    *(
        at_least("evidence", case, 2, ("torch.linalg.eigh pipeline",), "a torch.linalg.eigh pipeline")
        for case in ("D=1024, K=100", "D=2048, K=100", "D=2048, K=1000")
    ),
    *(at_least("evidence", case, 50, ("original",), "the original") for case in ("D=1024, K=100", "D=2048, K=100")),
    Goal("threshold", "100M", "ms", 0.3, "≤ 0.3 ms"),
    *(
        at_least("masked_step", case, 1.4, ("fused",), "torch fused + mask")
        for case in ("100M, adam", "100M, sgd momentum")
    ),
    *(
        at_least("sparse_linear", f"4096x4096, {sparsity} %, batch {batch}", limit, ("cuBLAS bf16",), "cuBLAS bf16")
        for sparsity, limit in ((90, 2.0), (95, 2.5))
        for batch in (1, 2, 4, 8)
    ),
    of_copy("blend", "8 models, 100M, float32"),
    of_copy("multidot", "8 models, 100M, float32"),
)


def evaluate(documents: Iterable[dict[str, Any]]) -> list[Outcome]:
    """What the results say about each goal, in the order of the goals."""
    found = list(documents)
    return [outcome(goal, found) for goal in GOALS]


def outcome(goal: Goal, documents: list[dict[str, Any]]) -> Outcome:
    def without(why: str) -> Outcome:
        return Outcome(goal, NOT_MEASURED, why)

    own = [d for d in documents if d["op"] == goal.op and d["machine"]["device"] == "cuda"]
    fit = [d for d in own if GPU in (d["machine"]["gpu"] or "")]
    if not fit:
        others = ", ".join(sorted({str(d["machine"]["gpu"]) for d in own}))
        return without(f"results of {others} only" if others else "no results")
    document = max(fit, key=lambda d: d["machine"]["date"])
    rows = cases(goal, document["rows"])
    if len(rows) != 1:
        return without("several such cases" if rows else "no such case")
    row = rows[0]
    if row["backend"] != "cuda":
        return without(f"served by {row['backend']}")
    value = measured(goal, row, document)
    if isinstance(value, str):
        return without(value)
    share = row["percent_of_ceiling"]
    status = MET if goal.met(value) else MISSED
    return Outcome(goal, status, "", value, share, row["bound"], document["machine"])


def cases(goal: Goal, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a goal's case: one, or the several that cannot be told apart."""
    exact = [r for r in rows if r["case"] == goal.case]
    # "batch 1" must not find "batch 16"
    begins = [r for r in rows if r["case"].startswith(goal.case) and not r["case"][len(goal.case) :][:1].isalnum()]
    return exact or begins


def peers(goal: Goal, row: dict[str, Any]) -> list[dict[str, float]]:
    for words in goal.peer:
        found = [p for name, p in row["peers"].items() if words.lower() in name.lower()]
        if found:
            return found
    return []


def measured(goal: Goal, row: dict[str, Any], document: dict[str, Any]) -> float | str:
    """The quantity of a goal in a row, or why it is not there."""
    ms: float = row["ours"]["ms"]
    if goal.quantity == "ms":
        return ms
    if goal.quantity == "ratio":
        ratios = [p["ratio"] for p in peers(goal, row)]
        return min(ratios) if ratios else f"no peer {goal.peer[0]!r}"
    copy = next((c["value"] for c in document["ceilings"] if c["name"] == "copy"), None)
    if not copy or not row.get("bytes"):
        return "no copy ceiling" if not copy else "bytes not counted"
    floor = row["bytes"] / copy * 1e3
    return ms / floor if goal.quantity == "floors" else 100 * floor / ms


# --------------------------------------------------------------------------------------------------------------- tables


def shown(o: Outcome) -> str:
    if o.value is None:
        return "–"
    unit = {"ratio": "x", "floors": "x", "percent": " %", "ms": " ms"}[o.goal.quantity]
    return f"{o.value:.3g}{unit}"


def verdict(o: Outcome) -> str:
    return f"{o.status} ({o.why})" if o.why else o.status


def where(o: Outcome) -> str:
    if o.machine is None:
        return "–"
    commit = o.machine["commit"]
    return f"{o.machine['gpu']}, {commit[:12]}{'+' * ('+' in commit)}, {o.machine['date'][:10]}"


def lines(outcomes: list[Outcome]) -> list[str]:
    """A sentence and a table in Markdown."""
    count = {s: sum(o.status == s for o in outcomes) for s in (MET, MISSED, NOT_MEASURED)}
    body = []
    for o in outcomes:
        share = "–" if o.percent_of_ceiling is None else f"{o.percent_of_ceiling:.0f} ({o.bound})"
        body.append([o.goal.op, o.goal.case, o.goal.sentence, shown(o), share, verdict(o), where(o)])
    head = ["op", "case", f"goal on an {GPU}", "measured", "% of ceiling", "outcome", "GPU, commit, day"]
    table = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]
    summary = ", ".join(f"{n} {status}" for status, n in count.items())
    return [f"Of {len(outcomes)} goals: {summary}.", "", *table, ""]


def between(text: str, outcomes: list[Outcome]) -> str:
    """A page with its goals written anew, between the two marks that it must have once each."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the page must have {BEGIN!r} and, behind it, {END!r}, once each")
    before, rest = text.split(BEGIN)
    return "\n".join([before + BEGIN, "", *lines(outcomes), END]) + rest.split(END)[1]
