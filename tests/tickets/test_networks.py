# SPDX-License-Identifier: Apache-2.0
"""Networks and presets of the lottery-ticket papers: sizes, ladders, initialisation, schedules, what may be pruned."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from zipfast.tickets import networks
from zipfast.tickets.networks import PRESETS, Preset, ladder, prunable, rates_of

NAMES = ("lenet-300-100", "conv-2", "conv-4", "conv-6", "resnet-20", "resnet-18", "vgg-19")
BY_LAYER = NAMES[:4]
VARIANTS = {"resnet-20-warmup": "resnet-20", "vgg-19-warmup": "vgg-19"}


def shapes_of(name: str, **arguments) -> nn.Module:
    """A preset's network without its numbers."""
    with torch.device("meta"):
        return PRESETS[name].build(**arguments)


def weights(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small layers on several threads of a busy machine mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# sizes


@pytest.mark.parametrize(
    ("name", "total", "convolutions"),
    [
        ("lenet-300-100", 266_200, 0),
        ("conv-2", 4_300_992, 38_592),
        ("conv-4", 2_425_024, 259_776),
        ("conv-6", 2_261_184, 1_144_512),
        ("resnet-20", 270_896, 270_256),
        ("resnet-18", 11_164_352, 11_159_232),
        ("vgg-19", 20_018_880 + 5_120, 20_018_880),
    ],
)
def test_papers_sizes(name, total, convolutions):
    found = prunable(shapes_of(name))
    assert weights(found) == total
    assert sum(w.numel() for w in found.values() if w.dim() == 4) == convolutions


def test_resnet_18_has_11_2_million_parameters():
    assert sum(p.numel() for p in shapes_of("resnet-18").parameters()) == 11_173_962


def test_lenet_is_plain():
    model = shapes_of("lenet-300-100")
    assert [type(layer) for layer in model] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert list(prunable(model)) == ["fc1.weight", "fc2.weight", "out.weight"]


def test_digits_net():
    assert weights(prunable(shapes_of("lenet-300-100", image_size=8))) == 50_200


@pytest.mark.parametrize(("name", "side"), [("conv-2", 4), ("conv-4", 2), ("conv-6", 1), ("conv-4", (2, 2))])
def test_small_images_make_fc1_small(name, side):
    height, width = (side, side) if isinstance(side, int) else side
    found = prunable(shapes_of(name, in_channels=1, image_size=8))
    last = [w for w in found.values() if w.dim() == 4][-1]
    assert found["fc1.weight"].shape == (256, last.shape[0] * height * width)


# forward and backward


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
@pytest.mark.parametrize("name", NAMES)
def test_trains(name, channels, size):
    torch.manual_seed(0)
    model = PRESETS[name].build(in_channels=channels, out_features=7, image_size=size)
    out = model(torch.randn(2, channels, size, size))
    assert out.shape == (2, 7)
    out.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
    assert all(weight.grad.any() for weight in prunable(model).values())


@pytest.mark.parametrize("size", [1, (5, 9), 28])
@pytest.mark.parametrize("name", ["lenet-300-100", "conv-6", "resnet-20"])
def test_any_size(name, size):
    height, width = (size, size) if isinstance(size, int) else size
    model = PRESETS[name].build(in_channels=1, image_size=size).eval()
    assert model(torch.randn(2, 1, height, width)).shape == (2, 10)


# initialisation


def assert_normal(weight: Tensor, std: float) -> None:
    """Mean and spread within 5 standard errors; a normal distribution has 68.3 % within one std, a uniform one 57.7 %."""
    count = weight.numel()
    assert abs(weight.mean()) < 5 * std / math.sqrt(count)
    assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * count))
    if count > 5000:
        assert (weight.abs() < std).float().mean().item() == pytest.approx(0.6827, abs=5 * 0.4654 / math.sqrt(count))


def fans(weight: Tensor) -> tuple[int, int]:
    field = weight[0, 0].numel()
    return weight.shape[1] * field, weight.shape[0] * field


@pytest.mark.parametrize("name", ["lenet-300-100", "conv-6"])
def test_glorot_normal(name):
    torch.manual_seed(0)
    model = PRESETS[name].build(image_size=28)
    for weight in prunable(model).values():
        assert_normal(weight.detach(), math.sqrt(2 / sum(fans(weight))))
    assert not any(p.any() for key, p in model.named_parameters() if key.endswith("bias"))


@pytest.mark.parametrize("name", ["resnet-20", "resnet-18", "vgg-19"])
def test_kaiming_normal(name):
    torch.manual_seed(0)
    model = PRESETS[name].build()
    for weight in prunable(model).values():
        assert_normal(weight.detach(), math.sqrt(2 / fans(weight)[0]))
    assert all((m.weight == 1).all() and not m.bias.any() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_the_seed_decides():
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(PRESETS["lenet-300-100"].build(image_size=8).fc1.weight)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# ladders


@pytest.mark.parametrize(
    ("name", "level", "remaining"),
    [
        *[("lenet-300-100", 1, "80.04"), ("lenet-300-100", 3, "51.28"), ("lenet-300-100", 7, "21.07")],
        *[("lenet-300-100", 9, "13.52"), ("lenet-300-100", 15, "3.58"), ("lenet-300-100", 18, "1.85")],
        ("lenet-300-100", 20, "1.19"),
        *[("conv-2", 11, "8.81"), ("conv-2", 14, "4.57")],
        *[("conv-4", 11, "11.06"), ("conv-4", 12, "9.18")],
        *[("conv-6", 7, "26.61"), ("conv-6", 10, "15.29")],
    ],
)
def test_ladders(name, level, remaining):
    assert f"{ladder(shapes_of(name), PRESETS[name], level):.2f}" == remaining


@pytest.mark.parametrize("name", ["resnet-20", "resnet-18", "vgg-19"])
def test_global_ladder_is_a_power(name):
    model = shapes_of(name)
    assert [ladder(model, PRESETS[name], level) for level in (0, 1, 5)] == pytest.approx([100, 80, 100 * 0.8**5])


def test_ladder_takes_rates_in_any_form():
    model = shapes_of("lenet-300-100")
    preset = PRESETS["lenet-300-100"]
    by_name = rates_of(preset, prunable(model))
    assert ladder(model, preset, 4) == ladder(model, preset.rates, 4) == ladder(model, by_name, 4)
    assert ladder(model, {"fc1.weight": 1.0}, 1) == 0
    assert ladder(model, {"fc1.weight": 0.0, "out.weight": 0.5}, 1) == 100 * (235_200 + 500) / 236_200


# presets


def test_names():
    assert set(PRESETS) == {*NAMES, *VARIANTS}
    assert all(preset.name == name for name, preset in PRESETS.items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lenet-300-100", (50_000, 60, "adam", 1.2e-3, 0, 0, 0, (), "layer")),
        ("conv-2", (20_000, 60, "adam", 2e-4, 0, 0, 0, (), "layer")),
        ("conv-4", (25_000, 60, "adam", 3e-4, 0, 0, 0, (), "layer")),
        ("conv-6", (30_000, 60, "adam", 3e-4, 0, 0, 0, (), "layer")),
        ("resnet-20", (30_000, 128, "sgd", 0.1, 0.9, 1e-4, 0, (20_000, 25_000), "global")),
        ("resnet-20-warmup", (30_000, 128, "sgd", 0.03, 0.9, 1e-4, 20_000, (20_000, 25_000), "global")),
        ("resnet-18", (30_000, 128, "sgd", 0.1, 0.9, 1e-4, 0, (20_000, 25_000), "global")),
        ("vgg-19", (112_000, 64, "sgd", 0.1, 0.9, 1e-4, 0, (56_000, 84_000), "global")),
        ("vgg-19-warmup", (112_000, 64, "sgd", 0.1, 0.9, 1e-4, 10_000, (56_000, 84_000), "global")),
    ],
)
def test_figures(name, expected):
    p = PRESETS[name]
    figures = (p.iterations, p.batch_size, p.optimizer, p.lr, p.momentum, p.weight_decay, p.warmup, p.milestones)
    assert (*figures, p.scope) == expected


@pytest.mark.parametrize("name", [*NAMES, *VARIANTS])
def test_every_figure_has_a_source(name):
    preset = PRESETS[name]
    figures = {f.name for f in dataclasses.fields(Preset)} - {"name", "build", "sources"}
    assert set(preset.sources) == figures
    assert all(source[:4] in ("[S] ", "[M] ", "[C] ") and len(source) > 4 for source in preset.sources.values())
    # The figures that the notes leave to memory.
    memory = {"conv-2": "lr", "conv-4": "lr", "conv-6": "lr", "resnet-20": "weight_decay", "vgg-19": "batch_size"}
    if name in memory:
        assert preset.sources[memory[name]].startswith("[M]")


@pytest.mark.parametrize("name", [*NAMES, *VARIANTS])
def test_rates(name):
    preset, found = PRESETS[name], prunable(shapes_of(name))
    rates = rates_of(preset, found)
    conv = {"conv-2": 0.1, "conv-4": 0.1, "conv-6": 0.15}.get(name, 0.2)
    if name in BY_LAYER:
        assert rates == {k: conv if w.dim() == 4 else 0.1 if k == "out.weight" else 0.2 for k, w in found.items()}
    else:
        assert rates == {k: conv for k, w in found.items() if w.dim() == 4}


def test_presets_are_values():
    preset = PRESETS["conv-4"]
    assert pickle.loads(pickle.dumps(preset)) is not preset
    assert len({preset, dataclasses.replace(preset), PRESETS["conv-6"]}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.lr = 1.0
    assert dataclasses.replace(preset, iterations=10).iterations == 10


def test_optimizers():
    parameters = [nn.Parameter(torch.zeros(2))]
    adam = PRESETS["conv-2"].optimizer_for(parameters)
    sgd = PRESETS["vgg-19"].optimizer_for(iter(parameters))
    assert type(adam) is torch.optim.Adam and type(sgd) is torch.optim.SGD
    assert adam.defaults["lr"] == 2e-4 and adam.defaults["weight_decay"] == 0
    assert [sgd.defaults[key] for key in ("lr", "momentum", "weight_decay")] == [0.1, 0.9, 1e-4]


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("lenet-300-100", {0: 1, 1: 1, 49_999: 1}),
        ("resnet-20", {0: 1, 19_999: 1, 20_000: 0.1, 24_999: 0.1, 25_000: 0.01, 30_000: 0.01}),
        ("resnet-20-warmup", {0: 0, 1: 5e-5, 10_000: 0.5, 19_999: 0.99995, 20_000: 0.1, 25_000: 0.01}),
        ("vgg-19", {0: 1, 55_999: 1, 56_000: 0.1, 83_999: 0.1, 84_000: 0.01}),
        ("vgg-19-warmup", {0: 0, 2_500: 0.25, 10_000: 1, 55_999: 1, 56_000: 0.1, 84_000: 0.01}),
    ],
)
def test_schedule(name, table):
    assert {it: PRESETS[name].schedule(it) for it in table} == pytest.approx(table)


def test_milestone_inside_the_warm_up():
    preset = dataclasses.replace(PRESETS["vgg-19"], warmup=4, milestones=(2, 6), gamma=0.5)
    assert [preset.schedule(it) for it in range(8)] == [0, 0.25, 0.25, 0.375, 0.5, 0.5, 0.25, 0.25]


def test_schedule_is_for_lambda_lr():
    preset = dataclasses.replace(PRESETS["vgg-19"], warmup=2, milestones=(3,))
    optimizer = preset.optimizer_for([nn.Parameter(torch.zeros(2))])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, preset.schedule)
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([0, 0.05, 0.1, 0.01])


# what may be pruned


class Conv1D(nn.Module):
    """Stands for that of transformers, which is told by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(5))


def test_layers_that_count():
    model = nn.ModuleDict(
        {
            "a": nn.Conv1d(1, 2, 3),
            "b": nn.Conv3d(1, 2, 3),
            "c": nn.ConvTranspose2d(1, 2, 3),
            "d": Conv1D(),
            "e": nn.Linear(2, 3, bias=False),
            "f": nn.Embedding(4, 5),
            "g": nn.LayerNorm(5),
            "h": nn.BatchNorm1d(5),
            "i": nn.MultiheadAttention(4, 2),
        }
    )
    found = prunable(model)
    assert list(found) == [f"{key}.weight" for key in "abcde"] + ["i.out_proj.weight"]
    assert all(found[key] is model.get_parameter(key) for key in found)


def test_transformers_conv1d():
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D
    assert list(prunable(nn.Sequential(layer(5, 3)))) == ["0.weight"]


def test_shared_weights_once():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "e": nn.Embedding(6, 4), "o": nn.Linear(4, 6)})
    model["b"].weight = model["a"].weight
    assert list(prunable(model)) == ["a.weight", "o.weight"]
    model["o"].weight = model["e"].weight
    assert list(prunable(model)) == ["a.weight"]


def test_first_pattern_wins_and_whole_names_match():
    names = ["fc1.weight", "fc2.weight", "out.weight"]
    assert rates_of([("fc1.*", 0.5), (".*", 0.1)], names) == {"fc1.weight": 0.5, "fc2.weight": 0.1, "out.weight": 0.1}
    assert rates_of([("fc.*", 0.5)], iter(names)) == {"fc1.weight": 0.5, "fc2.weight": 0.5}
    assert rates_of([], names) == {}
    with pytest.raises(ValueError, match="matches none"):
        rates_of([("fc", 0.5)], names)


# errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: networks.conv_net(3), r"conv_net: 'depth' must be one of \(2, 4, 6\), got 3"),
        (lambda: networks.vgg_19(image_size=0), "vgg_19: 'image_size' must be at least 1, got 0"),
        (lambda: networks.lenet_300_100(image_size=(8, 0)), r"lenet_300_100: 'image_size' .* got \(8, 0\)"),
        (lambda: rates_of([("a", 1.5)], ["a"]), r"rates_of: 'rates' must be in \[0, 1\], got 1.5 for 'a'"),
        (lambda: rates_of([("a", math.nan)], ["a"]), r"rates_of: 'rates' must be in \[0, 1\], got nan"),
        (lambda: rates_of([("(", 0.5)], ["a"]), r"rates_of: 'rates' must be regular expressions, got '\('"),
        (
            lambda: rates_of([("head", 0.5)], ["fc.weight", "out.weight"]),
            "rates_of: 'rates' must match a weight each, got 'head', which matches none of fc.weight, out.weight$",
        ),
        (lambda: rates_of([("x", 0.5)], [f"l{i}" for i in range(25)]), "none of l0, .*, l19 and 5 more$"),
        (lambda: rates_of([("x", 0.5)], []), r"matches none of \(no weights\)"),
        (lambda: ladder(nn.Linear(2, 2), [(".*", 0.5)], -1), "ladder: 'level' must be at least 0, got -1"),
        (lambda: ladder(nn.Linear(2, 2), {"x": 0.5}, 1), "ladder: 'rates' must name weights of the model, got x"),
        (lambda: ladder(nn.Linear(2, 2), {"weight": 2}, 1), r"ladder: 'rates' must be in \[0, 1\], got 2"),
        (lambda: ladder(nn.Linear(2, 2), [], 1), "ladder: 'rates' must prune at least one weight, got none"),
        (lambda: PRESETS["vgg-19"].schedule(-1), "schedule: 'iteration' must be at least 0, got -1"),
        (
            lambda: dataclasses.replace(PRESETS["vgg-19"], optimizer="lamb"),
            "Preset: 'optimizer' must be one of .*, got 'lamb'",
        ),
        (lambda: dataclasses.replace(PRESETS["vgg-19"], scope="all"), "Preset: 'scope' must be one of .*, got 'all'"),
        (
            lambda: dataclasses.replace(PRESETS["conv-2"], scope="global"),
            r"Preset: 'rates' must be one rate where the scope is 'global', got \[0.1, 0.2\]",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
