"""What surrounds this package's ops in a compiler's graph, handed to kernels that have the numbers in hand.

    torch.compile(step, options={"post_grad_custom_pre_pass": JoinResiduals()})

A block of a transformer stays as in the textbook. Around the backward pass of a norm, autograd then writes an addition
to the residual stream's gradient, a scale of it (drop-path) and sums over tokens (biases), which are passes over memory
of their own, because a compiler does not look into an op. Where nothing is found, nothing is changed.
"""

from collections.abc import Sequence
from operator import getitem
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch._inductor import decomposition
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fastdino_kernels.column_sums import AT_ONCE
from fastdino_kernels.layer_norm import plain_layer_norm

aten, ours = torch.ops.aten, torch.ops.fastdino

# Inductor joins a norm with the addition before it and with what reads it, where it sees single operations.
if ours.layer_norm.default not in decomposition.decompositions:
    decomposition.register_decomposition([ours.layer_norm.default])(plain_layer_norm)
    decomposition.fast_random_decomps.cache_clear()  # a copy, where something has been compiled before

# Ops that sum what they write over tokens, where their last argument says so: that result, and its sums.
SUMMING = {ours.short_attention_backward.default: (0, 1), ours.cls_attention_backward.default: (1, 2)}
VIEWS = (aten.view.default, aten.reshape.default)


def _value(node: Node) -> Tensor:
    return cast(Tensor, node.meta["val"])


def _users(node: Node, *targets: Any) -> list[Node]:
    return [user for user in node.users if user.target in targets]


def _output(node: Node, i: int) -> Node | None:
    """The node that takes result i of an op."""
    return next((user for user in _users(node, getitem) if user.args[1] == i), None)


def _insert(after: Node, target: Any, args: tuple[Any, ...], value: Any) -> Node:
    with after.graph.inserting_after(after):
        node = after.graph.call_function(target, args)
    node.meta["val"] = value
    return node


def _replace(node: Node, by: Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _sums_of(x: Node) -> list[Node]:
    """The sums over the first axis of a tensor, or of it as a matrix of as many rows."""
    views = [x, *(view for view in _users(x, *VIEWS) if _value(view).shape[:1] == _value(x).shape[:1])]
    sums = [node for view in views for node in _users(view, aten.sum.dim_IntList)]
    return [node for node in sums if list(cast(list[int], node.args[1])) == [0] and not node.kwargs]


def _set_args(node: Node, *args: Any) -> None:
    """Give an op other arguments."""
    node.args = args
    node.meta["val"] = cast(Any, node.target)(*map_arg(args, _value))
    node.meta.pop("eager_input_vals", None)  # of the arguments it had


def _column_sums(part: Node, dtype: torch.dtype) -> Node:
    """The node that holds what a kernel's programs have summed, added up; made where there is none."""
    for node in _users(part, ours.column_sums.default):
        if node.args[1] == dtype and (found := _output(node, 0)):
            return found
    value = _value(part).new_empty(_value(part).shape[1:], dtype=dtype)
    node = _insert(part, ours.column_sums.default, ([part], dtype), [value])
    return _insert(node, getitem, (node, 0), value)


def _is_result(node: Node) -> bool:
    """Whether nothing in the graph computes with a value: gradients of parameters, as a rule."""
    views = (getitem, aten.select.int, *VIEWS)
    return all(user.op == "output" or (user.target in views and _is_result(user)) for user in node.users)


class JoinResiduals(CustomGraphPass):
    """A pass of Inductor: the backward passes of `layer_norm` and of attention take in what follows them.

    Attributes: n_streams, n_scales, n_sums, how many additions to a stream's gradient, scales of it and sums over
    tokens were found, in all graphs.
    """

    def __init__(self) -> None:
        self.n_streams = self.n_scales = self.n_sums = 0

    def uuid(self) -> bytes:
        """What compiled graphs are kept by: this pass's text, and that of the ops."""
        rooms = ("fusion", "layer_norm", "attention", "column_sums")
        return get_hash_for_files(tuple(str(Path(__file__).with_name(f"{room}.py")) for room in rooms))

    def __call__(self, graph: Graph) -> None:
        """Change a graph in place."""
        for norm in graph.find_nodes(op="call_function", target=ours.layer_norm_backward.default):
            self._join_norm(norm)
        for target, (result, sums) in SUMMING.items():
            for node in graph.find_nodes(op="call_function", target=target):
                self._join_attention(node, result, sums)
        _sum_at_once(graph)

    def _join_norm(self, norm: Node) -> None:
        grad, part = _output(norm, 0), _output(norm, 2)
        if grad is None or part is None:
            return
        order = {node: i for i, node in enumerate(norm.graph.nodes)}
        value = _value(grad)

        def other(node: Node, shape: Sequence[int]) -> Node | None:
            """What is added to the gradient, or scales it: of this shape, and there before the norm's turn."""
            found = next((x for x in node.args if isinstance(x, Node) and x is not grad), None)
            if found is None or node.kwargs or _value(node).dtype != value.dtype or _value(found).shape != shape:
                return None
            source = cast(Node, found.args[0]) if found.target is aten.unsqueeze.default else found
            return source if order[source] < order[norm] else None

        added = _users(grad, aten.add.Tensor)
        stream = other(added[0], value.shape) if added and len(grad.users) == 1 else None
        if stream:
            _replace(added[0], grad)
            self.n_streams += 1
        scaled = [(node, scale) for node in _users(grad, aten.mul.Tensor) if (scale := other(node, (len(value), 1)))]
        branch, scale = scaled[0] if len(scaled) == 1 else (grad, None)
        _set_args(norm, *norm.args[:5], stream, scale)
        if scale:
            product, branch = branch, _insert(norm, getitem, (norm, 1), _value(branch))
            _replace(product, branch)
            self.n_scales += 1
        for total in _sums_of(branch):
            sums = _column_sums(part, _value(total).dtype)
            self._use(total, _insert(sums, aten.select.int, (sums, 0, 2), _value(sums)[2]))

    def _join_attention(self, node: Node, result: int, sums: int) -> None:
        grad = _output(node, result)
        totals = _sums_of(grad) if grad else []
        if totals:
            _set_args(node, *node.args[:5], True)
            part = _insert(node, getitem, (node, sums), node.meta["val"][sums])
            for total in totals:
                self._use(total, _column_sums(part, _value(total).dtype))

    def _use(self, total: Node, by: Node) -> None:
        """Put another node, of any shape, in the place of a sum."""
        shape = _value(total).shape
        _replace(total, _insert(by, aten.reshape.default, (by, list(shape)), _value(by).reshape(shape)))
        self.n_sums += 1


def _sum_at_once(graph: Graph) -> None:
    """Join sums for which nothing in the graph waits, so that they share launches."""
    waiting: dict[torch.dtype, list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=ours.column_sums.default):
        if _is_result(node):
            waiting.setdefault(cast(torch.dtype, node.args[1]), []).append(node)
    for dtype, nodes in waiting.items():
        for first in range(0, len(nodes), AT_ONCE):
            some = nodes[first : first + AT_ONCE]
            parts = [part for node in some for part in cast(list[Node], node.args[0])]
            values = [value for node in some for value in node.meta["val"]]
            joined = _insert(some[-1], ours.column_sums.default, (parts, dtype), values)
            for node in some:
                for user in list(node.users):
                    i = parts.index(cast(list[Node], node.args[0])[cast(int, user.args[1])])
                    user.args = (joined, i)
                graph.erase_node(node)
    stable_topological_sort(graph)
