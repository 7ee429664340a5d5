"""The places where a layer can do less: attention from its queries to its output projection, the MLP from its channels to its last one.

A site runs with some of its units (query heads, channels) by giving its projections, on the instance, a ``forward`` over gathered
weights. Parameters are never touched; :meth:`Site.restore` leaves nothing behind. Exports: AttentionSite, MLPSite, Site, sites_of.
"""

# B samples, L tokens, H query heads, G key-value heads, d features of a head, C input channels of the output projection, D hidden size

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsim.llm.attention import read_by, unobserved
from fedsim.llm.families import family_of
from fedsim.llm.pruned_model import Family, VacantAttention, VacantMLP
from fedsim.llm.structures import key_value_heads

NORMS: Mapping[str, tuple[str, str]] = {"opt": ("self_attn_layer_norm", "final_layer_norm"), "gpt2": ("ln_1", "ln_2")}
LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
CACHES = ("cache", "past_key_values", "layer_past")


class Site(ABC):
    """One of the two, named by its output projection.

    ``units`` of ``width`` channels each may stay out. ``norm`` is the module whose output enters the site; the residual stream is its input,
    or, ``after`` a norm that closes a block, its output.
    """

    def __init__(self, name: str, layer: int, norm: nn.Module | None, after: bool, output: nn.Module, units: int, width: int):
        self.name, self.layer, self.norm, self.after, self.output = name, layer, norm, after, output
        self.units, self.width = units, width
        self._set: dict[tuple[nn.Module, str], Any] = {}

    @property
    def columns(self) -> Tensor:
        """Weights (C, D) that read each channel."""
        return _inputs_first(self.output)

    @abstractmethod
    def states(self, hidden: Tensor, arguments: Mapping[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
        """What the output projection would read (n, m, C) if only ``hidden`` (n, m, D), normed, ran, cut from the batch at ``rows``, ``columns``."""

    @abstractmethod
    def keep(self, units: Tensor, seen: Callable[[Tensor], None] | None, bias: Tensor | None) -> None:
        """From now on run with ``units`` (k,), ascending; ``seen`` gets what the output projection reads, ``bias`` (D,) is added to its own."""

    def mask(self, units: Tensor, seen: Callable[[Tensor], None] | None, bias: Tensor | None) -> None:
        """As :meth:`keep` by zeroing what leaves: the reference, which saves nothing."""
        self.restore()
        alive = torch.zeros(self.units, dtype=self.output.weight.dtype, device=units.device)  # type: ignore[arg-type]
        alive[units] = 1.0
        self._output(self.channels(torch.arange(self.units, device=units.device)), alive.repeat_interleave(self.width), seen, bias)

    def channels(self, units: Tensor) -> Tensor:
        """Channels (k w,) of ``units`` (k,)."""
        return (units[:, None] * self.width + torch.arange(self.width, device=units.device)).flatten()

    def restore(self) -> None:
        """Run with everything again."""
        for (module, attribute), before in self._set.items():
            if before is _ABSENT:
                delattr(module, attribute)
            else:
                setattr(module, attribute, before)
        self._set.clear()

    @abstractmethod
    def projected(self) -> int:
        """Scalars of the projections that shrink with the units, per unit."""

    def shared(self) -> int:
        """Scalars of the projections that run whatever units stay."""
        return 0

    def _assign(self, module: nn.Module, attribute: str, value: Any) -> None:
        self._set.setdefault((module, attribute), module.__dict__.get(attribute, _ABSENT))
        setattr(module, attribute, value)

    def _rows(self, projection: nn.Module, rows: Tensor) -> None:
        """Compute only some outputs of a projection."""
        weight, bias = projection.weight, projection.bias
        assert isinstance(weight, Tensor)
        gathered = weight.index_select(int(isinstance(projection, Conv1D)), rows)
        some = bias.index_select(0, rows) if isinstance(bias, Tensor) else None
        self._assign(projection, "forward", _linear(gathered, some, transposed=isinstance(projection, Conv1D)))

    def _output(self, columns: Tensor, alive: Tensor | None, seen: Callable[[Tensor], None] | None, bias: Tensor | None) -> None:
        """Read only some inputs of the output projection, those that are not ``alive`` as zeros."""
        transposed = isinstance(self.output, Conv1D)
        weight, own = self.output.weight, self.output.bias
        assert isinstance(weight, Tensor)
        whole = len(columns) == weight.shape[int(not transposed)]
        gathered = weight if whole else weight.index_select(int(not transposed), columns)
        parts = [b for b in (own, bias) if isinstance(b, Tensor)]
        run = _linear(gathered, sum(parts[1:], parts[0]) if parts else None, transposed=transposed)

        def forward(states: Tensor) -> Tensor:
            if alive is not None:
                states = states * alive
            if seen is not None:
                seen(states)
            return run(states)

        self._assign(self.output, "forward", forward)

    def _captured(self, run: Callable[[], Any]) -> Tensor:
        """What the output projection is given while ``run`` runs, without its own product."""
        found: list[Tensor] = []
        size = self.columns.shape[1]

        def capture(states: Tensor) -> Tensor:
            found.append(states)
            return states.new_zeros(*states.shape[:-1], size)

        self._assign(self.output, "forward", capture)
        try:
            run()
        finally:
            self.restore()
        return found[0]


class AttentionSite(Site):
    """Query heads. With a key-value head for each they leave together, else keys and values stay and each query head reads its own."""

    def __init__(self, name: str, layer: int, family: Family, attention: nn.Module, norm: nn.Module | None):
        self.family, self.attention = family, attention
        self.heads, self.groups = key_value_heads(attention, family)
        output = attention.get_submodule(family.output)
        super().__init__(name, layer, norm, False, output, self.heads, int(attention.head_dim))  # type: ignore[arg-type]
        self.forward: Callable[..., Any] = attention.forward

    def states(self, hidden: Tensor, arguments: Mapping[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
        own = {name: _part(name, value, rows, columns) for name, value in arguments.items()}
        with unobserved(self.attention):
            return self._captured(lambda: self.forward(hidden, **own))

    def keep(self, units: Tensor, seen: Callable[[Tensor], None] | None, bias: Tensor | None) -> None:
        self.restore()
        channels = self.channels(units)
        together = self.groups == self.heads
        if self.family.fused:
            step = self.heads * self.width
            self._rows(self.attention.get_submodule(self.family.fused), torch.cat([channels + i * step for i in range(3)]))
        else:
            assert self.family.separate is not None
            for name in self.family.separate if together else self.family.separate[:1]:
                self._rows(self.attention.get_submodule(name), channels)
        for counter, value in zip(self.family.counted, (len(units), len(channels)), strict=True):
            if counter is not None:
                self._assign(self.attention, counter, value)
        if not together:
            self._assign(self.attention, "num_key_value_groups", 1)
            read_by(self.attention, units // (self.heads // self.groups))
        self._output(channels, None, seen, bias)

    def restore(self) -> None:
        super().restore()
        read_by(self.attention, None)

    def projected(self) -> int:
        each = 4 if self.groups == self.heads else 2
        return each * self.width * self.columns.shape[1]

    def shared(self) -> int:
        return 0 if self.groups == self.heads else 2 * self.groups * self.width * self.columns.shape[1]


class MLPSite(Site):
    """Channels. ``entry`` is the module around the projections, or the first of them where the layer holds them and its ``activation`` itself."""

    def __init__(
        self,
        name: str,
        layer: int,
        norm: nn.Module,
        after: bool,
        output: nn.Module,
        hidden: tuple[nn.Module, ...],
        entry: nn.Module,
        activation: Any,
    ):
        super().__init__(name, layer, norm, after, output, _inputs_first(output).shape[0], 1)
        self.hidden, self.activation = hidden, activation
        self.forward: Callable[..., Any] = entry.forward

    def states(self, hidden: Tensor, arguments: Mapping[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
        if self.activation is not None:
            found: Tensor = self.activation(self.forward(hidden))
            return found
        return self._captured(lambda: self.forward(hidden))

    def keep(self, units: Tensor, seen: Callable[[Tensor], None] | None, bias: Tensor | None) -> None:
        self.restore()
        for projection in self.hidden:
            self._rows(projection, units)
        self._output(units, None, seen, bias)

    def projected(self) -> int:
        return (len(self.hidden) + 1) * self.columns.shape[1]


def sites_of(model: nn.Module) -> tuple[Site, ...]:
    """Attention and MLP of every layer of ``model``, in the order they run; those that lost all their units are left out."""
    family = family_of(model)
    config: Any = model.config
    norms = NORMS.get(config.model_type, LLAMA_NORMS)
    after = config.model_type == "opt" and not config.do_layer_norm_before
    found: list[Site] = []
    for number, (index, layer) in enumerate(model.get_submodule(family.layers).named_children()):
        prefix = f"{family.layers}.{index}"
        first, second = (layer.get_submodule(name) for name in norms)
        attention = layer.get_submodule(family.attention)
        if not isinstance(attention, VacantAttention):
            name = f"{prefix}.{family.attention}.{family.output}"
            found.append(AttentionSite(name, number, family, attention, None if after else first))
        hidden = tuple(layer.get_submodule(name) for name in family.hidden)
        entry = hidden[0] if family.mlp is None else layer.get_submodule(family.mlp)
        output = layer.get_submodule(family.down)
        if not isinstance(entry, VacantMLP) and _inputs_first(output).shape[0]:
            activation = layer.activation_fn if family.mlp is None else None
            found.append(MLPSite(f"{prefix}.{family.down}", number, first if after else second, after, output, hidden, entry, activation))
    return tuple(found)


_ABSENT = object()


def _inputs_first(projection: nn.Module) -> Tensor:
    weight = projection.weight
    assert isinstance(weight, Tensor)
    return weight.detach() if isinstance(projection, Conv1D) else weight.detach().T


def _linear(weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Callable[[Tensor], Tensor]:
    matrix = weight.T if transposed else weight
    return lambda inputs: F.linear(inputs, matrix, bias)


def _part(name: str, value: Any, rows: Tensor, columns: Tensor) -> Any:
    """What an argument of attention is for some rows and columns of the batch."""
    if name in CACHES:
        return None
    if name == "position_embeddings":
        return tuple((e[rows] if len(e) > 1 else e)[:, columns] for e in value)
    if not isinstance(value, Tensor):
        return value
    if name == "attention_mask" and value.ndim == 4:
        if value.shape[-1] != value.shape[-2]:
            raise ValueError(f"a prefill's mask must be square, got {tuple(value.shape)}; caches of a fixed size cannot be probed")
        return (value[rows] if len(value) > 1 else value)[:, :, columns][..., columns]
    return (value[rows] if len(value) > 1 else value)[:, columns] if value.ndim == 2 else value
