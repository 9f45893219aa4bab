# SPDX-License-Identifier: Apache-2.0
"""Real merges through mergekit's own commands, with the methods of zipfast.

They need mergekit 0.1.5, which pins much; ``python tests/check/mergekit_env.py`` makes an environment for it and runs them.
What needs no mergekit is in test_mergekit_recipes.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llamas import answers, copy_folder, llama, near, permuted, save, text
from safetensors.torch import load_file, save_file

import zipfast
from zipfast import zoo

ROOT = Path(__file__).resolve().parents[2]
stock = pytest.importorskip("mergekit", reason="mergekit is not installed; see tests/check/mergekit_env.py")
yaml = pytest.importorskip("yaml")

from zipfast.compat import mergekit  # noqa: E402

# mergekit's model card asks the network about a path with fewer than two slashes.
HERE = "././model-"
ARGS = {"in_features": 6, "hidden": [8], "out_features": 3}
JUDGE = '''
import torch
from zipfast import checkpoint

def agreement(model):
    """How near the model's answers are to those of the truth."""
    words = torch.arange(24).view(3, 8)
    return -float((model(words).logits.double() - torch.load("truth.pt", weights_only=True)).square().mean())

def score(state):
    truth = checkpoint.load("truth.safetensors")
    return -float(sum((state[k] - v).square().sum() for k, v in truth.items()))
'''


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    names = mergekit.register()
    assert names == ("zipfast_linear", "zipfast_greedy_soup", "zipfast_zipit")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llamas: a and b near a truth, c far away, p: a with permuted features; nets in files; texts; judge.py."""
    folder = tmp_path_factory.mktemp("shelf")
    truth = llama(0)
    with torch.no_grad():
        torch.save(truth(torch.arange(24).view(3, 8)).logits.double(), folder / "truth.pt")
    models = {"a": near(truth, 1, 0.05), "b": near(truth, 2, 0.05), "c": llama(5)}
    models["p"] = permuted(models["a"])
    for name, model in models.items():
        save(model, folder / f"model-{name}")
    text(folder / "held-out.txt", 400, 1)
    text(folder / "calibration.txt", 2000, 2)
    (folder / "judge.py").write_text(JUDGE)
    torch.manual_seed(0)
    net = zoo.mlp(**ARGS)
    for name, one in (
        ("truth", net),
        ("run-1", near(net, 1, 0.1)),
        ("run-2", near(net, 2, 0.1)),
        ("far", zoo.mlp(**ARGS)),
    ):
        save_file(one.state_dict(), folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def kitchen(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder with links to all that, as the current one."""
    for file in shelf.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "judge", raising=False)
    return tmp_path


def run(config: dict, out: str, *flags: str, script=None) -> int:
    """Exit status of the console script on this config."""
    Path("config.yml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as end:
        (script or mergekit.yaml_main)(["config.yml", out, "--quiet", *flags])
    return int(end.value.code or 0)


def models(*names: str, **parameters) -> list[dict]:
    return [
        {"model": f"{HERE}{name}", "parameters": dict(parameters)} if parameters else {"model": f"{HERE}{name}"}
        for name in names
    ]


def tensors(folder: str) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(Path(folder).glob("*.safetensors")) for key, value in load_file(file).items()}


# ---------------------------------------------------------------------------------------------------------------- linear


@pytest.mark.parametrize(
    ("extra", "weight", "ulps"),
    [
        ({}, 1.0, 2),
        ({}, [0.2, 3.0], 2),
        ({}, [{"filter": "mlp", "value": [0, 1]}, {"value": 0.25}], 2),
        ({"parameters": {"normalize": False}}, 0.5, 2),
        ({"dtype": "bfloat16"}, 0.7, 1),
        ({"dtype": "float32", "out_dtype": "float16"}, 0.7, 1),
        ({"base_model": HERE + "a"}, 0.7, 2),
    ],
    ids=["plain", "gradient", "filter", "sum", "bfloat16", "out_dtype", "base"],
)
def test_linear_is_mergekits_linear_within_rounding(kitchen: Path, extra: dict, weight, ulps: int) -> None:
    inputs = [
        {"model": HERE + "a", "parameters": {"weight": 1}},
        {"model": HERE + "c", "parameters": {"weight": weight}},
    ]
    for method in ("linear", "zipfast_linear"):
        assert run({"merge_method": method, "models": inputs, **extra}, method) == 0
    want, found = tensors("linear"), tensors("zipfast_linear")
    assert found.keys() == want.keys() and len(found) == 21
    for key, value in want.items():
        assert found[key].dtype is value.dtype
        eps = ulps * torch.finfo(value.dtype).eps
        torch.testing.assert_close(found[key].double(), value.double(), rtol=eps, atol=2e-7, msg=key)
    assert not torch.equal(found["lm_head.weight"].float(), tensors("model-a")["lm_head.weight"])


def test_linear_is_a_uniform_soup_to_the_bit_and_a_whole_model(kitchen: Path) -> None:
    assert (
        run(
            {"merge_method": "zipfast_linear", "models": models("a", "b", "c", weight=1)},
            "out",
            "--out-shard-size",
            "9000",
        )
        == 0
    )
    soup = zipfast.uniform_soup(["model-a", "model-b", "model-c"]).state
    found = tensors("out")
    assert all(torch.equal(found[key], value) for key, value in soup.items()) and found.keys() == soup.keys()
    names = {file.name for file in Path("out").iterdir()}
    assert {
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
        "README.md",
        "mergekit_config.yml",
    } <= names
    assert len([name for name in names if name.startswith("model-0")]) > 1
    assert "[Linear (zipfast)](https://arxiv.org/abs/2203.05482)" in Path("out/README.md").read_text()
    assert answers(Path("out")).isfinite().all()


def test_slices_and_tokenizers_stay_mergekits(kitchen: Path) -> None:
    sources = [{"model": f"{HERE}{name}", "layer_range": [0, 1], "parameters": {"weight": 1}} for name in "ab"]
    config = {
        "merge_method": "zipfast_linear",
        "slices": [{"sources": sources}, {"sources": sources}, {"sources": sources}],
    }
    assert run({**config, "tokenizer_source": "union"}, "out") == 0
    found, one, two = tensors("out"), tensors("model-a"), tensors("model-b")
    key = "self_attn.q_proj.weight"
    mean = (one[f"model.layers.0.{key}"] + two[f"model.layers.0.{key}"]) / 2
    for layer in range(3):
        torch.testing.assert_close(found[f"model.layers.{layer}.{key}"], mean)
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 3


def test_other_methods_are_mergekits_own(kitchen: Path) -> None:
    config = {"merge_method": "slerp", "base_model": HERE + "a", "models": models("a", "c"), "parameters": {"t": 0.25}}
    assert run(config, "out") == 0
    subprocess.run([sys.executable, "-m", "mergekit.scripts.run_yaml", "config.yml", "stock", "--quiet"], check=True)
    found, want = tensors("out"), tensors("stock")
    assert all(torch.equal(found[key], want[key]) for key in want)
    assert not Path("out/zipfast.json").exists()


def test_state_dicts_in_memory() -> None:
    from mergekit.merge_methods import merge_state_dicts

    states = [{"w": torch.randn(3, 4), "n": torch.tensor(3)} for _ in range(2)]
    found = merge_state_dicts(states, "zipfast_linear", parameters={"weight": [1.0, 3.0]})
    torch.testing.assert_close(found["w"], states[0]["w"] / 4 + states[1]["w"] * 0.75)
    with pytest.raises(
        RuntimeError, match="zipfast_greedy_soup: whole models must be looked at before tensors are merged"
    ):
        merge_state_dicts(states, "zipfast_greedy_soup")


# ---------------------------------------------------------------------------------------------------------------- greedy


def test_greedy_soup_keeps_the_better(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "merge_method": "zipfast_greedy_soup",
        "models": models("c", "a", "b"),
        "zipfast": {"evaluate": "judge:agreement"},
    }
    assert run(config, "out") == 0
    facts = json.loads(Path("out/zipfast.json").read_text())
    assert facts["soup"]["weights"] == [0, 0.5, 0.5]
    assert facts["soup"]["score"] > max(facts["soup"]["scores"])
    assert facts["models"] == [HERE + "c", HERE + "a", HERE + "b"]
    want, found = zipfast.uniform_soup(["model-a", "model-b"]).state, tensors("out")
    assert all(torch.equal(found[key], value) for key, value in want.items())
    assert "[Greedy soup (zipfast)]" in Path("out/README.md").read_text()
    assert "+    " not in capsys.readouterr().err  # --quiet


def test_greedy_soup_by_text_is_that_of_zipfast(kitchen: Path) -> None:
    from zipfast.compat.mergekit_recipes import TokenLoss, load_batches

    settings = {"data": "held-out.txt", "length": 10}
    config = {
        "merge_method": "zipfast_greedy_soup",
        "models": models("a", "b", "c"),
        "zipfast": {**settings, "accept": "ge"},
    }
    assert run(config, "out") == 0
    batches = load_batches("greedy", settings, "model-a")
    soup = zipfast.greedy_soup(["model-a", "model-b", "model-c"], TokenLoss(llama(0), batches), accept="ge")
    assert json.loads(Path("out/zipfast.json").read_text())["soup"]["weights"] == list(soup.weights)
    found = tensors("out")
    assert all(torch.equal(found[key], value) for key, value in soup.state.items())


# ----------------------------------------------------------------------------------------------------------------- zipit


def test_zipit_of_permuted_copies_recovers_the_function(kitchen: Path) -> None:
    config = {
        "merge_method": "zipfast_zipit",
        "models": models("a", "p"),
        "zipfast": {"data": "calibration.txt", "length": 16},
    }
    assert run(config, "out") == 0
    want = answers(Path("model-a"))
    torch.testing.assert_close(answers(Path("out")), want, rtol=0, atol=1e-4 * float(want.abs().max()))
    assert run({"merge_method": "zipfast_linear", "models": models("a", "p", weight=1)}, "average") == 0
    assert float((answers(Path("average")) - want).abs().max()) > 0.3 * float(want.abs().max())  # what matching is for
    assert run({**config, "dtype": "bfloat16", "out_dtype": "float16"}, "half") == 0
    assert {value.dtype for value in tensors("half").values()} == {torch.float16}
    torch.testing.assert_close(answers(Path("half")), want, rtol=0, atol=0.1 * float(want.abs().max()))
    facts = json.loads(Path("out/zipfast.json").read_text())
    assert facts["settings"]["data"] == "calibration.txt" and facts["plan"]["spaces"]


def test_tied_models_stay_tied(kitchen: Path) -> None:
    tied = llama(11, tie_word_embeddings=True)
    save(tied, Path("model-t"))
    save(permuted(tied), Path("model-q"))
    assert "lm_head.weight" not in tensors("model-t")
    config = {**ZIPIT, "models": models("t", "q")}
    assert run(config, "out") == 0
    want = answers(Path("model-t"))
    torch.testing.assert_close(answers(Path("out")), want, rtol=0, atol=1e-4 * float(want.abs().max()))
    assert run({**GREEDY, "models": models("q", "t")}, "greedy") == 0
    for method in ("linear", "zipfast_linear"):
        assert run({"merge_method": method, "models": models("t", "q", weight=1)}, method) == 0
    assert tensors("linear").keys() == tensors("zipfast_linear").keys()
    assert json.loads(Path("zipfast_linear/config.json").read_text())["tie_word_embeddings"] is True


def test_zipit_is_zipfast_merge_to_the_bit(kitchen: Path) -> None:
    from zipfast.compat.mergekit_recipes import load_batches
    from zipfast.sources import load_model

    settings = {"data": "calibration.txt", "length": 16, "samples": 40}
    config = {"merge_method": "zipfast_zipit", "models": models("a", "c"), "zipfast": {**settings, "beta": 0.25}}
    assert run(config, "out") == 0
    nets = [load_model("model-a"), load_model("model-c")]
    for net in nets:
        net.config.use_cache = False
    batches = load_batches("zipit", settings, "model-a")
    merged = zipfast.merge(nets, (), batches, example_kwargs={"input_ids": batches[0]["input_ids"][:2]}, beta=0.25)
    found = tensors("out")
    assert all(torch.equal(found[key], value) for key, value in merged.state_dict.items())
    shares = [{"model": HERE + "a", "parameters": {"weight": [1, 2]}}, {"model": HERE + "c"}]
    assert run({**config, "models": shares}, "shared") == 0
    other = tensors("shared")
    differ = {key for key in found if not torch.equal(found[key], other[key])}
    assert "model.layers.1.mlp.up_proj.weight" in differ and "model.layers.0.mlp.up_proj.weight" not in differ


# ------------------------------------------------------------------------------------------------------- mergekit-pytorch


def test_raw_files(kitchen: Path) -> None:
    files = [{"model": f"{name}.safetensors", "parameters": {"weight": 1}} for name in ("run-1", "run-2", "far")]
    main = mergekit.pytorch_main
    assert run({"merge_method": "zipfast_linear", "models": files}, "linear", script=main) == 0
    want = zipfast.uniform_soup([one["model"] for one in files]).state
    assert all(torch.equal(tensors("linear")[key], value) for key, value in want.items())
    config = {"merge_method": "zipfast_greedy_soup", "models": files, "zipfast": {"evaluate": "judge:score"}}
    assert run(config, "greedy", script=main) == 0
    want = zipfast.uniform_soup(["run-1.safetensors", "run-2.safetensors"]).state
    assert all(torch.equal(tensors("greedy")[key], value) for key, value in want.items())
    import numpy as np

    np.savez("x.npz", x=np.random.default_rng(0).standard_normal((64, 6)))
    settings = {"data": "x.npz", "factory": "zipfast.zoo:mlp", "factory_args": ARGS}
    assert run({"merge_method": "zipfast_zipit", "models": files[:2], "zipfast": settings}, "zipit", script=main) == 0
    assert tensors("zipit").keys() == want.keys()


def test_the_installed_scripts(kitchen: Path) -> None:
    """As a user's shell would start them, with mergekit's own flags."""
    Path("config.yml").write_text(
        yaml.safe_dump({"merge_method": "zipfast_linear", "models": models("a", "b", weight=1)})
    )
    code = "import sys; from zipfast.compat.mergekit import {} as main; sys.exit(main())"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-c", code.format("yaml_main")]
    subprocess.run(
        [*start, "config.yml", "out", "-j", "1", "--no-copy-tokenizer", "--lazy-unpickle"], check=True, env=env
    )
    assert not Path("out/tokenizer.json").exists() and Path("out/model.safetensors").exists()
    told = subprocess.run([*start, "--help"], check=True, capture_output=True, text=True, env=env).stdout
    assert "zipfast-mergekit-yaml [OPTIONS] CONFIG_FILE OUT_PATH" in told and "--out-shard-size" in told
    assert "zipfast_zipit" in told
    start = [sys.executable, "-c", code.format("pytorch_main")]
    told = subprocess.run([*start, "--help"], check=True, capture_output=True, text=True, env=env).stdout
    assert "zipfast-mergekit-pytorch" in told and "--tensor-union" in told


# ------------------------------------------------------------------------------------------------------------- bad input


def test_registered_twice() -> None:
    with pytest.raises(
        ValueError, match="register: 'zipfast_linear' must be registered once, but mergekit has it already"
    ):
        mergekit.register()


def test_a_tensor_that_a_model_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit.merge_methods import merge_tensors

    from zipfast.compat.mergekit_methods import FOUND
    from zipfast.compat.mergekit_recipes import Matching

    monkeypatch.setitem(FOUND, "zipfast_zipit", (("a", "b"), Matching(None, {}, "")))
    with pytest.raises(ValueError, match="zipfast_zipit: tensor 'w' must be in every model, got none in b"):
        merge_tensors([torch.ones(2)], "zipfast_zipit", ids=["a"], name="w")


ZIPIT = {"merge_method": "zipfast_zipit", "zipfast": {"data": "calibration.txt", "length": 16}}
GREEDY = {"merge_method": "zipfast_greedy_soup", "zipfast": {"data": "held-out.txt", "length": 16}}
SOURCES = [{"sources": [{"model": HERE + "a", "layer_range": [0, 2]}, {"model": HERE + "b", "layer_range": [0, 2]}]}]
BAD = {
    "nan": ({"merge_method": "zipfast_linear", "models": models("a", "nan", weight=1)},
            r"all values must be finite, got NaN or infinity in ././model-nan, tensor 'model.norm.weight' at flat index 3"),
    "sum 0": ({"merge_method": "zipfast_linear", "models": [*models("a", weight=1), *models("b", weight=-1)]},
              r"'weights' must not add up to 0"),
    "setting": ({"merge_method": "zipfast_linear", "models": models("a", weight=1), "zipfast": {"data": "x"}},
                r"zipfast_linear: what stands under 'zipfast' must be left out, got 'data'"),
    "not ours": ({"merge_method": "linear", "models": models("a", weight=1), "zipfast": {"data": "x"}},
                 r"linear: what stands under 'zipfast' must be left out, got 'data'"),
    "no data": ({"merge_method": "zipfast_zipit", "models": models("a", "b")}, r"zipfast_zipit: 'zipfast: data' must name"),
    "neither": ({"merge_method": "zipfast_greedy_soup", "models": models("a", "b")}, r"data or evaluate, got neither"),
    "slices": ({**ZIPIT, "slices": SOURCES}, r"zipfast_zipit: the config must list 'models', .* got 'slices'"),
    "base": ({**ZIPIT, "models": models("a", "b"), "base_model": HERE + "c"},
             r"'base_model' must be one of the models, got ././model-c; list it"),
    "tokenizer": ({**GREEDY, "models": models("a", "b"), "tokenizer_source": "union"}, r"models must share a tokenizer"),
    "framework": ({"merge_method": "zipfast_linear", "models": models("a", "flax", weight=1)},
                  r"models must be PyTorch checkpoints .* got, in ././model-flax, flax_model.msgpack of Flax; save"),
    "adapter": ({**GREEDY, "models": models("a", "adapter")}, r"whole checkpoints, got the adapter ././model-adapter"),
    "method": ({"merge_method": "zipfast_zipit2", "models": models("a", "b")}, r"Unimplemented merge method zipfast_zipit2"),
    "layers": ({**ZIPIT, "models": models("a", "short")}, r"models 0 and 1 must have one structure"),
    "share": ({**ZIPIT, "models": [*models("a", weight=0), *models("b")]}, r"'weight' must be positive for every model"),
    "absent": ({"merge_method": "zipfast_linear", "models": models("nope", weight=1)}, r"no model at ././model-nope"),
    "names": ({"merge_method": "zipfast_linear", "models": models("vit", weight=1)}, r"must be of an architecture whose "
        r"tensors mergekit finds all, but it left out 'vit.encoder.*and 15 more weights of layers; use zipfast zip"),
    "no models": ({"merge_method": "zipfast_linear"}, r"Exactly one of 'models', 'slices', or 'modules' must be present"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_in_one_sentence_and_nothing_left(
    kitchen: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, wanted = BAD[case]
    if case == "nan":
        copy_folder(Path("model-b"), Path("model-nan"))
        state = load_file("model-nan/model.safetensors")
        state["model.norm.weight"][3] = torch.nan
        save_file(state, "model-nan/model.safetensors", {"format": "pt"})
    if case == "framework":
        copy_folder(Path("model-b"), Path("model-flax"))
        Path("model-flax/model.safetensors").rename("model-flax/flax_model.msgpack")
    if case == "adapter":
        Path("model-adapter").mkdir()
        Path("model-adapter/adapter_config.json").write_text("{}")
    if case == "names":  # transformers 5 has other names in memory, by which mergekit does not find the layers
        import transformers

        sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        config_of = transformers.ViTConfig(**sizes, image_size=4, patch_size=2)
        transformers.ViTForImageClassification(config_of).save_pretrained("model-vit")
    if case == "layers":
        save(llama(3, num_hidden_layers=1), Path("model-short"))
    assert run(config, "out") == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("Error: ") and re.search(wanted, message), message
    assert not Path("out").exists()
    if case == "nan":  # what a user asks for: where it was
        with pytest.raises(ValueError, match="model-nan"):
            mergekit.yaml_main(["config.yml", "out", "--quiet", "-v"])


def test_a_folder_that_was_there_stays(kitchen: Path) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("x")
    assert (
        run({"merge_method": "zipfast_linear", "models": [*models("a", weight=1), *models("b", weight=-1)]}, "out") == 1
    )
    assert Path("out/mine.txt").read_text() == "x"


def test_a_config_that_is_none(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, wanted in (("- 1\n", "config.yml must hold a mapping of options, got list"), ("a: [", "must be YAML")):
        Path("config.yml").write_text(content)
        with pytest.raises(SystemExit):
            mergekit.yaml_main(["config.yml", "out"])
        assert wanted in capsys.readouterr().err
    with pytest.raises(SystemExit):
        mergekit.yaml_main(["none.yml", "out"])
    assert "config: no file at none.yml" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- examples


EXAMPLES = sorted((ROOT / "examples" / "mergekit").glob("*.yml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.stem for example in EXAMPLES])
def test_examples_run(kitchen: Path, example: Path) -> None:
    Path("example.yml").write_text(example.read_text().replace("model: model-", f"model: {HERE}"))
    main = mergekit.pytorch_main if example.stem == "raw" else mergekit.yaml_main
    with pytest.raises(SystemExit) as end:
        main(["example.yml", "merged"])
    assert not end.value.code and tensors("merged")


def test_from_python(kitchen: Path) -> None:
    text = (ROOT / "examples" / "mergekit" / "zipit.yml").read_text().replace("model: model-", f"model: {HERE}")
    Path("example.yml").write_text(text)
    mergekit.run_merge("example.yml", "file")
    config = yaml.safe_load(text)
    mergekit.run_merge(config, "mapping")
    one, two = tensors("file"), tensors("mapping")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert "beta" in Path("file/mergekit_config.yml").read_text()
    with pytest.raises(ValueError, match="must list 'models'"):
        mergekit.run_merge({**ZIPIT, "slices": SOURCES}, "none")
    assert not Path("none").exists()
