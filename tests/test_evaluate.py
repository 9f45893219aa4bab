# SPDX-License-Identifier: Apache-2.0
"""Accuracy: by hand, for every form of batch and answer, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zipfast
from zipfast import zoo
from zipfast.evaluate import accuracy

EYE = torch.eye(4)


class Same(nn.Module):
    """Answers with its input, one score per class."""

    def forward(self, x):
        return x


class Several(nn.Module):
    """A list of answers, as of several heads."""

    def __init__(self, *answers):
        super().__init__()
        self.answers = answers

    def forward(self, x):
        return [answer(x) for answer in self.answers]


@pytest.mark.parametrize(
    "labels, want",
    [([0, 1, 2, 3], 100.0), ([0, 1, 2, 0], 75.0), ([1, 0, 3, 3], 25.0), ([3, 2, 1, 0], 0.0)],
)
def test_by_hand(labels, want):
    assert accuracy(Same(), [(EYE, torch.tensor(labels))]) == want


def test_every_sample_counts_once_however_they_are_batched():
    labels = torch.tensor([0, 1, 0])
    batches = [(EYE[:1], labels[:1]), (EYE[1:3], labels[1:])]  # 1 of 1, 1 of 2
    assert accuracy(Same(), batches) == pytest.approx(200 / 3)
    assert accuracy(Same(), iter(batches)) == pytest.approx(200 / 3)
    assert accuracy(Same(), [[x, y, "more"] for x, y in batches]) == pytest.approx(200 / 3)


def test_equal_scores_are_those_of_the_first_class():
    assert accuracy(Same(), [(torch.zeros(2, 3), torch.tensor([0, 1]))]) == 50.0


def test_one_answer_for_each_position():
    """Tokens: scores [N, L, C], labels [N, L]."""
    x = torch.stack([EYE, EYE.flip(0)])
    labels = torch.tensor([[0, 1, 2, 3], [3, 2, 0, 1]])
    assert accuracy(Same(), [(x, labels)]) == 75.0
    assert accuracy(Same(), [({"x": x}, labels)]) == 75.0


class Masked(nn.Module):
    """The sum of the tokens that a mask leaves, in a record as Hugging Face's models answer."""

    def forward(self, tokens, mask):
        return {"loss": torch.tensor(0.0), "logits": (tokens * mask[..., None]).sum(1)}


def test_keyword_arguments_and_masks():
    tokens = torch.stack([EYE[[0, 1, 1]], EYE[[2, 3, 3]]])
    mask = torch.tensor([[1.0, 0, 0], [1, 1, 1]])
    batch = {"tokens": tokens, "mask": mask}
    assert accuracy(Masked(), [(batch, torch.tensor([0, 3]))]) == 100.0
    assert accuracy(Masked(), [({**batch, "mask": torch.ones(2, 3)}, torch.tensor([0, 3]))]) == 50.0


def test_hugging_face_record():
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    net = hf.BertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.arange(40).reshape(8, 5) % 20, "attention_mask": torch.ones(8, 5, dtype=torch.int64)}
    with torch.no_grad():
        said = net(**batch).logits.argmax(-1)
    labels = torch.where(torch.arange(8) < 6, said, (said + 1) % 3)
    assert accuracy(net, [(batch, labels)]) == 75.0


def test_heads():
    """The mean of all, as of an ensemble, or one of them."""
    net = Several(lambda x: x, lambda x: 3 * x.flip(1), lambda x: x)
    labels = torch.arange(4)
    assert accuracy(net, [(EYE, labels)], head=0) == 100.0
    assert accuracy(net, [(EYE, labels)], head=1) == 0.0
    assert accuracy(net, [(EYE, labels)]) == 0.0  # the second one is the loudest
    assert accuracy(net, [(EYE, 3 - labels)]) == 100.0
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=rf"accuracy: 'head' must be in \[0, 3\), got {wrong}"):
            accuracy(net, [(EYE, labels)], head=wrong)


def test_heads_of_different_sizes():
    net = Several(lambda x: x, lambda x: x[:, :2])
    labels = torch.tensor([0, 1, 2, 3])
    assert accuracy(net, [(EYE, labels)], head=0) == 100.0
    assert accuracy(net, [(EYE[:2], labels[:2])], head=1) == 100.0
    with pytest.raises(ValueError, match="'head' must say which head the labels belong to, as they have 4, 2 classes"):
        accuracy(net, [(EYE, labels)])
    with pytest.raises(ValueError, match=r"in \[0, 2\), the classes of head 1, got 0 to 3; are they labels of another"):
        accuracy(net, [(EYE, labels)], head=1)


def test_merged_heads_and_ensembles():
    torch.manual_seed(0)
    models = [zoo.mlp(8, (6,), 3), zoo.mlp(8, (6,), 3)]
    data = [torch.randn(16, 8) for _ in range(3)]
    net = zipfast.merge(models, (data[0],), data, stop="2").module
    with torch.no_grad():
        outputs = [net(x) for x in data]
    for m in range(2):
        labelled = [(x, output[m].argmax(1)) for x, output in zip(data, outputs)]
        assert accuracy(net, labelled, head=m) == 100.0
    assert accuracy(net, [(x, (o[0] + o[1]).argmax(1)) for x, o in zip(data, outputs)]) == 100.0
    ensemble = zipfast.LogitEnsemble(models)
    with torch.no_grad():
        labelled = [(x, (models[0](x) + models[1](x)).argmax(1)) for x in data]
    assert accuracy(ensemble, labelled) == 100.0
    unlike = zipfast.LogitEnsemble([models[0], zoo.mlp(8, (6,), 4)])
    with torch.no_grad():
        assert accuracy(unlike, [(x, unlike(x)[1].argmax(1)) for x in data], head=1) == 100.0


def test_a_model_with_one_answer_has_one_head():
    batches = [(EYE, torch.arange(4))]
    assert accuracy(Same(), batches, head=0) == 100.0
    with pytest.raises(ValueError, match="'head' must be None or 0 for a model with one answer, got 1"):
        accuracy(Same(), batches, head=1)


@pytest.mark.parametrize("labels, seen", [([0, 4], "0 to 4"), ([-1, 3], "-1 to 3"), ([-100, 900], "-100 to 900")])
def test_labels_out_of_range(labels, seen):
    message = rf"accuracy: labels must be in \[0, 4\), the classes of the model, got {seen}; are they labels of another"
    with pytest.raises(ValueError, match=message):
        accuracy(Same(), [(EYE[:2], torch.tensor(labels))])


@pytest.mark.parametrize("shape", [(4, 1), (2,), (4, 4), ()])
def test_labels_of_another_shape(shape):
    """Compared with the answers they would be broadcast: [4, 1] with [4] would count 16 times."""
    with pytest.raises(ValueError, match=rf"labels must have the shape \[4\] of the answers, got \{list(shape)}"):
        accuracy(Same(), [(EYE, torch.zeros(shape, dtype=torch.int64))])


@pytest.mark.parametrize("batch", [EYE, (EYE,), {"x": EYE}, (EYE, None), (EYE, [0, 1, 2, 3])])
def test_no_labels(batch):
    with pytest.raises(ValueError, match="accuracy: 'batches' must hold labels beside the inputs, got none"):
        accuracy(Same(), [batch])


@pytest.mark.parametrize("batches", [[], [(EYE[:0], torch.zeros(0, dtype=torch.int64))]])
def test_nothing_to_count(batches):
    with pytest.raises(ValueError, match="accuracy: 'batches' must hold at least one sample, got none"):
        accuracy(Same(), batches)


def test_model_and_gradients_stay_as_they_are():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    accuracy(net, [(EYE, torch.arange(4))])
    assert net.training and net[1].training and all(p.grad is None for p in net.parameters())
