# SPDX-License-Identifier: Apache-2.0
"""Writes docs/benchmarks.md from the JSON in benches/results: one table per op and machine, no number typed by hand.

The goals of the CUDA kernels (goals.py) are a table there and the same one in docs/kernels.md, between two marks.
``python benches/report.py``; ``--check`` writes nothing and fails if a page is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import goals
from files import ROOT, results_folder, validate

PAGE = ROOT / "docs" / "benchmarks.md"
KERNELS = ROOT / "docs" / "kernels.md"
ORDER = ["moments", "correlate", "zip_match", "regroup", "evidence", "blend", "multidot", "gram", "threshold"]
GOALS = """\
## Goals

What the CUDA kernels are to reach. A row counts only if exactly this case was measured on such a GPU, agreement checked
first; "not measured" claims nothing. *% of ceiling* is against the rates measured in the same run."""
READ = """\
How to read the tables: results are compared first, and only what agrees is timed. Ours and a peer then run in pairs,
A B A B, each with a cold cache. *ours* is the median; *spread* its interquartile range as a share of the median. A
peer's cell is its median and, in brackets, the median of the per-pair ratios: 3.00x says that the peer takes three
times as long as zipfast; below 1 the peer is faster. *% of ceiling* is the time that the case needs at the measured
copy or GEMM rate, over the measured time; above 100 % the op beats the library's own square GEMM, per useful flop.
"""
HEAD = f"""\
# Benchmarks

This page is generated from `benches/results/*.json`; do not edit it. To measure and write it anew:

```
pytest benches                     # CPU; ZIPFAST_ZIPIT=<checkout of the public ZipIt code> adds it as a peer
make gpu ONLY=bench                # GPU; one of them: ONLY=bench:moments
python benches/report.py
```

{READ}"""


def load(folder: Path) -> list[dict[str, Any]]:
    """All results, validated; what is no results file of a bench (gpu.json) is left out."""
    documents = []
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or "op" not in document:
            continue
        try:
            validate(document)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from e
        documents.append(document)
    return documents


def milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]
    return "\n".join(lines) + "\n"


def op_table(document: dict[str, Any]) -> str:
    rows = document["rows"]
    peers = list(dict.fromkeys(name for r in rows for name in r["peers"]))
    usual = document["machine"]["threads"]
    body = []
    for r in rows:
        case = r["case"] if r["threads"] == usual or r["device"] != "cpu" else f"{r['case']} ({r['threads']} threads)"
        cells = [case, milliseconds(r["ours"]["ms"])]
        for name in peers:
            p = r["peers"].get(name)
            cells.append("–" if p is None else f"{milliseconds(p['ms'])} ({p['ratio']:.2f}x)")
        share = r["percent_of_ceiling"]
        cells.append("–" if share is None else f"{share:.0f} ({r['bound']})")
        cells.append(f"{100 * r['ours']['iqr_ms'] / r['ours']['ms']:.0f} %")
        body.append(cells)
    return table(["case", "ours, ms", *[f"{p}, ms" for p in peers], "% of ceiling", "spread"], body)


def notes(document: dict[str, Any]) -> list[str]:
    """What a row holds beyond its times."""
    found = []
    for r in document["rows"]:
        extra = r["extra"]
        if "extra_over_input" in extra:
            size = f"{extra['extra_bytes'] / 2**20:.0f} MiB, {extra['extra_over_input']:.2f} times the input"
            grows = f"; time grows as n^{extra['growth_exponent']:.2f} from 1024" if "growth_exponent" in extra else ""
            found.append(f"- {r['case']}: peak memory beyond the input {size}{grows}.")
    return found


def amount(c: dict[str, Any]) -> str:
    return f"{c['value'] * 1e3:.3g} ms" if c["unit"] == "s" else f"{c['value'] / 1e9:.1f} G{c['unit']}"


def ceilings(documents: list[dict[str, Any]]) -> str:
    """The ceilings of the newest run of this machine; each op's percentages use those in its own file."""
    newest = max(documents, key=lambda d: d["machine"]["date"])["ceilings"]
    rows = [[c["name"], "–" if c["threads"] is None else str(c["threads"]), amount(c)] for c in newest]
    return table(["ceiling", "threads", "measured"], rows) if rows else "No ceilings were measured.\n"


def title(machine: dict[str, Any]) -> str:
    if machine["gpu"]:
        return machine["gpu"]
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"


def facts(document: dict[str, Any]) -> str:
    m = document["machine"]
    backends = sorted({r["backend"] for r in document["rows"]})
    cuda = f", CUDA {m['cuda']}" if m.get("cuda") else ""
    simd = f", {m['simd']}" if m.get("simd") else ""
    return (
        f"torch {m['torch']}{cuda}{simd}, Python {m['python']}, commit {m['commit'][:12]}{'+' * ('+' in m['commit'])}, "
        f"{m['date'][:10]}, backend {', '.join(backends)}."
    )


def section(name: str, documents: list[dict[str, Any]], empty: str) -> list[str]:
    out = [f"## {name}", ""]
    if not any(d["op"] != "ceilings" for d in documents):
        return [*out, empty, ""]
    for machine in dict.fromkeys(title(d["machine"]) for d in documents):
        own = [d for d in documents if title(d["machine"]) == machine]
        out += [f"### {machine}", "", ceilings(own)]
        known = [d["op"] for d in own if d["op"] != "ceilings"]
        for op in sorted(known, key=lambda op: (ORDER.index(op) if op in ORDER else len(ORDER), op)):
            document = next(d for d in own if d["op"] == op)
            out += [f"#### {op}", "", facts(document), "", op_table(document)]
            out += [*notes(document), ""] if notes(document) else []
    return out


def merge_cost(folder: Path) -> list[str]:
    """The section on a whole merge, from merge_cost.json."""
    path = folder / "merge_cost.json"
    if not path.exists():
        return []
    d = json.loads(path.read_text())
    m, r, v = d["machine"], d["resnet50"], d["vit_b"]
    memory, rest = r["memory"], r["rest_s"]
    allowed = memory["before_mb"] + memory["features_mb"] + memory["moments_mb"]
    return [
        "## A whole merge",
        "",
        "```",
        "python benches/merge_cost.py",
        "```",
        "",
        f"Two ResNet-50 (random weights), four batches of 16 at 224x224, {title(m)}, torch {m['torch']}, commit "
        f"{m['commit'][:12]}, {m['date'][:10]}; medians over {r['pairs']} pairs.",
        "",
        table(
            ["", "seconds", "part of the forward passes"],
            [
                ["forward passes of both models", f"{r['forward_s']:.2f}", "100 %"],
                ["moments (the operator)", "", f"{100 * r['moments_of_forward']:.0f} %"],
                [
                    "gathering, all that it takes beyond the forward passes",
                    "",
                    f"{100 * r['gathering_of_forward']:.0f} %",
                ],
                *[[name, f"{value:.2f}", f"{100 * value / r['forward_s']:.1f} %"] for name, value in rest.items()],
                ["planning to writing together", f"{sum(rest.values()):.2f}", f"{100 * r['rest_of_forward']:.1f} %"],
                ["export (torch.export) and check of the second model", f"{r['export_s']:.2f}", ""],
            ],
        ),
        f"Memory: {memory['before_mb']:.0f} MB with models and data loaded, {memory['peak_mb']:.0f} MB at the peak of "
        f"gathering; the features of one batch that are read are {memory['features_mb']:.0f} MB, the moments "
        f"{memory['moments_mb']:.0f} MB (together {allowed:.0f} MB). ViT-B: export {v['export_s']:.2f} s, walk "
        f"{v['walk_s']:.3f} s.",
        "",
    ]


def logme_cost(folder: Path) -> list[str]:
    """The section on a LogME score, from logme_cost.json."""
    path = folder / "logme_cost.json"
    if not path.exists():
        return []
    d = json.loads(path.read_text())
    m, memory, sets = d["machine"], d["memory"], d["label_sets"]
    names = list(d["rows"][0]["ours"])
    rows = []
    for r in d["rows"]:
        outputs = f"{r['outputs']} {'targets' if r['regression'] else 'classes'}"
        cells = [f"{r['n']} x {r['d']}, {outputs}", f"{r['public']:.2f}" if "public" in r else "–"]
        for name in names:
            ratio = f" ({r['ratio'][name]:.1f}x)" if name in r["ratio"] else ""
            cells.append(f"{r['ours'][name]:.3f}{ratio}")
        rows.append(cells)
    return [
        "## A LogME score",
        "",
        "```",
        "ZIPFAST_LOGME=<checkout of github.com/thuml/LogME> python benches/logme_cost.py",
        "```",
        "",
        f"The whole call from float32 features, {title(m)}, torch {m['torch']}, commit {d['commit'][:12]}, "
        f"{m['date'][:10]}; medians over {d['pairs']} pairs, seconds (times faster than the public code, whose score mode "
        "reference gives).",
        "",
        table(["N x D", "public code", *[f"zipfast, {name}" for name in names]], rows),
        f"Twenty label sets on one matrix of 5000 x 1024 (`zipfast.Basis.score_many`): {sets['together_s']:.2f} s, "
        f"{sets['ratio']:.1f}x faster than twenty calls of `zipfast.logme`. Streaming 20 000 x 2048 features "
        f"({memory['features_mb']:.0f} MB) through `zipfast.FeatureStats`, score included, took "
        f"{memory['peak_mb'] - memory['before_mb']:.0f} MB at the peak, whatever the number of samples.",
        "",
    ]


def soup_cost(folder: Path) -> list[str]:
    """The section on averaging files, from soup_cost.json."""
    path = folder / "soup_cost.json"
    if not path.exists():
        return []
    d = json.loads(path.read_text())
    m = d["machine"]
    peers = [name for name in d["rows"][0]["seconds"] if name != "ours"]
    rows = []
    for r in d["rows"]:
        own = r["seconds"]["ours"]
        cells = [f"{r['models']} x {r['dtype']}, {r['input_mb']:.0f} MB", f"{own:.2f}"]
        cells += [f"{r['seconds'][name]:.2f} ({r['seconds'][name] / own:.2f}x)" for name in peers]
        rows.append([*cells, f"{r['peak_mb'] - r['before_mb']:.0f}"])
    return [
        "## A uniform soup of files",
        "",
        "```",
        "python benches/soup_cost.py",
        "```",
        "",
        f"`zipfast.uniform_soup(paths, out=file)` on files in the page cache, {title(m)}, torch {m['torch']}, commit "
        f"{d['commit'][:12]}, {m['date'][:10]}; medians, seconds, and their ratio to ours. The limit reads every byte once "
        "and writes the result once.",
        "",
        table(["input", "ours", *peers, "our memory, MB"], rows),
    ]


def lottery_cost(folder: Path) -> list[str]:
    """The section on a lottery-ticket experiment, from lottery_cost.json."""
    path = folder / "lottery_cost.json"
    if not path.exists():
        return []
    d = json.loads(path.read_text())
    m, names = d["machine"], list(d["seconds"])
    own = names[0]

    def cells(row: dict[str, float]) -> list[str]:
        return [f"{row[own]:.2f}", *(f"{row[n]:.2f} ({row[n] / row[own]:.1f}x)" for n in names[1:])]

    rows = [[str(r["level"]), str(r["alive"]), *cells(r)] for r in d["rows"] if r["level"] % 3 == 0]
    rows.append(["all", "", *cells(d["seconds"])])
    return [
        "## A lottery-ticket experiment",
        "",
        "```",
        "python benches/lottery_cost.py",
        "```",
        "",
        f"{len(d['rows'])} levels of LeNet-300-100 on digits by `zipfast.lottery`, and by a plain torch loop (fused Adam, "
        f"foreach masks) that looks at the same data as often, {title(m)}, torch {m['torch']}, commit "
        f"{d['commit'][:12]}, {m['date'][:10]}; seconds a level, and their ratio to ours.",
        "",
        table(["level", "survivors", *names], rows),
    ]


def whole(folder: Path) -> list[str]:
    """The sections on whole systems."""
    return [*merge_cost(folder), *logme_cost(folder), *soup_cost(folder), *lottery_cost(folder)]


def steps(folder: Path) -> list[str]:
    """What ``make gpu`` ran, from gpu.json; nothing where it met no GPU."""
    path = folder / "gpu.json"
    document = json.loads(path.read_text()) if path.exists() else {}
    if document.get("dry") or not document.get("gpu"):
        return []
    commit = document["commit"]
    rows = [[s["step"], f"{s['seconds']:.0f}", s["status"].splitlines()[0]] for s in document["steps"]]
    return [
        "### Steps of `make gpu`",
        "",
        f"{document['gpu']}, commit {commit[:12]}{'+' * ('+' in commit)}, {document['date']}; "
        f"{sum(s['seconds'] for s in document['steps']):.0f} s of {document['deadline_s']:.0f} s.",
        "",
        table(["step", "seconds", "status"], rows),
    ]


def page(documents: list[dict[str, Any]], systems: list[str] | None = None, ran: list[str] | None = None) -> str:
    gpu = [d for d in documents if d["machine"]["gpu"]]
    cpu = [d for d in documents if not d["machine"]["gpu"]]
    lines = [HEAD, *section("CPU", cpu, "not measured yet"), *(systems or [])]
    lines += [GOALS, "", *goals.lines(goals.evaluate(documents)), *section("GPU", gpu, "not measured yet")]
    lines += ran or []
    return "\n".join(lines).rstrip("\n") + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=results_folder())
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument(
        "--kernels", type=Path, help="the page with the goals between marks (default: docs/kernels.md beside its page)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    options = parser.parse_args()
    documents = load(options.results)
    pages = {options.page: page(documents, whole(options.results), steps(options.results))}
    kernels = options.kernels or (KERNELS if options.page == PAGE else None)
    if kernels is not None:
        pages[kernels] = goals.between(kernels.read_text(), goals.evaluate(documents))
    for path, text in pages.items():
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            print(f"{path} is not what {options.results} says; run python benches/report.py", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
