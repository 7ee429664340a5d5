"""The attention function of a live model: it can be observed, and told which key-value head each query head reads, whatever the architecture.

Attention modules of transformers look their function up by name. While a model is :func:`steered` that name is one of ours, which gathers
keys and values for query heads that were chosen and asks the observer of the module, who sees queries, keys and values after rotation,
norms and cache. The name is registered for masks too, without which passes of several tokens would lose theirs silently.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

Function = Callable[..., tuple[Tensor, Tensor | None]]


class Observer(Protocol):
    """``before`` and ``after`` surround an attention module; ``attend`` stands where its attention function does and may call ``own``."""

    def before(self, module: nn.Module, cache: Cache | None) -> None: ...
    def attend(
        self, own: Function, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, Tensor | None]: ...
    def after(self, module: nn.Module, cache: Cache | None) -> None: ...


@contextmanager
def observed(model: nn.Module, attentions: Sequence[nn.Module], observer: Observer) -> Iterator[None]:
    """``attentions`` of ``model`` report to ``observer`` inside the block, and nothing of it is left after, also by exception.

    Raises ``RuntimeError`` where another observer watches them, ``ValueError`` as :func:`steered`.
    """
    if any(module in _OBSERVERS for module in attentions):
        raise RuntimeError("one session per model: another one watches its attention; leave that first, or take a copy of the model")
    with ExitStack() as undo:
        undo.enter_context(steered(model))
        for module in attentions:
            undo.callback(_OBSERVERS.pop, module, None)
            _OBSERVERS[module] = observer
            undo.callback(module.register_forward_pre_hook(partial(_before, observer), with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(partial(_after, observer), with_kwargs=True).remove)
        yield


@contextmanager
def steered(model: nn.Module) -> Iterator[None]:
    """Attention of ``model`` goes through this file inside the block; the blocks nest.

    Raises ``ValueError`` for attention other than sdpa or eager.
    """
    configs: list[Any] = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
    names = {config._attn_implementation for config in configs}
    if names - set(_OURS) - set(_OURS.values()):
        raise ValueError(f"attention must be 'sdpa' or 'eager', got {sorted(map(str, names))}; call model.set_attn_implementation('sdpa')")
    if "eager" in names and any(getattr(module, "reorder_and_upcast_attn", False) for module in model.modules()):
        raise ValueError(
            "reorder_and_upcast_attn computes eager attention in a place of its own; call model.set_attn_implementation('sdpa')"
        )
    with ExitStack() as undo:
        for config in configs:
            before = config._attn_implementation
            undo.callback(setattr, config, "_attn_implementation", before)
            config._attn_implementation = _OURS.get(before, before)
        yield


@contextmanager
def unobserved(attention: nn.Module) -> Iterator[None]:
    """What ``attention`` computes inside the block is shown to no observer."""
    observer = _OBSERVERS.pop(attention, None)
    try:
        yield
    finally:
        if observer is not None:
            _OBSERVERS[attention] = observer


def read_by(attention: nn.Module, heads: Tensor | None) -> None:
    """From now on query head i of ``attention`` reads key-value head ``heads[i]``; ``None``: as the model does by itself."""
    if heads is None:
        _HEADS.pop(attention, None)
    else:
        _HEADS[attention] = heads


def heads_read(attention: nn.Module) -> Tensor | None:
    """What :func:`read_by` was told."""
    return _HEADS.get(attention)


_OBSERVERS: WeakKeyDictionary[nn.Module, Observer] = WeakKeyDictionary()
_HEADS: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
_OURS = {"sdpa": "fedsim_observed_sdpa", "eager": "fedsim_observed_eager"}


def _sdpa(module: nn.Module, *tensors: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
    return _attend(sdpa_attention_forward, module, *tensors, **settings)


def _eager(module: nn.Module, *tensors: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
    """Every architecture has its own."""
    return _attend(sys.modules[type(module).__module__].eager_attention_forward, module, *tensors, **settings)


def _attend(
    own: Function, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    heads, observer = _HEADS.get(module), _OBSERVERS.get(module)
    if heads is not None:
        own = partial(_gathered, own, heads)
    if observer is None:
        return own(module, query, key, value, attention_mask, **settings)
    return observer.attend(own, module, query, key, value, attention_mask, **settings)


def _gathered(
    own: Function, heads: Tensor, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    return own(module, query, key.index_select(1, heads), value.index_select(1, heads), *rest, **settings)


for _name, _function, _mask in (("sdpa", _sdpa, sdpa_mask), ("eager", _eager, eager_mask)):
    AttentionInterface.register(_OURS[_name], _function)
    AttentionMaskInterface.register(_OURS[_name], _mask)


def _before(observer: Observer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    observer.before(module, _cache(args, kwargs))


def _after(observer: Observer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    observer.after(module, _cache(args, kwargs))


def _cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache among the arguments, whose name and place differ between architectures and versions."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
