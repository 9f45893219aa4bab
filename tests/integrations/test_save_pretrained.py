# SPDX-License-Identifier: Apache-2.0
"""Folders that from_pretrained loads: merged models and soups, tied and sharded, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import zipfast
from zipfast import zoo
from zipfast.pretrained import companions, copy_companions, folder_of, publish, save_pretrained
from zipfast.states import open_state

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None}
WORDS = 30
#: an empty file, or the smallest that its reader would take; not one of them is read here
BESIDE = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "preprocessor_config.json", "spiece.model")


def made(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    t, words = transformers, {"vocab_size": WORDS, "max_position_embeddings": 16}
    if kind == "resnet":
        config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=4)
        return t.ResNetForImageClassification(config).eval()
    if kind == "vit":
        config = t.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=4)
        return t.ViTForImageClassification(config).eval()
    if kind == "bert":
        return t.BertForSequenceClassification(t.BertConfig(**SIZES, **words, num_labels=4)).eval()
    if kind == "gpt2":
        config = t.GPT2Config(vocab_size=WORDS, n_embd=12, n_layer=2, n_head=3, n_positions=16, **NO_SPECIAL)
        return t.GPT2LMHeadModel(config).eval()
    assert kind in ("llama", "tied llama")
    tied = {"tie_word_embeddings": kind != "llama", "num_key_value_heads": 3}
    config = t.LlamaConfig(**{**SIZES, "num_attention_heads": 6}, **words, **tied, **NO_SPECIAL)
    return t.LlamaForCausalLM(config).eval()


KINDS = ("resnet", "vit", "bert", "gpt2", "llama", "tied llama")


def inputs(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if kind in ("resnet", "vit"):
        return {"pixel_values": torch.randn(4, 3, *((8, 8) if kind == "vit" else (32, 32)), generator=generator)}
    return {"input_ids": torch.randint(WORDS, (4, 6), generator=generator)}


def plain_forward(model: nn.Module) -> nn.Module:
    """Without a cache of past tokens, which the export does not take."""
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model


def logits(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


def merged_of(kind: str) -> zipfast.Merged:
    data = [inputs(kind, seed) for seed in range(3)]
    models = [plain_forward(made(kind, seed)) for seed in range(2)]
    return zipfast.merge(models, (), data, example_kwargs=data[0])


@pytest.mark.parametrize("kind", KINDS)
def test_merged_models_load(kind: str, tmp_path: Path) -> None:
    merged = merged_of(kind)
    names = merged.save_pretrained(tmp_path / "merged", metadata={"note": "mine"})
    assert {"config.json", "model.safetensors", "zipfast.json"} <= set(names)
    loaded = type(merged.module).from_pretrained(tmp_path / "merged").eval()
    given = inputs(kind, 9)
    assert torch.equal(logits(loaded, given), logits(merged.module, given))
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, merged.state_dict[key]), key
    facts = json.loads((tmp_path / "merged" / "zipfast.json").read_text())
    assert facts["note"] == "mine" and facts["options"]["method"] == "zip" and facts["plan"]
    auto = transformers.AutoModel.from_pretrained(tmp_path / "merged")  # by its name alone
    assert auto.config.architectures == [type(merged.module).__name__]


def test_ties_stay_ties(tmp_path: Path) -> None:
    merged_of("tied llama").save_pretrained(tmp_path / "merged")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with open_state(tmp_path / "merged") as written:
        assert "lm_head.weight" not in written.entries  # once in the file


def test_shards_and_what_was_there(tmp_path: Path) -> None:
    merged, given = merged_of("bert"), inputs("bert", 9)
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for size in ("6KB", "1GB", "4KB"):  # each in place of the one before
        names = merged.save_pretrained(folder, max_shard_size=size)
        assert ("model.safetensors" in names) == (size == "1GB") == ("model.safetensors.index.json" not in names)
        there = {file.name for file in folder.iterdir()}
        assert there == {*names, "notes.txt"} and (folder / "notes.txt").read_text() == "mine"
        loaded = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
        assert torch.equal(logits(loaded, given), logits(merged.module, given))


def saved(tmp_path: Path, kind: str = "bert", count: int = 2, **options: Any) -> list[Path]:
    folders = [tmp_path / f"run-{seed}" for seed in range(count)]
    for seed, folder in enumerate(folders):
        made(kind, seed).save_pretrained(folder, **options)
        for name in BESIDE:
            (folder / name).write_text(f"{name} of run {seed}")
        for name in ("optimizer.pt", "README.md", "modeling_mine.py", "trainer_state.json"):
            (folder / name).write_text("not to be taken along")
    return folders


def test_what_prepares_the_input_is_copied(tmp_path: Path) -> None:
    folders = saved(tmp_path)
    models = [plain_forward(transformers.BertForSequenceClassification.from_pretrained(f)) for f in folders]
    data = [inputs("bert", seed) for seed in range(2)]
    merged = zipfast.merge(models, (), data, example_kwargs=data[0])
    names = merged.save_pretrained(tmp_path / "merged")  # the folder that the first came from
    assert {*BESIDE, "config.json", "model.safetensors", "zipfast.json"} == set(names)
    assert (tmp_path / "merged" / "vocab.txt").read_text() == "vocab.txt of run 0"
    merged.save_pretrained(tmp_path / "other", source=folders[1])
    assert (tmp_path / "other" / "vocab.txt").read_text() == "vocab.txt of run 1"

    class Processor:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("given")
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "one.jinja").write_text("template")

    for _ in range(2):  # the second time over the first
        names = merged.save_pretrained(tmp_path / "given", processor=Processor())
        assert "vocab.txt" not in names and (tmp_path / "given" / "tokenizer.json").read_text() == "given"
        assert (tmp_path / "given" / "additional_chat_templates" / "one.jinja").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_soups_load(kind: str, tmp_path: Path) -> None:
    folders = saved(tmp_path, kind)
    zipfast.uniform_soup(folders, out=tmp_path / "soup")
    loaded = type(made(kind, 0)).from_pretrained(tmp_path / "soup").eval()
    models = [type(loaded).from_pretrained(folder) for folder in folders]
    want = type(loaded).from_pretrained(folders[0])
    soup = zipfast.uniform_soup(models).state
    assert soup is not None
    want.load_state_dict(soup)
    assert torch.equal(logits(loaded, inputs(kind)), logits(want.eval(), inputs(kind)))
    assert {file.name for file in (tmp_path / "soup").iterdir()} >= {*BESIDE, "config.json", "model.safetensors"}
    zipfast.uniform_soup([model.eval() for model in models], out=tmp_path / "modules")  # by themselves
    again = type(loaded).from_pretrained(tmp_path / "modules").eval()
    assert torch.equal(logits(again, inputs(kind)), logits(loaded, inputs(kind)))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("soup", "modules")]
    assert configs[0] == configs[1]
    assert not (tmp_path / "soup" / "optimizer.pt").exists() and not (tmp_path / "soup" / "modeling_mine.py").exists()


def test_a_greedy_soup_of_shards_and_files_loads(tmp_path: Path) -> None:
    folders = saved(tmp_path, "gpt2", 3, max_shard_size="8KB")
    soup = zipfast.greedy_soup(folders, lambda state: 1.0, out=tmp_path / "soup", accept="ge")
    assert len(soup.ingredients) == 3
    transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "soup")
    files = [folder / "model.safetensors" for folder in saved(tmp_path / "files", "gpt2")]
    zipfast.uniform_soup(files, out=tmp_path / "again")  # a file that is the weights of such a folder
    transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again")
    zipfast.uniform_soup([{"w": torch.ones(2)}] * 2, out=tmp_path / "plain")
    assert [file.name for file in (tmp_path / "plain").iterdir()] == ["model.safetensors"]


def test_the_config_says_the_dtype(tmp_path: Path) -> None:
    folders = saved(tmp_path, "vit")
    zipfast.uniform_soup(folders, out=tmp_path / "soup", out_dtype=torch.bfloat16)
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "soup", torch_dtype="auto")
    assert loaded.dtype == torch.bfloat16
    entries = json.loads((tmp_path / "soup" / "config.json").read_text())
    assert {entries[name] for name in ("dtype", "torch_dtype") if name in entries} == {"bfloat16"}
    (folders[0] / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"save_pretrained: .*config.json cannot be read as a JSON object \("):
        zipfast.uniform_soup(folders, out=tmp_path / "broken", out_dtype=torch.bfloat16)
    assert not (tmp_path / "broken").exists()


def test_failures_leave_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("vit", 0)
    save_pretrained(model, tmp_path / "net")
    before = {file.name: file.read_bytes() for file in (tmp_path / "net").iterdir()}

    def fail(folder: Path, **_: Any) -> None:
        (Path(folder) / "model.safetensors").write_text("half")
        raise OSError("no room")

    monkeypatch.setattr(model, "save_pretrained", fail)
    for folder in ("net", "new"):
        with pytest.raises(OSError, match="no room"):
            save_pretrained(model, tmp_path / folder)
    assert {file.name: file.read_bytes() for file in (tmp_path / "net").iterdir()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"'model' must be a model of transformers, got a Sequential; .* save"):
        save_pretrained(zoo.mlp(4, [5], 2), tmp_path / "net")
    with pytest.raises(FileNotFoundError, match=r"save_pretrained: 'source' must be a folder with config.json, got"):
        save_pretrained(made("vit", 0), tmp_path / "net", source=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file: it is a file; give a folder"):
        save_pretrained(made("vit", 0), tmp_path / "file")
    data = [torch.randn(8, 4)]
    nets = [zoo.mlp(4, [8, 8], 3) for _ in range(2)]
    partial = zipfast.merge(nets, (data[0],), data, stop="1")
    with pytest.raises(TypeError, match=r"must be one whole network, got a MultiHead, .* zipfast.MultiHead.load"):
        partial.save_pretrained(tmp_path / "net")
    ensemble = zipfast.merge(nets, (data[0],), data, method="ensemble")
    with pytest.raises(TypeError, match="must be one whole network, got a LogitEnsemble"):
        ensemble.save_pretrained(tmp_path / "net")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file"]


def test_files(tmp_path: Path) -> None:
    assert companions(tmp_path) == [] and folder_of(tmp_path) is None and folder_of("model 0") is None
    (tmp_path / "config.json").write_text("{}")
    assert folder_of(tmp_path) == folder_of(tmp_path / "model.safetensors") == tmp_path
    assert folder_of(tmp_path / "epoch-1.safetensors") is None
    assert copy_companions(tmp_path, tmp_path) == []
    names = publish(tmp_path / "new", lambda folder: (folder / "a.txt").write_text("a"))
    assert names == ["a.txt"]


@pytest.mark.parametrize(
    "name, framework",
    [("tf_model.h5", "TensorFlow"), ("flax_model.msgpack", "Flax"), ("model.onnx", "ONNX"), ("q4.gguf", "llama.cpp")],
)
def test_weights_of_other_frameworks(name: str, framework: str, tmp_path: Path) -> None:
    folder = tmp_path / "net"
    transformers.ViTForImageClassification(made("vit", 0).config).config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["ViTForImageClassification"]}))
    (folder / name).write_bytes(b"\0")
    for given in (folder, folder / name):
        with pytest.raises(
            (FileNotFoundError, ValueError), match=rf"open_state: .*got {name} of {framework}; save the model from"
        ):
            open_state(given)
    with pytest.raises(
        FileNotFoundError, match=rf"load_model: no model.safetensors .*, but {name} of {framework}; save"
    ):
        zipfast.ranking.load_candidate(str(folder))


def test_out_may_be_a_folder(tmp_path: Path) -> None:
    from zipfast.commands.zip import _check_out

    folders = saved(tmp_path, "vit")
    models = [zipfast.ranking.load_candidate(str(folder)) for folder in folders]
    data = [inputs("vit", seed)["pixel_values"] for seed in range(2)]
    merged = zipfast.merge(models, (data[0],), data, out=tmp_path / "merged-1.0")
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "merged-1.0").eval()
    assert torch.equal(logits(loaded, inputs("vit", 9)), logits(merged.module, inputs("vit", 9)))
    assert (
        tmp_path / "merged-1.0" / "vocab.txt"
    ).read_text() == "vocab.txt of run 0"  # of the folder it was loaded from
    facts = json.loads((tmp_path / "merged-1.0" / "zipfast.json").read_text())
    assert len(facts["options"]["inputs"]) == 2
    for name in ("merged.pt", "merged.bin"):
        with pytest.raises(ValueError, match=rf"save: 'path' must end in .safetensors, got '.*{name}'"):
            zipfast.merge(models, (data[0],), data, out=tmp_path / name)
    with pytest.raises(ValueError, match=r"save: 'path' must end in .safetensors, got '.*plain'"):
        zipfast.merge([zoo.mlp(4, [5], 2)] * 2, (torch.ones(2, 4),), [torch.ones(2, 4)], out=tmp_path / "plain")
    with pytest.raises(OSError, match=r"cannot write .*README.md: it is a file; give a folder"):
        zipfast.merge(models, (data[0],), data, out=folders[0] / "README.md")
    args = SimpleNamespace(out=str(tmp_path / "cli"), method="zip", start=None, stop=None, sweep=None)
    _check_out(args, models, (), {})
    args.method = "ensemble"
    with pytest.raises(ValueError, match=r"zip: 'out' must end in .safetensors for a whole model"):
        _check_out(args, models, (), {})


def test_a_soup_of_folders_is_scored_under_the_names_of_files(tmp_path: Path) -> None:
    folders = saved(tmp_path, "vit")
    batch = inputs("vit", 5)["pixel_values"]
    models = [transformers.ViTForImageClassification.from_pretrained(folder).eval() for folder in folders]
    batches = [(batch, logits(models[1], {"pixel_values": batch}).argmax(-1))]
    evaluator = zipfast.soups.Evaluator(models[0], batches)
    before = torch.get_rng_state()
    soup = zipfast.greedy_soup(folders, evaluator, out=tmp_path / "soup")
    assert torch.equal(torch.get_rng_state(), before)
    assert soup.ingredients[0] == 1 and soup.scores[1] == soup.score == 100.0 and soup.scores[0] < 100.0
    state = open_state(folders[0]).load()
    evaluator.load(state)
    loaded = transformers.ViTForImageClassification.from_pretrained(folders[0])
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in evaluator.model.state_dict().items())
    for changed in (
        {key: value for key, value in state.items() if key != "classifier.weight"},
        state | {"other": torch.zeros(1)},
        state | {"classifier.weight": torch.zeros(3, 12)},
    ):
        with pytest.raises(ValueError, match=r"Evaluator: the weights must fit ViT\w+, got ones that lack vit"):
            evaluator.load(changed)
