# SPDX-License-Identifier: Apache-2.0
"""What stands for the user's own models and data when the code of a page runs, and how its trainings are shortened.

For README.md; other pages say theirs themselves, in ``<!-- setup ... -->`` comments.
"""

from __future__ import annotations

README = """
import os
import torch
from torch import nn
import zipfast
from zipfast import zoo


def build_model():
    return zoo.mlp(64, (32,), 3)


x, labels = torch.randn(120, 64), torch.arange(120) % 3
model_a, model_b = build_model(), build_model()
example_batch = x[:4]
loader = list(zip(x.split(40), labels.split(40)))
features = x
train_batches, validation_batches, test_batches = loader[:1], loader[1:2], loader[2:]
for i in (1, 2):
    zipfast.checkpoint.save(f"run-{i}.safetensors", build_model().state_dict())
os.mkdir("run-3")
zipfast.checkpoint.save("run-3/model.safetensors", build_model().state_dict())


def held_out_accuracy(state):
    model = build_model()
    model.load_state_dict(state)
    return float((model(x).argmax(1) == labels).float().mean())
"""
SETUP = {"README.md": README}

# page -> what its code says -> what the tests run instead
NUMBERS = {
    "README.md": {"iterations=2500": "iterations=20", "levels=20": "levels=2"},
    "docs/tickets.md": {"iterations=1500": "iterations=60"},
}

# page -> start of a command -> what is added where the page runs it
OPTIONS = {
    "docs/tickets.md": {
        "ticket run": ["--iterations", "30", "--every", "15", "--seeds", "0,1", "--quiet"],
        "ticket": ["--quiet"],
    }
}
