# SPDX-License-Identifier: Apache-2.0
"""zipit.install: what is replaced, taken back and refused, in a small checkout that is written here; and, where
ZIPFAST_ZIPIT names the public one, whole merges by its own ModelMerge with and without it.
"""

from __future__ import annotations

import copy
import importlib
import sys
import textwrap
import types

import numpy as np
import pytest
import torch
from checkouts import imported

from zipfast.compat import zipit

# Other objects with the results of the public ones: what a checkout of it looks like to install().
FILES = {
    "matching_functions": """
        from zipfast.compat import zipit as z

        def compute_correlation(covariance, eps=1e-7):
            return z._common.compute_correlation(covariance, eps)

        def match_tensors_zipit(metric, r=.5, a=0.3, b=.125, **kwargs):
            return z.greedy.match_tensors_zipit(metric, r, a, b, **kwargs)

        def match_tensors_permute(metric, r=.5, **kwargs):
            return z.baselines.match_tensors_permute(metric, r, **kwargs)

        def match_tensors_identity(metric, r=.5, **kwargs):
            return z.baselines.match_tensors_identity(metric, r, **kwargs)

        def match_tensors_mine(metric):
            return compute_correlation(metric)
        """,
    "metric_calculators": """
        from matching_functions import compute_correlation
        from zipfast.compat.zipit import metrics

        class CovarianceMetric(metrics.CovarianceMetric):
            pass

        class MeanMetric(metrics.MeanMetric):
            pass

        def get_metric_fns(names):
            return {"covariance": CovarianceMetric, "mean": MeanMetric}
        """,
    "model_merger": """
        from matching_functions import *
        from metric_calculators import CovarianceMetric as Covariance, MeanMetric

        class ModelMerge:
            default = match_tensors_zipit
            static = staticmethod(match_tensors_permute)

            def transform(self, model, metric_classes=(Covariance, MeanMetric), transform_fn=match_tensors_zipit, *,
                          head=match_tensors_identity, names={"a": Covariance}):
                return metric_classes, transform_fn, head, names

            @classmethod
            def build(cls, metric=Covariance):
                return metric

        def evaluate(fn=match_tensors_zipit, stop=None):
            return fn
        """,
}
PLACES = {
    "matching_functions.compute_correlation",
    "matching_functions.match_tensors_zipit",
    "matching_functions.match_tensors_permute",
    "matching_functions.match_tensors_identity",
    "metric_calculators.compute_correlation",
    "metric_calculators.CovarianceMetric",
    "metric_calculators.MeanMetric",
    "model_merger.compute_correlation",
    "model_merger.match_tensors_zipit",
    "model_merger.match_tensors_permute",
    "model_merger.match_tensors_identity",
    "model_merger.Covariance",
    "model_merger.MeanMetric",
    "model_merger.ModelMerge.default",
    "model_merger.ModelMerge.static",
    "model_merger.ModelMerge.transform (defaults)",
    "model_merger.ModelMerge.build (defaults)",
    "model_merger.evaluate (defaults)",
}


@pytest.fixture
def clean():
    names = [*FILES, "later"]
    assert not any(name in sys.modules for name in names)
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in names:
        sys.modules.pop(name, None)


def write(folder, files=FILES):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    return folder


@pytest.fixture
def checkout(tmp_path, clean, monkeypatch):
    """model_merger of the small checkout, imported as its scripts do."""
    monkeypatch.syspath_prepend(str(write(tmp_path / "ZipIt")))
    pytest.importorskip("scipy")
    return importlib.import_module("model_merger")


def state():
    """Everything that the checkout's modules, class and functions hold."""
    merger = sys.modules["model_merger"]
    functions = (merger.ModelMerge.transform, merger.ModelMerge.build.__func__, merger.evaluate)
    return [{k: v for k, v in vars(sys.modules[name]).items() if not k.startswith("__")} for name in FILES], [
        (f.__defaults__, f.__kwdefaults__) for f in functions
    ]


def test_every_place_is_replaced_and_restored(checkout):
    before = state()
    static = vars(checkout.ModelMerge)["static"]
    handle = zipit.install()
    assert set(handle.replaced) == PLACES
    assert set(handle.difference) == {p.split(".")[1] for p in PLACES if p[0:5] in ("match", "metri")}
    for name in ("match_tensors_zipit", "match_tensors_permute", "match_tensors_identity", "compute_correlation"):
        assert getattr(sys.modules["matching_functions"], name) is getattr(checkout, name) is getattr(zipit, name)
    merge = checkout.ModelMerge()
    metrics, transform, head, names = merge.transform(None)
    assert metrics == (zipit.CovarianceMetric, zipit.MeanMetric) and transform is zipit.match_tensors_zipit
    assert head is zipit.match_tensors_identity and names == {"a": zipit.CovarianceMetric}
    assert merge.build() is zipit.CovarianceMetric and checkout.evaluate() is zipit.match_tensors_zipit
    assert merge.static is zipit.match_tensors_permute and checkout.ModelMerge.default is zipit.match_tensors_zipit
    assert sys.modules["metric_calculators"].get_metric_fns([])["mean"] is zipit.MeanMetric
    handle.uninstall()
    assert state() == before and vars(checkout.ModelMerge)["static"] is static
    handle.uninstall()
    assert state() == before


def test_context_manager_restores_after_an_error(checkout):
    before = state()
    with pytest.raises(KeyError, match="inside"), zipit.install(checkout) as handle:
        assert checkout.match_tensors_zipit is zipit.match_tensors_zipit and handle.elsewhere == ()
        raise KeyError("inside")
    assert state() == before


def test_only_some_names(checkout):
    mean = checkout.MeanMetric
    with zipit.install(names=["match_tensors_zipit", "CovarianceMetric"]) as first:
        assert checkout.MeanMetric is mean and checkout.Covariance is zipit.CovarianceMetric
        assert set(first.difference) == {"match_tensors_zipit", "CovarianceMetric"}
        with zipit.install(names=["MeanMetric"]):
            assert checkout.MeanMetric is zipit.MeanMetric
        assert checkout.MeanMetric is mean and checkout.Covariance is zipit.CovarianceMetric
    with pytest.raises(ValueError, match=r"zipit.install: 'names' must be of compute_correlation, .*, got 'match'"):
        zipit.install(names=["match"])


def test_twice_is_refused(checkout):
    with zipit.install():
        with pytest.raises(ValueError, match="must hold its own compute_correlation, got zipfast's; uninstall"):
            zipit.install()
        with pytest.raises(ValueError, match="must hold its own"):
            zipit.check()
    zipit.install().uninstall()


def test_modules_imported_later_are_restored_too(checkout, tmp_path):
    theirs = checkout.match_tensors_zipit
    (tmp_path / "ZipIt" / "later.py").write_text(
        "from matching_functions import match_tensors_zipit, match_tensors_mine\n"
        "from zipfast.compat.zipit import match_tensors_identity\n"
    )
    handle = zipit.install()
    later = importlib.import_module("later")
    assert later.match_tensors_zipit is zipit.match_tensors_zipit
    handle.uninstall()
    assert later.match_tensors_zipit is theirs


def test_what_uses_zipfast_of_its_own_accord_keeps_it(checkout, tmp_path):
    (tmp_path / "ZipIt" / "later.py").write_text("from zipfast.compat.zipit import match_tensors_zipit\n")
    later = importlib.import_module("later")
    zipit.install().uninstall()
    assert later.match_tensors_zipit is zipit.match_tensors_zipit


def test_what_was_replaced_again_stays(checkout):
    handle = zipit.install()
    checkout.match_tensors_zipit = other = lambda metric: None
    handle.uninstall()
    assert checkout.match_tensors_zipit is other
    assert sys.modules["matching_functions"].match_tensors_zipit is not zipit.match_tensors_zipit


def test_modules_of_others(checkout):
    mine, wrong = types.ModuleType("mine"), types.ModuleType("wrong")
    mine.match, wrong.match = checkout.match_tensors_zipit, checkout.match_tensors_zipit
    sys.modules["mine"], sys.modules["wrong"] = mine, wrong
    try:
        with zipit.install(also=[mine]) as handle:
            assert mine.match is zipit.match_tensors_zipit and "mine.match" in handle.replaced
            assert wrong.match is not zipit.match_tensors_zipit and handle.elsewhere == ("wrong.match",)
        assert mine.match is wrong.match is checkout.match_tensors_zipit
    finally:
        del sys.modules["mine"], sys.modules["wrong"]


def test_random_generators_are_left_alone(checkout):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    zipit.install().uninstall()
    zipit.check()
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()


# ------------------------------------------------------------------------------------------ refusals


def test_nothing_imported(clean):
    with pytest.raises(
        ImportError, match=r"must be imported first, got none of matching_functions, metric_calculators in"
    ):
        zipit.install()


def test_a_module_of_something_else(clean):
    with pytest.raises(
        ValueError, match=r"'checkout' must be a module of .* beside one of matching_functions, .*, got .*"
    ):
        zipit.install(textwrap)
    with pytest.raises(ValueError, match="'checkout' must be an imported module with a file, got <module 'sys'"):
        zipit.install(sys)


def test_two_checkouts(checkout, tmp_path):
    write(tmp_path / "fork", {"matching_functions": FILES["matching_functions"]})
    spec = importlib.util.spec_from_file_location("fork", tmp_path / "fork" / "matching_functions.py")
    fork = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fork)
    zipit.install().uninstall()  # the fork is in no list of modules
    with zipit.install(fork) as handle:
        assert {p.split(".")[0] for p in handle.replaced} == {"fork"}
        assert checkout.match_tensors_zipit is not zipit.match_tensors_zipit
    sys.modules["later"] = fork
    with pytest.raises(
        ValueError, match=r"'checkout' must name one of the imported checkouts, got None and .*ZipIt.*fork"
    ):
        zipit.install()
    with zipit.install(checkout):
        assert fork.match_tensors_zipit is not zipit.match_tensors_zipit


# What a fork changed: file, name, in it this, into that, and what install() says it got.
CHANGES = [
    (
        "matching_functions",
        "match_tensors_zipit",
        "zipit(metric, r, a, b",
        "zipit(metric, r, a, 1.0",
        "a difference of 1.0e",
    ),
    ("matching_functions", "compute_correlation", "(covariance, eps)", "(covariance, 0.1)", "a difference of"),
    (
        "matching_functions",
        "match_tensors_identity",
        "match_tensors_identity(metric, r=.5, **kwargs):",
        "match_tensors_identity(metric, r=.5, kwargs={}):",
        r"TypeError \(.*unexpected keyword argument 'add_bias'\)",
    ),
    (
        "metric_calculators",
        "CovarianceMetric",
        "class CovarianceMetric(metrics.CovarianceMetric):\n    pass",
        "class CovarianceMetric(metrics.CovarianceMetric):\n    def finalize(self, numel):\n"
        "        return super().finalize(numel) * numel / (numel - 1)",
        "a difference of 1",
    ),
    (
        "metric_calculators",
        "MeanMetric",
        "class MeanMetric(metrics.MeanMetric):\n    pass",
        "class MeanMetric(metrics.MeanMetric):\n    def finalize(self, numel):\n"
        "        return super().finalize(numel).double()",
        "a difference of inf",
    ),
    (
        "matching_functions",
        "match_tensors_permute",
        "match_tensors_permute(metric, r=.5, **kwargs):",
        "match_tensors_permute(metric, r=.5, solver=None, **kwargs):",
        "the parameter solver, which zipfast's has not",
    ),
    (
        "metric_calculators",
        "CovarianceMetric",
        "class CovarianceMetric(metrics.CovarianceMetric):\n    pass",
        "class CovarianceMetric(metrics.CovarianceMetric):\n    def finalize(self, numel, eps=1e-4, log=False):\n"
        "        return super().finalize(numel)",
        r"the parameter finalize\(log\), which zipfast's has not",
    ),
]


@pytest.mark.parametrize("file, name, old, new, seen", CHANGES, ids=range(len(CHANGES)))
def test_a_changed_fork(tmp_path, clean, monkeypatch, file, name, old, new, seen):
    pytest.importorskip("scipy")
    text = textwrap.dedent(FILES[file])
    assert old in text
    monkeypatch.syspath_prepend(str(write(tmp_path / "ZipIt", {**FILES, file: text.replace(old, new)})))
    merger = importlib.import_module("model_merger")
    before = state()
    with pytest.raises(
        ValueError, match=rf"{file}.{name} in .*ZipIt must compute what .*got {seen}.*; leave it out with"
    ):
        zipit.install(merger)
    assert state() == before  # nothing was replaced
    others = [p.split(".")[1] for p in PLACES if p.startswith(("match", "metric")) and not p.endswith(name)]
    with zipit.install(merger, names=others) as handle:
        assert not any(p.endswith("." + name) for p in handle.replaced)


def test_a_checkout_with_none_of_the_names(tmp_path, clean, monkeypatch):
    monkeypatch.syspath_prepend(str(write(tmp_path / "ZipIt", {"matching_functions": "x = 1"})))
    importlib.import_module("matching_functions")
    with pytest.raises(ValueError, match="must have one of the names, got none"):
        zipit.install()


# ------------------------------------------------------------------------------------------ the public code itself

quiet = pytest.mark.filterwarnings("ignore:.*autocast")  # which the public code asks of CUDA
MODULES = ["matching_functions", "metric_calculators", "utils", "model_merger", "graphs.resnet_graph", "models.resnets"]


@pytest.fixture(scope="module")
def public():
    with imported("ZIPFAST_ZIPIT", MODULES) as modules:
        yield modules


def images(batches):
    g = torch.Generator().manual_seed(7)
    drawn = (torch.randn(32, 3, 5, 5, generator=g) for _ in range(batches))
    return tuple((torch.nn.functional.interpolate(x, size=16, mode="bilinear"), None) for x in drawn)


def resnets(public, blocks, width, count):
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        net = (
            public["models.resnets"].ResNet(public["models.resnets"].BasicBlock, blocks, w=width, num_classes=5).train()
        )
        with torch.no_grad():
            for x, _ in images(4) * 5:
                net(x)
            for module in net.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.3)
        found.append(net.eval())
    return found


def merge(public, blocks, width, count, **options):
    nets = resnets(public, blocks, width, count)
    target = copy.deepcopy(nets[0])
    graphs = [public["graphs.resnet_graph"].resnet20(net).graphify() for net in nets]
    found = public["model_merger"].ModelMerge(*graphs, device="cpu")
    found.transform(target, images(4), **options)
    return found


def compare(theirs, ours):
    """Features in the same group, all features, and the largest difference of the merged weights, relative."""
    equal = total = 0
    assert list(theirs.unmerges) == list(ours.unmerges)
    for node in theirs.unmerges:
        rows = [torch.cat(list(found.unmerges[node])) for found in (theirs, ours)]
        equal += int((rows[0] == rows[1]).all(1).sum())
        total += len(rows[0])
    weights = zip(theirs.merged_model.state_dict().values(), ours.merged_model.state_dict().values())
    return equal, total, max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-9)) for a, b in weights)


@quiet
@pytest.mark.parametrize(
    "blocks, width, count, options",
    [
        ((1, 1, 1), 1, 2, {}),
        ((3, 3, 3), 1, 2, {"a": 1.0, "b": 1.0}),
        ((3, 3, 3), 1, 2, {"stop_at": 42}),
        ((1, 1, 1), 2, 2, {"a": 0.01, "b": 0.5}),
        ((1, 1, 1), 1, 3, {"b": 1.0}),
        ((1, 1, 1), 1, 2, {"transform_fn": "match_tensors_permute"}),
        ((1, 1, 1), 1, 3, {"transform_fn": "match_tensors_permute"}),
        ((1, 1, 1), 1, 2, {"transform_fn": "match_tensors_identity"}),
    ],
)
def test_whole_merges_by_the_public_code(public, blocks, width, count, options):
    def run():
        by_name = {k: public["utils"].get_merging_fn(v) for k, v in options.items() if k == "transform_fn"}
        return merge(public, blocks, width, count, **{**options, **by_name})

    theirs = run()
    with zipit.install() as handle:
        assert "model_merger.ModelMerge.transform (defaults)" in handle.replaced and handle.elsewhere == ()
        ours = run()
        used = ours.transform_fn
    assert used.__module__.startswith("zipfast.") and not theirs.transform_fn.__module__.startswith("zipfast.")
    equal, total, error = compare(theirs, ours)
    print(f"{equal} of {total} features in the same group; weights differ by {error:.1e} at most")
    assert equal >= 0.99 * total
    if equal == total:
        assert error <= 1e-6
        x = images(1)[0][0]
        outputs = [torch.cat(list(found(x))) if "stop_at" in options else found(x) for found in (theirs, ours)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@quiet
@pytest.mark.parametrize("kind", ["CorrelationMetric", "CossimMetric"])
def test_metrics_that_crash_in_the_public_code(public, kind):
    with pytest.raises(Exception, match=r".+"):
        merge(public, (1, 1, 1), 1, 2, metric_classes=(getattr(public["metric_calculators"], kind),))
    found = merge(
        public,
        (1, 1, 1),
        1,
        2,
        metric_classes=(getattr(zipit, kind),),
        transform_fn=zipit.match_tensors_zipit,
    )
    assert all(bool(torch.isfinite(v).all()) for v in found.merged_model.state_dict().values())


@quiet
def test_kmeans_in_the_public_transform(public):
    with pytest.raises(TypeError, match="unexpected keyword argument 'prune_threshold'"):
        merge(public, (1, 1, 1), 1, 2, transform_fn=public["matching_functions"].match_tensors_kmeans)
    found = merge(public, (1, 1, 1), 1, 2, transform_fn=zipit.match_tensors_kmeans, random_state=0)
    assert all(bool(torch.isfinite(v).all()) for v in found.merged_model.state_dict().values())


def test_all_names_agree(public):
    difference = zipit.check(public["matching_functions"])
    assert set(difference) == set(zipit.__all__) - {"MetricCalculator", "check", "get_metric_fns", "install"}
    assert all(difference[name] == 0 for name in difference if not name.endswith("Metric"))
    assert all(value <= 1e-6 for value in difference.values())


@quiet
def test_three_models_at_the_defaults(public):
    """The public code runs out of pairs and leaves features in no group, without a word; ours says so, and what to do."""
    theirs = merge(public, (1, 1, 1), 1, 3)
    lost = sum(int((torch.cat(list(u)).sum(1) == 0).sum()) for u in theirs.unmerges.values())
    print(f"{lost} features in no group")
    assert lost
    with (
        zipit.install(),
        pytest.raises(ValueError, match=r"no pair is left after .*; use zipfast.match, or a larger b"),
    ):
        merge(public, (1, 1, 1), 1, 3)
