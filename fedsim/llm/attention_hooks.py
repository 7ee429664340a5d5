"""What an attention function sees, handed to an observer: queries, keys and values after rotation, norms and cache, whatever the architecture.

Attention modules of transformers look their function up by name. Inside :func:`observed` that name is one of ours, which asks the observer
of the module. The name is registered for masks too, without which passes of several tokens would lose theirs silently.
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

    Raises ``RuntimeError`` where another observer watches them, ``ValueError`` for attention other than sdpa or eager.
    """
    configs: list[Any] = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
    _check(model, configs, attentions)
    with ExitStack() as undo:
        for module in attentions:
            undo.callback(_OBSERVERS.pop, module, None)
            _OBSERVERS[module] = observer
            undo.callback(module.register_forward_pre_hook(partial(_before, observer), with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(partial(_after, observer), with_kwargs=True).remove)
        for config in configs:
            undo.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = _OURS[config._attn_implementation]
        yield


_OBSERVERS: WeakKeyDictionary[nn.Module, Observer] = WeakKeyDictionary()
_OURS = {"sdpa": "fedsim_observed_sdpa", "eager": "fedsim_observed_eager"}


def _sdpa(module: nn.Module, *tensors: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
    return _attend(sdpa_attention_forward, module, *tensors, **settings)


def _eager(module: nn.Module, *tensors: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
    """Every architecture has its own."""
    return _attend(sys.modules[type(module).__module__].eager_attention_forward, module, *tensors, **settings)


def _attend(
    own: Function, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    observer = _OBSERVERS.get(module)
    if observer is None:  # a copy of an observed module
        return own(module, query, key, value, attention_mask, **settings)
    return observer.attend(own, module, query, key, value, attention_mask, **settings)


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


def _check(model: nn.Module, configs: Sequence[Any], attentions: Sequence[nn.Module]) -> None:
    names = {config._attn_implementation for config in configs}
    if names & set(_OURS.values()) or any(module in _OBSERVERS for module in attentions):
        raise RuntimeError("one session per model: another one watches its attention; leave that first, or take a copy of the model")
    if names - set(_OURS):
        raise ValueError(f"attention must be 'sdpa' or 'eager', got {sorted(map(str, names))}; call model.set_attn_implementation('sdpa')")
    if "eager" in names and any(getattr(module, "reorder_and_upcast_attn", False) for module in attentions):
        raise ValueError(
            "reorder_and_upcast_attn computes eager attention in a place of its own; call model.set_attn_implementation('sdpa')"
        )
