"""Probe Pruning (arXiv:2502.15618): before each block of a batch runs, a small part of the batch runs ahead and says what the block can do without.

The probe's squared activations fuse with a history, energies times weights rank query heads and MLP channels, and the batch runs on
gathered weights. Keep sets of a prefill hold while tokens are decoded. In place of clamps for half precision all statistics are float32.
"""

# B samples, L tokens, C input channels of an output projection, U units (query heads or channels)

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsim.errors import FedsimError
from fedsim.llm.attention import steered
from fedsim.llm.history import History, Seen
from fedsim.llm.probing import (
    ChannelImportance,
    Fusion,
    ImportanceScaled,
    PPImportance,
    ProbeSelection,
    ResidualImportance,
    mean_squares,
    probe_size,
)
from fedsim.llm.sites import AttentionSite, MLPSite, Site, sites_of

SKIPPED = 3 / 32  # share of the first layers that stay whole, three of Llama's 32


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of what a session ran: as the ``dense`` model would have, as it was ``pruned``, and of the ``probe`` on top."""

    dense: int = 0
    pruned: int = 0
    probe: int = 0

    def __add__(self, other: "FlopCount") -> "FlopCount":
        return FlopCount(self.dense + other.dense, self.pruned + other.pruned, self.probe + other.probe)


@dataclass(frozen=True, kw_only=True)
class ProbePruning:
    """Leave out, batch by batch, a share ``sparsity`` of all query heads and MLP channels.

    ``samples`` and ``tokens`` are the probe's shares of the batch (rounded up). After a batch the history moves to what was seen by
    ``1 - momentum``, for channels that ran. Layers in ``skip`` (``None``: the first 3 in 32, at least one) stay whole, the others lose
    so much more. The number of MLP channels kept is a ``multiple`` where so many can be spared. Batches of fewer than ``least`` samples, whose probe would be the
    batch, keep what the history says. Tokens equal to ``pad`` at the ends of rows count nowhere. ``execution="mask"`` zeroes instead of
    gathering: the reference, which saves nothing. Raises ``ValueError`` for shares out of range.
    """

    sparsity: float
    samples: float = 0.05
    tokens: float = 0.5
    momentum: float = 0.99
    importance: ChannelImportance = field(default_factory=PPImportance)
    probe: ProbeSelection = field(default_factory=ResidualImportance)
    fusion: Fusion = field(default_factory=ImportanceScaled)
    skip: tuple[int, ...] | None = None
    multiple: int = 8
    least: int = 4
    pad: int | None = None
    execution: Literal["slice", "mask"] = "slice"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must lie in [0, 1), got {self.sparsity!r}")
        for name in ("samples", "tokens"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1]: a probe is a part of the batch, got {getattr(self, name)!r}")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {self.momentum!r}")
        for name in ("multiple", "least"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.execution not in ("slice", "mask"):
            raise ValueError(f"execution must be 'slice' or 'mask', got {self.execution!r}")
        if self.importance.compensates and self.fusion.probes:
            raise ValueError(f"{self.importance!r} ranks by the variance over a calibration set and needs fusion=HistoryOnly()")

    def calibrate(self, model: nn.Module, batches: Sequence[Tensor]) -> History:
        """What every output projection of ``model`` reads on ``batches`` of tokens (B, L). Raises ``ValueError`` for none."""
        if not batches:
            raise ValueError("calibration needs at least one batch of tokens, got none")
        seen: dict[str, Seen] = {}
        real: list[Tensor] = []

        def watch(site: Site) -> Any:
            def take(module: nn.Module, args: tuple[Any, ...]) -> None:
                states = args[0].detach().view(*real[-1].shape, -1)
                found = Seen.of(states, real[-1])
                seen[site.name] = found if site.name not in seen else seen[site.name].merged(found)

            return take

        handles = [site.output.register_forward_pre_hook(watch(site)) for site in sites_of(model)]
        try:
            with torch.no_grad():
                for tokens in batches:
                    real.append(_real(tokens, None, self.pad))
                    model(tokens)
        finally:
            for handle in handles:
                handle.remove()
        return History(seen)

    @contextmanager
    def applied(self, model: nn.Module, history: History) -> Iterator["ProbeSession"]:
        """Within, ``model`` prunes what it runs. Nothing remains after, whatever ends it.

        Raises ``ValueError`` for a history of another model, a layer that would lose all its units, or attention that is
        neither sdpa nor eager; ``RuntimeError`` when the model is in such a session already. Inside, ``ValueError`` for batches longer than the
        history and for a cache that the latest prefill did not fill, ``FedsimError`` for states that are not finite.
        """
        if model in _IN_SESSION:
            raise RuntimeError("this model is in a session of Probe Pruning already; one at a time")
        session = ProbeSession(self, model, history)
        _IN_SESSION.add(model)
        try:
            with ExitStack() as stack:
                stack.enter_context(steered(model))
                stack.callback(session.close)
                session.open()
                yield session
        finally:
            _IN_SESSION.discard(model)

    def counts(self, sites: Sequence[Site], layers: int) -> dict[str, int]:
        """How many units of each site stay. Raises ``ValueError`` naming the layer where none would."""
        skip = range(max(1, round(layers * SKIPPED))) if self.skip is None else self.skip
        if absent := [layer for layer in skip if not 0 <= layer < layers]:
            raise ValueError(f"skip names layers {absent}, the model has 0..{layers - 1}")
        pruned = [site for site in sites if site.layer not in skip]
        if not self.sparsity or not pruned:
            return {}
        ratio = round(layers / len({site.layer for site in pruned}) * self.sparsity, 2)
        found = {}
        for site in pruned:
            kept = site.units - int(ratio * site.units)
            if isinstance(site, MLPSite):
                kept = min(site.units, -(-kept // self.multiple) * self.multiple)
            if kept < 1:
                raise ValueError(
                    f"sparsity={self.sparsity} with {layers - len({s.layer for s in pruned})} of {layers} layers whole leaves layer {site.layer} "
                    f"{kept} of {site.units} {'heads' if isinstance(site, AttentionSite) else 'channels'}; lower it or skip fewer layers"
                )
            if kept < site.units:
                found[site.name] = kept
        return found


class ProbeSession:
    """A model that prunes what it runs: ``kept`` units by the name of each site's output projection, ``flops`` so far, ``history`` as it is now."""

    def __init__(self, rule: ProbePruning, model: nn.Module, history: History):
        self.rule, self.model = rule, model
        self.flops = FlopCount()
        self.probes = self.batches = 0
        self.stability = float("nan")
        self.kept: dict[str, Tensor] = {}
        sites = sites_of(model)
        config: Any = model.config
        history.check({site.name: site.columns.shape[0] for site in sites})
        self._counts = rule.counts(sites, config.num_hidden_layers)
        self._all = sites
        self._sites = {site.name: site for site in sites if site.name in self._counts}
        self._constants = {name: rule.importance.constant(site.columns) for name, site in self._sites.items()}
        self._calibrated = history.on(self._device)
        self._squares = {name: self._calibrated.sites[name].squares.clone() for name in self._sites}
        self._rest = _linear_scalars(model) - sum(site.projected() * site.units for site in sites)
        self._norms: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._similar: list[float] = []
        self._real = torch.ones((0, 0), dtype=torch.bool)
        self._decoding, self._context = False, 0
        self._cache: ref[Any] | None = None

    @property
    def history(self) -> History:
        """The calibration's, moved by what was served."""
        moved = {name: replace(self._calibrated.sites[name], squares=squares.clone()) for name, squares in self._squares.items()}
        return History({**self._calibrated.sites, **moved})

    def open(self) -> None:
        """Begin to watch the model."""
        self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._end))
        for site in self._sites.values():
            if site.norm is not None:
                self._handles.append(site.norm.register_forward_hook(self._normed(site)))
            if isinstance(site, AttentionSite):
                self._handles.append(site.attention.register_forward_pre_hook(self._attends(site), with_kwargs=True))

    def close(self) -> None:
        """Leave nothing behind."""
        for handle in self._handles:
            handle.remove()
        for site in self._sites.values():
            site.restore()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens = args[0] if args else next(kwargs[n] for n in ("input_ids", "inputs_embeds") if kwargs.get(n) is not None)
        cache = next((kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None), None)
        held = 0 if cache is None else int(cache.get_seq_length())
        self._decoding, self._context = held > 0, held + tokens.shape[1]
        self._real = _real(tokens, kwargs.get("attention_mask") if not held else None, self.rule.pad)
        if self._decoding and self._sites and (self._cache is None or self._cache() is not cache):
            raise ValueError(
                "the cache was not filled by this session's latest prefill, so it holds other heads than run now; prefill again"
            )
        longest = self._calibrated.length
        if not held and self._sites and tokens.shape[1] > longest:
            raise ValueError(f"a batch has {tokens.shape[1]} tokens, the history knows positions up to {longest}; calibrate on longer ones")
        if not held:
            self.batches += 1
            self._similar = []
            self._cache = None if cache is None else ref(cache)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._cache is None and getattr(output, "cache", None) is not None:
            self._cache = ref(output.cache)
        size = self._real.numel()
        kept = {name: len(units) for name, units in self.kept.items()}
        self.flops += FlopCount(
            dense=self._cost(size, self._context, {}),
            pruned=self._cost(size, self._context, kept),
        )
        if self._similar:
            self.stability = sum(self._similar) / len(self._similar)

    def _cost(self, size: int, context: int, kept: Mapping[str, int]) -> int:
        """FLOPs of ``size`` tokens that attend to ``context`` each."""
        total = 2 * size * self._rest
        for site in self._all:
            total += _site_flops(site, kept.get(site.name, site.units), size, context)
        return total

    def _normed(self, site: Site) -> Any:
        def take(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self._decoding:
                return
            hidden = output.view(*self._real.shape, -1)
            stream = hidden if site.after else args[0].view(*self._real.shape, -1)
            self._norms[site.name] = stream.float().norm(dim=2) * self._real
            if isinstance(site, MLPSite):
                self._choose(site, hidden, {})

        return take

    def _attends(self, site: AttentionSite) -> Any:
        def take(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if self._decoding:
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            if site.norm is None:
                self._norms[site.name] = hidden.float().norm(dim=2) * self._real
            self._choose(site, hidden, {name: value for name, value in kwargs.items() if name != "hidden_states"})

        return take

    def _choose(self, site: Site, hidden: Tensor, arguments: Mapping[str, Any]) -> None:
        """Rank the units of ``site`` for the batch at hand and let it run with the best."""
        rule = self.rule
        site.restore()
        if rule.fusion.probes and len(hidden) >= rule.least:
            energy = self._probed(site, hidden, arguments)
        elif rule.fusion.probes:
            energy = self._squares[site.name].sum(0)
        else:
            energy = self._calibrated.sites[site.name].squares.sum(0)
        calibrated = self._calibrated.sites[site.name]
        scores = rule.importance.scores(energy, calibrated.variance, self._constants[site.name], site.width)
        if not bool(torch.isfinite(scores).all()):
            raise FedsimError(f"the states of layer {site.layer} ({site.name}) are not finite on this batch; nothing can be ranked")
        kept = torch.sort(scores, descending=True, stable=True).indices[: self._counts[site.name]].sort().values
        if site.name in self.kept:
            self._similar.append(_jaccard(self.kept[site.name], kept, site.units))
        self.kept[site.name] = kept
        run = site.keep if rule.execution == "slice" else site.mask
        run(kept, self._observer(site, kept), self._bias(site, kept) if rule.importance.compensates else None)

    def _probed(self, site: Site, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Energy (C,) of the channels, fused over the probe's positions."""
        rule, batch, length = self.rule, len(hidden), int(self._real.any(0).sum())
        rows, columns = rule.probe.select(self._norms[site.name], *probe_size(batch, length, rule.samples, rule.tokens), self.probes)
        self.probes += 1
        states = site.states(hidden[rows][:, columns], arguments, rows, columns)
        found, _ = mean_squares(states, self._real[rows][:, columns])
        self.flops += FlopCount(probe=_probe_flops(site, len(rows) * len(columns), len(columns)))
        return rule.fusion.fuse(found, self._squares[site.name][columns]).sum(0)

    def _observer(self, site: Site, kept: Tensor) -> Any:
        """Moves the history towards what the batch showed in full, for channels that ran."""
        if self.rule.momentum == 1 or not self.rule.fusion.probes:
            return None
        channels, squares, masked = site.channels(kept), self._squares[site.name], self.rule.execution == "mask"

        def seen(states: Tensor) -> None:
            if self._decoding:
                return
            found, number = mean_squares(states.detach().view(*self._real.shape, -1), self._real)
            found = found[:, channels] if masked else found
            weight = (1 - self.rule.momentum) * (number > 0).float()[:, None]
            length = len(found)
            old = squares[:length, channels]
            squares[:length, channels] = old + weight * (found - old)

        return seen

    def _bias(self, site: Site, kept: Tensor) -> Tensor:
        """(D,) what leaves adds on average."""
        gone = torch.ones(site.columns.shape[0], dtype=torch.bool, device=kept.device)
        gone[site.channels(kept)] = False
        columns = site.columns
        return (self._calibrated.sites[site.name].mean[gone] @ columns[gone].float()).to(columns.dtype)


_IN_SESSION: "WeakSet[nn.Module]" = WeakSet()


def _real(tokens: Tensor, mask: Tensor | None, pad: int | None) -> Tensor:
    """(B, L) which tokens count: those a 2-D ``mask`` says, without the run of ``pad`` at either end of a row."""
    real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask is not None and mask.ndim == 2:
        real = mask[:, -tokens.shape[1] :].bool()
    if pad is not None and tokens.ndim == 2:
        other = (tokens != pad).int()
        inside = (other.cumsum(1) > 0) & (other.flip(1).cumsum(1).flip(1) > 0)
        real = real & inside
    return real


def _linear_scalars(model: nn.Module) -> int:
    """Scalars of all projections, the head included."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear | Conv1D))


def _site_flops(site: Site, units: int, size: int, context: int) -> int:
    """Of ``size`` tokens: projections that shrink with the units and, of attention, products with ``context`` keys and values."""
    pairs = 4 * size * context * units * site.width if isinstance(site, AttentionSite) else 0
    return 2 * size * site.projected() * units + pairs


def _probe_flops(site: Site, size: int, context: int) -> int:
    """All of the site but the output projection, which a probe does not reach."""
    return _site_flops(site, site.units, size, context) + 2 * size * (site.shared() - site.columns.numel())


def _jaccard(one: Tensor, other: Tensor, units: int) -> float:
    masks = torch.zeros((2, units), dtype=torch.bool, device=one.device)
    masks[0, one], masks[1, other] = True, True
    return float((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum())
