# SPDX-License-Identifier: Apache-2.0
"""Small random Llama-style checkpoints with a tokenizer, made without a network."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import torch

WORDS = 31


def llama(seed: int, **changes):
    """A LlamaForCausalLM with two layers and grouped queries; weights large enough for outputs to depend on inputs."""
    import transformers

    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": WORDS + 1, "max_position_embeddings": 64, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for value in model.parameters():
            _ = value.normal_(std=0.4) if value.dim() > 1 else value.uniform_(0.5, 1.5)
    return model


def save(model, folder: Path) -> None:
    """With a tokenizer of whole words, w0 to w30."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(WORDS)} | {"<unk>": WORDS}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def text(path: Path, words: int, seed: int) -> None:
    own = random.Random(seed)
    path.write_text(" ".join(f"w{own.randrange(WORDS)}" for _ in range(words)))


def near(model, seed: int, by: float):
    """A copy with noise."""
    import copy

    found, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in found.parameters():
            value += by * torch.randn(value.shape, generator=generator)
    return found


def permuted(model):
    """A copy that computes the same with every feature space in another order."""
    import copy

    import zipfast
    from zipfast.merging import permute, random_permutations

    found = copy.deepcopy(model)
    found.config.use_cache = False
    plan = zipfast.find_spaces(found, (), {"input_ids": torch.arange(16).view(2, 8)}).plan
    found.load_state_dict(permute(plan, random_permutations(plan, 1), model.state_dict()))
    found.config.use_cache = model.config.use_cache
    return found


def answers(folder: Path, length: int = 9) -> torch.Tensor:
    """Logits of the model in a folder for fixed words."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    words = torch.randint(WORDS, (3, length), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(words).logits.double()


def copy_folder(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
