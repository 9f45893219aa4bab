# SPDX-License-Identifier: Apache-2.0
"""Features in memory by a model's name: folders, the hub, timm; what is refused, and with which words."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import zipfast
from zipfast import features_of, zoo
from zipfast.integrations import timm as timm_models
from zipfast.ranking import load_candidate

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
BATCHES = [(X[:20], Y[:20]), (X[20:], Y[20:])]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return zoo.mlp(4, [6, 5], 2)


def test_all_batches_at_once(tmp_path: Path) -> None:
    model, seen = net(), list[int]()
    found = features_of(model, BATCHES, progress=lambda _, done: seen.append(done))
    with torch.no_grad():
        torch.testing.assert_close(found.features, model[:-1](X))
    assert found.labels is not None and torch.equal(found.labels, Y) and found.how == "input of '5'" and seen == [1, 2]
    found.save(tmp_path / "net.safetensors")
    ranking = zipfast.rank({"net": model, "saved": str(tmp_path / "net.safetensors")}, BATCHES)
    scores = {row.name: row.scores["logme"] for row in ranking.rows}
    assert scores["net"] == pytest.approx(scores["saved"]) == pytest.approx(zipfast.logme(found.features, Y))


def test_layers_and_a_part_of_the_data() -> None:
    found = features_of(net(), BATCHES, layers=["1", "3"], max_batches=1)
    assert {name: tuple(x.shape) for name, x in found.layers.items()} == {"1": (20, 6), "3": (20, 5)}
    with pytest.raises(ValueError, match=r"Features.features: there must be one layer, got 1, 3; see .layers"):
        _ = found.features
    assert features_of(net(), [X]).labels is None


def test_models_by_name(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 3}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=20)).eval()
    model.save_pretrained(tmp_path / "bert")
    batches = [{"input_ids": torch.arange(10).reshape(2, 5), "labels": torch.tensor([0, 1])}]
    want = features_of(model, batches)
    found = features_of(str(tmp_path / "bert"), batches)
    assert torch.equal(found.features, want.features) and found.labels is not None and found.labels.tolist() == [0, 1]
    args = {"in_features": 4, "hidden": [5], "out_features": 2}
    assert features_of("zipfast.zoo:mlp", BATCHES, factory_args=args).features.shape == (30, 5)


def test_revisions_and_the_cache_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import huggingface_hub

    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[6], depths=[1], layer_type="basic", num_labels=2)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "net")
    asked: list[dict[str, Any]] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append(options)
        if options.get("local_files_only") and name == "owner/new":
            raise OSError("Cannot find an appropriate cached snapshot folder for the specified revision")
        return str(tmp_path / "net")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    images = [torch.zeros(2, 3, 16, 16)]
    found = features_of("owner/net", images, revision="v1", local_files_only=True)
    assert found.features.shape == (2, 6)
    assert asked[-1]["revision"] == "v1" and asked[-1]["local_files_only"] is True
    features_of("owner/net", images)
    assert set(asked[-1]) == {"allow_patterns"}
    with pytest.raises(ValueError, match=r"got 'owner/new' \(Cannot find an appropriate cached snapshot folder"):
        features_of("owner/new", images, local_files_only=True)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="features_of: 'batches' must hold at least one batch, got none"):
        features_of(net(), [])
    with pytest.raises(ValueError, match="features_of: all batches must have labels, or none, got 1 of 2"):
        features_of(net(), [X, (X, Y)])
    with pytest.raises(ValueError, match="features_of: 'max_batches' must be at least 1 or None, got 0"):
        features_of(net(), BATCHES, max_batches=0)
    with pytest.raises(ValueError, match="options for loading and 'device' must be left out with a module, got some"):
        features_of(net(), BATCHES, revision="main")
    with pytest.raises(
        ValueError, match=r"load_candidate: 'revision' must be left out for '.*': it is read from the disk"
    ):
        features_of(str(tmp_path), BATCHES, revision="main")
    with pytest.raises(
        ValueError, match=r"'local_files_only' must be left out for 'timm:a': .* or set HF_HUB_OFFLINE=1"
    ):
        load_candidate("timm:a", local_files_only=True)
    with pytest.raises(FileNotFoundError, match="load_model: no folder at"):
        features_of(str(tmp_path / "none"), BATCHES)


# ----------------------------------------------------------------------------------------------------------------- timm


def test_unsupported_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(__version__="0.6.13"))
    wanted = (
        r"load_candidate: timm must be of version 0.9 or later and below 2, got 0.6.13; pip install '.*' torchvision$"
    )
    with pytest.raises(ImportError, match=wanted):
        timm_models.load("resnet18")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    monkeypatch.setattr(transformers, "__version__", "4.2.1")
    with pytest.raises(
        ImportError, match=r"load_model: transformers must be of version 4.40 or later and below 6, got 4.2.1"
    ):
        features_of(str(tmp_path), BATCHES)


def test_names_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def create(name: str, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        return net()

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create, __version__="1.0.31"))
    assert not timm_models.load("resnet18").training and features_of("timm:resnet18", BATCHES).features.shape == (30, 5)
    timm_models.load("timm:resnet18")
    assert asked == [("resnet18", True)] * 3


def test_how_images_are_prepared() -> None:
    model = net()
    config = {"input_size": (1, 28, 28), "mean": (0.5,), "std": np.array([0.25])}
    for kind in (dict, SimpleNamespace):  # a class of its own in timm
        model.pretrained_cfg = kind(**config)  # type: ignore[assignment]
        options = timm_models.data_options(model)
        assert options == {"image_size": 28, "mean": [0.5], "std": [0.25], "grayscale": True}
    model.pretrained_cfg = {**config, "input_size": (1, 28, 30)}  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"images must be square, .* got 1 x 28 x 30 with 1 means"):
        timm_models.data_options(model)
    with pytest.raises(
        ValueError, match=r"'model' must have timm's pretrained_cfg, got a Sequential without input_size"
    ):
        timm_models.data_options(net())


#: of timm 1.0.31, run once with the names of torchvision that it imports filled by empty modules: the width of the
#: pre-logits, for which head(features) was equal to the logits to the bit
WIDTHS = {"resnet18": 512, "convnext_atto": 320, "mobilenetv3_small_050": 1024, "tiny_vit_5m_224": 320}


@pytest.mark.parametrize("name", list(WIDTHS))
def test_timm_itself(name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed (it needs torchvision)")
    model = timm.create_model(name, pretrained=False, num_classes=7).eval()
    options = timm_models.data_options(model)
    x = torch.randn(2, 3, options["image_size"], options["image_size"])
    found = features_of(model, [x])
    assert found.features.shape == (2, WIDTHS[name])
    with torch.no_grad():
        torch.testing.assert_close(model.get_classifier()(found.features), model(x), rtol=1e-5, atol=1e-5)
