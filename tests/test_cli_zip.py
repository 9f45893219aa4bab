# SPDX-License-Identifier: Apache-2.0
"""``zipfast zip`` as a user meets it: every form of models and data, what is written, and one sentence for bad input.

The command is compared with the Python calls that it stands for, bit by bit. Most tests call `cli.main`; what only a
process can show (signals, a kill, several workers, what is on stdout) runs as one.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zipfast
from zipfast import MultiHead, checkpoint, cli, sources, zoo
from zipfast.evaluate import accuracy
from zipfast.merging import SpaceMoments, cuts, find_spaces
from zipfast.merging.sweep import sweep

ROOT = Path(zipfast.__file__).parents[1]
MLP = {"in_features": 8, "hidden": [6, 5], "out_features": 3}
VGG = {"stages": [[4], [6]], "hidden": 7, "out_features": 5}
TWO = [MLP, {**MLP, "out_features": 4}]
WORDS = {
    "MLP": ["--factory", "zipfast.zoo:mlp", "--factory-args", json.dumps(MLP)],
    "VGG": ["--factory", "zipfast.zoo:VGG", "--factory-args", json.dumps(VGG)],
}
WORDS["PAIR"] = ["@a.safetensors", "@b.safetensors", *WORDS["MLP"]]
WORDS["AB"] = [*WORDS["PAIR"], "--data", "@flat.npz"]
WORDS["IMAGES"] = ["@va.safetensors", "@vb.safetensors", *WORDS["VGG"], "--data", "@images.npz"]
WORDS["HEADS"] = ["@a.safetensors", "@four.safetensors", "--factory", "zipfast.zoo:mlp", "--data", "@flat.npz"]
WORDS["HEADS"] += ["--factory-args", json.dumps(TWO)]
NUMBER = itertools.count()
PNG = b"\x89PNG"


class Done(NamedTuple):
    status: int
    out: str
    err: str


Zip = Callable[..., Done]
Module = Callable[[str], str]


def mlp(seed: int, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return zoo.mlp(**{**MLP, **options})


def vgg(seed: int, **options: Any) -> nn.Module:
    """With norms that have seen data, so that re-estimating them means something."""
    torch.manual_seed(seed)
    net = zoo.VGG(**{**VGG, **options}).train()
    with torch.no_grad():
        for _ in range(2):
            net(torch.randn(16, options.get("in_channels", 1), 8, 8))
    return net.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and arrays that no test changes."""
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate("abc"):
        checkpoint.save(folder / f"{name}.safetensors", mlp(seed).state_dict())
        checkpoint.save(folder / f"v{name}.safetensors", vgg(seed).state_dict())
    checkpoint.save(folder / "four.safetensors", mlp(3, out_features=4).state_dict())
    checkpoint.save(folder / "narrow.safetensors", mlp(4, hidden=[6, 4]).state_dict())
    state = mlp(5).state_dict()
    checkpoint.save(folder / "extra.safetensors", {**state, "nine.weight": torch.zeros(2)})
    checkpoint.save(folder / "less.safetensors", {k: v for k, v in state.items() if k != "3.bias"})
    draw = np.random.default_rng(0)
    flat, labels = draw.standard_normal((96, 8)).astype(np.float32), draw.integers(0, 3, 96)
    np.savez(folder / "flat.npz", x=flat, y=labels)
    np.savez(folder / "high.npz", x=flat, y=labels + 1)
    np.savez(folder / "bare.npz", x=flat)
    np.savez(folder / "none.npz", x=flat[:0])
    np.savez(folder / "named.npz", pixels=flat, y=labels)
    np.savez(folder / "wide.npz", x=draw.standard_normal((8, 9)).astype(np.float32), y=np.zeros(8))
    np.savez(folder / "nan.npz", x=np.where(np.arange(96)[:, None] == 50, np.nan, flat))
    images = draw.standard_normal((80, 1, 8, 8)).astype(np.float32)
    np.savez(folder / "images.npz", x=images, y=draw.integers(0, 5, 80))
    np.savez(folder / "rgb.npz", x=np.repeat(images[:4], 3, 1))
    return folder


def expand(files: Path, argv: tuple[str, ...]) -> list[str]:
    """`WORDS` as what they stand for, and ``@name`` as the path of one of `files`."""
    words = [part for word in argv for part in WORDS.get(word, [word])]
    return [re.sub(r"@(\w[\w.]*)", lambda found: str(files / found[1]), word) for word in words]


@pytest.fixture
def zip_(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Zip:
    """The command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> Done:
        capsys.readouterr()
        status = cli.main(["zip", *expand(files, argv)])
        return Done(status, *capsys.readouterr())

    return call


@pytest.fixture
def module(tmp_path: Path) -> Iterator[Module]:
    """``module(source)`` writes a Python file where the command runs and gives its name."""
    names = []

    def write(source: str) -> str:
        names.append(f"loader_of_a_test_{next(NUMBER)}")
        (tmp_path / f"{names[-1]}.py").write_text(f"import os, time, torch\nfrom pathlib import Path\n{source}\n")
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


def start(argv: list[str], folder: Path, *launcher: str, **env: str) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "zipfast", "zip", *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts jobs in the background has them ignore interrupts, and they pass it on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # type: ignore[arg-type,return-value]
    )


def wait_for(there: Callable[[], bool], running: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def load(files: Path, *names: str, **options: Any) -> list[nn.Module]:
    maker, args = ("zipfast.zoo:VGG", VGG) if names[0].startswith("v") else ("zipfast.zoo:mlp", MLP)
    return [
        sources.load_model(str(files / f"{n}.safetensors"), factory=maker, factory_args={**args, **options})
        for n in names
    ]


def read(path: Path | str, **options: Any) -> tuple[Any, sources.Batches]:
    """An example and the data."""
    found = sources.load_data(str(path), **options)
    return found.example(2), found


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


def left(folder: Path) -> list[str]:
    """All files below a folder, but for loaders and what Python makes of them."""
    found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return sorted(str(p) for p in found if p.suffix not in (".py", ".pyc"))


# ------------------------------------------------------------------------------------------ a whole model


def test_checkpoints_and_arrays_as_the_python_call(zip_: Zip, files: Path, tmp_path: Path) -> None:
    done = zip_(
        "IMAGES", "--out", "merged.safetensors", "--alpha", "0.5", "--beta", "features.*=0.25", "--batches", "2"
    )
    assert done.status == 0 and done.err == ""
    x, data = read(files / "images.npz")
    want = zipfast.merge(load(files, "va", "vb"), (x,), data, alpha=0.5, beta={"features.*": 0.25}, max_batches=2)
    same(checkpoint.load("merged.safetensors"), want.state_dict)
    assert str(want.plan) in done.out and done.out.endswith("\nwritten to merged.safetensors\n")
    assert left(tmp_path) == ["merged.safetensors"]


@pytest.mark.parametrize(
    "flags, options",
    [
        (["--method", "permute"], {"method": "permute"}),
        (["--method", "average", "--weights", "3,1"], {"method": "average", "weights": [3.0, 1.0]}),
        (["--similarity", "mix", "--mix", "0.25"], {"similarity": "mix", "mix": 0.25}),
        (["--skip", "1", "--taps", "all"], {"skip": ["1"], "taps": "all"}),
        (["--compat", "--alpha", "0.3", "--beta", "0.5"], {"compat": True, "alpha": 0.3, "beta": 0.5}),
        (["--repair"], {"repair": True}),
    ],
)
def test_options_reach_the_merge(zip_: Zip, files: Path, flags: list[str], options: dict[str, Any]) -> None:
    assert zip_("AB", "--out", "merged.safetensors", *flags).status == 0
    x, data = read(files / "flat.npz")
    models = load(files, "a", "b")
    got = checkpoint.load("merged.safetensors")
    same(got, zipfast.merge(models, (x,), data, **options).state_dict)
    plain = zipfast.merge(models, (x,), data).state_dict
    assert any(not torch.equal(got[name], value) for name, value in plain.items())


def test_stale_statistics_are_those_of_the_weights(zip_: Zip, files: Path) -> None:
    assert zip_("IMAGES", "--stale", "--out", "stale.safetensors").status == 0
    x, data = read(files / "images.npz")
    models, got = load(files, "va", "vb"), checkpoint.load("stale.safetensors")
    same(got, zipfast.merge(models, (x,), data, reestimate=False).state_dict)
    fresh = zipfast.merge(models, (x,), data).state_dict
    assert not torch.equal(got["features.1.running_var"], fresh["features.1.running_var"])


def test_a_merged_file_loads_by_itself_and_merges_again(zip_: Zip, files: Path) -> None:
    assert zip_("AB", "--out", "two.safetensors").status == 0
    x, data = read(files / "flat.npz")
    two = zipfast.merge(load(files, "a", "b"), (x,), data).module
    loaded = sources.load_model("two.safetensors")  # factory and arguments stand in the file
    same(loaded.state_dict(), two.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(x), two(x))

    third = expand(files, ("@c.safetensors", "MLP", "--data", "@flat.npz", "--weights", "2,1"))
    assert zip_("two.safetensors", *third, "--out", "three.safetensors").status == 0
    want = zipfast.merge([two, *load(files, "c")], (x,), data, weights=(2, 1)).module
    same(sources.load_model("three.safetensors").state_dict(), want.state_dict())

    # Without --factory it is that of the files, and the result knows it as well; it may lie on top of an input.
    for _ in range(2):
        assert (
            zip_("three.safetensors", "two.safetensors", "--data", "@flat.npz", "--out", "two.safetensors").status == 0
        )
    same(sources.load_model("two.safetensors").state_dict(), checkpoint.load("two.safetensors"))


@pytest.mark.parametrize("given", ["--factory", "@", "arguments of the file"])
def test_a_result_knows_its_factory_however_it_was_named(zip_: Zip, files: Path, given: str) -> None:
    path = str(files / "a.safetensors")
    argv = [path, path, *WORDS["MLP"]]
    if given == "@":
        argv = [f"zipfast.zoo:mlp@{path}"] * 2 + WORDS["MLP"][2:]
    elif given == "arguments of the file":
        checkpoint.save("own.safetensors", checkpoint.load(path), {"factory": "zipfast.zoo:mlp", "factory_args": MLP})
        argv = ["own.safetensors", "own.safetensors", *WORDS["MLP"][:2]]
    assert zip_(*argv, "--data", "@flat.npz", "--out", "merged.safetensors").status == 0
    same(sources.load_model("merged.safetensors").state_dict(), checkpoint.load(path))
    assert checkpoint.read_metadata("merged.safetensors")["factory_args"] == MLP


def test_an_ensemble_names_no_factory(zip_: Zip, files: Path) -> None:
    """Its weights are those of all models, which no factory of one fits."""
    done = zip_("AB", "--method", "ensemble", "--out", "all.safetensors", "--evaluate", "@flat.npz", "--plots", ".")
    assert done.status == 0
    state, models = checkpoint.load("all.safetensors"), load(files, "a", "b")
    same(state, zipfast.LogitEnsemble(models).state_dict())
    assert "factory" not in checkpoint.read_metadata("all.safetensors")
    want = accuracy(zipfast.LogitEnsemble(models), read(files / "flat.npz")[1])
    assert f"accuracy on {files / 'flat.npz'}: {want:.1f}%\n" in done.out


# ------------------------------------------------------------------------------------------ models and data


def save_hf(folder: Path, kind: str) -> list[nn.Module]:
    """Two tiny models of Hugging Face as folders."""
    hf = pytest.importorskip("transformers")
    if kind == "ResNet":
        config = hf.ResNetConfig(
            num_channels=3, embedding_size=6, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=4
        )
    else:
        config = hf.BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=12,
            num_labels=3,
        )
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(
            getattr(hf, f"{kind}For{'Image' if kind == 'ResNet' else 'Sequence'}Classification")(config).eval()
        )
        models[-1].save_pretrained(folder / f"{kind}-{seed}")
    return models


def test_hugging_face_images_by_keyword(zip_: Zip, tmp_path: Path) -> None:
    models = save_hf(tmp_path, "ResNet")
    draw = np.random.default_rng(1)
    pixels = draw.integers(0, 256, (48, 3, 32, 32), dtype=np.uint8)
    np.savez("pixels.npz", pixel_values=pixels, labels=draw.integers(0, 4, 48))
    argv = ("ResNet-0", "ResNet-1/", "--data", "pixels.npz", "--batch-size", "16", "--evaluate", "pixels.npz")
    done = zip_(*argv, "--out", "merged.safetensors", "--json")
    assert done.status == 0, done.err
    x, data = read("pixels.npz", batch_size=16)
    assert list(x) == ["pixel_values"] and float(x["pixel_values"].max()) <= 1
    want = zipfast.merge(models, (), data, example_kwargs=x)
    same(checkpoint.load("merged.safetensors"), want.state_dict)
    result = json.loads(done.out)
    assert result["accuracy"]["pixels.npz"] == accuracy(want.module, data)
    assert result["inputs"][0]["factory"] == "transformers:ResNetForImageClassification"
    # A folder says what its config is; a file of weights cannot, and must not pretend to.
    assert "factory" not in checkpoint.read_metadata("merged.safetensors")

    assert zip_(*argv, "--out", "whole").status == 0  # a folder for from_pretrained
    loaded = type(models[0]).from_pretrained("whole").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**x).logits, want.module(**x).logits)
    assert json.loads(Path("whole/zipfast.json").read_text())["provenance"]["inputs"][0]["spec"] == "ResNet-0"

    stop = "resnet.encoder.stages.0"
    assert zip_(*argv, "--out", "parts", "--stop", stop).status == 0
    part = zipfast.merge(models, (), data, example_kwargs=x, stop=stop).module
    with torch.no_grad():
        for got, wanted in zip(MultiHead.load("parts")(**x), part(**x)):
            assert torch.equal(got["logits"] if isinstance(got, dict) else got, _logits(wanted))


def _logits(output: Any) -> Tensor:
    return output["logits"] if isinstance(output, dict) else output


def test_hugging_face_text_by_keywords(zip_: Zip, tmp_path: Path) -> None:
    models = save_hf(tmp_path, "Bert")
    draw = np.random.default_rng(2)
    mask = (np.arange(10) < draw.integers(4, 11, (64, 1))).astype(np.int32)
    np.savez("text.npz", input_ids=draw.integers(0, 30, (64, 10)), attention_mask=mask, y=draw.integers(0, 3, 64))
    done = zip_("Bert-0", "Bert-1", "--data", "text.npz", "--out", "merged.safetensors", "--evaluate", "text.npz")
    assert done.status == 0, done.err
    x, data = read("text.npz")
    assert set(x) == {"input_ids", "attention_mask"}
    want = zipfast.merge(models, (), data, example_kwargs=x)
    same(checkpoint.load("merged.safetensors"), {k: v for k, v in want.state_dict.items()})
    assert f"accuracy on text.npz: {accuracy(want.module, data):.1f}%" in done.out

    np.savez("odd.npz", input_ids=np.full((4, 10), 30), attention_mask=mask[:4])
    done = zip_("Bert-0", "Bert-1", "--data", "odd.npz")
    assert done.status == 1 and done.err.count("\n") == 1
    assert "(Embedding) wants indices in [0, 30), got 30 to 30" in done.err
    assert "input_ids [10], attention_mask [10]" in done.err

    done = zip_("Bert-0", "--cuts")  # the config says what the model reads
    assert done.status == 0 and "bert.embeddings" in done.out


def test_folder_of_images(zip_: Zip, files: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(3)
    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(9):
            pixels = draw.integers(0, 256, (12, 10, 3), dtype=np.uint8)
            image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{i}.png")
    for seed in range(2):
        checkpoint.save(f"{seed}.safetensors", vgg(seed, in_channels=3).state_dict())
    how = ("--image-size", "8", "--mean", "0.4,0.5,0.6", "--std", "0.2,0.3,0.4", "--batch-size", "5", "--samples", "16")
    args = json.dumps({**VGG, "in_channels": 3})
    names = ("0.safetensors", "1.safetensors", "--factory", "zipfast.zoo:VGG", "--factory-args", args)
    done = zip_(*names, "--data", "pictures", *how, "--evaluate", "pictures", "--out", "merged.safetensors")
    assert done.status == 0, done.err
    options = {"image_size": 8, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "batch_size": 5, "max_samples": 16}
    x, data = read("pictures", **options)
    assert len(data) == 4
    models = [vgg(seed, in_channels=3) for seed in range(2)]
    want = zipfast.merge(models, (x,), data)
    same(checkpoint.load("merged.safetensors"), want.state_dict)
    assert f"accuracy on pictures: {accuracy(want.module, data):.1f}%" in done.out


def test_python_factory_and_loader(zip_: Zip, module: Module) -> None:
    """The user's own code, in the current folder; a loader need not say how long it is."""
    name = module(
        "from torch import nn\n"
        "def net(wide=6): return nn.Sequential(nn.Linear(4, wide), nn.ReLU(), nn.Linear(wide, 2))\n"
        "class Endless:\n"
        "    def __iter__(self):\n"
        "        g = torch.Generator().manual_seed(0)\n"
        "        while True: yield {'input': torch.randn(32, 4, generator=g)}, torch.zeros(32).long()\n"
        "class Pairs(list): pass\n"
        "def endless(): return Endless()\n"
        "def three(): return [b for b, _ in zip(Endless(), range(3))]\n"
    )
    argv = (f"{name}:net", f"{name}:net", "--factory-args", '{"wide": 7}')
    torch.manual_seed(0)
    assert zip_(*argv, "--data", f"{name}:endless", "--batches", "3", "--out", "one.safetensors").status == 0
    torch.manual_seed(0)
    assert zip_(*argv, "--data", f"{name}:three", "--out", "two.safetensors").status == 0
    same(checkpoint.load("one.safetensors"), checkpoint.load("two.safetensors"))
    assert checkpoint.load("one.safetensors")["0.weight"].shape == (7, 4)
    assert checkpoint.read_metadata("one.safetensors")["factory"] == f"{name}:net"  # loaded only when it is trusted
    with pytest.raises(ValueError, match="if you trust it, pass it"):
        sources.load_model("one.safetensors")


# ------------------------------------------------------------------------------------------ looking at a model


def test_plan_cuts_and_verify(zip_: Zip, files: Path) -> None:
    """One model is enough, and no data either where the shape is known."""
    (net,), (x, _) = load(files, "va"), read(files / "images.npz")
    graph = find_spaces(net, (x,))
    one = ("@va.safetensors", "VGG")
    assert zip_(*one, "--plan-only", "--data", "@images.npz") == (0, f"{graph.plan}\n", "")
    assert zip_(*one, "--plan-only", "--input-shape", "1x8x8") == (0, f"{graph.plan}\n", "")
    done = zip_(*one, "--plan-only", "--input-shape", "1x8x8", "--json")
    assert zipfast.Plan.from_json(done.out) == graph.plan
    done = zip_(*one, "--plan-only", "--input-shape", "1x8x8", "--stop", "features.3")
    assert "features.0" in done.out and "features.4" not in done.out

    done = zip_(*one, "--cuts", "--input-shape", "1x8x8")
    rows = [line.split()[0] for line in done.out.splitlines()[1:]]
    assert rows == [cut.node for cut in cuts(graph)]
    done = zip_(*one, "--cuts", "--input-shape", "1x8x8", "--json")
    assert [row["node"] for row in json.loads(done.out)["cuts"]] == rows

    done = zip_("@a.safetensors", "MLP", "--verify", "--data", "@flat.npz")
    assert done.status == 0 and done.out.rstrip().endswith(": ok")
    done = zip_("@a.safetensors", "MLP", "--verify", "--data", "@flat.npz", "--json")
    assert json.loads(done.out)["ok"] is True and all(check["ok"] for check in json.loads(done.out)["checks"])


def test_verify_says_no_by_its_status(zip_: Zip, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = importlib.import_module("zipfast.merging.verify")  # in the package, the name is the function's

    real = verify.verify
    bad = verify.Check("planted", False, 1.0, 0.0, "by the test")

    def fail(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        return verify.Verification((*found.checks, bad), found.dtype, found.spaces, found.features)

    monkeypatch.setattr(verify, "verify", fail)
    done = zip_("@a.safetensors", "MLP", "--verify", "--data", "@flat.npz")
    assert done.status == 1 and "NOT ok: planted" in done.out and done.err == ""


# ------------------------------------------------------------------------------------------ heads of their own


@pytest.mark.parametrize("flags", [["--stop", "features.7"], ["--start", "features.2", "--stop", "classifier.1"]])
def test_partial_zip_is_the_python_call_and_loads(zip_: Zip, files: Path, tmp_path: Path, flags: list[str]) -> None:
    done = zip_("IMAGES", *flags, "--out", "merged/")
    assert done.status == 0 and "of the ensemble's" in done.out
    assert left(tmp_path) == ["merged/model.safetensors", "merged/zipfast.json"]
    x, data = read(files / "images.npz")
    places = {flag.removeprefix("--"): place for flag, place in zip(flags[::2], flags[1::2])}
    want = zipfast.merge(load(files, "va", "vb"), (x,), data, **places).module
    got = MultiHead.load("merged")
    same(got.state_dict(), want.state_dict())
    for batch, _ in data:
        with torch.no_grad():
            pairs = list(zip(got(batch), want(batch)))
        assert len(pairs) == 2 and all(torch.equal(a, b) for a, b in pairs)
    provenance = checkpoint.read_metadata("merged/model.safetensors")["provenance"]
    assert (
        provenance["options"]["stop"] == want.origin["stop"] not in ("features.7", "classifier.1")
    )  # the graph's node


def test_heads_of_different_sizes(zip_: Zip, files: Path) -> None:
    """Each model gets its own arguments, each keeps its head, and each head its own test data."""
    data = ("--evaluate", "0=@flat.npz", "--evaluate", "1=@high.npz")
    done = zip_("HEADS", "--out", "merged", *data, "--json")
    assert done.status == 0, done.err
    x, batches = read(files / "flat.npz")
    models = [*load(files, "a"), *load(files, "four", out_features=4)]
    want = zipfast.merge(models, (x,), batches).module
    got, result = MultiHead.load("merged"), json.loads(done.out)
    same(got.state_dict(), want.state_dict())
    assert [tuple(output.shape) for output in got(x)] == [(2, 3), (2, 4)]
    scores = [accuracy(want, read(files / name)[1], head=m) for m, name in enumerate(("flat.npz", "high.npz"))]
    assert list(result["accuracy"].values()) == scores
    assert [name.partition("=")[0] for name in result["accuracy"]] == ["0", "1"]
    assert result["cost"]["parameters"] < result["cost"]["ensemble_parameters"]
    assert [item["factory_args"] for item in result["inputs"]] == TWO


# ------------------------------------------------------------------------------------------ what is said


def test_json_is_all_of_stdout_and_says_what_it_was_made_of(files: Path, tmp_path: Path) -> None:
    """And an error is all of stderr: a bar is for a terminal."""
    (tmp_path / "bad").mkdir()
    failing = start(expand(files, ("PAIR", "--data", "@nan.npz", *OUT)), tmp_path / "bad")
    argv = expand(files, ("AB", "--out", "m.safetensors", "--evaluate", "@flat.npz", "--json", "--batch-size", "40"))
    running = start([*argv, "--beta", "1=0.5"], tmp_path)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    result = json.loads(out)
    assert err == ""
    bad, said = failing.communicate(timeout=120)
    assert failing.returncode == 1 and bad == "" and said.startswith("zipfast zip: ") and said.count("\n") == 1
    assert left(tmp_path / "bad") == []
    assert result["zipfast"] == zipfast.__version__ and result["torch"] == torch.__version__
    assert result["python"] and result["workers"] == 1 and result["command"] == "zip"
    options = result["options"]
    assert options["batch_size"] == 40 and options["beta"] == {"1": 0.5} and options["method"] == "zip"
    assert options["data"] == str(files / "flat.npz") and options["alpha"] == 1.0
    models = load(files, "a", "b")
    assert [item["state_hash"] for item in result["inputs"]] == [checkpoint.state_hash(m.state_dict()) for m in models]
    assert [item["checkpoint"] for item in result["inputs"]] == [str(files / f"{n}.safetensors") for n in "ab"]
    assert set(result["spaces"]) == {"1", "3"} and result["spaces"]["1"]["features"] == 6
    assert set(result["seconds"]) >= {"export", "moments", "match"} and result["out"] == "m.safetensors"
    written = checkpoint.read_metadata(tmp_path / "m.safetensors")
    assert {k: v for k, v in result.items() if k != "out"} == written["provenance"]
    zipfast.Plan.from_json(written["plan"])


def test_pictures(zip_: Zip, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert zip_("AB", "--plots", "pictures/new").status == 0
    assert zip_("AB", "--plots", "pictures/new", "--sweep", "--evaluate", "@flat.npz", "--alphas", "1").status == 0
    assert left(tmp_path) == ["pictures/new/sweep.png", "pictures/new/zip.png"]
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in left(tmp_path))


def test_sweep(zip_: Zip, files: Path, tmp_path: Path) -> None:
    grid = ("--alphas", "0.3,1", "--betas", "0,0.5,1")
    done = zip_("AB", "--sweep", *grid, "--evaluate", "@flat.npz", "--out", "sweep.json", "--json", "--taps", "all")
    assert done.status == 0, done.err
    x, data = read(files / "flat.npz")
    points = sweep(
        load(files, "a", "b"),
        (x,),
        data,
        lambda net: accuracy(net, data),
        alphas=(0.3, 1.0),
        betas=(0.0, 0.5, 1.0),
        taps="all",
    )
    result = json.loads(done.out)
    assert result["sweep"] == [vars(point) for point in points] and len(points) == 6
    assert json.loads((tmp_path / "sweep.json").read_text()) == result
    assert left(tmp_path) == ["sweep.json"]
    done = zip_("AB", "--sweep", *grid, "--evaluate", "@flat.npz")
    assert len(done.out.splitlines()) == 7 and done.out.split()[:3] == ["alpha", "beta", "accuracy"]


def test_progress_is_on_stderr_and_can_be_silenced(zip_: Zip, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tqdm every tenth batch is said."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    done = zip_("AB", "--batch-size", "8")
    assert done.err == "moments: 10/12\n" and "moments:" not in done.out
    assert zip_("AB", "--batch-size", "8", "--quiet").err == ""


# ------------------------------------------------------------------------------------------ options in a file


def write(text: str, name: str = "zip.yaml") -> str:
    Path(name).write_text(text)
    return name


def test_options_from_a_file_and_flags_on_top(zip_: Zip, files: Path) -> None:
    pytest.importorskip("yaml")
    config = write(
        f"""
models: [{files}/a.safetensors, {files}/b.safetensors]
factory: zipfast.zoo:mlp
factory-args: {{in_features: 8, hidden: [6, 5], out_features: 3}}
data: {files}/flat.npz
batch_size: 16
alpha: 5e-1
beta: {{"1": 0.25, "3": 1}}
weights: [3, 1]
skip: "3"
mix: 1e-1
evaluate: {files}/flat.npz
out: merged.safetensors
plots:
compat: no
json: true
"""
    )
    done = zip_("--config", config)
    assert done.status == 0, done.err
    x, data = read(files / "flat.npz", batch_size=16)
    options = {"alpha": 0.5, "beta": {"1": 0.25, "3": 1.0}, "weights": [3.0, 1.0], "skip": ["3"]}
    want = zipfast.merge(load(files, "a", "b"), (x,), data, **options)
    same(checkpoint.load("merged.safetensors"), want.state_dict)
    result = json.loads(done.out)
    assert result["options"]["mix"] == 0.1 and result["options"]["plots"] is None
    assert list(result["accuracy"]) == [f"{files}/flat.npz"]

    flags = (
        "--alpha",
        "1",
        "--beta=1",
        "--batch-size",
        "32",
        "--weights",
        "1,1",
        "--skip",
        "1",
        "--out",
        "b.safetensors",
    )
    done = zip_(f"--config={config}", *flags, "--evaluate", "@high.npz", "--method", "permute", "--batches", "2")
    assert done.status == 1 and "labels must be in [0, 3)" in done.err  # the file's test data are not read
    done = zip_("--config", config, *flags, "--evaluate", "@bare.npz")
    assert "'batches' must hold labels" in done.err
    done = zip_("--config", config, *flags, "@c.safetensors", "@b.safetensors")
    result = json.loads(done.out)
    x, data = read(files / "flat.npz")
    want = zipfast.merge(load(files, "c", "b"), (x,), data, weights=[1.0, 1.0], skip=["1"])
    same(checkpoint.load("b.safetensors"), want.state_dict)


@pytest.mark.parametrize(
    "text, message",
    [
        ("batchsize: 3", r"must hold options of this command, got 'batchsize'; did you mean 'batch_size'\?$"),
        ("wrong-key-altogether: 3", "must hold options of this command, got 'wrong-key-altogether'; there are alpha, "),
        ("- a\n- b", "must hold a mapping of options, got list$"),
        ("", "must hold a mapping of options, got NoneType$"),
        ("a: [1, 2", r"must be YAML \(while parsing"),
        ("a: !!python/object/apply:os.system [touch trap]", r"must be YAML \(could not determine a constructor"),
        ("method: best", "'method' in zip.yaml must be one of zip, permute, .*, ensemble, got 'best'$"),
        ("batch-size: many", "'batch-size' in zip.yaml must be a whole number, got 'many'$"),
        ("batch-size: 2.5", "'batch-size' in zip.yaml must be a whole number, got 2.5$"),
        ("batch-size: yes", "'batch-size' in zip.yaml must be a whole number, got True$"),
        ("mix: half", "'mix' in zip.yaml must be a number, got 'half'$"),
        ("alpha: high", "'alpha' in zip.yaml must be a number, or NAME=NUMBER .*, got 'high'$"),
        ("alpha: {fc: high}", "'alpha' in zip.yaml must be a number, or NAME=NUMBER .*, got {'fc': 'high'}$"),
        ("weights: 1", "'weights' in zip.yaml must be numbers with commas between them, got 1$"),
        ("input-shape: {a: 1}", "'input-shape' in zip.yaml must be sizes with an x between them"),
        ("factory-args: 3", "'factory-args' in zip.yaml must be a JSON object, or a list"),
        ("compat: 'no'", "'compat' in zip.yaml must be true or false, got 'no'$"),
        ("out: 3", "'out' in zip.yaml must be a text, got 3$"),
        ("skip: [1]", r"'skip' in zip.yaml must be a text or a list of texts, got \[1\]$"),
        ("models: 3", "'models' in zip.yaml must be a text or a list of texts, got 3$"),
        ("models: a.safetensors", "'models' must name two models or more, got 1"),
    ],
)
def test_bad_files_of_options(zip_: Zip, text: str, message: str, tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    done = zip_("--config", write(text))
    assert done.status == 1 and done.out == "" and done.err.count("\n") == 1
    assert re.search(message, done.err.rstrip("\n")) and done.err.startswith("zipfast zip: ")
    assert left(tmp_path) == ["zip.yaml"]


def test_a_file_of_options_that_is_not_there(zip_: Zip, tmp_path: Path) -> None:
    assert zip_("--config", "none.yaml") == (1, "", "zipfast zip: config: no file at none.yaml\n")
    for wrong in (
        ["--conf", "none.yaml"],
        ["--config"],
        ["--alpha", "high"],
        ["--weights", "1,b"],
        ["--input-shape", "a"],
    ):
        with pytest.raises(SystemExit) as stopped:  # bad usage; a shortened --config must not pass unread
            zip_("AB", *wrong)
        assert stopped.value.code == 2
    assert left(tmp_path) == []


# ------------------------------------------------------------------------------------------ bad input

OUT = ("--out", "merged.safetensors")
BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "structure": (
        ("@a.safetensors", "@narrow.safetensors", "--factory", "zipfast.zoo:mlp", "--data", "@flat.npz", *OUT)
        + ("--factory-args", json.dumps([MLP, {**MLP, "hidden": [6, 4]}])),
        r"merge: models 0 and 1 must have one structure, but node 'linear_1' \(module 3\) gives \['batch', 5\]",
    ),
    "structure, into a folder": (
        (
            "@a.safetensors",
            "@narrow.safetensors",
            "--factory",
            "zipfast.zoo:mlp",
            "--data",
            "@flat.npz",
            "--out",
            "heads",
        )
        + ("--factory-args", json.dumps([MLP, {**MLP, "hidden": [6, 4]}])),
        r"merge: models 0 and 1 must have one structure, but node 'linear_1' \(module 3\) gives \['batch', 5\]",
    ),
    "factory of other models": (
        ("@a.safetensors", "@b.safetensors", "VGG", "--data", "@images.npz", *OUT),
        r"load_model: .*a.safetensors must hold the tensors of zipfast.zoo:VGG, got \d+ missing .* and 6 unexpected",
    ),
    "other arguments": (
        ("@a.safetensors", "@narrow.safetensors", "MLP", "--data", "@flat.npz", *OUT),
        r"load_model: .*narrow.safetensors must hold the tensors of zipfast.zoo:mlp, got \[4, 6\] instead of \[5, 6\]",
    ),
    "extra keys": (
        ("@a.safetensors", "@extra.safetensors", "MLP", "--data", "@flat.npz", *OUT),
        r"load_model: .*extra.safetensors must hold the tensors of zipfast.zoo:mlp, got 1 unexpected \(nine.weight\)",
    ),
    "missing keys": (
        ("@a.safetensors", "@less.safetensors", "MLP", "--data", "@flat.npz", *OUT),
        r"load_model: .*less.safetensors must hold the tensors of zipfast.zoo:mlp, got 1 missing \(3.bias\)",
    ),
    "arguments for more models": (
        ("@a.safetensors", "@b.safetensors", "--factory", "zipfast.zoo:mlp", "--data", "@flat.npz", *OUT)
        + ("--factory-args", json.dumps([MLP] * 3)),
        "'factory-args' must be one object, or a list of one for each of 2 models, got a list of 3",
    ),
    "no such argument": (
        ("@a.safetensors", "@b.safetensors", "--factory", "zipfast.zoo:mlp", "--data", "@flat.npz", *OUT)
        + ("--factory-args", '{"deep": 3}'),
        "unexpected keyword argument 'deep'",
    ),
    "no such factory": (
        ("@a.safetensors", "@b.safetensors", "--factory", "zipfast.zoo:lstm", "--data", "@flat.npz", *OUT),
        "'lstm' must be a function or class in 'zipfast.zoo', got NoneType",
    ),
    "no factory": (
        ("@a.safetensors", "@b.safetensors", "--data", "@flat.npz", *OUT),
        "'factory' must be package.module:factory for .*a.safetensors, got None",
    ),
    "no file": (("@a.safetensors", "no.safetensors", "MLP", "--data", "@flat.npz", *OUT), "no checkpoint at no.saf"),
    "one model": (
        ("@a.safetensors", "MLP", "--data", "@flat.npz", *OUT),
        "'models' must name two models or more, got 1",
    ),
    "no model": (("--data", "@flat.npz", *OUT), "'models' must name two models or more, got 0"),
    "no model to look at": (("--cuts",), "'models' must name a model, got 0"),
    "wide samples": (
        ("PAIR", "--data", "@wide.npz", *OUT),
        r"'data' must give samples that Sequential takes, got \[9\]: '1' \(Linear\) wants 8 features, got 9$",
    ),
    "colours": (
        ("@va.safetensors", "@vb.safetensors", "VGG", "--data", "@rgb.npz", *OUT),
        r"'data' must give samples that VGG takes, got \[3, 8, 8\]: 'features.0' \(Conv2d\) wants 1 channels, got 3$",
    ),
    "shape by hand": (
        ("@va.safetensors", "VGG", "--cuts", "--input-shape", "3x8x8"),
        r"'input-shape' must give samples that VGG takes, got \[3, 8, 8\]: 'features.0' \(Conv2d\) wants 1 channels, got 3$",
    ),
    "test data of another shape": (
        ("AB", "--evaluate", "@wide.npz", *OUT),
        r"'evaluate' must give samples that Sequential takes, got \[9\]: '1' \(Linear\) wants 8 features, got 9$",
    ),
    "keyword of another model": (
        ("PAIR", "--data", "@named.npz", *OUT),
        r"'data' must give samples that Sequential takes, got pixels \[8\]: .*unexpected keyword argument 'pixels'$",
    ),
    "no data": (("PAIR", *OUT), "'data' must name the data that features are compared on, got none; use --data SPEC"),
    "no data to look at": (("@a.safetensors", "MLP", "--cuts"), "use --data SPEC or --input-shape 3x224x224"),
    "no such data": (("PAIR", "--data", "no.npz", *OUT), "load_data: no file or folder at no.npz"),
    "no samples": (("PAIR", "--data", "@none.npz", *OUT), "load_data: .*none.npz must hold numbers, in arrays"),
    "no images": (("PAIR", "--data", ".", *OUT), "load_data: . must hold images or a folder per class, got none"),
    "data of another kind": (("PAIR", "--data", "@a.safetensors", *OUT), "'spec' must be a folder, an .npz or package"),
    "NaN": (
        ("PAIR", "--data", "@nan.npz", *OUT),
        "features of space '1' must be finite, got NaN or infinity in model 0",
    ),
    "no batches": (("AB", "--batches", "0", *OUT), "'max_batches' must be at least 1 or None, got 0"),
    "empty batches": (("AB", "--batch-size", "0", *OUT), "'batch_size' must be at least 1, got 0"),
    "size of no image": (("AB", "--image-size", "8", *OUT), "'image_size' must be left out for"),
    "labels of another head": (
        ("HEADS", "--evaluate", "0=@high.npz", "--out", "heads"),
        r"labels must be in \[0, 3\), the classes of head 0, got 1 to 3; are they labels of another head\?$",
    ),
    "labels of another model": (
        ("AB", "--evaluate", "@high.npz", *OUT),
        r"labels must be in \[0, 3\), the classes of the model, got 1 to 3; are they labels of another head\?$",
    ),
    "head not named": (
        ("HEADS", "--evaluate", "@flat.npz", "--out", "heads"),
        "'head' must say which head the labels belong to, as they have 3, 4 classes$",
    ),
    "no such head": (("HEADS", "--evaluate", "2=@flat.npz", "--out", "heads"), r"'head' must be in \[0, 2\), got 2$"),
    "head of a whole model": (
        ("AB", "--evaluate", "1=@flat.npz", *OUT),
        "'head' must be None or 0 for a model with one",
    ),
    "no labels": (("AB", "--evaluate", "@bare.npz", *OUT), "'batches' must hold labels beside the inputs, got none"),
    "no such cut": (
        ("IMAGES", "--stop", "stages.7", "--out", "heads"),
        "'stop' must be a module's path or a graph node, got 'stages.7'; valid cuts are conv2d, ",
    ),
    "no cut there": (
        ("zipfast.zoo:resnet", "zipfast.zoo:resnet", "--factory-args", '{"depth_n": 1, "width": 0.25}')
        + ("--data", "@images.npz", "--stop", "stages.1.0.bn1", "--out", "heads"),
        "'stop' must be a place that all flow passes, got 'stages.1.0.bn1', .* the nearest valid cuts are 'relu_2' ",
    ),
    "cuts in the wrong order": (
        ("IMAGES", "--start", "features.6", "--stop", "features.3", "--out", "heads"),
        "'start' must come before 'stop', got 'features.6' and 'features.3'",
    ),
    "folder that is not there": (
        ("AB", "--out", "no/merged.safetensors"),
        "cannot write no/merged.safetensors: No such",
    ),
    "folder in a folder that is not there": (("HEADS", "--out", "no/heads"), "cannot write no/heads: No such file"),
    "below a file": (("AB", "--out", "FILE/m.safetensors"), "cannot write .*: Not a directory; choose a folder"),
    "heads over a file": (("HEADS", "--out", "FILE"), "cannot write .*: it is a file; give a folder"),
    "ending of a whole model": (
        ("AB", "--out", "merged"),
        "'out' must end in .safetensors for a whole model, got 'merged'",
    ),
    "ending of a pickle": (("AB", "--out", "merged.pt"), "'out' must end in .safetensors for a whole model"),
    "ending of heads": (("HEADS", *OUT), "'out' must be a folder for a network with several heads, got 'merged.saf"),
    "ending of a partial zip": (
        ("AB", "--stop", "2", *OUT),
        "'out' must be a folder for a network with several",
    ),
    "ending of a sweep": (("AB", "--sweep", "--evaluate", "@flat.npz", *OUT), "'out' must end in .json for a sweep"),
    "sweep into nowhere": (
        ("AB", "--sweep", "--evaluate", "@flat.npz", "--out", "no/s.json"),
        "cannot write no/s.* No such file or directory",
    ),
    "sweep without a score": (("AB", "--sweep"), "'evaluate' must name labelled data for a sweep, got none"),
    "sweep of a baseline": (
        ("AB", "--sweep", "--evaluate", "@flat.npz", "--method", "permute"),
        "'method' must be left out for a sweep, got 'permute'",
    ),
    "sweep out of range": (
        ("AB", "--sweep", "--evaluate", "@flat.npz", "--alphas", "0.5,1.5"),
        r"'alphas' must be in \[0, 1\], got \[0.5, 1.5\]",
    ),
    "alpha": (("AB", "--alpha", "1.5", *OUT), r"'alpha' must be in \[0, 1\], got 1.5"),
    "alpha of a space": (("AB", "--alpha", "3=1.5", *OUT), r"'alpha' must be in \[0, 1\], got 1.5"),
    "beta": (("AB", "--beta=-0.5", *OUT), r"'beta' must be in \[0, 1\], got -0.5"),
    "mix": (("AB", "--similarity", "mix", "--mix", "2", *OUT), r"'mix' must be in \[0, 1\], got 2.0"),
    "weights of three": (("AB", "--weights", "1,1,1", *OUT), "'weights' must"),
    "space to skip": (
        ("AB", "--skip", "conv*", *OUT),
        r"'skip' must name mergeable spaces, got 'conv\*'; there are 1, 3",
    ),
    "space of alpha": (("AB", "--alpha", "conv1=0.5", *OUT), "'alpha' must name mergeable spaces, got 'conv1'"),
    "space of beta": (("AB", "--beta", "1=0.5,conv1=0.5", *OUT), "'beta' must name mergeable spaces, got 'conv1'"),
    "ending of statistics": (("AB", "--statistics", "moments.pt", *OUT), "'path' must end in .safetensors"),
    "no statistics": (("AB", "--statistics", "@a.safetensors", *OUT), "must hold statistics"),
    "device": (("AB", "--device", "abacus", *OUT), "device: must be cpu or cuda, got 'abacus'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_no_file(zip_: Zip, tmp_path: Path, name: str) -> None:
    argv, message = BAD[name]
    (tmp_path / "FILE").write_text("")
    done = zip_(*argv)
    assert done.status == 1 and done.out == ""
    assert done.err.startswith("zipfast zip: ") and done.err.count("\n") == 1 and len(done.err) < 500
    assert re.search(message, done.err.rstrip("\n")), done.err
    assert not done.err.startswith("zipfast zip: zip: ") and "Traceback" not in done.err
    assert left(tmp_path) == ["FILE"]


def test_bad_input_is_refused_before_the_data_are_read(zip_: Zip, module: Module, tmp_path: Path) -> None:
    name = module(
        "class Once(list):\n"
        "    def __iter__(self):\n"
        "        assert not Path('read').exists(), 'read again'\n"
        "        Path('read').touch()\n"
        "        return super().__iter__()\n"
        "def data(): return Once([torch.randn(16, 8)])"
    )
    words = ("PAIR", "--data", f"{name}:data")  # the first read gives the example
    for wrong in (["--out", "merged"], ["--out", "no/m.safetensors"], ["--skip", "conv1"], ["--stop", "nine"]):
        assert zip_(*words, *wrong).status == 1
        (tmp_path / "read").unlink()


@pytest.mark.parametrize(
    "made, message",
    [
        ("[]", "'data' must hold at least one batch, got none"),
        (
            "iter([torch.zeros(2, 8)])",
            r"must return batches to read repeatedly \(list, DataLoader\), got list_iterator",
        ),
        ("['text']", "each batch must be a tensor, .* got str"),
        ("[torch.randn(4, 8), torch.randn(4, 9)]", "8"),
        (
            "[(torch.randn(2, 8), torch.zeros(2, 1).long())]",
            r"labels must have the shape \[2\] of the answers, got \[2, 1\]",
        ),
    ],
)
def test_bad_loaders(zip_: Zip, module: Module, tmp_path: Path, made: str, message: str) -> None:
    name = module(f"def data(): return {made}")
    done = zip_("PAIR", "--data", f"{name}:data", "--evaluate", f"{name}:data", *OUT)
    assert done.status == 1 and done.err.count("\n") == 1 and re.search(message, done.err), done.err
    assert left(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(zip_: Zip, tmp_path: Path) -> None:
    for name in ("cuda", "cuda:0"):
        done = zip_("AB", "--device", name, *OUT)
        assert (
            done.err == f"zipfast zip: device: {name!r} cannot be used, as torch sees no GPU here; see zipfast info\n"
        )
        assert done.status == 1 and left(tmp_path) == []


# ------------------------------------------------------------------------------------------ statistics in a file


def test_statistics_are_kept_and_used_again(zip_: Zip, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ("AB", "--statistics", "moments.safetensors", "--out")
    assert zip_(*argv, "one.safetensors").status == 0
    tensors, kept = checkpoint.load("moments.safetensors"), SpaceMoments.load("moments.safetensors")
    assert kept.batches == 3 and kept.origin["data"]["spec"] == str(files / "flat.npz")

    monkeypatch.setattr("zipfast.merging.taps.Tapped.values", None)  # whatever makes features
    monkeypatch.setattr("zipfast.merging.taps.Tapped.together", None, raising=False)
    assert zip_(*argv, "two.safetensors", "--quiet").status == 0
    same(checkpoint.load("two.safetensors"), checkpoint.load("one.safetensors"))
    assert zip_(*argv, "three.safetensors", "--beta", "0", "--method", "permute").status == 0
    same(checkpoint.load("moments.safetensors"), tensors)


def test_statistics_of_others_are_refused(zip_: Zip, tmp_path: Path) -> None:
    assert zip_("AB", "--statistics", "moments.safetensors").status == 0
    before = (tmp_path / "moments.safetensors").read_bytes()
    others = {
        "inputs": ("@a.safetensors", "@c.safetensors", "MLP", "--data", "@flat.npz"),
        "data": ("AB", "--batch-size", "16"),
        "stop": ("AB", "--stop", "2"),
    }
    for key, argv in others.items():
        done = zip_(*argv, "--statistics", "moments.safetensors")
        assert done.status == 1
        assert f"'statistics' must be of these models and data, but moments.safetensors is of other {key}" in done.err
    assert (tmp_path / "moments.safetensors").read_bytes() == before
    (tmp_path / "moments.safetensors").write_bytes(before[: len(before) // 2])
    done = zip_("AB", "--statistics", "moments.safetensors")
    assert done.status == 1 and done.err.count("\n") == 1 and "moments.safetensors" in done.err


# The 70th batch (and the rename of the second checkpoint, behind the 100th) never ends while `hang` says so.
SLOW = """
class Slow:
    def __len__(self): return 120
    def __iter__(self):
        g = torch.Generator().manual_seed(0)
        for i in range(120):
            if os.environ.get("HANG") == "reading" and i == 70: hang()
            yield torch.randn(4, 8, generator=g)
def hang():
    Path("hanging").touch()
    while True: time.sleep(0.01)
def data(): return Slow()
if os.environ.get("HANG") == "writing":
    renames, rename = [], os.replace
    def replace(source, target):
        renames.append(target)
        if len(renames) == 2: hang()
        rename(source, target)
    os.replace = replace
"""


def test_a_killed_run_goes_on_to_the_same_end(
    zip_: Zip,
    files: Path,
    module: Module,
    tmp_path: Path,
    threads: Callable[[int], None],
) -> None:
    """It is killed while it writes its second checkpoint: the first one is still there, and whole."""
    threads(1)  # as the process that is killed
    name, target = module(SLOW), tmp_path / "moments.safetensors"
    argv = ("PAIR", "--data", f"{name}:data", "--statistics")
    running = start([*expand(files, argv), target.name, *OUT], tmp_path, HANG="writing")
    try:
        wait_for((tmp_path / "hanging").exists, running)
        assert SpaceMoments.load(target).batches == 50
    finally:
        running.send_signal(signal.SIGKILL)
        running.communicate(timeout=60)
    assert running.returncode == -signal.SIGKILL
    assert SpaceMoments.load(target).batches == 50
    assert not (tmp_path / "merged.safetensors").exists()

    assert zip_(*argv, target.name, *OUT).status == 0
    assert zip_(*argv, "whole.safetensors", "--out", "other.safetensors").status == 0
    assert SpaceMoments.load(target).batches == 120
    same(checkpoint.load(target), checkpoint.load("whole.safetensors"))
    assert checkpoint.read_metadata(target) == checkpoint.read_metadata("whole.safetensors")
    same(checkpoint.load("merged.safetensors"), checkpoint.load("other.safetensors"))


def test_an_interrupt_is_said_and_leaves_whole_files(files: Path, module: Module, tmp_path: Path) -> None:
    name = module(SLOW)
    argv = expand(files, ("PAIR", "--data", f"{name}:data", "--statistics", "moments.safetensors", *OUT))
    running = start(argv, tmp_path, HANG="reading")
    wait_for((tmp_path / "hanging").exists, running)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and out == ""
    assert err == "zipfast zip: interrupted; files are whole or not there\n"
    assert left(tmp_path) == ["hanging", "moments.safetensors"]
    assert SpaceMoments.load(tmp_path / "moments.safetensors").batches == 50


# ------------------------------------------------------------------------------------------ several workers


def test_two_workers_find_what_one_finds(
    zip_: Zip, files: Path, module: Module, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    """Five batches of six, so that one worker reads more than the other."""
    threads(1)
    name = module(
        "import numpy as np\n"
        "from zipfast import checkpoint, distributed\n"
        "save = checkpoint.save\n"
        "def noted(path, *rest):\n"
        "    with open('saves', 'a') as f: f.write(f'{distributed.rank()} {path}\\n')\n"
        "    save(path, *rest)\n"
        "if 'RANK' in os.environ: checkpoint.save = noted\n"
        f"def data(): return list(torch.from_numpy(np.load({str(files / 'images.npz')!r})['x']).split(15))\n"
    )
    models = ("@va.safetensors", "@vb.safetensors", "VGG")
    argv = (*models, "--data", f"{name}:data", "--batches", "5", "--json", "--evaluate", "@images.npz")
    words = (*argv, "--statistics", "moments.safetensors", "--out", "two.safetensors")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    running = start(expand(files, words), tmp_path, *launcher)
    out, err = running.communicate(timeout=240)
    assert running.returncode == 0, err
    two = json.loads(out)  # one of them speaks
    saves = (tmp_path / "saves").read_text().splitlines()
    assert sorted(saves) == ["0 moments.safetensors", "0 two.safetensors"]

    done = zip_(*argv, "--out", "one.safetensors", "--statistics", "single.safetensors")
    one = json.loads(done.out)
    assert (one["workers"], two["workers"]) == (1, 2)
    assert one["spaces"].keys() == two["spaces"].keys() and one["inputs"] == two["inputs"]
    for space, row in one["spaces"].items():
        assert two["spaces"][space]["in_model_merges"] == row["in_model_merges"]
        assert two["spaces"][space]["mean_similarity"] == pytest.approx(row["mean_similarity"], abs=1e-6)
    assert one["accuracy"] == two["accuracy"]
    want, got = checkpoint.load("one.safetensors"), checkpoint.load("two.safetensors")
    assert want.keys() == got.keys()
    for key, value in want.items():
        if "running" in key:
            torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(got[key], value), key
    single, shared = SpaceMoments.load("single.safetensors"), SpaceMoments.load("moments.safetensors")
    assert single.batches == shared.batches == 5
    for space in single:
        assert [m.count for m in single[space]] == [m.count for m in shared[space]]
        torch.testing.assert_close(shared.correlation(space), single.correlation(space), rtol=0, atol=1e-6)
