# SPDX-License-Identifier: Apache-2.0
"""Ranking many models: every kind of candidate and metric, failures that stay alone, a journal that survives a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zipfast
from zipfast import checkpoint, zoo
from zipfast.ranking import metrics as functions
from zipfast.ranking.candidates import load_features
from zipfast.ranking.journal import Ranked
from zipfast.ranking.metrics import FROM_FEATURES, FROM_SUMMARY
from zipfast.ranking.rank import METRICS, Ranking, rank, slug

MLP = {"in_features": 6, "hidden": [8, 5], "out_features": 4}
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(150, 6, generator=DRAW)
Y = (X[:, :3] + 0.3 * torch.randn(150, 3, generator=DRAW)).argmax(1)
BATCHES = [(X[i : i + 64], Y[i : i + 64]) for i in range(0, 150, 64)]


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return zoo.mlp(**MLP).train()


def hidden(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model.get_submodule("3")(torch.relu(model.get_submodule("1")(x))).relu()


def quick(models: Any, batches: Any = BATCHES, **options: Any) -> Ranking:
    return rank(models, batches, **{"bootstrap": 0, **options})


def only(models: Any, batches: Any = BATCHES, **options: Any) -> Ranked:
    """The row of the only candidate, which must have scores."""
    (row,) = quick(models, batches, **options).rows
    assert row.error is None, row.error
    return row


def error(candidate: Any, batches: Any = BATCHES, **options: Any) -> str:
    """What is said of a candidate that fails beside one that does not."""
    found = quick({"bad": candidate, "good": (X, Y)}, batches, **options).rows
    assert [row.name for row in found] == ["good", "bad"] and found[0].scores and not found[1].scores
    assert found[1].error is not None and "\n" not in found[1].error
    return found[1].error


# ------------------------------------------------------------------------------------------------- scores


def test_order_and_scores() -> None:
    views = {"noise": torch.randn(150, 4, generator=DRAW), "some": X[:, :2], "all": X}
    found = quick({name: (x, Y) for name, x in views.items()}, None)
    assert [row.name for row in found.rows] == ["all", "some", "noise"] and found.metric == "logme"
    for row in found.rows:
        assert row.scores == {"logme": pytest.approx(zipfast.logme(views[row.name], Y), rel=1e-12)}
        assert row.scores["logme"] == zipfast.FeatureStats().update(views[row.name], Y).score()
        assert (row.samples, row.features, row.parameters) == (150, views[row.name].shape[1], None)
    lines = str(found).splitlines()
    assert len(lines) >= 4 and lines[1].split()[:2] == ["1", "all"]


def test_every_metric() -> None:
    model = mlp()
    x = hidden(model)
    with torch.no_grad():
        logits = model(X)
    row = only({"net": model}, metrics=METRICS)
    stats = zipfast.FeatureStats().update(x, Y)
    want = {name: stats.score(name) for name in ("logme", *FROM_SUMMARY)}
    want |= {name: function(x, Y) for name, function in FROM_FEATURES.items()}
    want["leep"] = functions.leep(logits.softmax(-1), Y)
    assert list(row.scores) == list(METRICS)  # in the order asked for
    assert row.scores == pytest.approx(want, rel=1e-6)
    assert only({"net": model}, metrics=["knn"]).scores == pytest.approx({"knn": want["knn"]})


def test_labels_of_any_integer_kind() -> None:
    want = only({"net": mlp()}, metrics=["logme", "knn", "leep"]).scores
    for cast in (Tensor.int, Tensor.float, lambda y: y[:, None]):
        batches = [(x, cast(y)) for x, y in BATCHES]
        assert only({"net": mlp()}, batches, metrics=["logme", "knn", "leep"]).scores == want


def test_ignored_labels_are_left_out_of_every_metric() -> None:
    y = Y.clone()
    y[::4] = -1
    batches = [(x, y[i * 64 : i * 64 + 64]) for i, (x, _) in enumerate(BATCHES)]
    kept = [(X[y >= 0], y[y >= 0])]
    want = only({"net": mlp()}, kept, metrics=METRICS).scores
    found = only({"net": mlp()}, batches, metrics=METRICS, ignore_index=-1)
    assert found.scores == pytest.approx(want, rel=1e-6) and found.samples == int((y >= 0).sum())
    saved = only({"saved": (X, y)}, None, ignore_index=-1, metrics=["logme", "gbc"])
    assert saved.scores["logme"] == pytest.approx(zipfast.logme(X, y, ignore_index=-1), rel=1e-12)


def test_regression_and_several_labels() -> None:
    target = torch.stack([X[:, 0] ** 2, X[:, 1]], 1)
    row = only({"net": mlp()}, [(X, target)], task="regression", mode="corrected")
    want = zipfast.logme(hidden(mlp()), target, task="regression", mode="corrected")
    assert row.scores["logme"] == pytest.approx(want, rel=1e-12)
    one = only({"a": (X, X[:, 0] ** 2)}, None, task="regression", bootstrap=10)
    assert one.scores["logme"] == pytest.approx(zipfast.logme(X, X[:, 0] ** 2, task="regression"), rel=1e-9)
    several = only({"a": (X, (X[:, :2] > 0).int())}, None, task="multilabel")
    assert several.scores["logme"] == pytest.approx(zipfast.logme(X, (X[:, :2] > 0).int(), task="multilabel"))


# ------------------------------------------------------------------------------------------------- candidates


def test_kinds_of_models(tmp_path: Path) -> None:
    model = mlp()
    path = tmp_path / "net.safetensors"
    checkpoint.save(path, model.state_dict(), {"factory": "zipfast.zoo:mlp", "factory_args": MLP})
    plain = tmp_path / "net.pt"
    torch.save(zoo.mlp(6, (64, 64), 10).state_dict(), plain)
    kinds = {"module": model, "factory": mlp, "metadata": str(path), "path": path}
    want = zipfast.logme(hidden(model), Y)
    for row in quick(kinds).rows:
        assert row.scores["logme"] == pytest.approx(want, rel=1e-12) and row.how == "input of '5'"
        assert row.parameters == sum(p.numel() for p in model.parameters())
    own = only({"own": "anything"}, load=lambda spec: mlp() if spec == "anything" else nn.Identity())
    assert own.scores["logme"] == pytest.approx(want, rel=1e-12)
    torch.manual_seed(1)
    wide = [(torch.randn(150, 64), Y)]
    names = [row.name for row in quick(["zipfast.zoo:mlp", f"mine=zipfast.zoo:mlp@{plain}"], wide).rows]
    assert sorted(names) == ["mine", "zipfast.zoo:mlp"]


def test_saved_features(tmp_path: Path) -> None:
    x, y = X.numpy(), Y.numpy()
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "b.npz", features=x, labels=y)
    np.savez(tmp_path / "c.npz", x=x, y=y)
    checkpoint.save(tmp_path / "d.safetensors", {"features": X, "labels": Y})
    checkpoint.save(tmp_path / "e.safetensors", {"x": X.half(), "y": Y})
    files = sorted(map(str, tmp_path.iterdir()))
    found = quick([*files], None, labels=y)
    want = zipfast.logme(X, Y)
    assert [row.how for row in found.rows] == ["saved features"] * 5
    assert [row.scores["logme"] for row in found.rows] == pytest.approx([want] * 5, abs=1e-3)
    assert sum(row.scores["logme"] == found.rows[1].scores["logme"] for row in found.rows) == 4  # but the half one
    pairs: dict[str, Any] = {"numpy": (x, y), "lists": (x.tolist(), y.tolist())}
    assert [row.scores["logme"] for row in quick(pairs, None).rows] == pytest.approx([want] * 2)
    assert only({"a": files[0]}, None, labels=Y).origin == files[0]


def test_named_layers_give_one_row_each() -> None:
    model = mlp()
    found = quick({"net": model, "saved": (X, Y)}, layers=["2", "4"], bootstrap=10)
    rows = {row.name: row for row in found.rows}
    assert rows.keys() == {"net:2", "net:4", "saved"}
    with torch.no_grad():
        assert rows["net:2"].scores["logme"] == pytest.approx(zipfast.logme(model[:3](X), Y), rel=1e-9)
    assert rows["net:4"].scores["logme"] == pytest.approx(zipfast.logme(hidden(model), Y), rel=1e-9)
    assert sum(row.first or 0 for row in rows.values()) == pytest.approx(1)


def test_models_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states: list[dict[str, Any]] = [{}, {"layers": ["1"]}, {"layers": ["nine"]}, {"pool": "sum"}, {"classes": 1}]
    for options in states:
        quick({"net": model}, **options)
        assert [m.training for m in model.modules()] == [True, True, False, True, True], options
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_save_features_are_candidates_again(tmp_path: Path) -> None:
    models = {"net": mlp(), "a/b c": mlp(1), "saved": (X, Y)}
    first = quick(models, metrics=["logme", "knn"], save_features=tmp_path / "kept")
    files = {slug(name): tmp_path / "kept" / f"{slug(name)}.safetensors" for name in models}
    assert len(files) == 3 and set((tmp_path / "kept").iterdir()) == set(files.values())
    again = quick({name: str(files[slug(name)]) for name in models}, None, metrics=["logme", "knn"])
    for one, two in zip(first.rows, again.rows):
        assert (one.name, one.features, one.samples) == (two.name, two.features, two.samples)
        assert two.scores == pytest.approx(one.scores, rel=1e-12)
    assert checkpoint.read_metadata(files["net"])["how"] == "input of '5'"
    assert torch.equal(load_features(str(files["net"]))[1], Y)


def test_batches_at_most_and_progress() -> None:
    steps: list[tuple[str, int]] = []
    row = only({"net": mlp()}, max_batches=2, progress=lambda *at: steps.append(at))
    assert row.samples == 128 and steps == [("models", 0), ("batches", 1), ("batches", 2), ("models", 1)]


# ------------------------------------------------------------------------------------------------- failures


def fail(kind: Exception) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        raise kind

    return factory


def test_a_failure_is_one_row(tmp_path: Path) -> None:
    broken = X.clone()
    broken[7, 2] = math.nan
    place = "rank: 'features' must be finite, got 1 NaN or infinite values, the first in row 7, column 2"
    assert error((broken, Y)) == place
    assert error("nowhere.npz") == "rank: no features at nowhere.npz"
    assert error("nowhere.safetensors") == "load_model: no checkpoint at nowhere.safetensors"
    assert "no folder at nowhere" in error("nowhere")
    assert "must have one entry per row of the features (150), got 149" in error((X, Y[:149]))
    assert error(lambda: 3) == "rank: test_a_failure_is_one_row.<locals>.<lambda> must return a torch module, got int"
    assert error(mlp, None) == "rank: 'batches' must be given to score the model 'bad', got none"
    assert "hold at least one batch, got none; can they be read more than once?" in error(mlp, [])
    assert error(mlp, [X]) == "rank: 'batches' must hold labels beside the inputs, got none"
    assert error(fail(RuntimeError("one\n two"))) == "one two"
    assert error(fail(KeyError("weights"))) == "KeyError: 'weights'"  # models are anyone's code
    tokens = nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(8, 2))
    assert error(tokens, [(torch.full((150, 2), 7), Y)]) == "IndexError: index out of range in self"
    with torch.no_grad():
        nans = mlp()
        nans[1].bias[0] = math.nan
    assert "'features' must be finite" in error(nans)
    lone = quick({"a": (X, Y)}, metrics=["leep"]).rows[0]
    assert lone.error == "rank: leep needs a model with a class head, got features only in 'a'"
    assert "- bad " in str(quick({"bad": (broken, Y)}))


def test_files_that_hold_no_features(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", x=X.numpy(), y=Y.numpy())
    whole = (tmp_path / "good.npz").read_bytes()
    np.savez(tmp_path / "other.npz", pixels=X.numpy())
    np.save(tmp_path / "flat.npy", Y.numpy())
    np.save(tmp_path / "bare.npy", X.numpy())
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "text.npz").write_bytes(b"hello")
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "array.npz").write_bytes((tmp_path / "bare.npy").read_bytes())
    (tmp_path / "text.safetensors").write_bytes(b"hello")
    said = {path.name: error(str(path)) for path in tmp_path.iterdir() if path.name != "good.npz"}
    assert said["other.npz"].endswith("must hold an array called features or x, got pixels")
    assert said["flat.npy"] == "rank: 'features' must be [N, D], got shape [150]"
    assert said["bare.npy"].endswith("must hold labels too, got none; pass labels=")
    for name in ("object.npy", "text.npz", "half.npz", "array.npz"):
        assert f"rank: {tmp_path / name} must hold arrays of numbers, got " in said[name]
    assert "text.safetensors" in said["text.safetensors"]


def test_all_must_have_the_same_labels() -> None:
    sentence = "rank: {} must be scored on the same labels as the others, got other ones"
    for y in (Y[:140], 2 - Y, Y.clamp(max=1), Y + 1):
        found = quick({"good": (X, Y), "bad": (X[: len(y)], y), "also": (X, Y)}, None).rows
        assert [row.error for row in found] == [None, None, sentence.format("bad")], y


def test_arguments_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    of, models = f"'metrics' must be of {', '.join(METRICS)}, each once, got", "'models' must"
    pairs, kind = r"'batches' must be batches of \(inputs, labels\), got", "a candidate must be a text, a torch .*, got"
    values: list[tuple[dict[str, Any], str]] = [
        ({"task": "sorting"}, "'task' must be one of classification, regression, multilabel, got 'sorting'"),
        ({"mode": "best"}, "'mode' must be one of reference, corrected, exact, got 'best'"),
        ({"metrics": []}, f"{of} none"),
        ({"metrics": ["logme", "logme"]}, f"{of} logme, logme"),
        ({"metrics": ["accuracy"]}, f"{of} accuracy"),
        ({"metrics": ["lfc"], "task": "regression"}, "'metrics' must be logme for task='regression', got lfc"),
        ({"bootstrap": -1}, "'bootstrap' must be at least 0, .* got -1, 16 and 0.95"),
        ({"shards": 0}, ".* 'shards' at least 1 .* got 0, 0 and 0.95"),
        ({"confidence": 1.0}, ".* 'confidence' between 0 and 1, got 0, 16 and 1.0"),
        ({"models": {}}, f"{models} hold at least one candidate, got none"),
        ({"models": ["a=x", "a=y"]}, f"{models} have names of their own, got 'a' twice; use NAME=SPEC"),
        ({"models": ["x", "x"]}, f"{models} have names of their own, got 'x' twice; use NAME=SPEC"),
    ]
    kinds: list[tuple[dict[str, Any], str]] = [
        ({"models": [mlp()]}, f"{models} be a mapping of names or a list of texts, got a Sequential in a list"),
        ({"models": {"a": 3}}, f"{kind} int for 'a'"),
        ({"models": {"a": (X, Y, Y)}}, f"{kind} tuple for 'a'"),
        ({"batches": X}, f"{pairs} Tensor"),
        ({"batches": {"x": X}}, f"{pairs} dict"),
    ]
    for number, (options, sentence) in enumerate([*values, *kinds]):
        with pytest.raises(ValueError if number < len(values) else TypeError, match=f"^rank: {sentence}$"):
            quick(**{"models": {"a": (X, Y)}, **options})
    monkeypatch.setattr("zipfast.distributed.world_size", lambda: 2)
    one_pass = "rank: 'metrics' must be computable in one pass in a process group, got"
    for name in ("knn", "leep"):
        with pytest.raises(ValueError, match=f"{one_pass} {name}"):
            quick({"a": (X, Y)}, metrics=["logme", name])
    with pytest.raises(ValueError, match="rank: 'save_features' must be None in a process group, got 'kept'"):
        quick({"a": (X, Y)}, save_features="kept")


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for option in ("out", "save_features"):
        with pytest.raises(OSError, match="it is a file; give a folder"):
            quick({"a": fail(AssertionError())}, **{option: tmp_path / "file"})
        with pytest.raises(OSError, match="choose a folder that exists"):
            quick({"a": fail(AssertionError())}, **{option: tmp_path / "no" / "such"})


# ------------------------------------------------------------------------------------------------- journal


class Counted:
    """Factories that count their calls; the one called ``broken`` fails until it is mended."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.mended = False

    def __call__(self, spec: str) -> nn.Module:
        self.calls.append(spec)
        if spec == "broken" and not self.mended:
            raise ValueError("not yet")
        return mlp(len(spec))

    def run(self, out: Path, names: list[str], **options: Any) -> tuple[Ranking, list[str]]:
        """The table, and who was loaded for it."""
        self.calls = []
        options = {"bootstrap": 8, "metrics": ["logme", "knn"], **options}
        return rank(names, BATCHES, out=out, load=self, **options), self.calls


def table(found: Ranking) -> list[dict[str, Any]]:
    """All but how long it took."""
    return [{**vars(row), "seconds": None} for row in found.rows]


def test_finished_models_are_not_scored_again(tmp_path: Path) -> None:
    load = Counted()
    want, calls = load.run(tmp_path / "run", ["a", "bb", "broken"])
    assert calls == ["a", "bb", "broken"] and want.rows[-1].error == "not yet"
    found, calls = load.run(tmp_path / "run", ["a", "bb", "broken"])
    assert calls == ["broken"] and table(found) == table(want)  # only who failed is tried again
    assert [row.seconds for row in found.rows] == [row.seconds for row in want.rows]
    load.mended = True
    found, calls = load.run(tmp_path / "run", ["broken", "cccc", "a", "other=a"])
    assert calls == ["broken", "cccc", "a"]  # another name is another candidate
    fresh, _ = load.run(tmp_path / "fresh", ["broken", "cccc", "a", "other=a"])
    assert table(found) == table(fresh) and all(row.first is not None for row in found.rows)
    assert load.run(tmp_path / "run", ["a", "bb", "broken", "cccc"])[1] == []


def test_modules_are_known_by_their_weights_and_arrays_not_at_all(tmp_path: Path) -> None:
    seen: list[str] = []
    options = {"out": tmp_path / "run", "progress": lambda stage, done: seen.append(stage)}
    for model, batches in ((mlp(0), 3), (mlp(0), 0), (mlp(1), 3)):
        seen.clear()
        quick({"net": model, "saved": (X, Y)}, **options)
        assert seen.count("batches") == batches
    assert quick({"saved": (X[:, :2], Y)}, **options).rows[0].features == 2


@pytest.mark.parametrize("cut", [1, 5, 300])
def test_a_line_that_a_kill_cut_off_is_written_again(tmp_path: Path, cut: int) -> None:
    load = Counted()
    want, _ = load.run(tmp_path / "run", ["a", "bb", "ccc"])
    path = tmp_path / "run" / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    found, calls = load.run(tmp_path / "run", ["a", "bb", "ccc"])
    assert calls == ["ccc"] and table(found) == table(want)
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and all(json.loads(line) for line in lines) and path.read_bytes()[-1:] == b"\n"
    path.write_bytes(whole[:20])  # within the first line
    assert load.run(tmp_path / "run", ["a"])[1] == ["a"]


def test_other_options_are_refused(tmp_path: Path) -> None:
    load = Counted()
    load.run(tmp_path, ["a"])
    other: dict[str, Any] = dict(metrics=["knn"], bootstrap=9, seed=1, pool="mean", max_batches=2, shards=4)
    other |= dict(mode="corrected", confidence=0.9, layers=["1"], classes=9, ignore_index=0, data_name="x")
    for option, value in other.items():
        sentence = f"'out' must be a folder for these options, got one with another '{option.removesuffix('_name')}' "
        with pytest.raises(ValueError, match=rf"rank: {sentence}.*; choose another folder or remove .*journal\.jsonl"):
            load.run(tmp_path, ["a"], **{option: value})
        assert load.calls == []
    assert load.run(tmp_path, ["a"])[1] == []


@pytest.mark.parametrize("text", ["hello\n", "[1]\n", '{"format": "other/1"}\n', "FIRST\n{}\n", "FIRST\nhello\n"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    Counted().run(tmp_path, ["a"])
    path = tmp_path / "journal.jsonl"
    path.write_text(text.replace("FIRST", path.read_text().splitlines()[0]))
    with pytest.raises(ValueError, match=r"journal\.jsonl must be a journal of this version, got another file; remove"):
        Counted().run(tmp_path, ["a"])


def test_a_file_written_anew_is_scored_again(tmp_path: Path) -> None:
    features, labels = torch.randn(60, 4), torch.arange(60) % 2
    spec = str(tmp_path / "lr=0.1.npz")  # an = in the name of a file is no NAME=SPEC
    found = []
    for step in range(3):
        np.savez(spec, x=(features + min(step, 1) * labels[:, None]).numpy(), y=labels.numpy())
        ranking = zipfast.rank([spec], bootstrap=0, out=tmp_path / "out")
        assert [row.name for row in ranking.rows] == [spec]
        found.append(ranking.rows[0].scores["logme"])
    assert found[0] < found[1] == found[2]
