"""Fisher divergence: how far apart two laws are for a detector that sees only scores."""

import numpy as np

from detection.laws import Gaussian


def fisher_divergence(law: Gaussian, reference: Gaussian) -> float:
    """``D_F(P || Q) = 0.5 E_P |s_P - s_Q|^2`` of two Gaussians, ``P = law``. Some texts omit the half; we keep it.

    With it, the drift of the score-based statistic is a difference of divergences. Raises ``ValueError`` where dimensions differ.

    >>> fisher_divergence(Gaussian(1.0, 1.0), Gaussian(0.0, 1.0))
    0.5
    """
    if law.dimension != reference.dimension:
        raise ValueError(f"laws must share one dimension, got {law.dimension} and {reference.dimension}")
    away = reference.precision @ (np.atleast_1d(np.asarray(law.mean)) - np.atleast_1d(np.asarray(reference.mean)))
    difference = reference.precision - law.precision
    return float(0.5 * (np.trace(difference @ law.covariance @ difference) + away @ away))
