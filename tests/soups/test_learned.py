# SPDX-License-Identifier: Apache-2.0
"""Learned soups against autograd through the mixed weights: derivatives, whole trajectories, files, ties, errors."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zipfast import checkpoint
from zipfast.soups import LearnedSoup, learned

MAPPING = {"embed|out": "words", r"hidden\.weight": "inner"}
GRANULARITIES: list[str | dict[str, str]] = ["model", "tensor", MAPPING]
MODELS = 3
STATISTICS = ("norm.running_mean", "norm.running_var")


class Net(nn.Module):
    """Words -> classes: the output embedding is the input's, batch norm has statistics, the head is frozen."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(7, 4)
            self.norm = nn.BatchNorm1d(4)
            self.hidden = nn.Linear(4, 4)
            self.out = nn.Linear(4, 7, bias=False)
            self.head = nn.Linear(7, 3)
            self.norm.running_mean.copy_(torch.randn(4))
            self.norm.running_var.copy_(torch.rand(4) + 0.5)
        self.out.weight = self.embed.weight
        self.head.requires_grad_(False)
        self.double()

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.out(self.hidden(self.norm(self.embed(words))).tanh()))


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(9)
    return [(torch.randint(7, (8,), generator=draw), torch.randint(3, (8,), generator=draw)) for _ in range(count)]


@functools.cache
def memory() -> list[dict[str, Tensor]]:
    return [Net(seed).state_dict() for seed in range(1, MODELS + 1)]


def files(folder: Path, ending: str = "safetensors") -> list[Path]:
    found = []
    for i, state in enumerate(memory()):
        path = folder / f"{i}.{ending}"
        checkpoint.save(path, state) if ending == "safetensors" else torch.save(state, path)
        found.append(path)
    return found


def new(granularity: Any = "model", sources: Any = None, **options: Any) -> LearnedSoup:
    return LearnedSoup(Net(), sources or memory(), granularity=granularity, exclude="^head", **options)


def group(key: str, granularity: Any) -> str:
    if isinstance(granularity, Mapping):
        words = key in ("embed.weight", "out.weight")
        return "words" if words else "inner" if key == "hidden.weight" else "rest"
    return "model" if granularity == "model" else key


def by_autograd(groups: list[str], granularity: Any, alpha: Tensor, beta: Tensor, batch: Any) -> Tensor:
    """The loss at Σ αᵢ θᵢ with a graph over all models; statistics are blended and carry no gradient."""
    states, mixed = memory(), {}
    for key in states[0]:
        if key == "out.weight" or key.endswith("tracked"):
            continue
        if key.startswith("head"):  # excluded: that of the first source
            mixed[key] = states[0][key]
            continue
        row = alpha[groups.index(group(key, granularity))]
        value = sum(row[i] * states[i][key] for i in range(len(states)))
        mixed[key] = value.detach() if key in STATISTICS else value
    logits = torch.func.functional_call(Net().eval(), mixed, (batch[0],))
    return F.cross_entropy(beta * logits, batch[1])


def spread(soup: LearnedSoup) -> None:
    """Other mixing weights than equal ones."""
    soup.logits.copy_(torch.randn(soup.logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    soup.blend()


@pytest.mark.parametrize("source", ["memory", "safetensors", "pt"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=["model", "tensor", "mapping"])
def test_derivative(granularity: Any, source: str, tmp_path: Path) -> None:
    soup = new(granularity, memory() if source == "memory" else files(tmp_path, source))
    spread(soup)
    alpha, beta = soup.alpha.clone().requires_grad_(), torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = by_autograd(soup.groups, granularity, alpha, beta, batches()[0])
    loss.backward()
    step = soup.step(batches()[0])
    assert alpha.grad is not None and beta.grad is not None and soup.logits.grad is not None
    torch.testing.assert_close(step.gradient, alpha.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(soup.beta.grad, beta.grad, rtol=0, atol=1e-10)
    assert step.loss == pytest.approx(float(loss.detach()), abs=1e-10)
    assert float(soup.logits.grad.sum(1).abs().max()) < 1e-14  # softmax: adding a number to all logits changes nothing


@pytest.mark.parametrize("temperature", [True, False])
@pytest.mark.parametrize("source", ["memory", "safetensors"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=["model", "tensor", "mapping"])
def test_trajectory(granularity: Any, source: str, temperature: bool, tmp_path: Path) -> None:
    soup = new(granularity, None if source == "memory" else files(tmp_path), temperature=temperature)
    a = torch.zeros(len(soup.groups), MODELS, dtype=torch.float64, requires_grad=True)
    beta = torch.ones((), dtype=torch.float64, requires_grad=temperature)
    rate = 0.1 if granularity == "model" else 0.05
    adam = torch.optim.AdamW([a, beta] if temperature else [a], lr=rate, weight_decay=0.0)
    for i in range(10):
        batch = batches()[i % 3]
        adam.zero_grad()
        loss = by_autograd(soup.groups, granularity, a.softmax(1), beta, batch)
        loss.backward()
        adam.step()
        assert soup.step(batch).loss == pytest.approx(float(loss.detach()), abs=1e-9)
        torch.testing.assert_close(soup.alpha, a.detach().softmax(1), rtol=0, atol=1e-9)
        torch.testing.assert_close(soup.beta.detach(), beta.detach(), rtol=0, atol=1e-9)
    assert (float(soup.beta.detach()) != 1.0) is temperature
    assert float((soup.alpha - 1 / MODELS).abs().max()) > 0.01


def test_groups_share_a_row_for_tied_names(tmp_path: Path) -> None:
    for sources in (memory(), files(tmp_path), files(tmp_path, "pt")):
        soup = new("tensor", sources)
        assert "embed.weight" in soup.groups and "out.weight" not in soup.groups and "head.weight" not in soup.groups
        assert len(soup.groups) == 7


def test_ties_of_the_sources_alone() -> None:
    net = Net()
    net.out.weight = nn.Parameter(net.out.weight.detach().clone())
    soup, tied = LearnedSoup(net, memory(), granularity="tensor", exclude="^head"), new("tensor")
    batch = batches()[0]
    torch.testing.assert_close(soup.step(batch).gradient, tied.step(batch).gradient, rtol=0, atol=1e-12)
    assert torch.equal(net.out.weight, net.embed.weight) and torch.equal(net.out.weight, tied.model.out.weight)


def test_statistics_are_blended_and_the_head_is_not() -> None:
    soup, states = new(), memory()
    spread(soup)
    for key in STATISTICS:
        wanted = sum(soup.alpha[0, i] * states[i][key] for i in range(MODELS))
        torch.testing.assert_close(soup.model.state_dict()[key], wanted, rtol=0, atol=1e-14)
    assert torch.equal(soup.model.state_dict()["head.weight"], states[0]["head.weight"])


def test_one_model_stays() -> None:
    soup = new("tensor", memory()[:1])
    soup.fit(batches(), epochs=2)
    assert torch.equal(soup.alpha, torch.ones_like(soup.alpha)) and not soup.logits.any()
    for key, value in memory()[0].items():
        assert key.startswith("head") or torch.equal(soup.model.state_dict()[key], value)


@pytest.mark.parametrize("i", range(MODELS))
def test_one_hot_is_that_model(i: int) -> None:
    soup = new("tensor")
    soup.logits.fill_(-1000.0)[:, i] = 1000.0
    soup.blend()
    for key, value in memory()[i].items():
        assert key.startswith("head") or torch.equal(soup.model.state_dict()[key], value), key


def test_the_model_is_left_as_it_was() -> None:
    soup = new()
    net = soup.model
    net.train()
    net.norm.eval()
    net.hidden.bias.requires_grad_(False)
    net.hidden.weight.grad = torch.ones(4, 4, dtype=torch.float64)
    modes = [part.training for part in net.modules()]
    flags = [p.requires_grad for p in net.parameters()]
    counter = int(net.norm.num_batches_tracked)
    soup.step(batches()[0])
    with pytest.raises(ValueError, match="the loss must be finite"):
        soup.loss = lambda logits, labels: logits.sum() * float("nan")
        soup.step(batches()[0])
    assert [part.training for part in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())
    assert int(net.norm.num_batches_tracked) == counter


def test_tiny_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = new("tensor")
    losses = wanted.fit(batches(), epochs=2)
    module = importlib.import_module("zipfast.soups.mix")  # zipfast.soups.mix is the function
    monkeypatch.setattr(module, "SMALLEST", 5)
    monkeypatch.setattr(learned, "groups_of", functools.partial(module.groups_of, buffers=0))
    soup = new("tensor")
    assert soup.fit(batches(), epochs=2) == pytest.approx(losses, abs=1e-12)
    torch.testing.assert_close(soup.alpha, wanted.alpha, rtol=0, atol=1e-12)


def test_transposed_memory_of_the_model() -> None:
    wanted, net = new(), Net()
    net.hidden.weight = nn.Parameter(net.hidden.weight.detach().T.contiguous().T)
    soup = LearnedSoup(net, memory(), exclude="^head")
    assert soup.fit(batches()) == pytest.approx(wanted.fit(batches()), abs=1e-12)
    torch.testing.assert_close(net.hidden.weight, wanted.model.hidden.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("source", ["memory", "safetensors"])
def test_soup_is_the_live_model(source: str, tmp_path: Path) -> None:
    soup = new(MAPPING, None if source == "memory" else files(tmp_path))
    soup.model.head.load_state_dict(Net(1).head.state_dict())  # what is not mixed is the first model's
    soup.fit(batches(), epochs=2)
    kept, written = soup.soup(), soup.soup(out=tmp_path / "soup.safetensors", metadata={"mine": 1})
    live, file = soup.model.state_dict(), checkpoint.load(tmp_path / "soup.safetensors")
    assert kept.state is not None and written.state is None and set(kept.state) == set(live)
    for key, value in live.items():
        assert torch.equal(kept.state[key], value) and torch.equal(file[key], value), key
    facts = checkpoint.read_metadata(tmp_path / "soup.safetensors")
    assert facts["groups"] == soup.groups and sorted(soup.groups) == ["inner", "rest", "words"]
    assert facts["alpha"] == soup.alpha.tolist() and facts["beta"] == float(soup.beta.detach())
    assert facts["recipe"] == "learned" and facts["mine"] == 1
    assert facts["weights"] == pytest.approx(soup.alpha.mean(0).tolist()) and kept.weights == written.weights


def test_dtypes(tmp_path: Path) -> None:
    half = [{key: t.bfloat16() if t.is_floating_point() else t for key, t in state.items()} for state in memory()]
    half = [{**state, "out.weight": state["embed.weight"]} for state in half]
    with pytest.raises(ValueError, match=r"differ in dtype .*bfloat16, float64"):
        new(sources=[memory()[0], half[1]])
    soup = new(sources=half)  # in the model's own precision, whatever the files have
    torch.testing.assert_close(
        soup.model.state_dict()["hidden.bias"],
        sum(state["hidden.bias"].double() for state in half) / MODELS,
        rtol=0,
        atol=1e-15,
    )
    soup.fit(batches(), epochs=1)
    wide, own = soup.soup(out_dtype=torch.float64).state, soup.soup().state
    assert wide is not None and own is not None and own["hidden.bias"].dtype == torch.bfloat16
    assert torch.equal(wide["hidden.bias"], soup.model.state_dict()["hidden.bias"])


def test_better_than_uniform() -> None:
    draw = torch.Generator().manual_seed(0)
    truth, x = torch.randn(3, 5, generator=draw), torch.randn(128, 5, generator=draw)
    data = [(x, (x @ truth.T).argmax(1))]
    net = nn.Linear(5, 3, bias=False)
    good = [{"weight": 3 * truth + 0.3 * torch.randn(3, 5, generator=draw)} for _ in range(2)]
    soup = LearnedSoup(net, [*good, {"weight": -4 * truth}], temperature=False)
    losses = soup.fit(data, epochs=40)
    assert losses[-1] < 0.5 * losses[0]  # the first is the uniform soup's
    assert float(soup.alpha[0, 2]) < 0.05


def test_progress_and_history() -> None:
    seen: list[tuple[str, int]] = []
    soup, twin = new(), new()
    history = soup.fit(batches(), epochs=2, progress=lambda what, done: seen.append((what, done)))
    steps = [twin.step(batch).loss for _ in range(2) for batch in batches()]
    assert history == [sum(steps[:3]) / 3, sum(steps[3:]) / 3] and seen == [("epochs", 1), ("epochs", 2)]


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "batch": (lambda: new().fit([]), "'batches' must hold at least one batch in every epoch"),
    "epoch": (lambda: new().fit(iter(batches()), epochs=2), "in every epoch"),
    "labels": (lambda: new().step(batches()[0][0]), "'batch' must hold labels"),
    "nan": (lambda: new(loss=lambda f, y: f.sum() * float("nan")).step(batches()[0]), "must be finite, got nan"),
    "kind": (lambda: new("layer"), "'granularity' must be model, tensor or a mapping, got 'layer'"),
    "none": (lambda: LearnedSoup(Net(), []), "at least one model is needed"),
    "name": (lambda: LearnedSoup(nn.Linear(2, 2), [{"w": torch.ones(2)}]), "'w' is no part of the model"),
    "shape": (
        lambda: LearnedSoup(nn.Linear(2, 2), [{"weight": torch.ones(2, 3)}]),
        r"'weight' is \[2, 3\] and in the model \[2, 2\]",
    ),
    "models": (
        lambda: LearnedSoup(nn.Linear(2, 2), [{"weight": torch.ones(2, 2)}, {"bias": torch.ones(2)}]),
        "lacks weight",
    ),
    "values": (
        lambda: LearnedSoup(nn.Linear(1, 1), [{"bias": torch.tensor([float("inf")])}]),
        "all values must be finite",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_frozen_tensors_are_part_of_the_mix_and_excluded_ones_are_the_first_source() -> None:
    generator = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    sources = [
        {k: torch.randn(v.shape, generator=generator).double() for k, v in net.state_dict().items()} for _ in range(3)
    ]
    batch = torch.randn(20, 4, generator=generator).double(), torch.arange(20) % 3
    free = LearnedSoup(net, sources).step(batch).gradient
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
    soup = LearnedSoup(net, sources)
    torch.testing.assert_close(soup.step(batch).gradient, free, rtol=0, atol=1e-12)
    assert not net[0].weight.requires_grad and net[2].weight.requires_grad and net[0].weight.grad is None
    LearnedSoup(net, sources, exclude=r"^2\.")
    assert torch.equal(net[2].weight.detach(), sources[0]["2.weight"])
