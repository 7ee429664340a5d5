"""Find the structures of an MLP or CNN by following channels through its torch.fx graph.

Every Linear or convolution opens a *space* of output channels; whatever reads, scales or normalises those channels joins
it, and an elementwise sum of two spaces makes them one. A space whose every use is understood becomes a block. A space that
meets anything else is *pinned* with the reason: listed in ``StructureMap.skipped``, never guessed.
"""

# B batch, C channels

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from fedsim.pruning.spaces import Flow, Space
from fedsim.pruning.structures import Block, StructureMap, Weight

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
)
POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
)
ELEMENTWISE = {
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.sigmoid, F.tanh, F.hardswish),
    *(F.hardsigmoid, F.hardtanh, F.dropout, F.dropout2d, torch.relu, torch.sigmoid, torch.tanh),
    *("relu", "relu_", "sigmoid", "tanh", "contiguous", "clone"),
}
POOLINGS = {
    *(F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, torch.max_pool2d, torch.adaptive_avg_pool1d),
}
JOINS = {
    operator.add,
    operator.iadd,
    operator.sub,
    operator.mul,
    operator.imul,
    torch.add,
    torch.mul,
    torch.sub,
    "add",
    "add_",
    "mul",
    "mul_",
    "sub",
}
SCALINGS = JOINS | {operator.truediv, operator.neg, torch.div, "div"}
SHAPES = {getattr, "size", "dim"}


def structure_map(model: nn.Module, example: Tensor, *, couple_residual: bool = False) -> StructureMap:
    """The structures of ``model``, traced with one ``example`` (1, ...).

    Hidden units of consecutive Linears, filters of convolutions (with their depthwise followers and normalisation; whole
    groups under GroupNorm). Channels joined by a residual sum stay unless ``couple_residual``, which makes one structure
    of the same channel in every layer of the stream. Inputs and outputs of the model stay. Raises ``ValueError`` for a
    parametrised module or a weight used twice.
    """
    with evaluating(model), torch.no_grad():
        pair = torch.cat([example, example])
        flops = flops_per_scalar(model, pair)
        _refuse_shared_weights(model)
        try:
            graph = fx.symbolic_trace(model)
        except (fx.proxy.TraceError, TypeError, NotImplementedError, RuntimeError, AttributeError) as error:
            blocks: tuple[Block, ...] = ()
            skipped = {"": f"the model cannot be traced: {error}"}
        else:
            ShapeProp(graph).propagate(pair)
            spaces = _Tracer(graph).spaces()
            blocks = tuple(s.block() for s in spaces if s.reason(couple_residual) is None)
            skipped = {name: reason for s in spaces if (reason := s.reason(couple_residual)) for name in s.producers}
    return StructureMap(weights_of(model, flops), blocks, skipped)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every module's own mode is put back after it, also by exception."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def flops_per_scalar(model: nn.Module, inputs: Tensor) -> dict[str, int]:
    """2 x output positions per example of every Linear and convolution, by the name of its weight; one forward pass."""
    flops: dict[str, int] = {}

    def count(name: str, module: nn.Module, output: Tensor) -> None:
        channels = output.shape[1 if isinstance(module, Convolution) else -1]
        flops[name] = flops.get(name, 0) + 2 * (output.numel() // max(channels, 1)) // len(inputs)

    handles = [
        module.register_forward_hook(lambda module, _, output, name=f"{name}.weight": count(name, module, output))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Convolution)
    ]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return flops


def weights_of(model: nn.Module, flops: Mapping[str, int]) -> tuple[Weight, ...]:
    """Parameters, then buffers, with the FLOPs of one scalar of each that computes."""

    def weight(name: str, tensor: Tensor, parameter: bool) -> Weight:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Weight(name, tuple(tensor.shape), dtype, flops.get(name, 0), parameter and tensor.requires_grad, parameter)

    return (
        *(weight(n, p, True) for n, p in model.named_parameters()),
        *(weight(n, b, False) for n, b in model.named_buffers()),
    )


def _refuse_shared_weights(model: nn.Module) -> None:
    owner: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if owner.setdefault(id(parameter), name) != name:
            raise ValueError(f"parameters {owner[id(parameter)]!r} and {name!r} are one tensor; pruning one use would prune the other")


class _Tracer:
    """Walks the graph once in order; ``flows`` maps nodes to the channels they carry."""

    def __init__(self, graph: fx.GraphModule):
        self.graph = graph
        self.modules = dict(graph.named_modules())
        self.flows: dict[fx.Node, Flow] = {}
        self.opened: list[Space] = []

    def spaces(self) -> list[Space]:
        """Every space with a producer, in graph order, joined ones once."""
        used: set[str] = set()
        for node in self.graph.graph.nodes:
            if node.op == "call_module" and any(True for _ in self.modules[node.target].parameters()):
                if node.target in used:
                    kind = type(self.modules[node.target]).__name__
                    raise ValueError(f"module {node.target!r} ({kind}) is used twice; pruning one use would prune the other")
                used.add(node.target)
            self._visit(node)
        return list(dict.fromkeys(space.root() for space in self.opened))

    def _visit(self, node: fx.Node) -> None:
        inputs = [self.flows[a] for a in node.all_input_nodes if a in self.flows]
        if node.op == "output":
            _pin(inputs, "its channels are outputs of the model")
        if node.op not in ("call_module", "call_function", "call_method") or node.target in SHAPES:
            return
        if not inputs:
            self._open_after(node)
            return
        try:
            self.flows[node] = self._module(node, inputs) if node.op == "call_module" else self._function(node, inputs)
        except _NotFollowedError as reason:
            _pin(inputs, f"{node.name}: {reason}")
            self._open_after(node)

    def _open_after(self, node: fx.Node) -> None:
        """Channels can be followed again from a module that produces new ones, whatever it reads."""
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        if isinstance(module, nn.Linear | Convolution):
            self.flows[node] = self._produce(str(node.target), module, len(_shape(node)))
            if getattr(module, "groups", 1) > 1:
                self.flows[node].space.pin("its channels come from a grouped convolution")

    def _module(self, node: fx.Node, inputs: list[Flow]) -> Flow:
        module, name, flow = self.modules[str(node.target)], str(node.target), inputs[0]
        rank = len(_shape(node))
        if isinstance(module, nn.Linear):
            _require(flow.dim == rank - 1, "a Linear over another axis than the channels")
            flow.space.consumed_by(f"{name}.weight", name, "in_features", module.in_features, flow.width)
            return self._produce(name, module, rank)
        if isinstance(module, Convolution):
            return self._convolution(name, module, flow, rank)
        if isinstance(module, nn.GroupNorm):
            _require(flow.dim == 1 and flow.width == 1, "GroupNorm over another axis than the channels")
            _require(module.num_groups > 1, "GroupNorm with one group normalises across all its channels")
            flow.space.normalised_by(name, module, 1, each={"num_channels": 1}, groups=module.num_groups)
            return flow
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            _require(flow.dim == 1, "BatchNorm over another axis than the channels")
            flow.space.normalised_by(name, module, flow.width, each={"num_features": flow.width})
            return flow
        if isinstance(module, ACTIVATIONS):
            return flow
        if isinstance(module, POOLS):
            return self._pool(node, flow)
        if isinstance(module, nn.Flatten):
            return self._flatten(node, flow)
        raise _NotFollowedError(f"the tracer does not follow channels through {type(module).__name__}")

    def _convolution(self, name: str, module: Convolution, flow: Flow, rank: int) -> Flow:
        _require(flow.dim == 1 and flow.width == 1, "a convolution over flattened channels")
        if module.groups == 1:
            flow.space.consumed_by(f"{name}.weight", name, "in_channels", module.in_channels, 1)
            return self._produce(name, module, rank)
        _require(module.groups == module.in_channels == module.out_channels, "a grouped convolution that is not depthwise")
        flow.space.normalised_by(name, module, 1, each=dict.fromkeys(("in_channels", "out_channels", "groups"), 1))
        return flow

    def _produce(self, name: str, module: nn.Module, rank: int) -> Flow:
        convolution = isinstance(module, Convolution)
        space = Space.of(name, module, convolution)
        self.opened.append(space)
        return Flow(space, 1 if convolution else rank - 1, 1)

    def _function(self, node: fx.Node, inputs: list[Flow]) -> Flow:
        target: Any = node.target
        if target in ELEMENTWISE:
            return inputs[0]
        if target in POOLINGS:
            return self._pool(node, inputs[0])
        if target in (torch.mean, "mean"):
            _require(inputs[0].dim == 1 and _reduced(node) <= set(range(2, len(_shape(node.all_input_nodes[0])))), "a mean over channels")
            return inputs[0]
        if target in (torch.flatten, "flatten", torch.reshape, "reshape", "view"):
            return self._flatten(node, inputs[0])
        if target in SCALINGS and len(node.all_input_nodes) == 1:
            return inputs[0]
        if target in JOINS:
            return _join(node, inputs)
        name = target if isinstance(target, str) else getattr(target, "__name__", repr(target))
        raise _NotFollowedError(f"the tracer does not follow channels through {name}")

    def _pool(self, node: fx.Node, flow: Flow) -> Flow:
        _require(flow.dim == 1 and len(_shape(node)) > 2, "pooling over another axis than space")
        return flow

    def _flatten(self, node: fx.Node, flow: Flow) -> Flow:
        """(B, C, ...) -> (B, C * ...): channel c owns one run of columns. A width written as a number would break after surgery."""
        before, after = _shape(node.all_input_nodes[0]), _shape(node)
        _require(flow.dim == 1 and after == (before[0], prod(before[1:])), "a reshape other than (B, C, ...) -> (B, -1)")
        if node.target in (torch.reshape, "reshape", "view"):
            wanted = node.args[1:] if len(node.args) == 3 else node.args[1]
            _require(isinstance(wanted, tuple | list) and wanted[-1] == -1, "a reshape to a fixed width (write -1)")
        return Flow(flow.space, 1, flow.width * prod(before[2:]))


class _NotFollowedError(Exception):
    """Why channels cannot be followed through a node."""


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise _NotFollowedError(reason)


def _pin(flows: list[Flow], reason: str) -> None:
    for flow in flows:
        flow.space.pin(reason)


def _join(node: fx.Node, inputs: list[Flow]) -> Flow:
    first, *others = inputs
    shapes = [_shape(a) for a in node.all_input_nodes]
    aligned = (
        len(inputs) == len(shapes)
        and all(f.dim == first.dim and f.width == first.width for f in others)
        and len({len(s) for s in shapes}) == 1
        and len({s[first.dim] for s in shapes}) == 1
    )
    _require(aligned, "a sum or product of tensors whose channels do not correspond")
    for other in others:
        first.space.join(other.space)
    return first


def _shape(node: fx.Node) -> tuple[int, ...]:
    meta = node.meta.get("tensor_meta")
    if meta is None or not hasattr(meta, "shape"):
        raise _NotFollowedError(f"{node.name} is not a tensor")
    return tuple(meta.shape)


def _reduced(node: fx.Node) -> set[int]:
    """Axes a mean runs over; with none given, the channel axis is among them."""
    axes = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 1)
    rank = len(_shape(node.all_input_nodes[0]))
    return {int(a) % rank for a in (axes if isinstance(axes, tuple | list) else (axes,))}  # type: ignore[arg-type]
