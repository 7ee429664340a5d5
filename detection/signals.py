"""What to watch: signals of a classifier's logits, with labels and without, and the change set for a drift of scale.

Without labels, watch both directions (:func:`detection.TwoSided`): a model may grow *more* sure while it is wrong. A shift of the class
prior hardly moves any of these: watch the predicted classes as counts too (:class:`detection.CountsCUSUM`).
"""

import numpy as np
import scipy
from numpy.typing import ArrayLike

from detection.laws import Array
from detection.uncertainty import GaussianBox


def cross_entropy(logits: ArrayLike, labels: ArrayLike) -> Array:
    """Loss ``-log p(label)`` (N,) in nats of ``logits`` (N, K) for ``labels`` (N,) in ``0 .. K - 1``. Watch it upwards."""
    logits, labels = _checked(logits), np.asarray(labels)
    if labels.shape != logits.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers of shape ({len(logits)},), got {labels.dtype} of shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels must lie in 0 .. {logits.shape[1] - 1}, got {labels.min()} to {labels.max()}")
    return np.asarray(-_log_probabilities(logits)[np.arange(len(logits)), labels])


def entropy(logits: ArrayLike) -> Array:
    """Entropy (N,) in nats of the predictions: 0 when sure, ``log K`` when all classes are alike. Watch both directions.

    >>> entropy([[0.0, 0.0], [50.0, 0.0]]).round(3)
    array([0.693, 0.   ])
    """
    logs = _log_probabilities(_checked(logits))
    return np.asarray(0.0 - (np.exp(logs) * logs).sum(axis=1))


def margin(logits: ArrayLike) -> Array:
    """Log-odds (N,) of the best class against the second best, at least 0; large when sure. Watch both directions."""
    top = np.partition(_checked(logits), -2, axis=1)
    return np.asarray(top[:, -1] - top[:, -2])


def energy(logits: ArrayLike, temperature: float = 1.0) -> Array:
    """``-T log sum exp(logits / T)`` (N,): high where the model has met nothing alike (Liu et al. 2020). Unlike the others it sees a
    constant added to all logits. Watch both directions."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    return np.multiply(-temperature, _log_sum_exp(_checked(logits) / temperature))


def max_probability(logits: ArrayLike) -> Array:
    """Probability (N,) of the predicted class, ``1 / K`` to 1. Watch both directions; where it crowds at 1, watch :func:`margin`."""
    return np.asarray(np.exp(_log_probabilities(_checked(logits)).max(axis=1)))


def vector_signal(logits: ArrayLike, labels: ArrayLike) -> Array:
    """Loss, entropy and margin side by side (N, 3), for detectors of vectors; whiten, since they are strongly correlated."""
    return np.column_stack((cross_entropy(logits, labels), entropy(logits), margin(logits)))


def scale_post(pre: GaussianBox, *, variance: float = 2.0, most: float = 4.0, shift: float = 1.0) -> GaussianBox:
    """Change set for a drift of scale: every variance from ``variance`` to ``most`` times that of a standard stream (below 1: down to
    ``1 / most``), with means up to ``shift`` either way.

    A design for a mean is nearly blind to it: with 100 calibration values and one false alarm in 1,000, a doubled variance takes
    :func:`detection.default_post` 699 observations, this set 51, and a mean shift of 1 takes them 18 and 51. Watch both in a
    :class:`detection.Bank`. Raises ``ValueError`` where ``pre`` reaches ``variance``.

    >>> from detection import confidence_box
    >>> scale_post(confidence_box(n=100))
    GaussianBox(mean=(-1.0, 1.0), variance=(2.0, 4.0))
    """
    if not 0 < variance != 1:
        raise ValueError(f"variance must be positive and not 1, got {variance!r}")
    low, high = (variance, max(variance, most)) if variance > 1 else (min(variance, 1.0 / most), variance)
    if low <= pre.variance[1] and high >= pre.variance[0]:
        raise ValueError(
            f"variances after the change, {low:g} to {high:g}, must lie outside those before it, {pre.variance}; use more data"
        )
    return GaussianBox(mean=(-shift, shift), variance=(low, high))


def _checked(logits: ArrayLike) -> Array:
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or len(logits) == 0 or logits.shape[1] < 2:
        raise ValueError(f"logits must have shape (N, K) with at least 2 classes, got {logits.shape}")
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        raise ValueError(f"{int(bad.sum())} rows of logits hold nan or infinite values, the first is row {int(bad.argmax())}")
    return logits


def _log_sum_exp(logits: Array) -> Array:
    return np.asarray(scipy.special.logsumexp(logits, axis=1), dtype=np.float64)


def _log_probabilities(logits: Array) -> Array:
    return logits - _log_sum_exp(logits)[:, None]
