# SPDX-License-Identifier: Apache-2.0
"""What ``zipfast bench`` can measure, and beside whom: targets and peers by name, and whether a peer is here.

Nothing but the standard library is imported, so that a list of them costs nothing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SYSTEMS = {
    "zipit": "a whole merge of two networks",
    "logme": "a LogME score from features, the whole call",
    "soups": "the average of checkpoints on disk",
    "tickets": "iterative magnitude pruning, and training of what is left",
}


ON_HOST = ("soups", "tickets")  # whatever the device


@dataclass(frozen=True)
class Offer:
    """A peer: ``module`` is what is imported, ``package`` what pip calls it; or ``variable`` names a checkout of it.

    ``where``: the targets that it takes part in; none named: all.
    """

    what: str
    where: tuple[str, ...] = ()
    module: str = ""
    package: str = ""
    variable: str = ""
    holds: str = ""  # a file that the checkout must have
    homepage: str = ""

    def how(self) -> str:
        """What a user does to have it take part."""
        if self.variable:
            return f"set {self.variable} to a checkout of {self.homepage}"
        return f"pip install {self.package}"


PEERS = {
    "torch": Offer("the same with torch's own operators, and ours in pure torch", (), "torch", "torch"),
    "torch.cov": Offer("torch.cov on the features as rows", ("moments",), "torch", "torch"),
    "torch.nn.utils.prune": Offer(
        "torch's pruning of modules", ("threshold", "tickets"), "torch.nn.utils.prune", "torch"
    ),
    "numpy": Offer(
        "the formula as it is usually written",
        ("correlate", "evidence", "gram", "moments", "threshold", "logme"),
        "numpy",
        "numpy",
    ),
    "scipy": Offer(
        "hierarchical clustering, scalar search, CSR products",
        ("evidence", "sparse_linear", "zip_match"),
        "scipy",
        "scipy",
    ),
    "fastcluster": Offer("hierarchical clustering", ("zip_match",), "fastcluster", "fastcluster"),
    "scikit-learn": Offer("agglomerative clustering, BayesianRidge", ("zip_match", "logme"), "sklearn", "scikit-learn"),
    "networkx": Offer("matching of maximal weight", ("zip_match",), "networkx", "networkx"),
    "mergekit": Offer("mergekit-pytorch, method linear", ("soups",), "mergekit", "mergekit"),
    "transformer-ranker": Offer("its LogME", ("logme",), "transformer_ranker", "transformer-ranker"),
    "SparseLab": Offer(
        "products and training with its sparse layer", ("sparse_linear", "tickets"), "sparselab", "sparselab"
    ),
    "timm": Offer(
        "avg_checkpoints.py",
        ("soups",),
        "timm",
        "timm",
        "ZIPFAST_TIMM",
        "avg_checkpoints.py",
        "github.com/huggingface/pytorch-image-models",
    ),
    "ZipIt": Offer(
        "the authors' code",
        ("moments", "zip_match", "zipit"),
        "",
        "",
        "ZIPFAST_ZIPIT",
        "matching_functions.py",
        "github.com/gstoica27/ZipIt",
    ),
    "LogME": Offer(
        "the authors' code", ("logme",), "numba", "numba", "ZIPFAST_LOGME", "LogME.py", "github.com/thuml/LogME"
    ),
}


def ops() -> list[str]:
    """The ops that have a bench here."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def targets() -> dict[str, str]:
    """Name -> "op" or "system", in the order in which they run."""
    return dict.fromkeys(ops(), "op") | dict.fromkeys(SYSTEMS, "system")


def taking_part(target: str, names: list[str]) -> list[str]:
    """Those of the peers that have a case in a target."""
    return [name for name in names if not PEERS[name].where or target in PEERS[name].where]


def missing(name: str) -> str | None:
    """Why a peer cannot take part here, and what to do; None where it seems to be here (it is not imported)."""
    offer = PEERS[name]
    if offer.variable:
        folder = os.environ.get(offer.variable)
        if not folder:
            return f"not named: {offer.how()}"
        if not (Path(folder) / offer.holds).is_file():
            return f"{offer.variable} is {folder}, which has no {offer.holds}"
    if offer.module:
        try:
            found = importlib.util.find_spec(offer.module) is not None
        except ImportError:  # of a parent package
            found = False
        if not found:
            return f"not installed: pip install {offer.package}"
    return None


def version(name: str) -> str:
    """Of a peer that is here: its package's version, or the checkout that was named."""
    offer = PEERS[name]
    if offer.variable and not offer.package:
        return "a checkout"
    try:
        found = importlib.metadata.version(offer.package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
    if offer.package == name or not offer.variable:
        return found
    return f"a checkout, with {offer.package} {found}"
