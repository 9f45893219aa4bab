# SPDX-License-Identifier: Apache-2.0
"""What stands behind mergekit's methods of zipfast, without mergekit: settings, averages, the passes over whole models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from llamas import answers, llama, near, permuted, save, text

import zipfast
from zipfast import checkpoint, sources, zoo
from zipfast.compat import mergekit, mergekit_recipes
from zipfast.compat.mergekit_recipes import (
    TokenLoss,
    blend_tensors,
    check_checkpoint,
    check_settings,
    choose_soup,
    facts_of,
    load_batches,
    match_models,
)
from zipfast.states import open_state

# mergekit 0.1.5, merge_tensors(x, "linear", parameters={"weight": w, "normalize": n}) on the tensors of `recorded`.
RECORDED = [
    (torch.float32, [1, 2.5, 0.5], True, [0.7321428656578064, -0.8571428060531616, 0.839285671710968, 0.4821428656578064,
     2.1785714626312256, -0.2321428656578064, -0.5892857313156128, 1.1071429252624512]),
    (torch.float32, [1, 2.5, -0.5], False, [-2.6428568363189697, -5.142857074737549, 5.5, -1.9285714626312256,
     8.714285850524902, 2.9285714626312256, -4.5, 6.142857551574707]),
    (torch.bfloat16, [1, 2.5, 0.5], True, [0.73046875, -0.859375, 0.83984375, 0.484375, 2.171875, -0.232421875, -0.5859375,
     1.1015625]),
    (torch.bfloat16, [1, 2.5, -0.5], False, [-2.640625, -5.125, 5.5, -1.921875, 8.6875, 2.921875, -4.5, 6.125]),
]  # fmt: skip


def recorded(dtype: torch.dtype) -> list[torch.Tensor]:
    return [(((torch.arange(8) * 37 + 11 * i) % 23 - 9) / 7 * (i + 1)).to(dtype) for i in range(3)]


@pytest.mark.parametrize(("dtype", "weights", "normalize", "want"), RECORDED, ids=range(len(RECORDED)))
def test_a_tensor_is_averaged_as_mergekit_does(dtype, weights, normalize, want) -> None:
    found = blend_tensors("zipfast_linear", "w", recorded(dtype), weights, ["a", "b", "c"], normalize)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), torch.tensor(want).double(), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_an_average_is_that_of_a_uniform_soup_to_the_bit() -> None:
    states = [{"w": torch.randn(7, 5), "s": torch.randn(())} for _ in range(3)]
    soup = zipfast.uniform_soup(states).state
    for key in ("w", "s"):
        found = blend_tensors("zipfast_linear", key, [s[key] for s in states], [1, 1, 1], ["a", "b", "c"])
        assert torch.equal(found, soup[key])
    strided = [s["w"].T for s in states]
    assert torch.equal(blend_tensors("zipfast_linear", "w", strided, [2, 2, 2], ["a", "b", "c"]), soup["w"].T)


def test_tensors_that_cannot_be_averaged() -> None:
    one, bad = torch.ones(2, 3), torch.ones(2, 3)
    bad[1, 0] = torch.nan
    names = ["model-a", "model-b"]
    with pytest.raises(
        ValueError, match=r"zipfast_linear: all values must be finite, got NaN .* in model-b, tensor 'w' .* 3$"
    ):
        blend_tensors("zipfast_linear", "w", [one, bad], [1, 1], names)
    with pytest.raises(ValueError, match=r"zipfast_linear: w: 'weights' must not add up to 0, got \[1.0, -1.0\]"):
        blend_tensors("zipfast_linear", "w", [one, one], [1, -1], names)
    with pytest.raises(ValueError, match=r"overflow in tensor 'w' at flat index 0; say dtype: float32"):
        blend_tensors("zipfast_linear", "w", [one.half() * 6e4] * 2, [1, 1], names, normalize=False)
    with pytest.raises(TypeError, match=r"zipfast_linear: 'w' must be of floating point, got torch.int64"):
        blend_tensors("zipfast_linear", "w", [one.long()] * 2, [1, 1], names)


def test_settings() -> None:
    assert check_settings("zipfast_linear", None) == {}
    good = {"data": "a.txt", "alpha": 1, "beta": {"*": 0.5}, "skip": ["x"]}
    assert check_settings("zipfast_zipit", good) == {**good, "alpha": 1.0}
    with pytest.raises(ValueError, match="zipfast_linear: what stands under 'zipfast' must be left out, got 'data'"):
        check_settings("zipfast_linear", {"data": "a"})
    with pytest.raises(ValueError, match=r"under 'zipfast' must be one of data, .*, got 'dta'"):
        check_settings("zipfast_zipit", {"dta": "a"})
    with pytest.raises(ValueError, match="zipfast_greedy_soup: 'length' must be int, got 'x'"):
        check_settings("zipfast_greedy_soup", {"length": "x"})
    with pytest.raises(ValueError, match="zipfast_zipit: 'beta' must be float or dict, got True"):
        check_settings("zipfast_zipit", {"beta": True})
    with pytest.raises(ValueError, match="zipfast_zipit: 'zipfast' must be a mapping, got list"):
        check_settings("zipfast_zipit", ["data"])


@pytest.mark.parametrize(
    ("file", "of"), [("tf_model.h5", "TensorFlow"), ("flax_model.msgpack", "Flax"), ("m.gguf", "llama.cpp")]
)
def test_checkpoints_of_other_frameworks(tmp_path: Path, file: str, of: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).touch()
    with pytest.raises(
        ValueError, match=rf"models must be PyTorch checkpoints .* got, in .*, {file} of {of}; save the model"
    ):
        check_checkpoint("zipfast_linear", str(tmp_path))
    with pytest.raises(ValueError, match=f"got, in .*, {file} of {of}"):
        check_checkpoint("zipfast_linear", str(tmp_path / file))
    with pytest.raises(FileNotFoundError, match=f"must hold model.safetensors, .* got {file} of {of}; save"):
        open_state(tmp_path)
    with pytest.raises(ValueError, match=rf"must end in \.safetensors, .* got {file} of {of}; save"):
        open_state(tmp_path / file)
    (tmp_path / "model.safetensors").touch()  # beside one that can be read, others do not matter
    check_checkpoint("zipfast_linear", str(tmp_path))


@pytest.mark.parametrize("path", ["./nothing", "{}/nothing", "some/where/nothing"])
def test_a_path_where_nothing_is(tmp_path: Path, path: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"zipfast_linear: no model at .*nothing"):
        check_checkpoint("zipfast_linear", path.format(tmp_path))
    check_checkpoint("zipfast_linear", "owner/nothing")  # of the hub: mergekit's own to fetch


def test_an_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match=r"must be whole checkpoints, got the adapter .*base\+adapter"):
        check_checkpoint("zipfast_linear", str(tmp_path))


# -------------------------------------------------------------------------------------------------------------- greedy


ARGS = {"in_features": 6, "hidden": [8], "out_features": 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A net, two noisy copies of it and a stranger, with data that it labels; judge.py."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    net, stranger = zoo.mlp(**ARGS), zoo.mlp(**ARGS)
    x = torch.randn(200, 6)
    np.savez(folder / "held.npz", x=x.numpy(), y=net(x).argmax(1).numpy())
    for name, model in (("a", near(net, 1, 0.15)), ("b", near(net, 2, 0.15)), ("c", stranger)):
        checkpoint.save(folder / f"{name}.safetensors", model.state_dict())
    checkpoint.save(folder / "truth.safetensors", net.state_dict())
    (folder / "judge.py").write_text(
        "from zipfast import checkpoint\n"
        "import torch\n"
        "def score(state):\n"
        "    truth = checkpoint.load('truth.safetensors')\n"
        "    return -float(sum((state[k] - v).square().sum() for k, v in truth.items()))\n"
        "def of_module(module):\n"
        "    assert not module.training and not torch.is_grad_enabled()\n"
        "    return score(module.state_dict())\n"
    )
    return folder


def test_a_soup_by_data(files: Path) -> None:
    paths = [str(files / f"{name}.safetensors") for name in "cab"]
    settings = {"data": str(files / "held.npz"), "factory": "zipfast.zoo:mlp", "factory_args": ARGS}
    soup = choose_soup(paths, settings)
    net = zoo.mlp(**ARGS)
    want = zipfast.greedy_soup(paths, zipfast.soups.Evaluator(net, [tuple(_arrays(files / "held.npz"))]))
    assert soup.weights == want.weights
    assert soup.weights[0] == 0  # the stranger
    assert soup.scores == pytest.approx(want.scores)
    facts = facts_of("zipfast_greedy_soup", paths, settings, soup)
    assert json.loads(json.dumps(facts))["soup"]["weights"] == list(soup.weights)


def _arrays(path: Path) -> list[torch.Tensor]:
    with np.load(path) as file:
        return [torch.tensor(file["x"], dtype=torch.float32), torch.tensor(file["y"])]


def test_a_soup_by_a_function(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    monkeypatch.delitem(sys.modules, "judge", raising=False)
    paths = ["c.safetensors", "a.safetensors", "b.safetensors"]
    soup = choose_soup(paths, {"evaluate": "judge:score", "accept": "ge"})
    assert soup.weights == (0, 0.5, 0.5)
    with_module = {"evaluate": "judge:of_module", "factory": "zipfast.zoo:mlp", "factory_args": ARGS}
    assert choose_soup(paths, with_module).weights == (0, 0.5, 0.5)
    assert choose_soup(paths, {"evaluate": "judge:score", "scores": [9.0, 2.0, 1.0]}).weights[0] > 0


def test_soups_that_cannot_be_chosen(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, data = [str(files / "a.safetensors"), str(files / "b.safetensors")], str(files / "held.npz")
    with pytest.raises(ValueError, match="must name either data or evaluate, got neither"):
        choose_soup(paths, {})
    with pytest.raises(ValueError, match="must name either data or evaluate, got both"):
        choose_soup(paths, {"data": data, "evaluate": "judge:score"})
    with pytest.raises(ValueError, match=r"'zipfast: factory' must say what .*a.safetensors belongs to"):
        choose_soup(paths, {"data": data})
    with pytest.raises(
        ValueError, match=r"zipfast_greedy_soup: 'evaluate' must be package.module:function, got 'judge'"
    ):
        choose_soup(paths, {"evaluate": "judge"})
    np.savez(files / "bare.npz", x=np.zeros((4, 6)))
    with pytest.raises(ValueError, match="'data' must hold labels, or the input_ids of a language model, got neither"):
        choose_soup(paths, {"data": str(files / "bare.npz"), "factory": "zipfast.zoo:mlp", "factory_args": ARGS})
    (files / "nothing.py").write_text("def batches():\n    return []\n")
    monkeypatch.syspath_prepend(str(files))
    with pytest.raises(ValueError, match="zipfast_greedy_soup: 'data' must hold at least one batch, got none"):
        choose_soup(paths, {"data": "nothing:batches", "factory": "zipfast.zoo:mlp", "factory_args": ARGS})
    with pytest.raises(ValueError, match=r"'length' must be left out without a .txt file, got 8"):
        choose_soup(paths, {"data": data, "factory": "zipfast.zoo:mlp", "factory_args": ARGS, "length": 8})


# -------------------------------------------------------------------------------------------------------- language models


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("folders")
    model = llama(0)
    save(model, folder / "a")
    save(llama(1), folder / "b")
    save(permuted(model), folder / "p")
    text(folder / "words.txt", 1000, 3)
    return folder


def test_text_is_cut_into_tokens(folders: Path) -> None:
    settings = {"data": str(folders / "words.txt"), "length": 12, "batch_size": 5, "samples": 13}
    batches = load_batches("zipfast_zipit", settings, str(folders / "a"))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(5, 12), (5, 12), (3, 12)]
    words = (folders / "words.txt").read_text().split()[: 13 * 12]
    assert torch.cat([batch["input_ids"].flatten() for batch in batches]).tolist() == [int(w[1:]) for w in words]


def test_text_that_cannot_be_read(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(**settings):
        return load_batches("zipfast_zipit", {"data": str(folders / "words.txt"), **settings}, str(folders / "a"))

    with pytest.raises(ValueError, match=r"words.txt must hold at least 'length' = 2000 tokens, got 1000"):
        read(length=2000)
    with pytest.raises(ValueError, match="zipfast_zipit: 'length' must be at least 2, got 1"):
        read(length=1)
    with pytest.raises(ValueError, match="zipfast_zipit: 'samples' must be at least 1, got 0"):
        read(samples=0)
    with pytest.raises(FileNotFoundError, match=r"zipfast_zipit: no text at .*none.txt"):
        read(data=str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match=r"must hold a tokenizer to read .*words.txt with, got none"):
        load_batches("zipfast_zipit", {"data": str(folders / "words.txt")}, str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r"transformers must be installed to read .*words.txt; pip install transformers"
    ):
        read(length=10)


def test_loss_of_the_next_token(folders: Path) -> None:
    model = llama(0)
    words = torch.randint(31, (4, 9))
    mask = torch.ones_like(words)
    mask[1, 6:] = 0
    score = TokenLoss(model, [{"input_ids": words[:2], "attention_mask": mask[:2]}, {"input_ids": words[2:]}])
    found = score(model.state_dict())
    with torch.no_grad():
        rows = [F.log_softmax(model(words[i : i + 1, : int(mask[i].sum())]).logits[0].double(), -1) for i in range(4)]
    losses = [-rows[i][t, words[i, t + 1]] for i in range(4) for t in range(int(mask[i].sum()) - 1)]
    assert found == pytest.approx(-float(torch.stack(losses).mean()), rel=1e-5)
    with pytest.raises(ValueError, match="'data' must hold sequences of two tokens or more, got none"):
        TokenLoss(model, [{"input_ids": words[:, :1]}])(model.state_dict())


def test_a_soup_of_language_models(folders: Path) -> None:
    paths = [str(folders / name) for name in "ab"]
    settings = {"data": str(folders / "words.txt"), "length": 10, "batch_size": 16}
    soup = choose_soup(paths, settings)
    batches = load_batches("zipfast_greedy_soup", settings, paths[0])
    want = zipfast.greedy_soup(paths, TokenLoss(llama(0), batches))
    assert soup.weights == want.weights and soup.scores == want.scores


def test_a_matching_merges_each_tensor_as_a_whole_merge_does(folders: Path) -> None:
    paths = [str(folders / name) for name in "ab"]
    settings = {"data": str(folders / "words.txt"), "length": 8, "samples": 40, "beta": 0.25}
    found = match_models(paths, settings)
    models = [_load(path) for path in paths]
    batches = load_batches("zipfast_zipit", settings, paths[0])
    whole = zipfast.merge(models, (), batches, example_kwargs={"input_ids": batches[0]["input_ids"]}, beta=0.25)
    states = [model.state_dict() for model in models]
    for key, value in whole.module.state_dict().items():
        assert torch.equal(found.tensor(key, [state[key] for state in states], [1.0, 1.0]), value), key
    key = "model.layers.0.mlp.down_proj.weight"
    shares = found.tensor(key, [state[key] for state in states], [3.0, 1.0])
    assert not torch.equal(shares, whole.module.state_dict()[key])
    assert "spaces matched" in found.summary()
    facts = facts_of("zipfast_zipit", paths, settings, found)
    assert json.loads(json.dumps(facts))["plan"]["spaces"]


def _load(path: str):
    model = sources.load_model(path)
    model.config.use_cache = False
    return model


def test_a_permuted_copy_is_found_again(folders: Path, tmp_path: Path) -> None:
    paths = [str(folders / name) for name in "ap"]
    found = match_models(paths, {"data": str(folders / "words.txt"), "length": 8})
    models = [_load(path) for path in paths]
    states = [model.state_dict() for model in models]
    assert not torch.allclose(states[0]["model.embed_tokens.weight"], states[1]["model.embed_tokens.weight"])
    merged = {key: found.tensor(key, [state[key] for state in states], [1.0, 1.0]) for key in states[0]}
    want = answers(folders / "a")
    save(models[0], tmp_path / "m")
    models[0].load_state_dict(merged)
    models[0].save_pretrained(tmp_path / "m")
    torch.testing.assert_close(answers(tmp_path / "m"), want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_models_that_cannot_be_matched(folders: Path, files: Path, tmp_path: Path) -> None:
    paths, words = [str(folders / name) for name in "ab"], str(folders / "words.txt")
    with pytest.raises(ValueError, match="'zipfast: data' must name the data that features are compared on, got none"):
        match_models(paths, {})
    with pytest.raises(ValueError, match="zipfast_zipit: 'models' must be two or more, got 1"):
        match_models(paths[:1], {"data": words})
    with pytest.raises(ValueError, match=r"'method' must be one of zip, .*, got 'ensemble'"):
        match_models(paths, {"data": words, "method": "ensemble"})
    found = match_models(paths, {"data": words, "length": 8, "samples": 4})
    with pytest.raises(ValueError, match=r"tensor 'other.weight' must be a parameter of the model"):
        found.tensor("other.weight", [torch.ones(2)] * 2, [1, 1])
    with pytest.raises(
        ValueError, match=r"'weight' must be positive for every model, got \[0, 1\] for 'lm_head.weight'"
    ):
        found.tensor("lm_head.weight", [torch.ones(32, 16)] * 2, [0, 1])
    save(llama(2, num_hidden_layers=1), tmp_path / "short")
    with pytest.raises(ValueError, match="models 0 and 1 must have one structure"):
        match_models([paths[0], str(tmp_path / "short")], {"data": words, "length": 8})
    torch.manual_seed(0)
    for name in "xy":
        net = zoo.resnet(1, width=0.25, in_channels=3)
        checkpoint.save(tmp_path / f"{name}.safetensors", net.state_dict())
    np.savez(tmp_path / "images.npz", x=np.zeros((4, 3, 8, 8), dtype=np.float32))
    settings = {
        "data": str(tmp_path / "images.npz"),
        "factory": "zipfast.zoo:resnet",
        "factory_args": {"depth_n": 1, "width": 0.25, "in_channels": 3},
    }
    with pytest.raises(ValueError, match=r"models must be without batch norm, got '.*running_mean'.*use zipfast zip"):
        match_models([str(tmp_path / f"{name}.safetensors") for name in "xy"], settings)


# -------------------------------------------------------------------------------------------------------- mergekit itself


def test_mergekit_is_absent_or_of_another_version(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def absent(name: str) -> str:
        raise mergekit.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(mergekit.importlib.metadata, "version", absent)
    with pytest.raises(
        ImportError, match=r"mergekit 0\.1\.5 must be installed, got none; pip install 'zipfast\[mergekit\]'"
    ):
        mergekit.register()
    assert mergekit.yaml_main(["a", "b"]) == 1
    assert capsys.readouterr().err.startswith(
        "zipfast-mergekit-yaml: mergekit: mergekit 0.1.5 must be installed, got none"
    )
    monkeypatch.setattr(mergekit.importlib.metadata, "version", lambda name: "0.1.4")
    with pytest.raises(ImportError, match=r"mergekit 0\.1\.5 must be installed, got 0\.1\.4; pip install"):
        mergekit.check_version()
    assert mergekit.pytorch_main(["a", "b"]) == 1
    monkeypatch.setattr(mergekit.importlib.metadata, "version", lambda name: "0.1.5+cpu")
    assert mergekit.check_version() == "0.1.5+cpu"


def test_the_scripts_are_announced() -> None:
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    for name, function in (("yaml", "yaml_main"), ("pytorch", "pytorch_main")):
        assert f'zipfast-mergekit-{name} = "zipfast.compat.mergekit:{function}"' in project
        assert callable(getattr(mergekit, function))
    assert set(mergekit_recipes.SETTINGS) == {"zipfast_greedy_soup", "zipfast_zipit"}


# ----------------------------------------------------------------------------------------------------------------- pages


ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples" / "mergekit").glob("*.yml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.stem for example in EXAMPLES])
def test_examples_are_those_of_the_guide(example: Path) -> None:
    yaml = pytest.importorskip("yaml")
    assert f"```yaml\n{example.read_text()}```" in (ROOT / "docs" / "compat" / "mergekit.md").read_text()
    config = yaml.safe_load(example.read_text())
    assert check_settings(config["merge_method"], config.get("zipfast")) == config.get("zipfast", {})
    assert config["merge_method"] in ("zipfast_linear", "zipfast_greedy_soup", "zipfast_zipit")


def test_the_guide_names_every_setting() -> None:
    guide = (ROOT / "docs" / "compat" / "mergekit.md").read_text()
    for settings in mergekit_recipes.SETTINGS.values():
        assert all(f"`{name}`" in guide for name in settings), [name for name in settings if f"`{name}`" not in guide]
    assert len(EXAMPLES) == 4 and all(version in guide for version in mergekit.SUPPORTED)
