"""What surrounds this package's ops in a compiler's graph, handed to kernels that have the numbers in hand.

    torch.compile(step, options={"post_grad_custom_pre_pass": JoinResiduals()})

A block of a transformer stays as in the textbook. Around the backward pass of a norm, autograd then writes an addition
to the residual stream's gradient, some rows of it (drop-path by batch), scales (drop-path, LayerScale) and sums over
tokens (biases), which are passes over memory of their own, because a compiler does not look into an op. Where nothing
is found, nothing is changed.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from operator import getitem
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._inductor import decomposition
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from fastdino_kernels.column_sums import AT_ONCE
from fastdino_kernels.layer_norm import plain_layer_norm
from fastdino_kernels.rows import plain_spread, plain_take

aten, ours = torch.ops.aten, torch.ops.fastdino
convert = torch.ops.prims.convert_element_type.default

# Inductor joins a norm with the addition before it and with what reads it, where it sees single operations.
if ours.layer_norm.default not in decomposition.decompositions:
    decomposition.register_decomposition([ours.layer_norm.default])(plain_layer_norm)
    decomposition.fast_random_decomps.cache_clear()  # a copy, where something has been compiled before

# Ops that sum what they write over tokens, where their sixth argument says so: that result, and its sums.
SUMMING = {ours.short_attention_backward.default: (0, 1), ours.cls_attention_backward.default: (1, 2)}
ROWS = {ours.take_rows.default: plain_take, ours.spread_rows.default: plain_spread}
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
    value = _value(part).new_empty(_value(part).shape[1:], dtype=dtype)
    for node in _users(part, ours.column_sums.default):
        if node.args[1] == dtype and (found := _output(node, 0)):
            node.meta["val"], found.meta["val"] = [value], value  # there may be more of them now
            return found
    node = _insert(part, ours.column_sums.default, ([part], dtype), [value])
    return _insert(node, getitem, (node, 0), value)


def _waits_for(node: Node, other: Node) -> bool:
    """Whether a node is computed from another."""
    seen, left = {node}, [node]
    while left and other not in seen:
        new = set(left.pop().all_input_nodes) - seen
        seen |= new
        left += new
    return other in seen


def _take_apart(node: Node, function: Callable[..., Tensor]) -> None:
    """Put the single operations of a function in the place of an op."""
    args = [cast(Node, arg) for arg in node.args]
    values = [_value(arg) for arg in args]
    with detect_fake_mode(values) or nullcontext():
        made = make_fx(function, decomposition.select_decomp_table())(*values).graph
    with node.graph.inserting_before(node):
        result = node.graph.graph_copy(made, dict(zip(made.find_nodes(op="placeholder"), args)))
    _replace(node, cast(Node, result))


def _is_result(node: Node) -> bool:
    """Whether nothing in the graph computes with a value: gradients of parameters, as a rule."""
    views = (getitem, aten.select.int, *VIEWS)
    return all(user.op == "output" or (user.target in views and _is_result(user)) for user in node.users)


class JoinResiduals(CustomGraphPass):
    """A pass of Inductor: the backward passes of `layer_norm` and of attention take in what follows them.

    Attributes: n_streams, n_scales, n_sums, how many additions to a stream's gradient, branches with rows, a scale or a
    dtype of their own, and sums over tokens were found, in all graphs.
    """

    def __init__(self) -> None:
        self.n_streams = self.n_scales = self.n_sums = 0

    def uuid(self) -> bytes:
        """What compiled graphs are kept by: this pass's text, and that of the ops."""
        rooms = ("fusion", "layer_norm", "attention", "column_sums", "rows")
        return get_hash_for_files(tuple(str(Path(__file__).with_name(f"{room}.py")) for room in rooms))

    def __call__(self, graph: Graph) -> None:
        """Change a graph in place."""
        for norm in graph.find_nodes(op="call_function", target=ours.layer_norm_backward.default):
            self._join_norm(norm)
        for target, (result, sums) in SUMMING.items():
            for node in graph.find_nodes(op="call_function", target=target):
                self._join_attention(node, result, sums)
        stable_topological_sort(graph)
        graph.eliminate_dead_code()
        for target, function in ROWS.items():
            for node in graph.find_nodes(op="call_function", target=target):
                _take_apart(node, function)
        _sum_at_once(graph)

    def _join_norm(self, norm: Node) -> None:
        grad, part = _output(norm, 0), _output(norm, 2)
        if grad is None or part is None:
            return

        def factor(product: Node, x: Node, *shapes: Sequence[int]) -> Node | None:
            """What else is in a product, or a sum, of x: of such a shape, and not computed from the norm."""
            found = next((arg for arg in product.args if isinstance(arg, Node) and arg is not x), None)
            if found is None or product.kwargs or _value(product).dtype != _value(x).dtype:
                return None
            source = cast(Node, found.args[0]) if found.target is aten.unsqueeze.default else found
            return source if _value(found).shape in shapes and not _waits_for(source, norm) else None

        def products(x: Node, *shapes: Sequence[int]) -> list[tuple[Node, Node]]:
            return [(node, by) for node in _users(x, aten.mul.Tensor) if (by := factor(node, x, *shapes))]

        stream, taken, sent, total = None, None, None, grad
        if len(grad.users) == 1 and (spread := _users(grad, ours.spread_rows.default)):
            total = spread[0]
        added = _users(total, aten.add.Tensor)
        if added and len(total.users) == 1 and (stream := factor(added[0], total, _value(total).shape)):
            grad.meta["val"] = _value(added[0])
            _replace(added[0], grad)
            if total is not grad:
                taken = total.args[2]
                total.graph.erase_node(total)
            self.n_streams += 1
        elif total is not grad:
            return
        branch, scale, gamma, scaled, sums_of_gamma = grad, None, None, None, list[Node]()
        takes = _users(grad, ours.take_rows.default)
        if len(takes) == 1 and not _waits_for(cast(Node, takes[0].args[2]), norm):
            branch, sent = takes[0], takes[0].args[2]
        size = _value(branch).shape
        if len(found := products(branch, (size[0], 1))) == 1 and (branch is grad or len(branch.users) == 1):
            branch, scale = found[0]
        if len(casts := _users(branch, convert)) == 1 and (branch is grad or len(branch.users) == 1):
            branch = casts[0]
        by_gamma, by_scaled = products(branch, size[1:]), products(branch, size)
        if len(by_gamma) == len(by_scaled) == 1 and (branch is grad or len(branch.users) == 2):
            sums_of_gamma = _sums_of(by_scaled[0][0])
            if len(sums_of_gamma) == len(by_scaled[0][0].users) == 1:
                (branch, gamma), scaled = by_gamma[0], by_scaled[0][1]
        n_sent = None if sent is None else size[0]
        _set_args(norm, *norm.args[:5], stream, scale, gamma, scaled, _value(branch).dtype, taken, sent, n_sent)
        part.meta["val"] = norm.meta["val"][2]
        if branch is not grad:
            product, branch = branch, _insert(norm, getitem, (norm, 1), _value(branch))
            _replace(product, branch)
            self.n_scales += 1
        self._use_sums(part, 2, _sums_of(branch))
        if gamma:
            self._use_sums(part, 3, sums_of_gamma)

    def _use_sums(self, part: Node, which: int, totals: list[Node]) -> None:
        for total in totals:
            sums = _column_sums(part, _value(total).dtype)
            self._use(total, _insert(sums, aten.select.int, (sums, 0, which), _value(sums)[which]))

    def _join_attention(self, node: Node, result: int, sums: int) -> None:
        grad = _output(node, result)
        totals = _sums_of(grad) if grad else []
        if totals:
            _set_args(node, *node.args[:5], True, *node.args[6:])
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
