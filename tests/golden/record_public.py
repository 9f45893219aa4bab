# SPDX-License-Identifier: Apache-2.0
"""Inputs by integer formulas, and what the public codes answer to them, recorded in zipit.json and logme.json beside this.

    python tests/golden/record_public.py zipit <checkout of github.com/gstoica27/ZipIt>
    python tests/golden/record_public.py logme <checkout of github.com/thuml/LogME>

Nothing here depends on a random generator: whole numbers, and one rounding where they are divided.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------- ZipIt

KINDS = ("plain", "related", "dead", "ties", "asymmetric")
OPTIONS = [(0.3, 0.125), (1.0, 1.0), (0.5, 0.5), (0.0, 1.0), (1.5, 0.5), (0.3, 0.0)]
SIZES = [(2, 7), (2, 16), (3, 11), (4, 5), (2, 1)]


def whole(features: int, samples: int, seed: int) -> np.ndarray:
    """[features, samples] whole numbers from -500 to 500, of a linear congruential sequence."""
    state, found = 2 * seed + 12345, []
    for _ in range(features * samples):
        state = (state * 1103515245 + 12345) % 2**31
        found.append((state >> 8) % 1001 - 500)
    return np.array(found, dtype=np.int64).reshape(features, samples)


def shared(models: int, size: int, samples: int, seed: int) -> np.ndarray:
    """What the models have in common, in another order in each: [models·size, samples]."""
    base = whole(size, samples, seed)
    return np.concatenate([np.roll(base, 3 * m, axis=0) for m in range(models)])


def activations(kind: str, models: int, size: int, seed: int) -> np.ndarray:
    x = whole(models * size, 60, seed)
    if kind != "plain":
        x = x + 2 * shared(models, size, 60, seed + 1000)
    if kind == "dead":
        x[1::4] = 0
    return x


def covariance(kind: str, models: int, size: int, seed: int) -> torch.Tensor:
    """Biased covariance of whole numbers: one division, so the same bits everywhere."""
    x = activations(kind, models, size, seed)
    total, samples = x.sum(1), x.shape[1]
    return torch.from_numpy((samples * (x @ x.T) - np.outer(total, total)) / samples**2).float()


def metric(kind: str, models: int, size: int, seed: int) -> dict[str, torch.Tensor]:
    """As the matchings take it; ties and asymmetry are of similarities."""
    found = covariance(kind, models, size, seed)
    if kind not in ("ties", "asymmetric"):
        return {"covariance": found}
    std = found.double().diagonal().sqrt()
    sims = found.double() / torch.outer(std, std)
    if kind == "ties":
        return {"cossim": ((sims * 4).round() / 4).float()}
    return {"cossim": (sims + torch.from_numpy(whole(len(sims), len(sims), seed)) / 2000).float()}


def matching_cases() -> list[tuple[str, int, int, int, float, float]]:
    return [
        (kind, models, size, 10 * k + s, *OPTIONS[(k + s + t) % len(OPTIONS)])
        for k, kind in enumerate(KINDS)
        for s, (models, size) in enumerate(SIZES)
        for t in (0, 2, 3)
    ]


def batches(kind: str, size: int, seed: int) -> list[tuple[int, list[torch.Tensor]]]:
    """Features [D, B·9] of two models, three batches of 4, 4 and 2 images, in eighths: exact in float32."""
    found = []
    for part, images in enumerate((4, 4, 2)):
        x = 2 * whole(2 * size, 9 * images, seed + part) + shared(2, size, 9 * images, seed + part + 500)
        x = np.maximum(x, 0) if kind == "relu" else x + 8000 if kind == "large mean" else x
        found.append((images, list((torch.from_numpy(x).float() / 8).split(size))))
    return found


def groups(unmerge: torch.Tensor) -> list[int] | None:
    """Group of each feature; None where features have none."""
    return unmerge.argmax(1).tolist() if bool((unmerge.sum(1) == 1).all()) else None


def through(kind: type, shares: bool, data: list) -> torch.Tensor:
    """A metric over all batches, in the one or the other way."""
    found, images = kind(), sum(size for size, _ in data)
    for size, feats in data:
        found.update(size, *([size / images] if shares else []), *feats)
    return found.finalize() if shares else found.finalize(images)


def signature(call: object) -> list[list[str]]:
    """[name, kind, default] of each parameter."""
    found = inspect.signature(call).parameters.values()
    return [[p.name, p.kind.name, "" if p.default is p.empty else repr(p.default)] for p in found]


MATCHINGS = [f"match_tensors_{name}" for name in ("zipit", "permute", "identity", "optimal", "kmeans")]


def record_zipit(matching: object, metrics: object) -> dict:
    out: dict = {"source": "github.com/gstoica27/ZipIt at 1b6ca40", "zipit": [], "permute": [], "optimal": []}
    for kind, models, size, seed, a, b in matching_cases():
        given, r = metric(kind, models, size, seed), 1 - 1 / models
        out["zipit"].append(groups(matching.match_tensors_zipit(given, r, a, b)[1]))
    for seed, (models, size) in enumerate(SIZES):
        for kind in ("plain", "related", "dead"):
            given, r = {"covariance": covariance(kind, models, size, seed)}, 1 - 1 / models
            _, unmerge, value = matching.match_tensors_permute(given, r, get_merge_value=True)
            out["permute"].append([groups(unmerge), float(value)])
    for seed, size in enumerate((1, 3, 6)):
        given = {"covariance": covariance("related", 2, size, seed)}
        out["optimal"].append(groups(matching.match_tensors_optimal(given)[1]))
    for name in ("CovarianceMetric", "MeanMetric", "CorrelationMetric", "CossimMetric"):
        shares = name in ("CorrelationMetric", "CossimMetric")
        found = through(getattr(metrics, name), shares, batches("plain", 3, 77))
        out[name] = found.double().tolist()
    out["signatures"] = {n: signature(getattr(matching, n)) for n in ("compute_correlation", *MATCHINGS)}
    out["whole way"] = []
    for seed, kind in enumerate(("plain", "relu", "large mean")):
        found = through(metrics.CovarianceMetric, False, batches(kind, 24, 100 * seed))
        out["whole way"].append(groups(matching.match_tensors_zipit({"covariance": found}, 0.5, 0.5, 0.5)[1]))
    return out


# ---------------------------------------------------------------------------------------------------------------- LogME

LOGME = [(60, 7, 3, 1.0), (200, 40, 5, 1.0), (12, 30, 2, 1.0), (30, 30, 3, 1.0), (120, 9, 4, 0.01), (80, 25, 2, 100.0)]


def features(samples: int, size: int, classes: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(samples) % classes
    x = whole(samples, size, samples + size) + 300 * whole(classes, size, size)[labels] // 500
    return x / 500 * scale, labels


def probabilities(samples: int, classes: int, seed: int) -> np.ndarray:
    """[N, C] with rows that sum to 1; the last class has no mass where the seed is odd."""
    x = (whole(samples, classes, seed) + 501) ** 2
    if seed % 2:
        x[:, -1] = 0
    return x / x.sum(1, keepdims=True)


def label_pairs(samples: int, source: int, target: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    x = whole(2, samples, seed) + 500
    y = x[1] % target
    return np.where(x[0] % 3 == 0, x[0] % source, y % source), y


LEEP = [(50, 4, 3, 0), (50, 6, 2, 2), (7, 3, 3, 4), (200, 10, 5, 6)]
NCE = [(50, 4, 3, 0), (100, 10, 4, 1), (9, 2, 2, 2), (300, 40, 7, 3)]


def record_logme(logme: type, leep: object, nce: object) -> dict:
    out: dict = {"source": "github.com/thuml/LogME at 56551ca", "logme": [], "regression": [], "leep": [], "nce": []}
    for case in LOGME:
        x, y = features(*case)
        model = logme()
        out["logme"].append([float(model.fit(x, y)), list(map(float, model.alphas)), model.predict(x[:9]).tolist()])
        model = logme(regression=True)
        targets = np.stack([x[:, 0] + y, x[:, 1] * y], 1)
        out["regression"].append([float(model.fit(x, targets)), model.predict(x[:3]).tolist()])
    for samples, source, target, seed in LEEP:
        y = label_pairs(samples, source, target, seed)[1]
        out["leep"].append(float(leep(probabilities(samples, source, seed), y)))
    for case in NCE:
        out["nce"].append(float(nce(*label_pairs(*case))))
    out["signatures"] = {"LEEP": signature(leep), "NCE": signature(nce), "LogME": signature(logme)}
    out["signatures"] |= {n: signature(getattr(logme, n)) for n in ("fit", "predict", "reset")}
    return out


if __name__ == "__main__":
    which, folder = sys.argv[1:]
    sys.path.insert(0, folder)
    warnings.simplefilter("ignore")
    if which == "zipit":
        import matching_functions
        import metric_calculators

        answers = record_zipit(matching_functions, metric_calculators)
    else:
        from LEEP import LEEP as their_leep
        from LogME import LogME
        from NCE import NCE as their_nce

        answers = record_logme(LogME, their_leep, their_nce)
    (HERE / f"{which}.json").write_text(json.dumps(answers) + "\n", encoding="utf-8")
