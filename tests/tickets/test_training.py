# SPDX-License-Identifier: Apache-2.0
"""One training: both trainers agree, any network and loader work, and what was killed goes on bit for bit."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zipfast import checkpoint
from zipfast.tickets import Batches, Masks, Task, Trained, measure, train, why_not_mlp
from zipfast.tickets.task import seed_of, stream

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.randn(6, 3, generator=torch.Generator().manual_seed(1))).argmax(1)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))


def noisy() -> nn.Module:
    """Batch norm and dropout: state beyond the weights, and randomness in the forward pass."""
    return nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, 3))


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 0.01)


def task_of(build=perceptron, loader=None, iterations: int = 40, optimizer=adam, **options) -> Task:
    data = Batches(X, Y, 8) if loader is None else loader
    return Task(build, data, Batches(X[:20], Y[:20], 20), Batches(X[20:], Y[20:], 30), iterations, optimizer, **options)


def half(model: nn.Module) -> Masks:
    return Masks.ones(model).prune(model, 0.5, scope="layer")


def run(task: Task, *, masks=half, seed: int = 3, **options) -> tuple[nn.Module, Trained]:
    model = task.network(7)
    return model, train(task, model, masks(model), seed=seed, every=10, **options)


def same(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def key(done: Trained) -> list[tuple]:
    """A curve that can be compared: NaN is equal to itself."""
    return [(p.iteration, p.loss, p.accuracy, None if math.isnan(p.test) else p.test) for p in done.curve]


# ------------------------------------------------------------------------------------------------------------------- data


def test_batches() -> None:
    batches = Batches(X, Y, 8)
    assert len(batches) == 7 and [len(y) for _, y in batches] == [8] * 6 + [2]
    order = batches.order(0, 7, seed=1)
    assert sorted(order[order >= 0].tolist()) == list(range(50)) and (order[-1] >= 0).sum() == 2
    assert torch.equal(batches.order(3, 20, 1), torch.cat([batches.order(3, 9, 1), Batches(X, Y, 8).order(9, 20, 1)]))
    assert not torch.equal(order, batches.order(7, 14, 1)) and not torch.equal(order, batches.order(0, 7, 2))
    walk = batches.stream(5, 1)
    for i in range(5, 9):
        rows = batches.order(i, i + 1, 1)[0]
        data, labels = next(walk)
        assert torch.equal(data, X[rows[rows >= 0]]) and torch.equal(labels, Y[rows[rows >= 0]])
    for bad in (lambda: Batches(X, Y, 0), lambda: Batches(X[:0], Y[:0], 1), lambda: Batches(X, Y[:3], 1)):
        with pytest.raises(ValueError, match="Batches: there must be samples"):
            bad()


def test_any_loader_from_any_iteration() -> None:
    loader = DataLoader(TensorDataset(X, Y), 8, shuffle=True)
    whole = [y.tolist() for _, (_, y) in zip(range(20), stream(loader, 0, 5))]
    for start in (1, 6, 7, 8, 15):
        assert [y.tolist() for _, (_, y) in zip(range(5), stream(loader, start, 5))] == whole[start : start + 5]
    assert [y.tolist() for _, (_, y) in zip(range(5), stream(loader, 0, 6))] != whole[:5]
    sized = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 50, 8)]

    class Sizeless:
        def __iter__(self):
            return iter(sized)

    for start in (0, 5, 9):
        one, two = next(stream(Sizeless(), start, 0)), next(stream(sized, start, 0))
        assert torch.equal(one[1], two[1]) and torch.equal(one[1], sized[start % 7][1])
    with pytest.raises(ValueError, match="must give batches again in each epoch, got an epoch of none"):
        next(stream([], 0, 0))


def test_set_epoch_is_called() -> None:
    class Sampler:
        seen: list[int]

        def __init__(self) -> None:
            self.seen = []

        def set_epoch(self, epoch: int) -> None:
            self.seen.append(epoch)

    class Loader(list):
        sampler = Sampler()

    loader = Loader([(X[:4], Y[:4])] * 3)
    walk = stream(loader, 4, 0)
    for _ in range(5):
        next(walk)
    assert loader.sampler.seen == [1, 2]


def test_seeds_are_the_same_everywhere() -> None:
    assert seed_of(0, "epoch", 1) == seed_of("0", "epoch", 1) != seed_of(0, "epoch", 2)
    assert 0 <= seed_of("x") < 1 << 56


def test_bad_tasks() -> None:
    with pytest.raises(ValueError, match="'iterations' must be at least 1, got 0"):
        task_of(iterations=0)
    with pytest.raises(ValueError, match="'train' must be readable more than once, got an iterator"):
        task_of(loader=iter([]))
    with pytest.raises(ValueError, match="there must be at least one sample, got none"):
        measure(perceptron(), [], nn.functional.cross_entropy)


def test_measure() -> None:
    model = noisy()
    loss, accuracy = measure(model, Batches(X, Y, 7), nn.functional.cross_entropy)
    model.eval()
    output = model(X).detach()
    assert loss == pytest.approx(float(nn.functional.cross_entropy(output, Y)))
    assert accuracy == pytest.approx(100 * float((output.argmax(1) == Y).float().mean()))


def test_measure_counts_samples_and_places() -> None:
    """Labels at each position: the mean loss is the loss's own mean; negative labels are none."""
    model = nn.Linear(6, 3)
    x, y = torch.randn(20, 7, 6), torch.randint(3, (20, 7))
    y[:, 0] = -100

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), labels.flatten())

    found, accuracy = measure(model, [(x[:12], y[:12]), (x[12:], y[12:])], loss)
    output = model(x).detach()
    assert found == pytest.approx(float(loss(output, y)), rel=1e-5)
    assert accuracy == pytest.approx(100 * float((output.argmax(-1) == y)[:, 1:].float().mean()))
    named = measure(lambda_model(), [{"x": x[:, 1], "labels": y[:, 1]}], nn.functional.cross_entropy)
    assert 0 <= named[1] <= 100


def lambda_model() -> nn.Module:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    return Named()


# --------------------------------------------------------------------------------------------------------------- trainers


RULES = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}


@pytest.mark.parametrize("rule", RULES)
def test_both_trainers_agree(rule: str) -> None:
    """In float64, as Adam turns rounding into steps."""
    task = Task(
        lambda: perceptron().double(), Batches(X.double(), Y, 8), Batches(X[:20].double(), Y[:20], 20),
        Batches(X[20:].double(), Y[20:], 30), 40, RULES[rule], schedule=lambda i: 0.5 ** (i // 15),
    )  # fmt: skip
    slow, one = run(task, trainer="torch")
    for sparse_below in (0.0, 2.0):
        fast, two = run(task, trainer="mlp", sparse_below=sparse_below)
        assert (one.trainer, two.trainer) == ("torch", "mlp")
        for a, b in zip(slow.state_dict().values(), fast.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert [p.iteration for p in one.curve] == [p.iteration for p in two.curve] == [0, 10, 20, 30, 40]
        for p, q in zip(one.curve, two.curve):
            assert p.loss == pytest.approx(q.loss, rel=1e-8) and p.accuracy == q.accuracy


def test_dead_weights_stay_dead() -> None:
    for options in ({"trainer": "torch"}, {"trainer": "mlp"}, {"trainer": "torch", "mode": "post"}):
        task = task_of()
        start = task.network(7)
        model, _ = run(task, **options)
        for name, alive in half(start).dense().items():
            weight = model.get_parameter(name)
            assert not weight[~alive].any() and not torch.signbit(weight[~alive]).any() and weight[alive].all()


def test_reasons_against_the_fast_trainer() -> None:
    frozen = perceptron()
    frozen[1].bias.requires_grad_(False)
    pools = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3))
    groups = lambda p: torch.optim.Adam([{"params": list(p)[:1]}, {"params": list(p)[1:]}])  # noqa: E731
    cases = [
        (task_of(noisy), noisy(), "no nn.Sequential of linear layers with ReLU"),
        (task_of(), pools, "no nn.Sequential of linear layers with ReLU"),
        (task_of(), nn.Sequential(nn.Linear(6, 3, bias=False)), "a layer has no bias"),
        (task_of(loader=[(X, Y)]), perceptron(), "the training data are no zipfast.tickets.Batches"),
        (task_of(), perceptron().double(), "not all float32, or all float64"),
        (task_of(), perceptron().to("meta"), "not on the CPU"),
        (task_of(), frozen, "a parameter is frozen"),
        (task_of(loss=nn.functional.mse_loss), perceptron(), "the loss is not"),
        (task_of(clip_norm=1.0), perceptron(), "gradients are clipped"),
        (task_of(optimizer=torch.optim.RMSprop), perceptron(), "RMSprop is not SGD, Adam or AdamW"),
        (task_of(optimizer=groups), perceptron(), "several groups"),
        (task_of(optimizer=lambda p: torch.optim.Adam(p, amsgrad=True)), perceptron(), "uses amsgrad"),
    ]
    for task, model, reason in cases:
        assert reason in str(why_not_mlp(task, model))
    assert "lets dead weights move" in str(why_not_mlp(task_of(), perceptron(), "forward"))
    assert why_not_mlp(task_of(), perceptron()) is None
    with pytest.raises(ValueError, match="trainer 'mlp' cannot be used: gradients are clipped"):
        run(task_of(clip_norm=1.0), trainer="mlp")
    for options, message in (
        ({"trainer": "jax"}, "'trainer' must be one of auto, torch, mlp, got 'jax'"),
        ({"mode": "both"}, "'mode' must be one of grad, post, forward, got 'both'"),
        ({"start": 41}, r"'start' must be in \[0, 40\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run(task_of(), **options)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class Scaled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_only_looks_like_a_perceptron() -> None:
    relu, shared = nn.ReLU(), nn.Linear(20, 20)
    hooked, normed = perceptron(), perceptron()
    hooked[1].register_forward_hook(lambda *a: None)
    nn.utils.parametrizations.weight_norm(normed[1])
    tied = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))
    tied[4].weight = tied[2].weight
    for model, reason in (
        (nn.Sequential(nn.Linear(6, 20), nn.ReLU(), Residual(), nn.ReLU(), nn.Linear(20, 3)), "no plain nn.Sequential"),
        (Scaled(*perceptron()), "no plain nn.Sequential"),
        (nn.Sequential(nn.Linear(6, 20), relu, nn.Linear(20, 3), relu), "no nn.Sequential of linear layers"),
        (nn.Sequential(nn.Linear(6, 20), relu, shared, relu, shared), "layers share a weight"),
        (tied, "layers share a weight"),
        (hooked, "a module has hooks"),
        (normed, "no plain nn.Sequential"),
        (nn.Sequential(nn.Flatten(2), *perceptron()[1:]), "inputs of several dimensions are not flattened"),
    ):
        assert reason in str(why_not_mlp(task_of(), model)), reason
    nested = nn.Sequential(
        nn.Sequential(nn.Linear(6, 20), relu), nn.Sequential(nn.Linear(20, 20), relu), nn.Linear(20, 3)
    )
    assert why_not_mlp(task_of(), nested) is None
    images = Batches(X.view(50, 1, 2, 3), Y, 8)
    assert "are not flattened" in str(why_not_mlp(task_of(loader=images), perceptron()[1:]))
    assert why_not_mlp(task_of(loader=images), perceptron()) is None
    heavy = task_of(optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=1.0))
    assert "the momentum is 1 or more" in str(why_not_mlp(heavy, perceptron()))

    def watched(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = adam(parameters)
        optimizer.register_step_pre_hook(lambda *a: None)
        return optimizer

    assert "hooks around its step" in str(why_not_mlp(task_of(optimizer=watched), perceptron()))


def test_schedules_must_be_numbers() -> None:
    for trainer in ("torch", "mlp"):
        with pytest.raises(ValueError, match=r"'schedule' must give numbers of 0 or more, got -1.0 for iteration 5"):
            run(task_of(schedule=lambda i: -1.0 if i == 5 else 1.0), trainer=trainer)


def test_batches_without_labels() -> None:
    with pytest.raises(ValueError, match="each training batch must hold labels beside the inputs, got none"):
        run(task_of(noisy, loader=[X[:8], X[8:16]]))


def test_the_users_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(task_of(noisy))
    assert torch.equal(before, torch.get_rng_state())


def test_early_stopping_is_decided_afterwards() -> None:
    _, done = run(task_of(iterations=100), trainer="torch")
    losses = [p.loss for p in done.curve]
    assert done.early.loss == min(losses) and done.early.iteration == done.curve[losses.index(min(losses))].iteration
    assert not math.isnan(done.early.test) and not math.isnan(done.end.test) and done.end.iteration == 100
    lowest = math.inf
    for p in done.curve:  # the test data is looked at where early stopping may end, and at the end
        assert math.isnan(p.test) == (p.loss >= lowest and p.iteration < 100)
        lowest = min(lowest, p.loss)


def test_a_diverged_training_is_told() -> None:
    task = task_of(optimizer=lambda p: torch.optim.SGD(p, 1e20), iterations=20)
    for trainer in ("torch", "mlp"):
        _, done = run(task, trainer=trainer)
        assert math.isnan(done.end.loss) or done.end.loss > 1e6
        assert done.early.iteration == 0


# ----------------------------------------------------------------------------------------------------------------- resume


class Killed(BaseException):
    pass


def killed(task: Task, partial: Path, at: int, **options) -> None:
    def stop(iteration: int) -> None:
        if iteration == at:
            raise Killed

    with pytest.raises(Killed):
        run(task, partial=partial, checkpoint_seconds=0.0, progress=stop, **options)


class Augmented:
    """A loader that draws from torch's generator for every batch, as random crops do."""

    def __len__(self) -> int:
        return 7

    def __iter__(self):
        for i in torch.randperm(7).tolist():
            yield X[8 * i : 8 * i + 8] + 0.1 * torch.randn(1), Y[8 * i : 8 * i + 8]


class Counted(torch.optim.SGD):
    """Keeps a number in its groups, as schedule-free optimisers do."""

    def step(self, closure=None):  # type: ignore[no-untyped-def]
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["momentum"] = 0.9 / group["k"]
        return super().step(closure)


CASES = {
    "groups": (task_of(noisy, optimizer=lambda p: Counted(p, 0.05, momentum=0.9)), {}),
    "late loader": (task_of(noisy, loader=Augmented()), {"start": 10}),
    "own generator": (
        task_of(noisy, loader=DataLoader(TensorDataset(X, Y), 8, shuffle=True, generator=torch.Generator())),
        {},
    ),
    "mlp": (task_of(), {"trainer": "mlp"}),
    "mlp sgd": (task_of(optimizer=RULES["momentum"]), {"trainer": "mlp"}),
    "torch": (task_of(), {"trainer": "torch"}),
    "noise": (task_of(noisy), {}),
    "loader": (task_of(noisy, loader=DataLoader(TensorDataset(X, Y), 8, shuffle=True)), {}),
    "augmented": (task_of(noisy, loader=Augmented()), {}),
    "schedule": (task_of(noisy, schedule=lambda i: 1 / (1 + i)), {}),
    "sgd": (task_of(noisy, optimizer=RULES["momentum"]), {}),
    "rmsprop": (task_of(noisy, optimizer=torch.optim.RMSprop), {"mode": "forward"}),
    "late": (task_of(noisy), {"start": 17}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at", [20, 30])
def test_what_was_killed_goes_on_bit_for_bit(at: int, case: str, tmp_path: Path) -> None:
    task, options = CASES[case]
    whole, one = run(task, **options)
    partial = tmp_path / "p.safetensors"
    killed(task, partial, at, **options)
    facts = checkpoint.read_metadata(partial)
    assert options.get("start", 0) <= facts["iteration"] < at and len(facts["curve"]) > 0
    torch.manual_seed(random.randrange(1 << 30))  # whatever happens in between
    torch.rand(3)
    again, two = run(task, partial=partial, **options)
    assert same(whole, again) and key(one) == key(two)


def test_a_partial_file_of_another_training(tmp_path: Path) -> None:
    partial = tmp_path / "p.safetensors"
    killed(task_of(), partial, 20, identity="one")
    with pytest.raises(
        ValueError, match=r"p.safetensors must be of this training, got one of other settings; delete it"
    ):
        run(task_of(), partial=partial, identity="two")
    tensors, facts = checkpoint.load(partial), checkpoint.read_metadata(partial)
    checkpoint.save(partial, {k: v for k, v in tensors.items() if k != "parameter.1"}, facts)
    with pytest.raises(ValueError, match=r"p.safetensors is damaged: it lacks 'parameter.1'; delete it to begin"):
        run(task_of(), partial=partial, identity="one")
    data = partial.read_bytes()
    partial.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"p.safetensors cannot be read as plain tensors"):
        run(task_of(), partial=partial, identity="one")


def test_a_late_start_is_the_rest_of_the_whole() -> None:
    """Order of data and schedule go on from k; with plain SGD there is no other state."""
    task = task_of(optimizer=RULES["sgd"], schedule=lambda i: 1 / (1 + i))
    kept: dict[str, Tensor] = {}
    whole = task.network(7)
    masks = Masks.ones(whole)
    train(
        task, whole, masks, seed=3, every=7, keep_at=13,
        keep=lambda i, m: kept.update({k: v.clone() for k, v in m.state_dict().items()}),
    )  # fmt: skip
    late = task.network(1)
    late.load_state_dict(kept)
    done = train(task, late, masks, seed=3, start=13, every=7)
    assert same(whole, late) and [p.iteration for p in done.curve] == [13, 14, 21, 28, 35, 40]
