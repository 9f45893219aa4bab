# SPDX-License-Identifier: Apache-2.0
"""Features: the law ``head(features) == logits`` on many models, pooling by hand, hooks and modes, errors, specs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zipfast import zoo
from zipfast.ranking.extract import Extractor, extract, load_candidate

IMAGES = (2, 3, 32, 32)
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def hf() -> Any:
    return pytest.importorskip("transformers")


class Net(nn.Module):
    """Parts as children, and a function of them as the forward pass."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def no_hooks(model: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def law(model: nn.Module, head: str, batch: Any, width: int, rounding: float = 0) -> Extractor:
    """head(features) is the model's answer, to the bit unless told otherwise, in the first batch and the second."""
    extractor = Extractor(model)
    with torch.no_grad():
        for _ in range(2):
            features = extractor(batch)[""]
            output = model.eval()(**batch) if isinstance(batch, dict) else model.eval()(batch)
            answer = output if isinstance(output, Tensor) else output.logits
            given = features if isinstance(model.get_submodule(head), nn.Linear) else features[:, :, None, None]
            assert features.shape == (len(answer), width) and features.dtype == torch.float32
            assert extractor.logits is not None and not features.requires_grad
            again = model.get_submodule(head)(given).flatten(1)
            torch.testing.assert_close(again, answer, rtol=0, atol=rounding)
            assert torch.equal(extractor.logits, answer)
    assert extractor.names == [""] and no_hooks(model)
    return extractor


def vision(name: str) -> Any:
    t = hf()
    vit = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    sizes = {"ViT": {**vit, "image_size": 32, "patch_size": 16}}
    sizes["ResNet"] = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    sizes["ConvNext"] = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2}
    sizes["Swin"] = {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    kind = name.removesuffix("Model").removesuffix("ForImageClassification")
    return getattr(t, name)(getattr(t, f"{kind}Config")(**sizes[kind], num_labels=4)).eval()


def text(name: str, **options: Any) -> Any:
    t = hf()
    if name.startswith("Bert"):
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        return getattr(t, name)(t.BertConfig(vocab_size=20, num_labels=3, **small, **options)).eval()
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "pad_token_id": 0}
    return getattr(t, name)(t.GPT2Config(vocab_size=20, num_labels=3, **small, **options)).eval()


def words(mask: Tensor = MASK) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 20, mask.shape) * mask, "attention_mask": mask}


# --- the law ---


@pytest.mark.parametrize(
    ("name", "head", "width"),
    [
        ("ResNetForImageClassification", "classifier.1", 12),
        ("ViTForImageClassification", "classifier", 16),
        ("ConvNextForImageClassification", "classifier", 12),
        ("SwinForImageClassification", "classifier", 16),
    ],
)
def test_classifiers_of_images(name: str, head: str, width: int) -> None:
    extractor = law(vision(name), head, {"pixel_values": torch.randn(IMAGES)}, width)
    assert extractor.how.startswith(f"input of '{head}'")


def test_classifiers_of_text() -> None:
    assert law(text("BertForSequenceClassification"), "classifier", words(), 16).how == "input of 'classifier'"
    # of the 15 tokens that the head sees, 3 are picked: a product of other shape sums in another order (3e-8 seen)
    extractor = law(text("GPT2ForSequenceClassification"), "score", words(), 16, rounding=1e-6)
    assert extractor.how == "input of 'score', at the positions of the logits"


@pytest.mark.parametrize("zero", [False, True])  # a head of zeros: all positions have the same logits
def test_a_token_is_picked_as_the_model_does(zero: bool) -> None:
    model, batch = text("GPT2ForSequenceClassification"), words()
    if zero:
        nn.init.zeros_(model.score.weight)
    with torch.no_grad():
        tokens = model.transformer(**batch).last_hidden_state
    expected = tokens[torch.arange(3), torch.tensor([2, 4, 3])]
    assert torch.equal(Extractor(model)(batch)[""], expected)
    extractor = Extractor(model, pool="mean")
    kept = MASK[:, :, None]
    torch.testing.assert_close(extractor(batch)[""], (tokens * kept).sum(1) / kept.sum(1))
    assert extractor.logits is not None and extractor.logits.shape == (3, 3)
    batch["labels"] = torch.zeros(3).long()  # left out: the loss would be taken of more than the logits
    assert torch.equal(Extractor(model)(batch)[""], expected)


def test_averaged_logits_of_tokens() -> None:
    model = Net(lambda m, x: m.any(x).mean(1), any=nn.Linear(6, 3))
    x = torch.randn(4, 5, 6)
    assert torch.equal(Extractor(model)(x)[""], model(x))  # no name that is known: the answer itself
    model = Net(lambda m, x: m.head(x).mean(1), head=nn.Linear(6, 3))
    extractor = Extractor(model)
    for _ in range(2):
        torch.testing.assert_close(extractor(x)[""], x.mean(1))
        torch.testing.assert_close(extractor.logits, model(x).detach())


def test_own_nets() -> None:
    law(zoo.resnet(1, width=0.25, classes=5), "linear", torch.randn(2, 1, 8, 8), 16)
    law(zoo.mlp(16, [12, 7], 3), "5", torch.randn(4, 1, 4, 4), 7)
    law(zoo.VGG(((4,), (6,)), hidden=9), "classifier.2", torch.randn(2, 1, 8, 8), 9)
    assert law(nn.Sequential(nn.Linear(4, 2)), "0", torch.randn(3, 4), 4).how == "input of '0'"
    linear = nn.Linear(4, 2)
    x = torch.randn(3, 4)
    extractor = Extractor(linear)
    assert torch.equal(extractor(x)[""], x) and extractor.how == "input of the model"


@pytest.mark.parametrize("end", ["plain", "flatten", "softmax", "squeeze", "tuple", "slice", "dict"])
def test_ends_of_a_network(end: str) -> None:
    ends: dict[str, Callable[[Tensor], Any]] = {
        "plain": lambda y: y,
        "flatten": lambda y: y.flatten(1)[:],
        "softmax": lambda y: y.softmax(-1),
        "squeeze": lambda y: y.unsqueeze(1).squeeze(1),
        "tuple": lambda y: (y, y + 1),
        "slice": lambda y: y[:, :4],
        "dict": lambda y: {"out": y, "aux": y + 1},
    }

    def run(m: Any, x: Tensor) -> Any:
        return ends[end](m.fc(F.adaptive_avg_pool2d(m.conv(x).relu_(), 1).flatten(1)))

    model = Net(run, conv=nn.Conv2d(3, 6, 3), fc=nn.Linear(6, 5 if end == "slice" else 4))
    x = torch.randn(2, 3, 8, 8)
    extractor = Extractor(model)
    features = extractor(x)[""]
    assert extractor.how == "input of 'fc'" and features.shape == (2, 6)
    assert torch.equal(model.fc(features)[:, :4], extractor.logits)  # also behind a softmax: the logits, not the answer
    assert torch.equal(features, F.adaptive_avg_pool2d(model.conv(x).relu(), 1).flatten(1))


def test_convolution_as_head() -> None:
    model = Net(
        lambda m, x: m.c(m.conv(x).mean((2, 3), True)).flatten(1), conv=nn.Conv2d(3, 6, 3), c=nn.Conv2d(6, 4, 1)
    )
    law(model, "c", torch.randn(IMAGES), 6)
    classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(6, 4, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
    squeeze = Net(lambda m, x: m.classifier(m.conv(x)).flatten(1), conv=nn.Conv2d(3, 6, 3), classifier=classifier)
    x = torch.randn(2, 3, 8, 8)
    extractor = Extractor(squeeze)
    assert torch.equal(extractor(x)[""], squeeze.conv(x).flatten(2).transpose(1, 2).mean(1))
    assert extractor.how == "input of 'classifier.1', mean over 36 positions"
    assert torch.equal(extractor.logits, squeeze.eval()(x))


def test_what_is_written_into_is_no_head() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.fc2(m.fc1(x).relu())
        y += x
        return y

    model = Net(run, fc1=nn.Linear(6, 8), fc2=nn.Linear(8, 6))
    x = torch.randn(3, 6)
    extractor = Extractor(model)
    assert torch.equal(extractor(x)[""], model(x)) and extractor.logits is None and extractor.how == "output"


def test_densenet_like() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([x, m.conv(x)], 1)
        return m.classifier(torch.flatten(F.adaptive_avg_pool2d(F.relu(m.norm(x), inplace=True), (1, 1)), 1))

    law(
        Net(run, conv=nn.Conv2d(3, 5, 1), norm=nn.BatchNorm2d(8), classifier=nn.Linear(8, 4)),
        "classifier",
        torch.randn(IMAGES),
        8,
    )


class Timm(nn.Module):
    """The methods that timm's models have."""

    def __init__(self, classes: int = 4, pooled: bool = True) -> None:
        super().__init__()
        self.conv, self.hidden, self.num_classes, self.pooled = nn.Conv2d(3, 6, 3), nn.Linear(6, 9), classes, pooled
        self.out = nn.Linear(9, classes) if classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.hidden(x.mean((2, 3))).tanh() if self.pooled else x
        return x if pre_logits else self.out(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x)) * 2  # not what is asked for


def test_timm_stub() -> None:
    model, x = Timm(), torch.randn(IMAGES)
    extractor = Extractor(model)
    features = extractor(x)[""]
    assert features.shape == (2, 9) and extractor.how == "forward_head(pre_logits=True) of timm"
    assert torch.equal(model.out(features), extractor.logits) and torch.equal(extractor.logits * 2, model(x))
    bare = Extractor(Timm(0))
    assert bare(x)[""].shape == (2, 9) and bare.logits is None
    maps = Extractor(Timm(0, pooled=False))
    assert maps(x)[""].shape == (2, 6) and maps.how.endswith("of timm, mean over 900 positions")


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed (it needs torchvision)")
    model = timm.create_model(name, pretrained=False, num_classes=5).eval()
    extractor = Extractor(model)
    features = extractor(torch.randn(2, 3, 224, 224))[""]
    assert features.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(features), extractor.logits)


# --- no head ---


def test_bare_vision_models() -> None:
    x = {"pixel_values": torch.randn(IMAGES)}
    for name, what, width in [
        ("ResNetModel", "pooler_output, mean over 1 positions", 12),
        ("ConvNextModel", "pooler_output", 12),
        ("SwinModel", "pooler_output", 16),
        ("ViTModel", "last_hidden_state, first token", 16),
    ]:
        model = vision(name)
        extractor = Extractor(model)
        features = extractor(x)[""]
        with torch.no_grad():
            output = model(**x)
        expected = output.last_hidden_state[:, 0] if name == "ViTModel" else output.pooler_output.flatten(1)
        assert torch.equal(features, expected) and features.shape == (2, width)
        assert extractor.how == what and extractor.logits is None
        assert torch.equal(extractor(x)[""], expected)


def test_bare_text_models() -> None:
    batch = words()
    bert, gpt = text("BertModel"), text("GPT2Model")
    with torch.no_grad():
        tokens, others = bert(**batch).last_hidden_state, gpt(**batch).last_hidden_state
    extractor = Extractor(bert)  # its pooler has a linear layer
    torch.testing.assert_close(extractor(batch)[""], torch.stack([t[m > 0].mean(0) for t, m in zip(tokens, MASK)]))
    assert extractor.how == "last_hidden_state, mean over the tokens that the attention mask keeps"
    extractor = Extractor(gpt)
    assert torch.equal(extractor(batch)[""], others[torch.arange(3), torch.tensor([2, 4, 3])])
    assert extractor.how == "last_hidden_state, last token that the attention mask keeps"


def test_causal_language_model() -> None:
    model, batch = text("GPT2LMHeadModel"), words()
    extractor = Extractor(model)
    with torch.no_grad():
        tokens = model.transformer(**batch).last_hidden_state
    assert torch.equal(extractor(batch)[""], tokens[torch.arange(3), torch.tensor([2, 4, 3])])
    assert extractor.how.startswith("input of 'lm_head', last token") and extractor.logits is None  # one per token


def test_plain_outputs() -> None:
    x = torch.randn(IMAGES)
    trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
    assert torch.equal(Extractor(trunk)(x)[""], trunk(x).flatten(2).transpose(1, 2).mean(1))
    signal = nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2)).eval()
    extractor = Extractor(signal)
    torch.testing.assert_close(extractor(torch.ones(2, 3, 9))[""], signal(torch.ones(2, 3, 9)).mean(2))
    assert extractor.how == "output, mean over 3 positions"
    resnet = Net(lambda m, x: m.fc(m.conv(x).mean((2, 3))), conv=nn.Conv2d(3, 6, 3), fc=nn.Identity())
    assert torch.equal(Extractor(resnet)(x)[""], resnet(x))


# --- layers and pooling ---


def test_named_layers() -> None:
    net = zoo.resnet(1, width=0.25).eval()
    x = torch.randn(2, 1, 8, 8)
    extractor = Extractor(net, layers=["linear", "stages.1", "bn1", "bn1"])
    found = extractor(x)
    assert extractor.names == list(found) == ["linear", "stages.1", "bn1"] and extractor.logits is None
    assert torch.equal(found["linear"], net(x))
    torch.testing.assert_close(found["bn1"], net.bn1(net.conv1(x)).mean((2, 3)))
    assert extractor.how.startswith("output of 'linear'; output of 'stages.1', mean over 16 positions; output")
    written = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True))
    x = torch.randn(3, 4)
    assert torch.equal(Extractor(written, layers=["0"])(x)["0"], written[0](x))  # not what the ReLU wrote there


def test_layers_of_transformers() -> None:
    model = vision("ViTForImageClassification")
    x = {"pixel_values": torch.randn(IMAGES)}
    layer = "vit.embeddings"  # holds a convolution, yet gives tokens
    found = Extractor(model, layers=[layer, "classifier"])(x)
    with torch.no_grad():
        assert torch.equal(found[layer], model.vit.embeddings(x["pixel_values"])[:, 0])
        assert torch.equal(found["classifier"], model(**x).logits)
    swin = vision("SwinModel")
    extractor = Extractor(swin, layers=["pooler"])  # [N, C, 1]: a pooling, not C tokens
    assert torch.equal(extractor(x)["pooler"], Extractor(swin)(x)[""])
    assert extractor.how == "output of 'pooler', mean over 1 positions"


def test_running_out_of_memory_is_no_error_of_the_head() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.score(x)
        if y.shape[-1] > 3:  # the second pass, with the input beside the logits
            raise torch.OutOfMemoryError("planted")
        return y[:, -1].clone()

    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        Extractor(Net(run, score=nn.Linear(4, 3)))(torch.randn(2, 5, 4))


def test_pooling_of_tokens_by_hand() -> None:
    x = torch.tensor([[[1.0], [2.0], [4.0], [64.0], [float("nan")]]] * 2)
    masks = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]])
    model = Net(lambda m, x, attention_mask=None: m.norm(x), norm=nn.Identity())
    table = {
        "mean": [7 / 3, 70 / 3],
        "first": [1.0, 2.0],
        "last": [4.0, 64.0],
        "max": [4.0, 64.0],
        "auto": [7 / 3, 70 / 3],
    }
    for pool, expected in table.items():
        found = Extractor(model, pool=pool)({"x": x, "attention_mask": masks})[""]
        torch.testing.assert_close(found, torch.tensor(expected)[:, None])
    plain = {"mean": 7 / 3, "first": 1.0, "last": 4.0, "max": 4.0, "channels_last": 7 / 3}
    for pool, value in plain.items():
        assert Extractor(model, pool=pool)(x[:, :3])[""].tolist() == [[pytest.approx(value)]] * 2
    assert Extractor(model, pool="channels_first")(x[:, :3])[""].tolist() == [[1.0, 2.0, 4.0]] * 2
    extractor = Extractor(model)
    extractor({"x": x[:, :3], "attention_mask": masks})
    assert extractor.how == "output, mean over the tokens (the attention mask has another shape)"


def test_pooling_of_maps_by_hand() -> None:
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    table = {
        "auto": [5.5, 17.5],
        "mean": [5.5, 17.5],
        "max": [11.0, 23.0],
        "channels_first": [5.5, 17.5],
        "channels_last": [10.0, 11.0, 12.0, 13.0],
    }
    for pool, expected in table.items():
        assert Extractor(nn.Identity(), pool=pool)(x)[""].tolist() == [expected]


def test_which_token() -> None:
    def rule(model: Any, **config: Any) -> str:
        model.config = SimpleNamespace(**config)
        extractor = Extractor(model)
        extractor(torch.randn(2, 3, 4))
        return extractor.how.removeprefix("output, ")

    assert rule(nn.Identity()) == "mean over the tokens" and rule(nn.Identity(), is_decoder=True) == "last token"
    assert rule(nn.Identity(), architectures=["TinyForCausalLM"]) == "last token"
    assert rule(nn.Identity(), is_decoder=True, is_encoder_decoder=True) == "mean over the tokens"
    marked = nn.Identity()
    marked.register_buffer("cls_token", torch.zeros(1))
    assert rule(marked, is_decoder=True) == "first token"


# --- types, modes, hooks ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    net = zoo.resnet(1, width=0.25).to(dtype)
    extractor = Extractor(net)
    features = extractor(torch.randn(2, 1, 8, 8))[""]
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert features.dtype == extractor.logits.dtype == expected  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(net.linear(features.to(dtype)).to(expected), extractor.logits)
    model = text("GPT2ForSequenceClassification").to(dtype)
    assert Extractor(model)(words())[""].dtype == expected


def test_modes_and_gradients() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 2)).train()
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(6, 4)
    with torch.inference_mode():
        features = Extractor(net)(x)[""]
    assert [m.training for m in net] == [True, False, True, True] and net.training
    assert not features.is_inference() and not features.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(features, net.eval()[:3](x))


def test_hooks_are_removed_after_an_exception() -> None:
    def fail(m: Any, x: Tensor) -> Tensor:
        m.fc(x)
        raise KeyError("planted")

    model = Net(fail, fc=nn.Linear(4, 2)).train()
    for layers in (None, ["fc"]):
        with pytest.raises(KeyError, match="planted"):
            Extractor(model, layers=layers)(torch.zeros(2, 4))
        assert no_hooks(model) and model.training and model.fc.training


def test_stream() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).train()
    seen: list[Any] = []
    x, y = torch.randn(5, 4), torch.arange(5)
    found = list(extract(net, [(x[:3], y[:3]), (x[3:], y[3:]), x], progress=lambda *args: seen.append(args)))
    assert seen == [("batches", 1), ("batches", 2), ("batches", 3)] and net.training
    assert torch.equal(torch.cat([f[""] for f, _ in found[:2]]), net[:2](x))
    assert torch.equal(torch.cat([labels for _, labels in found[:2]]), y) and found[2][1] is None
    model = text("BertForSequenceClassification")
    batch = {**words(), "labels": torch.tensor([0, 1, 2])}
    ((_, labels),) = extract(model, [batch])
    assert torch.equal(labels, batch["labels"]) and "labels" in batch
    stream = extract(net, ((x, y) for _ in iter(int, 1)))  # without end: nothing is read ahead
    assert next(stream)[0][""].shape == (5, 8)


# --- errors ---


def test_errors_of_arguments() -> None:
    net = zoo.mlp(4, [3], 2)
    with pytest.raises(TypeError, match="extract: 'model' must be a torch module, got function"):
        Extractor(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"extract: 'pool' must be one of auto, mean, .*, got 'median'"):
        extract(net, [], pool="median")
    for layers in (["0", "9"], "9", [], [""]):
        with pytest.raises(ValueError, match=r"extract: 'layers' must be a list of submodules \(as 0, 1, .*got \["):
            Extractor(net, layers=layers)


def test_errors_of_layers() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        m.texts(x)
        return m.fc(x)

    parts = {"texts": Net(lambda m, x: "text"), "numbers": nn.Identity(), "fc": nn.Linear(4, 2)}
    model, x = Net(run, **parts), torch.randn(2, 4)
    with pytest.raises(TypeError, match="extract: 'layers' must return tensors, got none from 'texts'"):
        Extractor(model, layers=["texts"])(x)
    with pytest.raises(ValueError, match="extract: 'layers' must be called by the model, got 'numbers', which is not"):
        Extractor(model, layers=["fc", "numbers"])(x)
    whole = nn.Sequential(Net(lambda m, x: x.argmax(1, True)), nn.Embedding(9, 2))
    with pytest.raises(TypeError, match=r"extract: 'layers' must return floating tensors, got torch.int64 as output"):
        Extractor(whole, layers=["0"])(x)
    assert no_hooks(model) and no_hooks(whole)


def test_errors_of_shapes() -> None:
    x = torch.randn(2, 5, 4)
    flat = Net(lambda m, x: m.fc(x.flatten(0, 1)), fc=nn.Linear(4, 3))
    with pytest.raises(
        ValueError, match=r"features must have a row per sample, got \[10, 4\] for 2 samples as input of"
    ):
        Extractor(flat)(x)
    with pytest.raises(ValueError, match=r"a row per sample, got \[2\] for 2 samples as output; give other 'layers'"):
        Extractor(Net(lambda m, x: x.sum((1, 2))))(x)
    with pytest.raises(
        ValueError, match="extract: 'pool' must be auto, mean or max for maps, got 'last' for the output"
    ):
        Extractor(nn.Identity(), pool="last")(torch.randn(IMAGES))
    with pytest.raises(ValueError, match="extract: 'attention_mask' must keep a token of every sample"):
        Extractor(Net(lambda m, x, attention_mask: x))({"x": x, "attention_mask": torch.zeros(2, 5)})
    with pytest.raises(ValueError, match="extract: each batch must hold a tensor with an axis of samples"):
        Extractor(nn.Identity())({"x": 1})
    with pytest.raises(TypeError, match="data: each batch must be a tensor, a mapping"):
        Extractor(nn.Identity())("text")


def test_errors_of_heads() -> None:
    x = torch.randn(2, 5, 4)
    for end in (
        lambda y: y.max(1).values,
        lambda y: y.sum(1),
        lambda y: y.mean(1).view(-1, 3),
        lambda y: y.mean(1).softmax(1),
    ):
        model = Net(lambda m, x, end=end: end(m.score(x)), score=nn.Linear(4, 3))
        with pytest.raises(
            ValueError, match=r"extract: 'pool' must be given for Net, where 'score' works .* got logits that are no"
        ):
            Extractor(model)(x)
        assert Extractor(model, pool="mean")(x)[""].shape == (2, 4) and no_hooks(model)
    two = Net(lambda m, x: SimpleNamespace(logits=(m.a(x) + m.b(x)) / 2), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    with pytest.raises(ValueError, match="'layers' must be given, got a Net, whose logits come from no linear layer"):
        Extractor(two)(x[:, 0])
    fickle = Net(lambda m, x: m.fc(x) if len(x) > 1 else x, fc=nn.Linear(4, 3))
    extractor = Extractor(fickle)
    extractor(x[:, 0])
    with pytest.raises(RuntimeError, match="extract: 'model' must answer as it did before, got no logits of its head"):
        extractor(x[:1, 0])


# --- specs ---


def test_specs_of_files(tmp_path: Any) -> None:
    model = vision("ResNetForImageClassification")
    model.save_pretrained(tmp_path / "net")
    x = {"pixel_values": torch.randn(IMAGES)}
    for spec in (str(tmp_path / "net"), f"hf:{tmp_path / 'net'}"):
        loaded = load_candidate(spec)
        assert type(loaded) is type(model) and torch.equal(Extractor(loaded)(x)[""], Extractor(model)(x)[""])
    net = load_candidate("zipfast.zoo:mlp", factory_args={"in_features": 4, "hidden": [5], "out_features": 2})
    assert net[1].out_features == 5 and not net.training
    with pytest.raises(FileNotFoundError, match="load_model: no folder at"):
        load_candidate(str(tmp_path / "none"))


def test_specs_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import huggingface_hub

    asked: list[Any] = []
    model = vision("ResNetForImageClassification")
    model.save_pretrained(tmp_path / "net")

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if "absent" in name:
            raise OSError("no such model\nand more")
        return str(tmp_path / "net")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    for spec, name in (("google/vit-base", "google/vit-base"), ("hf:gpt2", "gpt2"), ("hf:a/b", "a/b")):
        loaded = load_candidate(spec)
        assert type(loaded) is type(model) and not loaded.training  # with its class head, as LEEP wants
        assert asked[-1] == (name, ["config.json", "*.safetensors", "*.safetensors.index.json"])
    wanted = (
        r"load_candidate: 'spec' must be a path or what huggingface_hub loads, got 'owner/absent' \(no such model\)$"
    )
    with pytest.raises(ValueError, match=wanted):
        load_candidate("owner/absent")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"huggingface_hub must be installed, got .*; pip install transformers$"):
        load_candidate("hf:a")


def test_specs_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, pretrained: bool) -> nn.Module:
        if name != "resnet18":
            raise RuntimeError(f"Unknown model ({name})")
        return Timm() if pretrained else nn.Identity()

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create))
    model = load_candidate("timm:resnet18")
    assert isinstance(model, Timm) and not model.training
    with pytest.raises(ValueError, match=r"what timm loads, got 'timm:resnet0' \(Unknown model \(resnet0\)\)$"):
        load_candidate("timm:resnet0")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ImportError, match=r"load_candidate: timm must be installed, got .*; pip install timm torchvision$"
    ):
        load_candidate("timm:resnet18")
