# SPDX-License-Identifier: Apache-2.0
"""The report of ``zipfast bench``: Markdown and pictures from the record, bench.json; prints what is most worth knowing.

python product_page.py RECORD FOLDER
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import report
from offers import PEERS, SYSTEMS

QUICK = (
    "**Quick**: small sizes and few repeats. Such a run shows that everything works and agrees here; its ratios say little "
    "about the sizes of real models, and what fits into the cache may exceed the copy ceiling."
)


def ratios(document: dict[str, Any]) -> dict[str, list[float]]:
    """Peer -> its ratios in all rows of a target."""
    found: dict[str, list[float]] = {}
    for row in document["rows"]:
        for name, peer in row["peers"].items():
            found.setdefault(name, []).append(peer["ratio"])
    return found


def times(value: float) -> str:
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def summary(targets: list[dict[str, Any]]) -> list[list[str]]:
    """Target, peer, cases, median ratio, least and most."""
    rows = []
    for document in targets:
        for name, values in ratios(document).items():
            middle = times(statistics.median(values))
            span = f"{times(min(values))} … {times(max(values))}" if len(values) > 1 else ""
            rows.append([document["op"], name, str(len(values)), middle, span])
    return rows


def unmeasured(record: dict[str, Any]) -> list[list[str]]:
    """Target, case, peer, why: all that is not timed, though it was asked for."""
    rows = [[name, "all", "", f"failed: {why}"] for name, why in record["failed"].items()]
    for document in record["targets"]:
        op = document["op"]
        rows += [[op, d["case"], d["peer"], f"disagrees: {d['why']}"] for d in document["disagreements"]]
        rows += [[op, d["case"], d["peer"], f"failed: {d['why']}"] for d in document["failures"]]
        rows += [[op, d["case"], "", f"skipped: {d['why']}"] for d in document["skipped"]]
        noted = [r for r in document["rows"] if "not measured" in r["extra"]]
        rows += [[op, r["case"], "", f"memory not measured: {r['extra']['not measured']}"] for r in noted]
    return [[cell.replace("|", "\\|") for cell in row] for row in rows]


def left(text: str) -> str:
    """A table of texts, which do not stand at the right as numbers do."""
    return text.replace("---:", "---")


def peers_table(record: dict[str, Any]) -> str:
    rows = []
    for name, state in record["peers"].items():
        offer = PEERS[name]
        rows.append([name, state["version"] or state["why"], offer.what, ", ".join(offer.where) or "all"])
    return left(report.table(["peer", "here", "what takes part", "in"], rows))


def head(record: dict[str, Any]) -> list[str]:
    machine, settings = record["machine"], record["settings"]
    total = f", {record['memory_total'] / 1e9:.0f} GB of memory" if record["memory_total"] else ""
    size = total + (f" ({record['memory'] / 1e9:.1f} GB to use)" if record["memory"] else "")
    commit = machine["commit"]
    known = commit if commit == "unknown" else commit[:12] + "+" * ("+" in commit)
    lines = [
        "# zipfast bench",
        "",
        f"{report.title(machine)}{size}. zipfast {record['zipfast']} (commit {known}), torch {machine['torch']}"
        f"{', CUDA ' + machine['cuda'] if machine['cuda'] else ''}, {machine['simd']}, Python {machine['python']}, "
        f"{machine['date'][:16].replace('T', ' ')} UTC; {record['seconds']:.0f} s.",
        "",
    ]
    if settings["quick"]:
        lines += [QUICK, ""]
    if machine["device"] == "cpu" and not any(r["backend"] == "cpu" for d in record["targets"] for r in d["rows"]):
        lines += ["The compiled kernels are not built here: ours ran in pure torch. `zipfast info` says why.", ""]
    lines += [
        report.READ,
        "## Ceilings",
        "",
        report.ceilings([record | {"ceilings": record["ceilings"]}]),
        "## Peers",
        "",
    ]
    return [*lines, peers_table(record)]


def page(record: dict[str, Any], pictures: dict[str, str], without: str) -> str:
    """``pictures``: target, or "" for all of them -> file; ``without``: why there are none."""
    targets = record["targets"]
    lines = head(record)
    if rows := unmeasured(record):
        lines += ["## Not measured", "", left(report.table(["", "case", "peer", "why"], rows))]
    lines += ["## In short", ""]
    lines.append(report.table(["", "peer", "cases", "median", "from … to"], summary(targets)))
    if "" in pictures:
        lines += [f"![Ratios of all peers]({pictures['']})", ""]
    elif without:
        lines += [without, ""]
    for document in targets:
        name = document["op"]
        lines += [f"## {name}", ""] + ([f"{SYSTEMS[name].capitalize()}.", ""] if name in SYSTEMS else [])
        if not document["rows"]:
            lines += ["No case was measured.", ""]
            continue
        lines += [report.op_table(document)]
        lines += [*report.notes(document), ""] if report.notes(document) else []
        if name in pictures:
            lines += [f"![{name}]({pictures[name]})", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


# ------------------------------------------------------------------------------------------------------------- pictures


def bars(axes: Any, labels: list[str], values: list[float]) -> None:
    places = list(range(len(labels)))
    axes.barh(places, [v - 1 for v in values], left=1, color=["#2a7ab0" if v >= 1 else "#c8703a" for v in values])
    for place, value in zip(places, values):
        axes.text(value, place, f" {times(value)} ", va="center", ha="left" if value >= 1 else "right", fontsize=7)
    axes.set_yticks(places, labels, fontsize=7)
    axes.margins(y=0.3 / len(values))
    axes.invert_yaxis()
    axes.set_xscale("log")
    low, high = min([*values, 1.0]), max([*values, 1.0])
    axes.set_xlim(low / 2, high * 2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time of the peer over ours")


def draw(record: dict[str, Any], folder: Path) -> dict[str, str]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pages: dict[str, tuple[list[str], list[float]]] = {}
    rows = summary(record["targets"])
    middles = [statistics.median(v) for d in record["targets"] for v in ratios(d).values()]
    pages[""] = [f"{target}: {peer}" for target, peer, *_ in rows], middles
    for document in record["targets"]:
        pairs = [(f"{r['case']}: {n}", p["ratio"]) for r in document["rows"] for n, p in r["peers"].items()]
        pages[document["op"]] = [label for label, _ in pairs], [value for _, value in pairs]
    found = {}
    (folder / "plots").mkdir(exist_ok=True)
    for name, (labels, values) in pages.items():
        if not values:
            continue
        figure, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(values)), layout="constrained")
        bars(axes, labels, values)
        axes.set_title(name or "medians over the cases", fontsize=9)
        found[name] = f"plots/{name or 'all'}.png"
        figure.savefig(folder / found[name], dpi=110)
        pyplot.close(figure)
    return found


def said(record: dict[str, Any]) -> str:
    """For the terminal."""
    rows = [[target, peer, f"{middle:>8}", span] for target, peer, _, middle, span in summary(record["targets"])]
    wide = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines = ["time of a peer over ours: median of the cases, from … to"]
    lines += [f"  {a:<{wide[0]}}  {b:<{wide[1]}}  {c}  {d}".rstrip() for a, b, c, d in rows]
    return "\n".join(lines + [f"  {' '.join(row)}".replace("  ", " ") for row in unmeasured(record)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    record = json.loads(options.record.read_text())
    without = ""
    pictures: dict[str, str] = {}
    if importlib.util.find_spec("matplotlib") is None:
        without = "No pictures: matplotlib is not installed (pip install 'zipfast[plots]')."
    else:
        pictures = draw(record, options.folder)
    (options.folder / "report.md").write_text(page(record, pictures, without), encoding="utf-8")
    print(said(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
