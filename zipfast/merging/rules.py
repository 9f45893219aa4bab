# SPDX-License-Identifier: Apache-2.0
"""One rule per ATen op: what the op says about the layouts of its axes.

A rule receives the `Flow` (layouts found so far), the graph node and the node's own arguments; it unifies the axes that
must carry the same features, notes which parameter axes produce or consume features, and returns one layout per axis
of the node's output (a list of those for ops with several outputs). Rules see sizes only, never values.

A new op is one function here, or in user code:

    @rule("my_op")
    def _my_op(flow, node, x):
        return list(flow.axes(x))
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from .flow import RULES, Flow, UnknownOpError, apply_rule, op_name, rule, shape_of
from .layout import (
    Atom,
    Layout,
    Product,
    divide,
    flag,
    freeze,
    one,
    product,
    size_of,
    unify,
)

__all__ = ["RULES", "Flow", "UnknownOpError", "apply_rule", "op_name", "rule", "shape_of"]

# ------------------------------------------------------------------------------------------ elementwise

ELEMENTWISE = """
 add sub mul div rsub pow sqrt rsqrt exp log log1p tanh sigmoid log_sigmoid relu relu6 gelu silu mish hardtanh hardswish
 hardsigmoid leaky_relu elu selu celu softplus softsign clamp clamp_min clamp_max neg abs sign round floor erf sin cos
 where masked_fill maximum minimum lerp eq ne lt le gt ge logical_and logical_or logical_not isnan __and__ __or__
 bitwise_and bitwise_or bitwise_not dropout alpha_dropout feature_dropout to _to_copy clone contiguous alias detach
 lift_fresh_copy type_as square reciprocal zeros_like ones_like full_like fill zero copy nan_to_num addcmul addcdiv
"""


@rule(*ELEMENTWISE.split())
def _elementwise(flow: Flow, node: Node, *args: Any, **kwargs: Any) -> list[Layout]:
    """All operands' axes unify as they broadcast; a residual sum makes one space of its streams this way."""
    return flow.broadcast(shape_of(node), [flow.axes(source) for source in node.all_input_nodes if flow.axes(source)])


@rule("prelu")
def _prelu(flow: Flow, node: Node, x: Node, weight: Node) -> list[Layout]:
    """The slope rides the channel axis, unless there is one for all channels."""
    axes = flow.axes(x)
    if size_of(flow.axes(weight)[0]) != 1:
        unify(axes[1 if len(axes) > 1 else 0], flow.axes(weight)[0])
    return list(axes)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax")
def _softmax(flow: Flow, node: Node, x: Node, dim: int, *args: Any) -> list[Layout]:
    """Axes pass; along `dim` only a permutation is exact."""
    flag(flow.axes(x)[dim], "softmax")
    return list(flow.axes(x))


@rule("full", "zeros", "ones", "empty", "new_ones", "new_zeros", "new_full", "new_empty")
def _uniform(flow: Flow, node: Node, *args: Any, **kwargs: Any) -> list[Layout]:
    """One value everywhere: any permutation fits."""
    return [Atom(size) if size != 1 else one() for size in shape_of(node)]


# ------------------------------------------------------------------------------------------ weights


@rule("linear")
def _linear(flow: Flow, node: Node, x: Node, weight: Node, bias: Node | None = None) -> list[Layout]:
    """Weight axis 1 consumes the last axis of x, axis 0 and the bias produce."""
    flow.contract(x, -1, weight, 1)
    return flow.axes(x)[:-1] + [flow.produce(weight, 0, bias)]


@rule("addmm", "baddbmm")
def _addmm(flow: Flow, node: Node, bias: Node, x: Node, weight: Node, **kwargs: Any) -> list[Layout]:
    """bias + x @ weight: the second last axis of the weight consumes, the last and the bias produce."""
    flow.contract(x, -1, weight, -2)
    return flow.axes(x)[:-1] + [flow.produce(weight, -1, bias)]


@rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(flow: Flow, node: Node, x: Node, y: Node) -> list[Layout]:
    """The inner axes unify; a weight may stand on either side."""
    x_axes, y_axes = flow.axes(x), flow.axes(y)
    inner = -2 if len(y_axes) > 1 else -1
    head: list[Layout] = x_axes[-2:-1]
    if flow.is_weight(x) and not flow.is_weight(y):
        flow.contract(y, inner, x, -1)
        if head:
            head = [flow.produce(x, -2)]
    else:
        flow.contract(x, -1, y, inner)
    tail = head + ([flow.produce(y, -1)] if len(y_axes) > 1 else [])
    sizes = shape_of(node)
    return flow.broadcast(sizes[: len(sizes) - len(tail)], [x_axes[:-2], y_axes[:-2]]) + tail


@rule("einsum")
def _einsum(flow: Flow, node: Node, equation: str, tensors: Sequence[Node], **kwargs: Any) -> list[Layout]:
    """Equal letters unify; a letter that both operands have and the result has not is summed over."""
    terms, _, result = equation.replace(" ", "").partition("->")
    letters = terms.split(",")
    if "." in equation or not result or len(letters) != 2 or any(len(set(t)) != len(t) for t in letters):
        raise ValueError(f"einsum '{equation}' is not of the form 'ab,bc->ac' with two operands")
    (x, y), (of_x, of_y) = tensors, letters
    found: dict[str, Layout] = {}
    for tensor, names in ((x, of_x), (y, of_y)):
        for name, layout in zip(names, flow.axes(tensor)):
            if size_of(layout) != 1:
                unify(found.setdefault(name, layout), layout)
    weight, other, of_weight, of_other = (x, y, of_x, of_y) if flow.is_weight(x) else (y, x, of_y, of_x)
    for name in dict.fromkeys(of_x + of_y):
        shared = name in of_x and name in of_y
        if name not in result and shared:
            flow.contract(other, of_other.index(name), weight, of_weight.index(name))
        elif name not in result:
            flag(found.get(name, one()), "mean")
        elif name in of_weight and not shared:
            flow.produce(weight, of_weight.index(name))
    return [found.get(name, one()) for name in result]


@rule("scaled_dot_product_attention")
def _attention(
    flow: Flow, node: Node, q: Node, k: Node, v: Node, mask: Node | None = None, *args: Any, **kwargs: Any
) -> list[Layout]:
    """softmax(q kᵀ) v: heads unify, the width of q meets that of k, the width of v passes to the result.

    With grouped queries the heads of q are blocks, one for each head of k and v.
    """
    q_axes, k_axes, v_axes = flow.axes(q), flow.axes(k), flow.axes(v)
    sizes = shape_of(node)
    if len(q_axes) > 2 and size_of(q_axes[-3]) != size_of(k_axes[-3]):
        heads = size_of(k_axes[-3])
        outer, _ = divide(q_axes[-3], Product, [heads, size_of(q_axes[-3]) // heads])
        unify(outer, k_axes[-3])
        unify(k_axes[-3], v_axes[-3])
        lead = flow.broadcast(sizes[:-3], [axes[:-3] for axes in (q_axes, k_axes, v_axes)]) + [q_axes[-3]]
    else:
        lead = flow.broadcast(sizes[:-2], [axes[:-2] for axes in (q_axes, k_axes, v_axes)])
    flow.contract(q, -1, k, -1)
    unify(k_axes[-2], v_axes[-2])
    flag(k_axes[-2], "softmax")
    scores = [*lead, q_axes[-2], k_axes[-2]]
    if mask is not None:
        flow.broadcast([size_of(axis) for axis in scores], [scores, flow.axes(mask)])
    return [*lead, q_axes[-2], v_axes[-1]]


def freeze_positions(kernel: Sequence[Layout], spatial: Sequence[Layout]) -> None:
    # Whoever mixes neighbours gives its positions a meaning, also where a reshape made them of features.
    for axis in kernel:
        freeze(axis, "kernel")
    for axis in spatial:
        freeze(axis, "spatial")


@rule("conv1d", "conv2d", "conv3d")
def _conv(
    flow: Flow, node: Node, x: Node, weight: Node, bias: Node | None = None, *args: Any, **kwargs: Any
) -> list[Layout]:
    """Weight axis 1 consumes the channels, axis 0 and the bias produce; a depthwise weight rides its channels."""
    groups = args[3] if len(args) > 3 else kwargs.get("groups", 1)
    axes, weight_axes = flow.axes(x), flow.axes(weight)
    batched = len(axes) == len(weight_axes)
    freeze_positions(weight_axes[2:], axes[2 if batched else 1 :])
    if groups == 1:
        flow.contract(x, 1 if batched else 0, weight, 1)
        out = flow.produce(weight, 0, bias)
    else:
        out = weight_axes[0]
        _grouped(flow, x, 1 if batched else 0, weight, out, weight_axes[1], groups)
        if bias is not None:
            unify(out, flow.axes(bias)[0])
    spatial = flow.fresh(node, "spatial")
    return [axes[0], out, *spatial[2:]] if batched else [out, *spatial[1:]]


def _grouped(
    flow: Flow, x: Node, axis: int, weight: Node, grouped: Layout, inner: Layout, groups: int, transposed: bool = False
) -> Layout:
    """Channels are groups x width on both sides, and whole groups may be permuted. Returns the output's channels.

    `grouped` is the weight's axis that holds the groups, `inner` the other one, which all groups share.
    """
    channels = flow.axes(x)[axis]
    group, width_in = divide(channels, Product, [groups, size_of(channels) // groups])
    width_out = Atom(size_of(inner) if transposed else size_of(grouped) // groups)
    out = product(group, width_out)
    unify(grouped, product(group, width_in) if transposed else out)
    if size_of(inner) > 1:
        unify(inner, width_out if transposed else width_in)
    if flow.is_weight(weight):
        if size_of(width_in) > 1:
            flow.note(weight, width_in, "consume")
            flow.read(x, axis, "consume")
        if width_out.size > 1:
            flow.note(weight, width_out, "produce")
    return out


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(
    flow: Flow, node: Node, x: Node, weight: Node, bias: Node | None = None, *args: Any, **kwargs: Any
) -> list[Layout]:
    """As convolution, with the weight's axes 0 and 1 exchanged."""
    groups = args[3] if len(args) > 3 else kwargs.get("groups", 1)
    axes, weight_axes = flow.axes(x), flow.axes(weight)
    freeze_positions(weight_axes[2:], axes[2:])
    spatial = flow.fresh(node, "spatial")
    if groups == 1:
        flow.contract(x, 1, weight, 0)
        return [axes[0], flow.produce(weight, 1, bias), *spatial[2:]]
    out = _grouped(flow, x, 1, weight, weight_axes[0], weight_axes[1], groups, transposed=True)
    if bias is not None:
        unify(out, flow.axes(bias)[0])
    return [axes[0], out, *spatial[2:]]


@rule("embedding")
def _embedding(flow: Flow, node: Node, weight: Node, index: Node, *args: Any, **kwargs: Any) -> list[Layout]:
    """Rows are picked by index and stay; columns produce."""
    freeze(flow.axes(weight)[0], "table index")
    return flow.axes(index) + [flow.produce(weight, 1)]


# ------------------------------------------------------------------------------------------ norms, reductions, pools


@rule("batch_norm", "instance_norm")
def _batch_norm(flow: Flow, node: Node, x: Node, *params: Any, **kwargs: Any) -> list[Layout]:
    """Scale, shift and both running statistics ride the channel axis."""
    for param in params[:4]:
        if isinstance(param, Node):
            unify(flow.axes(x)[1], flow.axes(param)[0])
    return list(flow.axes(x))


@rule("layer_norm", "rms_norm")
def _layer_norm(flow: Flow, node: Node, x: Node, shape: Sequence[int], *params: Any, **kwargs: Any) -> list[Layout]:
    """Scale and shift ride the normalised axes, along which only a permutation is exact."""
    for i in range(1, len(shape) + 1):
        flag(flow.axes(x)[-i], "norm")
        for param in params:
            if isinstance(param, Node):
                unify(flow.axes(x)[-i], flow.axes(param)[-i])
    return list(flow.axes(x))


@rule("_weight_norm")
def _weight_norm(flow: Flow, node: Node, v: Node, g: Node, dim: int = 0) -> list[Layout]:
    """v scaled to the norms g, one for each index of `dim`: along the other axes only a permutation is exact."""
    for i, axis in enumerate(flow.axes(v)):
        if i != dim:
            flag(axis, "norm")
    return flow.broadcast(shape_of(node), [flow.axes(v), flow.axes(g)])


@rule("group_norm")
def _group_norm(flow: Flow, node: Node, x: Node, groups: int, *params: Any, **kwargs: Any) -> list[Layout]:
    """Channels become groups x width; scale and shift ride, and only a permutation is exact."""
    channels = flow.axes(x)[1]
    if 1 < groups < size_of(channels):
        divide(channels, Product, [groups, size_of(channels) // groups])
    flag(channels, "norm")
    axes: list[Layout] = _batch_norm(flow, node, x, *params[:2])
    return axes


@rule("mean", "sum", "var", "std", "amax", "amin", "prod", "logsumexp", "norm", "linalg_vector_norm", "any", "all")
def _reduce(flow: Flow, node: Node, x: Node, *args: Any, **kwargs: Any) -> list[Layout]:
    """Reduced axes go; if they were features, only a permutation is exact."""
    axes = flow.axes(x)
    args = args[1:] if op_name(node) in ("norm", "linalg_vector_norm") else args
    dims = kwargs.get("dim", args[0] if args else None)
    return _without(axes, dims, keep=len(shape_of(node)) == len(axes))


def _without(axes: list[Layout], dims: Any, keep: bool) -> list[Layout]:
    dims = range(len(axes)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {dim % len(axes) for dim in dims}
    for dim in gone:
        flag(axes[dim], "mean")
    return [one() if i in gone else axis for i, axis in enumerate(axes) if keep or i not in gone]


@rule("max", "min", "argmax", "argmin")
def _extremum(flow: Flow, node: Node, x: Node, *args: Any, **kwargs: Any) -> Any:
    """max(x, y) is elementwise; where the answer is a position, the axis is frozen."""
    if args and isinstance(args[0], Node):
        return _elementwise(flow, node)
    axes, value = flow.axes(x), node.meta["val"]
    several = isinstance(value, tuple | list)
    dim = kwargs.get("dim", args[0] if args else None)
    if several or op_name(node).startswith("arg"):
        for axis in axes if dim is None else [axes[dim]]:
            freeze(axis, "position")
    first = value[0] if several else value
    out = _without(axes, dim, keep=len(first.shape) == len(axes))
    return [out, list(out)] if several else out


POOLS = """
 max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
 adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices
 upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
 upsample_trilinear3d reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
"""


@rule(*POOLS.split())
def _pool(flow: Flow, node: Node, x: Node, *args: Any, **kwargs: Any) -> Any:
    """Channels pass, the spatial axes are new."""
    spatial = int(re.findall(r"([123])d", op_name(node))[0])
    freeze_positions((), flow.axes(x)[-spatial:])
    value = node.meta["val"]
    if isinstance(value, tuple | list):
        return [flow.axes(x)[:-spatial] + flow.fresh(item, "spatial")[-spatial:] for item in value]
    return flow.axes(x)[:-spatial] + flow.fresh(node, "spatial")[-spatial:]
