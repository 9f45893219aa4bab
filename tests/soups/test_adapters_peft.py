# SPDX-License-Identifier: Apache-2.0
"""Soups of adapters that PEFT saved, against what PEFT merges; tests/check/mergekit_env.py has an environment with PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import zipfast


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory):
    """A Llama on disk and adapters of several kinds, trained by nobody but filled with noise, saved by PEFT."""
    peft, t = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llamas")
    torch.manual_seed(0)
    config = t.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=32, bos_token_id=None, eos_token_id=None, attention_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    t.LlamaForCausalLM(config).save_pretrained(folder / "base")
    kinds = {
        "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "b": {"r": 2, "use_rslora": True, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
        "c": {"r": 2, "target_modules": r".*layers\.0.*(q|v)_proj", "rank_pattern": {"v_proj": 3},
              "alpha_pattern": {"layers.0.self_attn.v_proj": 16}},
        "d": {"r": 2, "target_modules": ["q_proj"], "lora_bias": True},
        "e": {"r": 2, "target_modules": ["q_proj"], "bias": "lora_only", "modules_to_save": ["lm_head"]},
        "f": {"r": 3, "target_modules": ["q_proj"], "bias": "lora_only", "modules_to_save": ["lm_head"]},
    }  # fmt: skip
    for i, (name, kind) in enumerate(kinds.items()):
        torch.manual_seed(i + 1)
        model = t.LlamaForCausalLM.from_pretrained(folder / "base")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **kind))
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value += 0.3 * torch.randn(value.shape)
        model.save_pretrained(folder / name, save_embedding_layers=False)
    return folder


def merged_by_peft(folder: Path, name: str) -> dict[str, Tensor]:
    import peft
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder / "base").double()
    model = peft.PeftModel.from_pretrained(model, folder / name).double()
    return {key: value.double() for key, value in model.merge_and_unload().state_dict().items()}


def logits(model) -> Tensor:
    words = torch.arange(24).view(3, 8)
    with torch.no_grad():
        return model.eval()(words).logits.double()


@pytest.mark.parametrize("names", ["ab", "abc", "ad", "ef", "bc"])
def test_soups_are_what_peft_merges(llamas: Path, tmp_path: Path, names: str) -> None:
    import peft
    import transformers

    parts = [merged_by_peft(llamas, name) for name in names]
    want = {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}
    folders = [llamas / name for name in names]
    cls = transformers.LlamaForCausalLM
    truth = cls.from_pretrained(llamas / "base").double()
    truth.load_state_dict(want)
    # as an adapter, loaded by PEFT
    zipfast.uniform_soup(folders, out=tmp_path / "soup")
    loaded = peft.PeftModel.from_pretrained(cls.from_pretrained(llamas / "base"), tmp_path / "soup")
    torch.testing.assert_close(logits(loaded), logits(truth), rtol=1e-4, atol=1e-5)
    # merged into the base, loaded by transformers
    soup = zipfast.uniform_soup(folders, base=llamas / "base", out=tmp_path / "whole")
    assert soup.path == str(tmp_path / "whole")
    whole = cls.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(whole), logits(truth), rtol=1e-4, atol=1e-5)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(value.double(), want[key], rtol=1e-5, atol=1e-6, msg=key)


def test_pefts_own_cat_is_the_same(llamas: Path) -> None:
    import peft
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(llamas / "base")
    model = peft.PeftModel.from_pretrained(model, llamas / "a", adapter_name="a")
    model.load_adapter(llamas / "b", adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.25, 0.75], "cat", combination_type="cat")
    model.set_adapter("cat")
    soup = zipfast.uniform_soup([llamas / "a", llamas / "b"], weights=[1, 3], base=llamas / "base").state
    whole = transformers.LlamaForCausalLM.from_pretrained(llamas / "base")
    whole.load_state_dict(soup)
    torch.testing.assert_close(logits(whole), logits(model), rtol=1e-4, atol=1e-5)


def test_gpt2_stores_weights_as_input_by_output(tmp_path: Path) -> None:
    peft, t = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = t.GPT2Config(
        vocab_size=32, n_embd=12, n_layer=2, n_head=3, n_positions=16, bos_token_id=None, eos_token_id=None
    )  # fmt: skip
    t.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    merged = []
    for name in "ab":
        model = t.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules=["attn.c_proj", "c_attn"], fan_in_fan_out=True
        )
        model = peft.get_peft_model(model, settings)
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value += 0.3 * torch.randn(value.shape)
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        merged.append(model.merge_and_unload().state_dict())
    soup = zipfast.uniform_soup([tmp_path / "a", tmp_path / "b"], base=tmp_path / "base", out=tmp_path / "whole")
    assert soup.weights == (0.5, 0.5)
    whole = t.GPT2LMHeadModel.from_pretrained(tmp_path / "whole").state_dict()
    for key, value in whole.items():  # c_proj is square: only the config says how it lies
        torch.testing.assert_close(value, (merged[0][key] + merged[1][key]) / 2, rtol=1e-5, atol=1e-6, msg=key)
