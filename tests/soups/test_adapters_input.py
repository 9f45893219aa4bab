# SPDX-License-Identifier: Apache-2.0
"""Adapters, bases and options that are refused, each in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora import base_state, factors, write
from safetensors.torch import save_file

import zipfast
from zipfast.soups import adapted
from zipfast.soups.adapters import Adapter
from zipfast.soups.mix import layout_of
from zipfast.states import open_state

BAD = {
    "dora": ({"use_dora": True}, r"must be a plain LoRA, got use_dora = True: DoRA divides by the norm"),
    "kind": ({"peft_type": "IA3"}, r"must be a LoRA adapter, got peft_type 'IA3'"),
    "pissa": (
        {"init_lora_weights": "pissa"},
        r"must leave its base as it is, got init_lora_weights 'pissa'; save it with",
    ),
    "experts": (
        {"target_parameters": ["experts.w"]},
        r"got target_parameters = \['experts.w'\]: parameters of experts",
    ),
    "unknown": ({"some_new_thing": 3}, r"got some_new_thing = 3: what it makes of the factors is not known here"),
    "rank": (
        {"r": 3},
        r"is damaged: the factors of 'block.0.wide' must have rank 3, .* got shapes \[2, 3\] and \[5, 2\]",
    ),
    "no rank": ({"r": 0}, r"'r' in .*adapter_config.json must be a whole number above 0, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_adapters_that_are_refused(tmp_path: Path, case: str) -> None:
    config, wanted = BAD[case]
    folder = write(tmp_path / "a", factors(1, 2, ("block.0.wide",)), **config)
    with pytest.raises(ValueError, match=wanted):
        zipfast.uniform_soup([folder])


def test_files_that_are_refused(tmp_path: Path) -> None:
    good = factors(1, 2, ("block.0.wide",))
    folder = write(tmp_path / "magnitude", {**good, "block.0.wide.lora_magnitude_vector": torch.ones(5)})
    with pytest.raises(ValueError, match=r"must hold plain LoRA factors, got '.*lora_magnitude_vector'"):
        open_state(folder)
    half = write(tmp_path / "half", {key: value for key, value in good.items() if "_A" in key})
    with pytest.raises(ValueError, match=r"half is damaged: module 'block.0.wide' must have lora_A and lora_B"):
        open_state(half)
    with pytest.raises(ValueError, match=r"none must hold LoRA factors, got none"):
        open_state(write(tmp_path / "none", {"head.weight": torch.ones(2)}))
    broken = {**good, "block.0.wide.lora_B.weight": good["block.0.wide.lora_B.weight"].clone()}
    broken["block.0.wide.lora_B.weight"][1, 1] = torch.inf
    folder = write(tmp_path / "broken", broken)
    with pytest.raises(ValueError, match=r"NaN or infinity in .*broken, tensor '.*lora_B.weight' at flat index 3"):
        zipfast.uniform_soup([folder, write(tmp_path / "good", good)], out=tmp_path / "soup")
    assert not (tmp_path / "soup").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"adapter: no adapter_config.json in"):
        Adapter(empty)
    (empty / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(
        FileNotFoundError, match=r"must hold adapter_model.safetensors or adapter_model.bin, got neither"
    ):
        open_state(empty)
    (empty / "adapter_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"adapter_config.json must hold a JSON object"):
        open_state(empty)


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    good = write(tmp_path / "a", factors(1, 2, ("block.0.wide",)))
    turned = {"block.0.wide.lora_A.weight": torch.ones(2, 5), "block.0.wide.lora_B.weight": torch.ones(3, 2)}
    other = write(tmp_path / "b", turned, base_model_name_or_path="elsewhere", fan_in_fan_out=True)
    with pytest.raises(ValueError) as found:
        zipfast.uniform_soup([good, other])
    for part in ("uniform_soup: the adapters must fit together, got: 'block.0.wide' maps [3] to [5] in", "[5] to [3] in",
                 "is of the base 'base', ", "of 'elsewhere': say base", "fan_in_fan_out differs in"):  # fmt: skip
        assert part in str(found.value)
    half = write(tmp_path / "h", factors(2, 2, ("block.0.wide",), dtype=torch.float16))
    with pytest.raises(ValueError, match=r"dtypes differ \(float16, float32\): say out_dtype"):
        zipfast.uniform_soup([good, half])
    ranks = write(tmp_path / "r", factors(3, 3, ("block.0.wide",)), r=3)
    with pytest.raises(
        ValueError, match="'separate' must be left out for adapters of other ranks, scales or modules, got 'block"
    ):
        zipfast.uniform_soup([good, ranks], separate=True)
    own = [
        write(tmp_path / str(n), {**factors(n, 2, ("block.0.wide",)), "head.weight": torch.ones(n, 4)}) for n in (1, 2)
    ]
    many = [f"layer.{i}" for i in range(9)]
    for name in ("m", "n"):
        sizes = {
            f"{m}.lora_{x}.weight": torch.ones(*shape)
            for m in many
            for x, shape in (("A", (2, len(name) + 3)), ("B", (3, 2)))
        }
        write(tmp_path / name, sizes if name == "m" else {k: v[..., :2] for k, v in sizes.items()})
    with pytest.raises(ValueError, match=r"'layer.0' maps \[4\] to \[3\] in .*'layer.4' maps .* and 4 more$"):
        zipfast.uniform_soup([tmp_path / "m", tmp_path / "n"])
    with pytest.raises(ValueError, match=r"'base_model.model.head.weight' has several shapes"):
        zipfast.uniform_soup(own)


def test_bases_that_do_not_fit(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", factors(1, 2, ("block.0.wide", "words")))
    base = base_state()
    with pytest.raises(ValueError, match=r"the base must have what the adapters change, but .* lacks 'words.weight'$"):
        zipfast.uniform_soup([folder], base={k: v for k, v in base.items() if k != "words.weight"})
    with pytest.raises(ValueError, match=r"'words.weight' is \[4, 7\], which factors \[4, 2\] and \[2, 7\] do not fit"):
        zipfast.uniform_soup([folder], base={**base, "words.weight": torch.ones(4, 7)})
    biased = write(tmp_path / "b", {**factors(1, 2, ("conv",)), "conv.lora_B.bias": torch.ones(6)}, lora_bias=True)
    with pytest.raises(ValueError, match=r"lacks 'conv.bias', which lora_bias changes"):
        zipfast.uniform_soup([biased], base=base)
    own = write(tmp_path / "c", {**factors(1, 2, ("conv",)), "head.weight": torch.ones(3, 4)})
    with pytest.raises(ValueError, match=r"'head.weight' is \[2, 4\], and \[3, 4\] in an adapter"):
        zipfast.uniform_soup([own], base=base)
    with pytest.raises(ValueError, match=r"lacks 'head.weight'"):
        zipfast.uniform_soup([own], base={k: v for k, v in base.items() if k != "head.weight"})
    with pytest.raises(ValueError, match="'base' must be a whole checkpoint, got the adapter"):
        zipfast.uniform_soup([folder], base=folder)


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    folder, base = write(tmp_path / "a", factors(1, 2)), base_state()
    with pytest.raises(
        ValueError, match=r"uniform_soup: models must be adapters or whole checkpoints, got .*a and model 1; zip"
    ):
        zipfast.uniform_soup([folder, base])
    with pytest.raises(ValueError, match="greedy_soup: 'base' must be left out for whole checkpoints, got"):
        zipfast.greedy_soup([base], lambda state: 0.0, base=base)
    with pytest.raises(ValueError, match="'separate' must be left out for whole checkpoints, got True"):
        zipfast.uniform_soup([base], separate=True)
    with pytest.raises(ValueError, match="'include' must be left out for adapters, got 'x'"):
        zipfast.uniform_soup([folder], include="x")
    with pytest.raises(ValueError, match="'separate' must be left out with a base"):
        zipfast.uniform_soup([folder], base=base, separate=True)
    with pytest.raises(ValueError, match=r"'out' must be a folder for an adapter, got 'soup.safetensors'"):
        zipfast.uniform_soup([folder], out="soup.safetensors")
    with pytest.raises(
        ValueError, match=r"geometry: models must be whole checkpoints here, got the adapter .*uniform_soup and"
    ):
        zipfast.soups.geometry([folder, folder])
    with pytest.raises(ValueError, match="'adapter' must be a folder with a LoRA adapter of PEFT, got state dict"):
        adapted(base, {"w": torch.ones(1)})
    with pytest.raises(ValueError, match="soup: models must be whole checkpoints here"):
        layout_of([open_state(folder)])


@pytest.mark.parametrize("said", [True, None])  # transformers 4 leaves its default, True, out
def test_a_base_whose_output_is_its_words(tmp_path: Path, said: bool | None) -> None:
    base = tmp_path / "base"
    base.mkdir()
    words = torch.randn(7, 4)
    save_file({"embed_tokens.weight": words, "block.0.wide.weight": torch.randn(5, 3)}, base / "model.safetensors")
    config = {"architectures": ["TinyForCausalLM"], **({} if said is None else {"tie_word_embeddings": said})}
    (base / "config.json").write_text(json.dumps(config))
    plain = write(tmp_path / "plain", factors(1, 2, ("block.0.wide",)))
    lora = {"embed_tokens.lora_embedding_A": torch.randn(2, 7), "embed_tokens.lora_embedding_B": torch.randn(4, 2)}
    for name, tensors in (
        ("factors", lora),
        ("whole", {**factors(1, 2, ("block.0.wide",)), "embed_tokens.weight": words}),
        ("head", {**factors(1, 2, ("block.0.wide",)), "lm_head.weight": words}),
    ):
        changed = write(tmp_path / name, tensors)
        wanted = (
            rf"must keep its output layer apart .*{name} changes '\w+.weight' and .*base.* ties them; soup the adap"
        )
        with pytest.raises(ValueError, match=wanted):
            zipfast.uniform_soup([changed], base=base, out=tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        assert zipfast.uniform_soup([changed]).state is not None
    for architecture, tied in (("TinyForCausalLM", False), ("TinyForSequenceClassification", True)):
        config = {"architectures": [architecture], "tie_word_embeddings": tied}
        (base / "config.json").write_text(json.dumps(config))
        merged = zipfast.uniform_soup([tmp_path / "factors"], base=base).state
        assert merged is not None and not torch.equal(merged["embed_tokens.weight"], words)
    (base / "config.json").write_text(json.dumps({"architectures": ["TinyForCausalLM"]}))
    assert zipfast.uniform_soup([plain], base=base).state is not None


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    for folder, size in ((base, 1), (other, 2)):
        folder.mkdir()
        save_file(base_state(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"size": size, "dtype": "float32"}))
        (folder / "trainer_state.json").write_text(str(size))
    adapter = write(tmp_path / "a", factors(1, 2, ("block.0.wide",)))
    zipfast.uniform_soup([adapter], base=base, out=other)  # the base's config, not that of what was there
    assert json.loads((other / "config.json").read_text())["size"] == 1
    assert (other / "trainer_state.json").read_text() == "2"
    zipfast.uniform_soup([adapter], base=base, out=tmp_path / "half", out_dtype=torch.float16)
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == {"size": 1, "dtype": "float16"}
    assert not (tmp_path / "half" / "trainer_state.json").exists()
    before = (other / "model.safetensors").read_bytes(), (adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"'out' must be free for an adapter, got .*other with model.safetensors of a"):
        zipfast.uniform_soup([adapter], out=other)
    for given in ({"base": base}, {}):
        sources = [adapter] if given else [base, base]
        with pytest.raises(ValueError, match=r"'out' must be free for a whole model, got .*a with adapter_config.json"):
            zipfast.uniform_soup(sources, out=adapter, **given)
    assert before == ((other / "model.safetensors").read_bytes(), (adapter / "adapter_model.safetensors").read_bytes())
