# SPDX-License-Identifier: Apache-2.0
"""Parts of an exported model as modules of their own: real parameters under their old names, real batch norms.

A `Part` runs the graph between some values of a model. It is a `torch.fx.GraphModule`, so that it trains, exports,
moves between devices and has a state dict; its graph can be written as JSON and read back without the model's code,
and without running any: only operators of PyTorch's own `aten` namespace and a few symbolic-size helpers are accepted.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from .flow import op_name
from .graph import Exported
from .taps import MAY_ALIAS

HELPERS = {f"operator.{name}": getattr(operator, name) for name in ("getitem", "mul", "add", "sub", "floordiv", "neg")}
HELPERS |= {"math.floor": math.floor, "math.ceil": math.ceil, "math.trunc": math.trunc}
HELPERS |= {f"torch.sym_{name}": getattr(torch, f"sym_{name}") for name in ("int", "float", "max", "min", "not")}
IGNORED = ("_assert", "sym_constrain", "_set_grad")  # checks of the exporter: they compute nothing
NORMS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
KINDS = ("placeholder", "get_attr", "call_function", "call_module", "output")


class Part(GraphModule):
    """The graph between some inputs and an output; see `extract`.

    inputs: names of its inputs, in order: the value at which it begins, if any, then inputs of the model.
    """

    inputs: tuple[str, ...]
    names: tuple[str, ...]

    def to_data(self) -> dict[str, Any]:
        """The graph as JSON data; weights are in the state dict."""
        nodes = [_node_data(self, node) for node in self.graph.nodes]
        return {"inputs": list(self.inputs), "names": list(self.names), "nodes": nodes}

    @staticmethod
    def from_data(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
        """The part that `to_data` described, with these weights.

        Raises:
            ValueError: an operator or a name that is not accepted, a weight that is missing, damaged data.
        """
        try:
            return _from_data(data, tensors)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, SyntaxError, AssertionError) as error:
            raise ValueError(f"load: the graph is damaged ({type(error).__name__}: {error})") from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        part = cast(Part, super().__deepcopy__(memo))
        part.inputs, part.names = self.inputs, self.names
        return part

    def __reduce__(self) -> tuple[Any, ...]:
        tensors = dict(self.named_parameters(remove_duplicate=False)) | dict(self.named_buffers(remove_duplicate=False))
        modes = {name: module.training for name, module in self.named_modules()}
        return _restore, (self.to_data(), tensors, modes)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        device = next((t.device for t in (*self.parameters(), *self.buffers())), None)
        if device is not None:  # the export wrote the example's device into ops that make tensors
            changed = False
            for node in self.graph.nodes:
                written = [v for v in (*node.args, *node.kwargs.values()) if isinstance(v, torch.device)]
                if any(value != device for value in written):
                    node.args = tuple(device if isinstance(v, torch.device) else v for v in node.args)
                    node.kwargs = {k: device if isinstance(v, torch.device) else v for k, v in node.kwargs.items()}
                    changed = True
            if changed:
                self.recompile()
        return result


def _restore(data: Mapping[str, Any], tensors: Mapping[str, Tensor], modes: Mapping[str, bool]) -> Part:
    part = Part.from_data(data, tensors)
    for name, value in part.named_parameters():
        value.requires_grad_(tensors[name].requires_grad)
    for name, module in part.named_modules():
        module.training = modes[name]
    return part


def _from_data(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
    graph, env, root = FxGraph(), dict[str, Node](), nn.Module()
    for item in data["nodes"]:
        _check_item(item)
        args, kwargs = _decode(item["args"], env), _decode(item["kwargs"], env)
        target: Any = item["target"]
        if item["op"] == "call_function":
            target = _function(target)
        elif item["op"] == "call_module":
            _set_norm(root, target, item["norm"], tensors)
        elif item["op"] == "get_attr":
            if target not in tensors:
                raise ValueError(f"load: the weights must hold {target!r}, got {len(tensors)} tensors without it")
            _set_tensor(root, target, tensors[target], item["kind"] == "parameter")
        env[item["name"]] = graph.create_node(item["op"], target, tuple(args), kwargs, item["name"])
    return _finish(root, graph, tuple(data["inputs"]), tuple(data["names"]))


def _check_item(item: Mapping[str, Any]) -> None:
    """Refuse what would not stay a name in the Python code that torch.fx writes for a graph."""
    kind, target = item["op"], item["target"]
    names = [target] if kind == "placeholder" else []
    if kind not in KINDS or not all(str(name).isidentifier() for name in (*names, *item["kwargs"].get("dict", ()))):
        raise ValueError(f"load: a graph must consist of {', '.join(KINDS)} with plain names, got {kind} {target!r}")
    if kind in ("get_attr", "call_module") and not re.fullmatch(r'[^"\\\x00-\x1f]+', target):
        raise ValueError(f"load: a weight must have a plain name, got {target!r}")


def extract(
    exported: Exported, state: Mapping[str, Tensor], *, begin: str | None = None, end: str | None = None
) -> Part:
    """The part of a model from the value of node `begin` (None: its inputs) to that of `end` (None: its outputs).

    Args:
        exported: the model's graph.
        state: the weights; copied. Buffers that a state dict leaves out are taken from the exported model.

    Returns:
        A module called with the values named in ``inputs``; it returns the value of `end`, or the model's output: one
        tensor, or a dict by name where there are several.

    Raises:
        ValueError: a weight is missing.
    """
    start = None if begin is None else exported.by_name[begin]
    outputs, names = _outputs(exported) if end is None else ([exported.by_name[end]], [""])
    last = exported.order[outputs[0]] if end is not None else len(exported.nodes)
    first = -1 if start is None else exported.order[start]
    writes = [n for n in exported.nodes if only_writes(n) and exported.order[n] <= last]
    needed = _needed([*outputs, *(n for n in writes if exported.order[n] > first)], start)
    # What inputs alone decide, e.g. a mask, is computed on both sides of `start`, with what was written to it before.
    early = [n for n in writes if exported.order[n] < first and n not in exported.flows]
    while early:
        found = [n for n in early if memory_of(n) in {memory_of(other) for other in needed}]
        early = [n for n in early if n not in found] if found else []
        needed = _needed(found, start) | needed
    graph, env, root, inputs = FxGraph(), dict[Node, Any](), nn.Module(), list[str]()
    if start is not None:
        env[start] = graph.placeholder(start.name)
        inputs.append(start.name)
    specs = dict(
        zip((n for n in exported.nodes if n.op == "placeholder"), exported.program.graph_signature.input_specs)
    )
    for node, spec in specs.items():
        if node in needed and spec.kind is InputKind.USER_INPUT:
            if isinstance(spec.arg, ConstantArgument):
                env[node] = spec.arg.value
            elif not _replaceable(node, needed, start):
                env[node] = graph.placeholder(node.name)
                inputs.append(node.name)
    for node in exported.nodes:
        if node not in needed or node in env or any(word in str(node.target) for word in IGNORED):
            continue
        if node.op == "placeholder":
            if specs[node].kind is not InputKind.USER_INPUT:
                _add_weight(exported, state, node, specs[node], needed, graph, env, root)
        elif node.op == "get_attr":
            _set_tensor(root, str(node.target), getattr(exported.program.graph_module, str(node.target)), False)
            env[node] = graph.get_attr(str(node.target))
        elif op_name(node) == "sym_size" and node.args[0] not in env:
            env[node] = graph.call_function(torch.ops.aten.sym_size.int, (env[start], _same_size(node, start)))  # type: ignore[index]
        elif op_name(node) == "batch_norm" and (path := _norm_path(node, specs)) is not None:
            _set_norm(root, path, _norm_config(node), _norm_tensors(exported, state, node, path, specs))
            env[node] = graph.call_module(path, (env[node.args[0]],))  # type: ignore[index]
        else:
            env[node] = graph.node_copy(node, lambda old: env[old])
            env[node].meta = {}
    graph.output(env[outputs[0]] if len(outputs) == 1 else {name: env[o] for name, o in zip(names, outputs)})
    return _finish(root, graph, tuple(inputs), tuple(names))


def _finish(root: nn.Module, graph: FxGraph, inputs: tuple[str, ...], names: tuple[str, ...]) -> Part:
    part = Part(root, graph, "Part")
    part.graph.eliminate_dead_code()
    part.recompile()
    part.inputs, part.names = inputs, names
    return part.eval()


def _outputs(exported: Exported) -> tuple[list[Node], list[str]]:
    """The nodes of the model's tensor outputs, and a name for each."""
    final = exported.nodes[-1]
    flat = list(final.args[0])  # type: ignore[arg-type]
    specs = exported.program.graph_signature.output_specs
    wanted = [
        (node, i)
        for i, (node, spec) in enumerate(zip(flat, specs))
        if spec.kind is OutputKind.USER_OUTPUT and isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)
    ]
    tree = tree_unflatten(list(range(len(flat))), exported.program.call_spec.out_spec)
    paths = {leaf: keystr(path).strip("[]'\". ") or "output" for path, leaf in tree_flatten_with_path(tree)[0]}
    return [node for node, _ in wanted], [paths.get(i, f"output{i}") for _, i in wanted]


def only_writes(node: Node) -> bool:
    """Whether a node's only effect is on the memory of its inputs, e.g. an assignment to a slice."""
    return not node.users and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def memory_of(node: Node) -> Node:
    """The node that made the memory in which a node's value lies: what it is a view of, or was written to."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        schema = getattr(node.target, "_schema", None)
        shares = schema is not None and schema.arguments[0].alias_info is not None
        if not shares and op_name(node) not in MAY_ALIAS.split():
            break
        node = node.args[0]
    return node


def _needed(outputs: Sequence[Node], start: Node | None) -> set[Node]:
    todo, needed = list(outputs), set[Node]()
    while todo:
        node = todo.pop()
        if node in needed:
            continue
        needed.add(node)
        if node is start or (start is not None and op_name(node) == "sym_size" and _same_size(node, start) is not None):
            continue
        todo += node.all_input_nodes
    return needed


def _same_size(node: Node, start: Node | None) -> int | None:
    """The axis of the value at `start` that has the symbolic size which `node` reads elsewhere."""
    if start is None:
        return None
    for axis, size in enumerate(start.meta["val"].shape):
        if not isinstance(size, int) and str(size) == str(node.meta["val"]):
            return axis
    return None


def _replaceable(node: Node, needed: set[Node], start: Node | None) -> bool:
    """Whether all that a part reads of a model input are sizes that its own first value has too."""
    users = [user for user in node.users if user in needed]
    return start is not None and all(op_name(u) == "sym_size" and _same_size(u, start) is not None for u in users)


def _lookup(exported: Exported, state: Mapping[str, Tensor], name: str) -> Tensor:
    for key in exported.twins.get(name, (name,)):
        if key in state:
            return state[key]
    program = exported.program
    value = program.constants.get(name)
    if value is None and name not in program.graph_signature.parameters:
        value = program.state_dict.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"extract: 'state' must hold {name!r}, got {len(state)} tensors without it")
    return value


def _add_weight(
    exported: Exported,
    state: Mapping[str, Tensor],
    node: Node,
    spec: Any,
    needed: set[Node],
    graph: FxGraph,
    env: dict[Node, Any],
    root: nn.Module,
) -> None:
    users = [user for user in node.users if user in needed]
    if users and all(
        op_name(u) == "batch_norm" and node in u.args[1:5] and _norm_path(u, _specs_of(exported)) is not None
        for u in users
    ):
        return  # it belongs to a batch-norm module
    name = exported.twins.get(str(spec.target), (str(spec.target),))[0]  # tied weights: one tensor, one name
    _set_tensor(root, name, _lookup(exported, state, name), spec.kind is InputKind.PARAMETER)
    env[node] = graph.get_attr(name)


def _specs_of(exported: Exported) -> dict[Node, Any]:
    return dict(zip((n for n in exported.nodes if n.op == "placeholder"), exported.program.graph_signature.input_specs))


def _set_tensor(root: nn.Module, name: str, value: Tensor, parameter: bool) -> None:
    *path, leaf = name.split(".")
    for step in path:
        if not hasattr(root, step):
            root.add_module(step, nn.Module())
        root = getattr(root, step)
    copy = value.detach().clone()
    if parameter:
        root.register_parameter(leaf, nn.Parameter(copy, requires_grad=copy.is_floating_point()))
    else:
        root.register_buffer(leaf, copy)


# ------------------------------------------------------------------------------------------ batch norms


def _norm_path(node: Node, specs: Mapping[Node, Any]) -> str | None:
    """The path of the batch-norm module that an op stands for; None if its tensors are not those of one module."""
    names = {}
    for key, value in zip(("weight", "bias", "running_mean", "running_var"), node.args[1:5]):
        if isinstance(value, Node) and value in specs:
            names[key] = str(specs[value].target)
    paths = {name.rpartition(".")[0] for name in names.values()}
    whole = "running_mean" in names and "running_var" in names and ("weight" in names) == ("bias" in names)
    fits = all(name.rpartition(".")[2] == key for key, name in names.items())
    dims = len(node.args[0].meta["val"].shape)  # type: ignore[union-attr]
    return paths.pop() if whole and fits and len(paths) == 1 and dims in NORMS and "" not in paths else None


def _norm_config(node: Node) -> dict[str, Any]:
    x = node.args[0].meta["val"]  # type: ignore[union-attr]
    return {
        "dims": len(x.shape),
        "features": int(x.shape[1]),
        "momentum": node.args[6],
        "eps": node.args[7],
        "affine": isinstance(node.args[1], Node),
    }


def _norm_tensors(
    exported: Exported, state: Mapping[str, Tensor], node: Node, path: str, specs: Mapping[Node, Any]
) -> dict[str, Tensor]:
    names = [str(specs[value].target) for value in node.args[1:5] if isinstance(value, Node)]
    counter = f"{path}.num_batches_tracked"
    found = {name: _lookup(exported, state, name) for name in names}
    return found | ({counter: state[counter]} if counter in state else {})


def _set_norm(root: nn.Module, path: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    *above, leaf = path.split(".")
    for step in above:
        if not hasattr(root, step):
            root.add_module(step, nn.Module())
        root = getattr(root, step)
    norm = NORMS[config["dims"]](
        config["features"], eps=config["eps"], momentum=config["momentum"], affine=config["affine"]
    )
    own = {key: tensors[f"{path}.{key}"] for key in norm.state_dict() if f"{path}.{key}" in tensors}
    missing = [key for key in norm.state_dict() if key not in own and key != "num_batches_tracked"]
    if missing:
        raise ValueError(f"load: the weights must hold '{path}.{missing[0]}', got {len(tensors)} tensors without it")
    norm.to(own["running_mean"].device, own["running_mean"].dtype)  # first: float32 would round float64
    norm.load_state_dict(own, strict=False)
    root.add_module(leaf, norm)


# ------------------------------------------------------------------------------------------ graphs as data


def _node_data(part: Part, node: Node) -> dict[str, Any]:
    item = {
        "name": node.name,
        "op": node.op,
        "target": str(node.target),
        "args": _encode(node.args),
        "kwargs": _encode(node.kwargs),
    }
    if node.op == "call_function":
        item["target"] = _function_name(node.target)
    elif node.op == "get_attr":
        item["kind"] = "parameter" if str(node.target) in dict(part.named_parameters()) else "buffer"
    elif node.op == "call_module":
        norm: Any = part.get_submodule(str(node.target))
        dims = next(dims for dims, kind in NORMS.items() if isinstance(norm, kind) and dims != 2)
        item["norm"] = {
            "dims": dims,
            "features": norm.num_features,
            "momentum": norm.momentum,
            "eps": norm.eps,
            "affine": norm.affine,
        }
    return item


def _function_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target)
    for name, function in HELPERS.items():
        if target is function:
            return name
    raise ValueError(f"save: operator {target} must be one of PyTorch's own")


def _function(name: str) -> Any:
    if name in HELPERS:
        return HELPERS[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops.aten, packet, None), overload, None) if namespace == "aten" else None
    files = isinstance(found, torch._ops.OpOverload) and any(a.name == "filename" for a in found._schema.arguments)
    if not isinstance(found, torch._ops.OpOverload) or files:
        raise ValueError(f"load: operator {name!r} must be one of this PyTorch's own, and read or write no file")
    return found


_SPECIAL: dict[str, type] = {
    "dtype": torch.dtype,
    "device": torch.device,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
}


def _encode(value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, Mapping):
        return {"dict": {key: _encode(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encode(value.start), _encode(value.stop), _encode(value.step)]}
    for key, kind in _SPECIAL.items():
        if isinstance(value, kind):
            return {key: str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"save: a graph argument must be plain data, got {type(value).__name__}")


def _decode(value: Any, env: Mapping[str, Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, env) for item in value]
    if not isinstance(value, Mapping):
        return value
    if len(value) != 1:
        raise ValueError(f"load: a graph argument must be of one kind, got {list(value)}")
    ((key, data),) = value.items()
    if key == "node":
        return env[data]
    if key == "dict":
        return {name: _decode(item, env) for name, item in data.items()}
    if key == "slice":
        return slice(*(_decode(item, env) for item in data))
    if key == "float":
        return float(data)
    if key == "device":
        return torch.device(data)
    found = getattr(torch, str(data), None) if key in _SPECIAL else None
    if found is None or not isinstance(found, _SPECIAL[key]):
        raise ValueError(f"load: a graph argument must be plain data, got {key} {data!r}")
    return found
