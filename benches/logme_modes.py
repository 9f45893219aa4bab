# SPDX-License-Identifier: Apache-2.0
"""The three modes of LogME on cases where they differ; docs/ranking.md holds this table.

``python benches/logme_modes.py`` prints it, ``--write`` puts it into the page.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np

import zipfast

PAGE = Path(__file__).resolve().parents[1] / "docs" / "ranking.md"
BEGIN, END = "<!-- modes: written by benches/logme_modes.py -->", "<!-- end of modes -->"
MODES = ("reference", "corrected", "exact")


def blobs(n: int, d: int, classes: int, noise: float = 3.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Class centres in 8 dimensions, the rest noise; all features are scaled alike."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    centres = rng.normal(size=(classes, 8))
    x = noise * rng.normal(size=(n, d))
    x[:, :8] += 2 * centres[y]
    return x, y


def cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What to fit, by the words of the table."""
    found = {f"the same signal, N = 500, D = {d}": blobs(500, d, 5) for d in (64, 256, 1024, 2048)}
    x, y = blobs(100, 200, 4)
    found["N = 100, D = 200"] = x, y
    found["... padded with 200 columns of 0"] = np.hstack([x, np.zeros_like(x)]), y
    found["... every column twice"] = np.hstack([x, x]), y
    x, y = blobs(1000, 64, 5)
    found["N = 1000, D = 64"] = x, y
    for scale in (100.0, 1e4, 1e-12):
        found[f"... features times {scale:g}"] = x * scale, y
    found["... labels 1 to 5: class 0 is empty"] = x, y + 1
    found["... all features 0"] = 0 * x, y
    found["weak signal, 500 x 450, 20 classes"] = blobs(500, 450, 20, noise=10.0)
    return found


def score(x: np.ndarray, y: np.ndarray, mode: str) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the modes differ is what the table shows
        model = zipfast.LogME(mode=mode)  # type: ignore[arg-type]
        return float(model.fit(x, y))


def table() -> str:
    lines = ["| case | reference | corrected | exact |", "|---|---:|---:|---:|"]
    for name, (x, y) in cases().items():
        values = [score(x, y, mode) for mode in MODES]
        lines.append(f"| {name} | " + " | ".join("nan" if np.isnan(v) else f"{v:.3f}" for v in values) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    found = table()
    if parser.parse_args().write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(before + BEGIN + "\n" + found + "\n" + END + rest.split(END)[1])
    sys.stdout.write(found + "\n")


if __name__ == "__main__":
    main()
