# SPDX-License-Identifier: Apache-2.0
"""Models and data from specs: every form, every error, and no code run from a file."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from zipfast import checkpoint, sources, zoo
from zipfast.sources import Spec, describe, load_data, load_model, parse_spec

SMALL = {"in_features": 4, "hidden": [8], "out_features": 3}
MLP = "zipfast.zoo:mlp"
NUMBER = itertools.count()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a test tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def module(here):
    """``module(source)`` writes a Python file into the current directory and gives its name."""
    names = []

    def write(source):
        names.append(f"written_by_a_test_{next(NUMBER)}")
        (here / f"{names[-1]}.py").write_text(f"import torch\nfrom torch import nn\n{source}\n")
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


def small(seed=0):
    torch.manual_seed(seed)
    return zoo.mlp(**SMALL)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


# ------------------------------------------------------------------------------------------ specs


@pytest.mark.parametrize(
    "text, kind, factory, path",
    [
        ("a.b:c", "factory", "a.b:c", None),
        ("a:b.c", "factory", "a:b.c", None),
        ("a.b:c@d/e.pt", "factory", "a.b:c", "d/e.pt"),
        ("a:b@c@d.pt", "factory", "a:b", "c@d.pt"),
        ("a/b.safetensors", "checkpoint", None, "a/b.safetensors"),
        ("b.pth", "checkpoint", None, "b.pth"),
        ("./a:b.bin", "checkpoint", None, "./a:b.bin"),
        ("runs/a@b", "folder", None, "runs/a@b"),
        ("bert", "folder", None, "bert"),
    ],
)
def test_parse_spec(text, kind, factory, path):
    assert parse_spec(text) == Spec(text, kind, factory, path)


def test_parse_spec_expands_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_spec("~/a.pt").path == parse_spec("a:b@~/a.pt").path == "/home/me/a.pt"
    assert parse_spec("~/a").path == "/home/me/a" and parse_spec(Path("a")).text == "a"
    with pytest.raises(AttributeError):
        parse_spec("a").path = "b"
    with pytest.raises(TypeError, match="not int"):
        parse_spec(3)


# ------------------------------------------------------------------------------------------ factories


def test_factory_of_the_current_directory(module):
    name = module("class Net:\n    @staticmethod\n    def make(n=2):\n        return nn.Linear(n, n).train()")
    before = list(sys.path)
    model = load_model(f"{name}:Net.make")
    assert model.weight.shape == (2, 2) and not model.training and sys.path == before
    assert load_model(f"{name}:Net.make", factory_args={"n": 3}).weight.shape == (3, 3)


def test_factory_without_the_current_directory_on_the_path(module):
    """As under the installed command, where it is not."""
    name = module("import sys, os\nseen = sys.path[0] == os.getcwd()\nmake = lambda: nn.Linear(1, 1 + seen)")
    code = (
        "import sys; sys.path = [p for p in sys.path if p not in ('', sys.argv[1])]; sys.path.append(sys.argv[2]);"
        "from zipfast.sources import load_model; assert load_model(sys.argv[3]).out_features == 2;"
        "assert sys.argv[1] not in sys.path"
    )
    root = str(Path(sources.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code, os.getcwd(), root, f"{name}:make"], check=True)


def test_path_is_restored_when_the_import_fails(module):
    name, before = module("raise ValueError('no')"), list(sys.path)
    with pytest.raises(ValueError, match="no"):
        load_model(f"{name}:make")
    assert sys.path == before
    name = module("import sys\nsys.path.insert(0, 'more')\nmake = lambda: nn.Linear(1, 1)")
    load_model(f"{name}:make")
    assert sys.path == ["more", *before]
    sys.path.remove("more")


def test_factory_errors(module):
    name = module("three, text = (lambda: 3), 'text'\ndef make(n):\n    return nn.Linear(n, n)")
    with pytest.raises(TypeError, match=rf"load_model: {name}:three must return a torch.nn.Module, got int"):
        load_model(f"{name}:three")
    with pytest.raises(TypeError, match=rf"load_model: 'text' must be a function or class in '{name}', got str"):
        load_model(f"{name}:text")
    with pytest.raises(TypeError, match=rf"load_model: 'none' must be a function or class in '{name}', got NoneType"):
        load_model(f"{name}:none")
    with pytest.raises(TypeError, match="unexpected keyword argument 'm'"):
        load_model(f"{name}:make", factory_args={"m": 3})
    with pytest.raises(
        ImportError, match=r"load_model: 'no_such.module' must be a module that can be imported, got: No"
    ):
        load_model("no_such.module:make")
    with pytest.raises(TypeError, match="load_model: 'factory_args' must be a mapping, got list"):
        load_model(f"{name}:make", factory_args=[3])
    with pytest.raises(ValueError, match=rf"load_model: 'factory' must be left out for '{name}:make', got 'a:b'"):
        load_model(f"{name}:make", factory="a:b")
    # What the module itself lacks is said, too.
    with pytest.raises(
        ImportError, match=r"must be a module that can be imported, got: No module named 'nothing_here'"
    ):
        load_model(f"{module('import nothing_here')}:make")


# ------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("suffix", sources.CHECKPOINTS)
def test_checkpoint(here, suffix):
    model = small()
    path = here / f"a{suffix}"
    save_file(model.state_dict(), path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
    loaded = load_model(f"{MLP}@a{suffix}", factory_args=SMALL)
    equal(loaded, model)
    assert not loaded.training
    equal(load_model(str(path), factory=MLP, factory_args=SMALL), model)


def test_metadata_of_our_own_files(here):
    model = small()
    checkpoint.save("a.safetensors", model.state_dict(), {"factory": MLP, "factory_args": SMALL})
    equal(load_model("a.safetensors"), model)
    equal(load_model("a.safetensors", factory=MLP), model)
    equal(load_model(f"{MLP}@a.safetensors"), model)
    with pytest.raises(
        ValueError, match=r"a.safetensors must hold the tensors of zipfast.zoo:mlp, got \[8, 4\] instead"
    ):
        load_model("a.safetensors", factory_args={**SMALL, "in_features": 5})
    # They are for mlp alone: resnet is called without.
    with pytest.raises(ValueError, match=r"must hold the tensors of zipfast.zoo:resnet, got \d+ missing"):
        load_model("a.safetensors", factory="zipfast.zoo:resnet")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_factory_is_needed(here, suffix):
    state = small().state_dict()
    save_file(state, "a.safetensors")
    torch.save(state, "a.pt")
    for wrong in ("mlp", "a:b@c.pt", "a b:c", ":x"):
        with pytest.raises(ValueError, match=rf"load_model: 'factory' must be package.module:factory, got '{wrong}'"):
            load_model(f"a{suffix}", factory=wrong)
    with pytest.raises(
        ValueError, match=rf"load_model: 'factory' must be package.module:factory for a{suffix}, got None$"
    ):
        load_model(f"a{suffix}")


@pytest.mark.parametrize("word", ["trap:make", "os:system", "zipfast.zoo:torch.hub.load", "zipfast.demo:run", 3])
def test_a_file_cannot_choose_what_runs(module, word):
    if word == "trap:make":
        word = module("open('trap', 'w')\nmake = lambda: nn.Linear(1, 1)") + ":make"
    checkpoint.save("a.safetensors", {"weight": torch.ones(1, 1), "bias": torch.ones(1)}, {"factory": word})
    with pytest.raises(ValueError, match=rf"got None \(the file names '{word}': if you trust it, pass it\)"):
        load_model("a.safetensors")
    assert not Path("trap").exists()
    if str(word).endswith(":make"):
        assert load_model("a.safetensors", factory=word).weight.item() == 1 and Path("trap").exists()


class Trap:
    def __reduce__(self):
        return open, ("trap", "w")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_a_pickle_with_code_is_refused(here, suffix):
    torch.save({**small().state_dict(), "x": Trap()}, f"a{suffix}")
    with pytest.raises(ValueError, match=rf"a{suffix} cannot be read as plain tensors .* never runs code"):
        load_model(f"{MLP}@a{suffix}", factory_args=SMALL)
    assert not Path("trap").exists()


def test_missing_and_damaged_checkpoints(here):
    for spec in ("none.pt", "none.safetensors", f"{MLP}@none.pt", f"{MLP}@none.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"load_model: no checkpoint at none"):
            load_model(spec)
    for name in ("a.pt", "a.safetensors"):
        Path(name).write_bytes(b"\x07" * 300)
        with pytest.raises(ValueError, match=f"{name} cannot be read as"):
            load_model(f"{MLP}@{name}")
    Path("a.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"load: a.npz must end in .safetensors"):
        load_model(f"{MLP}@a.npz")


def test_what_does_not_fit_is_named(here):
    state = small().state_dict()
    names = list(state)

    def load(changed):
        save_file(changed, "a.safetensors")
        return load_model(f"{MLP}@a.safetensors", factory_args=SMALL)

    start = r"load_model: a.safetensors must hold the tensors of zipfast.zoo:mlp, got "
    with pytest.raises(ValueError, match=rf"{start}1 missing \({names[0]}\)$"):
        load({k: state[k] for k in names[1:]})
    with pytest.raises(ValueError, match=rf"{start}4 missing \({', '.join(names[:3])}, \.\.\.\)$"):
        load({})
    with pytest.raises(ValueError, match=rf"{start}2 unexpected \(a, b\)$"):
        load({**state, "a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(ValueError, match=rf"{start}1 missing \({names[0]}\) and 1 unexpected \(a\)$"):
        load({**{k: state[k] for k in names[1:]}, "a": torch.ones(1)})
    with pytest.raises(ValueError, match=rf"{start}\[8, 5\] instead of \[8, 4\] for '{names[0]}'$"):
        load({**state, names[0]: torch.ones(8, 5), names[2]: torch.ones(3, 5)})
    with pytest.raises(ValueError, match=rf"{start}\[7\] instead of \[8\] for '{names[1]}' and 1 unexpected \(a\)$"):
        load({**state, names[1]: torch.ones(7), "a": torch.ones(1)})


def test_dtype_is_the_modules(here):
    save_file({k: v.half() for k, v in small().state_dict().items()}, "a.safetensors")
    assert load_model(f"{MLP}@a.safetensors", factory_args=SMALL)[1].weight.dtype == torch.float32


def test_old_batch_norm_files(here):
    """torch fills in the counter that files of old lack."""
    model = zoo.resnet(1, classes=2)
    state = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    save_file(state, "a.safetensors")
    equal(load_model("zipfast.zoo:resnet@a.safetensors", factory_args={"depth_n": 1, "classes": 2}), model)


def test_an_error_of_the_module_itself(module):
    name = module(
        "class Net(nn.Linear):\n"
        "    def _load_from_state_dict(self, s, p, m, strict, missing, unexpected, errors):\n"
        "        errors.append('too old')\n"
        "make = lambda: Net(1, 1)"
    )
    torch.save(nn.Linear(1, 1).state_dict(), "a.pt")
    with pytest.raises(ValueError, match=rf"load_model: a.pt cannot be loaded into {name}:make \(Error"):
        load_model(f"{name}:make@a.pt")


TIED = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head, self.lazy = nn.Embedding(5, 3), nn.Linear(3, 5), nn.LazyLinear(2)
        self.head.weight = self.embed.weight
        self.register_buffer("none", torch.zeros(0))
        self.register_buffer("void", torch.zeros(0))
"""


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_tied_tensors_saved_once(module, kept):
    name = module(TIED)
    state = {
        "embed.weight": torch.randn(5, 3),
        "head.bias": torch.randn(5),
        "lazy.weight": torch.randn(2, 7),
        "lazy.bias": torch.randn(2),
        "none": torch.zeros(0),
        "void": torch.zeros(0),
    }
    state["head.weight"] = state["embed.weight"]
    dropped = "head.weight" if kept == "embed.weight" else "embed.weight"
    save_file({k: v for k, v in state.items() if k != dropped}, "a.safetensors")
    model = load_model(f"{name}:Net@a.safetensors")
    assert model.head.weight is model.embed.weight and torch.equal(model.head.weight, state["embed.weight"])
    assert torch.equal(model.lazy.weight, state["lazy.weight"])
    torch.save(state, "both.pt")
    assert torch.equal(load_model(f"{name}:Net@both.pt").head.weight, state["embed.weight"])
    torch.save({**state, "head.weight": torch.zeros(5, 3)}, "two.pt")
    with pytest.raises(ValueError, match=r"two.pt must hold one value for 'embed.weight' and 'head.weight', got two"):
        load_model(f"{name}:Net@two.pt")
    save_file({k: v for k, v in state.items() if k not in ("head.weight", "embed.weight")}, "a.safetensors")
    with pytest.raises(ValueError, match=r"got 2 missing \(embed.weight, head.weight\)"):
        load_model(f"{name}:Net@a.safetensors")
    save_file({k: v for k, v in state.items() if k not in ("void", "head.weight")}, "a.safetensors")
    with pytest.raises(ValueError, match=r"got 1 missing \(void\)"):  # empty tensors share nothing
        load_model(f"{name}:Net@a.safetensors")


def test_data_parallel_prefix(module):
    model = small()
    torch.save({f"module.{k}": v for k, v in model.state_dict().items()}, "a.pt")
    equal(load_model(f"{MLP}@a.pt", factory_args=SMALL), model)
    torch.save({**{f"module.{k}": v for k, v in model.state_dict().items()}, "x": torch.ones(1)}, "a.pt")
    with pytest.raises(ValueError, match=r"got 4 missing .* and 5 unexpected \(module.1.weight"):
        load_model(f"{MLP}@a.pt", factory_args=SMALL)
    # A child of that name is no prefix, unless there is one before it.
    name = module("class Net(nn.Module):\n    def __init__(self):\n        super().__init__()")
    with (Path(f"{name}.py")).open("a") as file:
        file.write("        self.module = nn.Linear(2, 2)\n")
    child = nn.Module()
    child.module = nn.Linear(2, 2)
    for state in (child.state_dict(), {f"module.{k}": v for k, v in child.state_dict().items()}):
        torch.save(state, "a.pt")
        equal(load_model(f"{name}:Net@a.pt"), child)


def test_describe(here):
    model = small()
    checkpoint.save("a.safetensors", model.state_dict(), {"factory": MLP, "factory_args": SMALL})
    facts = describe("a.safetensors")
    assert facts == {
        "spec": "a.safetensors",
        "factory": MLP,
        "factory_args": SMALL,
        "checkpoint": "a.safetensors",
        "state_hash": checkpoint.state_hash(model.state_dict()),
    }
    assert json.loads(json.dumps(facts)) == facts
    other = small(1)
    given = describe(f"{MLP}@a.safetensors", other, factory_args=SMALL)
    assert given["state_hash"] == checkpoint.state_hash(other.state_dict()) != facts["state_hash"]
    assert describe(MLP, other, factory_args=SMALL)["checkpoint"] is None


# ------------------------------------------------------------------------------------------ Hugging Face


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A ResNet in half precision and a BERT whose head is tied to its embedding, saved as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    resnet = transformers.ResNetForImageClassification(config).half().eval()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=11, max_position_embeddings=6, **sizes)
    ).eval()
    resnet.save_pretrained(root / "resnet")
    bert.save_pretrained(root / "bert")
    return root, resnet, bert


def copy(source, target, **entries):
    """The files of a folder, with some entries of config.json replaced, or removed by None."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = {**json.loads((source / "config.json").read_text()), **entries}
    config = {k: v for k, v in config.items() if v is not None}
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


def test_hugging_face(folders, capfd):
    root, resnet, bert = folders
    loaded = load_model(str(root / "resnet"))
    equal(loaded, resnet)
    assert type(loaded) is type(resnet) and not loaded.training
    loaded = load_model(str(root / "bert"))
    equal(loaded, bert)
    tokens = torch.arange(10).reshape(2, 5)
    assert torch.equal(loaded(tokens).logits, bert(tokens).logits)
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    assert capfd.readouterr().err == ""  # no progress bars
    facts = describe(str(root / "bert"), loaded)
    assert facts["factory"] == "transformers:BertForMaskedLM" and facts["checkpoint"] == str(root / "bert")
    assert facts["state_hash"] == describe(str(root / "bert"))["state_hash"]


def test_older_transformers_are_asked_for_the_stored_dtype(folders, monkeypatch):
    root, resnet, _ = folders
    asked, cls = {}, type(resnet)
    real = cls.from_pretrained
    monkeypatch.setattr(
        cls, "from_pretrained", lambda *args, **options: asked.update(options) or real(*args, **options)
    )
    monkeypatch.setattr("transformers.__version__", "4.40.0")
    equal(load_model(str(root / "resnet")), resnet)
    assert asked["torch_dtype"] == "auto" and asked["local_files_only"]


def test_hugging_face_leaves_what_the_class_does_not_use(folders, tmp_path):
    root, resnet, _ = folders
    folder = Path(copy(root / "resnet", tmp_path / "more"))
    save_file({**resnet.state_dict(), "other.head": torch.ones(2)}, folder / "model.safetensors")
    equal(load_model(str(folder)), resnet)


def test_hugging_face_shards_and_bin(folders, tmp_path):
    root, _, bert = folders
    state = load_file(root / "bert" / "model.safetensors")
    names = sorted(state)
    parts = {"a": {k: state[k] for k in names[:9]}, "b": {k: state[k] for k in names[9:]}}
    for suffix, stem in ((".safetensors", "model"), (".bin", "pytorch_model")):
        folder = Path(copy(root / "bert", tmp_path / stem))
        (folder / "model.safetensors").unlink()
        if suffix == ".bin":
            torch.save(state, folder / f"{stem}.bin")
            equal(load_model(str(folder)), bert)
            (folder / f"{stem}.bin").unlink()
        for part, tensors in parts.items():
            write = save_file if suffix == ".safetensors" else torch.save
            write(tensors, folder / f"{part}{suffix}")
        index = {"weight_map": {k: f"../{part}{suffix}" for part, tensors in parts.items() for k in tensors}}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
        equal(load_model(str(folder)), bert)
        (folder / f"b{suffix}").unlink()
        (tmp_path / f"b{suffix}").write_bytes(b"")  # outside the folder: never read
        with pytest.raises(FileNotFoundError, match=rf"load: no checkpoint at {folder}/b{suffix}"):
            load_model(str(folder))


def test_hugging_face_code_is_not_run(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root, resnet, _ = folders
    state = resnet.state_dict()
    folder = Path(copy(root / "resnet", tmp_path / "pickle"))
    (folder / "model.safetensors").unlink()
    torch.save({**state, "x": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read as plain tensors"):
        load_model(str(folder))
    own = {"AutoModelForImageClassification": "code.Net", "AutoConfig": "code.Config"}
    more = {"auto_map": own, "_attn_implementation": "someone/kernel", "use_pretrained_backbone": True}
    folder = Path(copy(root / "resnet", tmp_path / "remote", **more))
    (folder / "code.py").write_text("open('trap', 'w')")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    model = load_model(str(folder))
    equal(model, resnet)
    assert not hasattr(model.config, "auto_map") and not model.config.use_pretrained_backbone
    assert model.config._attn_implementation != "someone/kernel"
    assert not Path("trap").exists()


def test_hugging_face_errors(folders, tmp_path, monkeypatch):
    root, resnet, _ = folders
    source = root / "resnet"
    with pytest.raises(FileNotFoundError, match=r"load_model: no folder at org/name; only local files are read"):
        load_model("org/name")
    for path in (tmp_path, Path(__file__)):
        with pytest.raises(ValueError, match=rf"load_model: 'spec' must be a folder with config.json, .*, got {path}"):
            load_model(str(path))
    for i, names in enumerate([None, [], "ResNetModel", ["NoSuchModel"], ["AutoModel"], ["pipeline"], [3]]):
        folder = copy(source, tmp_path / f"names{i}", architectures=names)
        with pytest.raises(ValueError, match=r"config.json must name a model of transformers in 'architectures', got"):
            load_model(folder)
    folder = Path(copy(source, tmp_path / "json"))
    for text in ("{", "3", "[1]", "\x00"):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"load_model: .*json/config.json cannot be read as a JSON object \(.+\)"):
            load_model(str(folder))
    folder = copy(source, tmp_path / "quantized", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match=r"load_model: .*quantized must hold plain weights, got quantized ones"):
        load_model(folder)
    folder = copy(source, tmp_path / "config", layer_type="triangle")
    with pytest.raises(
        ValueError, match=r"load_model: .*config cannot be loaded as ResNetForImageClassification \(.+\)"
    ):
        load_model(folder)
    folder = copy(source, tmp_path / "shapes", embedding_size=5)
    with pytest.raises(
        ValueError, match=r"shapes must hold .* of ResNetFor.*, got \[4, 1, 7, 7\] instead of \[5, 1, 7, 7\]"
    ):
        load_model(folder)
    folder = Path(copy(source, tmp_path / "missing"))
    state = resnet.state_dict()
    save_file({k: v for k, v in state.items() if k != "classifier.1.weight"}, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"missing must hold the .* of ResNetFor.*, got 1 missing \(classifier.1.weight"
    ):
        load_model(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "tf_model.h5").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError,
        match=r"load_model: no model.safetensors or .* in .*missing, but tf_model.h5 of TensorFlow; save",
    ):
        load_model(str(folder))
    with pytest.raises(ValueError, match=rf"load_model: 'factory' must be left out for '{source}', got 'a:b'"):
        load_model(str(source), factory="a:b")
    with pytest.raises(ValueError, match=rf"load_model: 'factory_args' must be left out for '{source}', got"):
        load_model(str(source), factory_args={"a": 1})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=rf"transformers must be installed for {source}; pip install transformers"):
        load_model(str(source))


# ------------------------------------------------------------------------------------------ images


def picture(path, size=(6, 4), value=0, mode="RGB"):
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(exist_ok=True, parents=True)
    generator = np.random.default_rng(value)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = generator.integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def pictures(tmp_path):
    """Nine of class a, three of b, none of c; and what is not to be seen."""
    pixels = {}
    for name, count in (("a", 9), ("b", 3)):
        for i in range(count):
            suffix = "png" if i else "PNG"
            pixels[name, i] = picture(tmp_path / "data" / name / f"{i}.{suffix}", value=10 * len(name) + i + ord(name))
    (tmp_path / "data" / "c").mkdir()
    (tmp_path / "data" / ".hidden").mkdir()
    (tmp_path / "data" / "a" / ".0.png").write_bytes(b"")
    (tmp_path / "data" / "a" / "notes.txt").write_bytes(b"")
    return str(tmp_path / "data"), pixels


def test_images_of_classes(pictures):
    root, pixels = pictures
    data = load_data(root, batch_size=4)
    assert data.classes == ("a", "b", "c") and len(data) == 3
    batches = list(data)
    assert [b[1].tolist() for b in batches] == [[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 0]]  # in proportion
    assert [b[1].dtype for b in batches] == [torch.int64] * 3
    seen = {0: 0, 1: 0}
    for x, y in batches:
        assert x.dtype == torch.float32 and x.shape == (4, 3, 4, 6) and x.is_contiguous()
        for image, label in zip(x, y.tolist()):
            want = torch.from_numpy(pixels["ab"[label], seen[label]]).permute(2, 0, 1).float() / 255
            assert torch.equal(image, want)
            seen[label] += 1
    assert seen == {0: 9, 1: 3}
    for (x, y), (again, labels) in zip(batches, data):  # read a second time
        assert torch.equal(x, again) and torch.equal(y, labels)
    assert torch.equal(data.example(), batches[0][0][:2]) and len(data.example(99)) == 12
    assert [y.tolist() for _, y in load_data(root, batch_size=4, max_samples=5)] == [[0, 0, 1, 0], [0]]


def test_images_without_labels(tmp_path):
    for i, suffix in enumerate(("png", "bmp", "jpg", "jpeg", "webp")):
        picture(tmp_path / f"{9 - i}.{suffix}", value=i)
    (tmp_path / "empty").mkdir()
    data = load_data(tmp_path, batch_size=2)
    assert data.classes is None and [(tuple(x.shape), y) for x, y in data] == [((2, 3, 4, 6), None)] * 2 + [
        ((1, 3, 4, 6), None)
    ]
    last = list(data)[2][0][0]  # sorted by name: 9.png is last
    assert torch.equal(last, torch.from_numpy(picture(tmp_path / "9.png")).permute(2, 0, 1) / 255)


def test_grayscale_and_modes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    gray = picture(tmp_path / "a.png", mode="L")
    picture(tmp_path / "b.png", mode="RGBA")
    image.open(tmp_path / "b.png").convert("RGB").convert("P").save(tmp_path / "c.png")
    x, _ = next(iter(load_data(tmp_path, grayscale=True)))
    assert x.shape == (3, 1, 4, 6) and torch.equal(x[0, 0], torch.from_numpy(gray) / 255)
    x, _ = next(iter(load_data(tmp_path)))
    assert x.shape == (3, 3, 4, 6) and torch.equal(x[0, 0], x[0, 2])
    image.fromarray(np.full((4, 6), 1000, np.uint16)).save(tmp_path / "d.png")
    with pytest.raises(
        ValueError, match=r"load_data: .*d.png cannot be read as an image \(more than 8 bits per channel"
    ):
        list(load_data(tmp_path))


def test_mean_and_std(tmp_path):
    pixels = picture(tmp_path / "a.png")
    x = load_data(tmp_path, mean=[0.1, 0.2, 0.3], std=(0.5, 1, 2)).example()
    want = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / (
        torch.tensor([0.5, 1, 2])[:, None, None]
    )
    assert torch.equal(x[0], want)
    shifted, plain = load_data(tmp_path, mean=[1, 1, 1]).example(), load_data(tmp_path).example()
    assert torch.equal(shifted, plain - 1)
    assert torch.equal(load_data(tmp_path, std=[0.5] * 3).example(), plain * 2)
    with pytest.raises(ValueError, match=r"load_data: 'mean' must hold 3 numbers .*, got \[0.5\]"):
        load_data(tmp_path, mean=[0.5])
    with pytest.raises(ValueError, match=r"load_data: 'std' must hold 1 numbers .*, got \[1, 1, 1\]"):
        load_data(tmp_path, mean=[0.5], std=[1, 1, 1], grayscale=True)
    with pytest.raises(ValueError, match=r"load_data: 'std' must hold 3 numbers \(std: above 0\), got \[1, 0, 1\]"):
        load_data(tmp_path, std=[1, 0, 1])


@pytest.mark.parametrize("size", [(6, 4), (4, 6), (5, 5), (7, 3), (31, 8), (2, 2)])
def test_image_size(tmp_path, size):
    image = pytest.importorskip("PIL.Image")
    picture(tmp_path / "a.png", size=size)
    x = load_data(tmp_path, image_size=4).example()
    assert x.shape == (1, 3, 4, 4)
    wide, high = (int(4 * s / min(size)) for s in size)
    want = np.asarray(image.open(tmp_path / "a.png").resize((wide, high), image.Resampling.BILINEAR))
    left, top = round((wide - 4) / 2), round((high - 4) / 2)
    assert torch.equal(
        x[0], torch.from_numpy(want[top : top + 4, left : left + 4].copy()).permute(2, 0, 1).float() / 255
    )


def test_images_of_several_sizes(tmp_path):
    picture(tmp_path / "a.png", size=(6, 4))
    picture(tmp_path / "b.png", size=(6, 5))
    data = load_data(tmp_path, batch_size=1)
    assert len(data.example(1)) == 1
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    with pytest.raises(
        ValueError, match=rf"load_data: 'image_size' must be given for \(6, 4\) in {first}, \(6, 5\) in {second}$"
    ):
        list(data)
    assert [x.shape[2:] for x, _ in load_data(tmp_path, batch_size=1, image_size=3)] == [(3, 3)] * 2


def test_images_are_decoded_when_needed(pictures, monkeypatch):
    from PIL import Image

    root, _ = pictures
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, *args: opened.append(path) or real(path, *args))
    data = load_data(root, batch_size=4, image_size=4)
    assert len(data) == 3 and not opened
    batches = iter(data)
    for i in range(1, 4):
        next(batches)
        assert len(opened) == 4 * i
    opened.clear()
    data.example(2)
    assert len(opened) == 2
    opened.clear()
    list(load_data(root, batch_size=4, image_size=4, shard=(1, 3)))
    assert len(opened) == 4
    opened.clear()
    load_data(root)  # the first file tells the size
    assert len(opened) == 1


def test_image_folders_to_refuse(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=rf"load_data: {tmp_path} must hold images or a folder per class, got none"):
        load_data(tmp_path)
    (tmp_path / "class").mkdir()
    with pytest.raises(ValueError, match="got none"):
        load_data(tmp_path)
    picture(tmp_path / "class" / "a.png")
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"load_data: {tmp_path} must hold images or a folder per class, got both"):
        load_data(tmp_path)
    (tmp_path / "class" / "a.png").unlink()
    content = (tmp_path / "a.png").read_bytes()
    for damaged in (b"", b"\x07" * 99, content[:-40], content[:20]):
        (tmp_path / "b.png").write_bytes(damaged)
        data = load_data(tmp_path)
        with pytest.raises(ValueError, match=rf"load_data: {tmp_path}/b.png cannot be read as an image \(.+\)"):
            list(data)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"load_data: Pillow must be installed .*; pip install 'zipfast\[images\]'"):
        load_data(tmp_path)


# ------------------------------------------------------------------------------------------ arrays


def arrays(path, **content):
    np.savez(path / "a.npz", **content)
    return path / "a.npz"


@pytest.mark.parametrize("name", ["x", "inputs", "images"])
@pytest.mark.parametrize("label", ["y", "labels", None])
def test_arrays(tmp_path, name, label):
    x = np.random.default_rng(0).normal(size=(7, 3))
    data = load_data(
        arrays(tmp_path, **{name: x}, **({label: np.arange(7, dtype=np.int16)} if label else {})), batch_size=3
    )
    assert len(data) == 3 and data.classes is None
    got = list(data)
    assert [len(inputs) for inputs, _ in got] == [3, 3, 1]
    assert torch.equal(torch.cat([inputs for inputs, _ in got]), torch.from_numpy(x.astype(np.float32)))
    if label:
        labels = torch.cat([y for _, y in got])
        assert labels.dtype == torch.int64 and labels.tolist() == list(range(7))
    else:
        assert all(y is None for _, y in got)
    got[0][0].zero_()  # a batch is the reader's own
    assert torch.equal(data.example(3), torch.from_numpy(x[:3].astype(np.float32)))
    assert sum(len(inputs) for inputs, _ in load_data(tmp_path / "a.npz", batch_size=2, max_samples=5)) == 5


def test_keyword_arrays(tmp_path):
    tokens = np.arange(12, dtype=np.int32).reshape(4, 3)
    path = arrays(tmp_path, input_ids=tokens, attention_mask=tokens > 2, labels=np.ones((4, 3), np.float64))
    (inputs, labels), (rest, _) = load_data(path, batch_size=3)
    assert list(inputs) == ["input_ids", "attention_mask"] and len(rest["input_ids"]) == 1
    assert inputs["input_ids"].dtype == torch.int64 and inputs["input_ids"].tolist() == tokens[:3].tolist()
    assert inputs["attention_mask"].dtype == torch.bool and labels.dtype == torch.float32
    example = load_data(path).example()
    assert {k: tuple(v.shape) for k, v in example.items()} == {"input_ids": (2, 3), "attention_mask": (2, 3)}


@pytest.mark.parametrize(
    "dtype, got",
    [("f2", "float32"), ("f4", "float32"), (">f8", "float32"), ("i1", "int64"), (">u4", "int64"), ("?", "bool")],
)
def test_array_dtypes(tmp_path, dtype, got):
    x = np.asfortranarray(np.arange(24).reshape(4, 6) % 2).astype(dtype)
    example = load_data(arrays(tmp_path, x=x)).example(4)
    assert example.dtype == getattr(torch, got) and example.tolist() == x.tolist()


def test_pixels(tmp_path):
    pixels = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    want = torch.from_numpy(pixels).float() / 255
    assert torch.equal(load_data(arrays(tmp_path, x=pixels)).example(), want)
    assert torch.equal(load_data(arrays(tmp_path, pixel_values=pixels)).example()["pixel_values"], want)
    (_, labels) = next(iter(load_data(arrays(tmp_path, x=pixels, y=pixels))))
    assert labels.dtype == torch.int64  # a map of classes
    assert load_data(arrays(tmp_path, x=pixels[:, 0, 0])).example().dtype == torch.int64
    shift, scale = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2, 3])
    normal = (want - shift[:, None, None]) / scale[:, None, None]
    for x in (pixels, want.numpy()):
        data = load_data(arrays(tmp_path, x=x), mean=shift.tolist(), std=scale.tolist())
        assert torch.equal(data.example(), normal)
    with pytest.raises(ValueError, match=r"load_data: 'mean' must hold 3 numbers .*, got \[0.5\]"):
        load_data(tmp_path / "a.npz", mean=[0.5])
    for other in ({"x": pixels[0]}, {"x": pixels.astype(int)}, {"pixel_values": pixels}):
        with pytest.raises(ValueError, match=r"'mean' and 'std' must be left out without images .*, got .*a.npz"):
            load_data(arrays(tmp_path, **other), std=[1, 1, 1])


def test_arrays_to_refuse(tmp_path):
    x, y = np.ones((3, 2)), np.ones(3)
    rows = r"a.npz must hold numbers, in arrays with the same number of rows, got "
    for content, message in [
        ({"x": x, "y": np.ones(4)}, rows + r"\{'x': 3, 'y': 4\}"),
        ({"x": x[:0]}, rows + r"\{'x': 0\}"),
        ({"x": np.array(3.0)}, rows + r"\{'x': 'float64'\}"),
        ({"x": x, "names": np.array(["a", "b", "c"])}, rows + r"\{'x': 3, 'names': '<U1'\}"),
        ({"x": x.astype(complex)}, rows + r"\{'x': 'complex128'\}"),
        ({}, rows + r"\{\}"),
        ({"y": y}, r"a.npz must hold x \(or keyword arguments\) and perhaps y, got y"),
        ({"x": x, "images": x}, "got x, images"),
        ({"x": x, "y": y, "labels": y}, "got x, y, labels"),
        ({"inputs": x, "attention_mask": x}, "got inputs, attention_mask"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_data(arrays(tmp_path, **content))


def test_damaged_arrays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = arrays(tmp_path, x=np.arange(999.0))
    content = path.read_bytes()
    plain = tmp_path / "plain.npy"
    np.save(plain, np.ones(3))
    for damaged in (b"", b"\x07" * 99, content[:-60], content[:200], plain.read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"load_data: .*a.npz cannot be read as plain arrays \(.+\)"):
            load_data(path)
    path.write_bytes(content[:400] + b"\xff" + content[401:])
    with pytest.raises(ValueError, match=r"a.npz cannot be read as plain arrays \(Bad CRC"):
        load_data(path)
    arrays(tmp_path, x=np.array([Trap(), 1], dtype=object))
    with pytest.raises(ValueError, match=r"a.npz cannot be read as plain arrays \(Object arrays"):
        load_data(path)
    assert not Path("trap").exists()


# ------------------------------------------------------------------------------------------ Python functions


def test_batches_of_a_function(module):
    name = module(
        "x = torch.arange(10.).reshape(5, 2)\n"
        "loader = lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, 0]), batch_size=2)\n"
        "batches = lambda: [x, (x, 1), [[x]], {'a': x, 'n': 3, 's': torch.tensor(1)}]\n"
    )
    data = load_data(f"{name}:batches")
    assert len(data) == 4 and data.classes is None
    first, second, third, fourth = data
    assert first is second[0] is third[0][0] is fourth["a"] and data.example() is not first
    data = load_data(f"{name}:loader", batch_size=99)
    assert [len(x) for x, _ in data] == [len(x) for x, _ in data] == [2, 2, 1] and len(data) == 3
    assert data.example(1).tolist() == [[0, 1]] and data.example(99).shape == (2, 2)
    assert len(load_data(f"{name}:loader", shard=(1, 2))) == 1


@pytest.mark.parametrize(
    "batch, want", [("x", [0]), ("(x, 1)", [0]), ("[[x], 1]", [0]), ("({'a': x, 'n': 3, 's': x[0]}, x)", None)]
)
def test_example_of_a_function(module, batch, want):
    name = module(f"x = torch.arange(3)\nmake = lambda: [{batch}]")
    example = load_data(f"{name}:make").example(1)
    if want is None:
        assert example["a"].tolist() == [0] and example["n"] == 3 and example["s"].item() == 0
    else:
        assert example.tolist() == want


def test_loader_without_a_length(module):
    name = module(
        "class Stream(torch.utils.data.IterableDataset):\n"
        "    def __iter__(self):\n"
        "        return iter(range(5))\n"
        "make = lambda: torch.utils.data.DataLoader(Stream(), batch_size=2)"
    )
    data = load_data(f"{name}:make")
    assert [b.tolist() for b in data] == [b.tolist() for b in data] == [[0, 1], [2, 3], [4]]
    with pytest.raises(TypeError, match="has no len"):
        len(data)


def test_function_errors(module):
    name = module(
        "def stream():\n    yield 1\n"
        "pairs = lambda: zip([1], [2])\ntensor = lambda: torch.ones(3)\n"
        "mapping = lambda: {}\nnumber = lambda: 3\nempty = lambda: []\ntexts = lambda: ['a']\nhollow = lambda: [[]]\n"
    )
    for function, kind in [
        ("stream", "generator"),
        ("pairs", "zip"),
        ("tensor", "Tensor"),
        ("mapping", "dict"),
        ("number", "int"),
    ]:
        with pytest.raises(
            TypeError, match=rf"load_data: {name}:{function} must return batches to read repeatedly .*, got {kind}"
        ):
            load_data(f"{name}:{function}")
    for function, kind in [("empty", "NoneType"), ("texts", "str"), ("hollow", "list")]:
        with pytest.raises(TypeError, match=rf"data: each batch must be a tensor, .*, got {kind}"):
            load_data(f"{name}:{function}").example()
    with pytest.raises(ValueError, match="example: 'n' must be at least 1, got 0"):
        load_data(f"{name}:empty").example(0)
    with pytest.raises(TypeError, match=rf"load_data: 'none' must be a function or class in '{name}'"):
        load_data(f"{name}:none")
    with pytest.raises(ImportError, match=r"load_data: 'no_such' must be a module that can be imported"):
        load_data("no_such:make")
    options = {"image_size": 4, "grayscale": True, "mean": [1], "std": [1], "max_samples": 3}
    for option, value in options.items():
        with pytest.raises(ValueError, match=rf"load_data: '{option}' must be left out for '{name}:empty', got"):
            load_data(f"{name}:empty", **{option: value})


# ------------------------------------------------------------------------------------------ all kinds


def test_options_and_paths(here):
    arrays(here, x=np.ones((3, 2)))
    for option in ("batch_size", "image_size", "max_samples"):
        with pytest.raises(ValueError, match=rf"load_data: '{option}' must be at least 1, got 0"):
            load_data("a.npz", **{option: 0})
    for shard in ((1, 1), (-1, 2), (0, 0), (2, 1)):
        with pytest.raises(ValueError, match=r"load_data: 'shard' must be \(rank, world\) with 0 <= rank < world, got"):
            load_data("a.npz", shard=shard)
    for option, value in (("image_size", 4), ("grayscale", True)):
        with pytest.raises(ValueError, match=rf"load_data: '{option}' must be left out for 'a.npz', got {value}"):
            load_data("a.npz", **{option: value})
    for spec in ("none", "none.npz", "none/deeper", "a.b:c@d"):
        with pytest.raises(FileNotFoundError, match=rf"load_data: no file or folder at {spec}"):
            load_data(spec)
    Path("a.txt").write_text("")
    with pytest.raises(ValueError, match=r"load_data: 'spec' must be a folder, an .npz or package.*, got 'a.txt'"):
        load_data("a.txt")
    with pytest.raises(TypeError, match="not int"):
        load_data(3)


@pytest.mark.parametrize("kind", ["images", "arrays", "function"])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 9])
def test_shards_partition_the_batches(module, here, kind, world):
    if kind == "images":
        for i in range(10):
            picture(here / "data" / "ab"[i % 2] / f"{i}.png", value=i)
        spec = "data"
    elif kind == "arrays":
        spec = str(arrays(here, x=np.random.default_rng(0).normal(size=(10, 2)), y=np.arange(10)))
    else:
        spec = module("x = torch.randn(10, 2)\nmake = lambda: list(zip(x.split(2), x.split(2)))") + ":make"
    whole = list(load_data(spec, batch_size=2))
    shards = [load_data(spec, batch_size=2, shard=(rank, world)) for rank in range(world)]
    assert [len(s) for s in shards] == [len(list(s)) for s in shards] and sum(map(len, shards)) == len(whole) == 5
    for rank, shard in enumerate(shards):
        for got, want in itertools.zip_longest(shard, whole[rank::world]):
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert torch.equal(shard.example(), whole[0][0])  # also where there is no batch


def test_what_it_reads_is_what_models_take(here):
    arrays(here, x=np.random.default_rng(0).normal(size=(6, 4)), y=np.arange(6))
    model = load_model(MLP, factory_args=SMALL)
    assert [tuple(model(x).shape) for x, _ in load_data("a.npz", batch_size=4)] == [(4, 3), (2, 3)]
