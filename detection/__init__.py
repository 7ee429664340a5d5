"""Quickest change detection for many streams at once, with a promise: how rare false alarms are, and how fast changes are caught.

Stands alone on NumPy and SciPy. Observations are clipped, increments follow from two laws, the threshold from a target run length.
"""

from detection.calibration import RunLengths, block_bootstrap, threshold_for
from detection.cusum import CUSUM
from detection.detector import Detector, DetectorState, ReflectedSum
from detection.divergence import SampledDivergence, fisher_divergence, sampled_divergence
from detection.evaluation import Delay, average_run_length, detection_delay
from detection.exponential import ExponentialFamily, Polynomial, Quartic, QuarticFeature, fit_exponential
from detection.increment import Increment, Standardised, likelihood_increment, score_increment
from detection.laws import Gaussian, GaussianStreams, Law, ScoredLaw, hyvarinen_score
from detection.least_favourable import LeastFavourablePair, least_favourable
from detection.mixtures import KernelDensity, Mixture
from detection.multiplier import multiplier_for, positive_root
from detection.normal_scores import FittedScores, NormalScores
from detection.promise import Promise
from detection.rbm import GaussBernoulliRBM
from detection.robust_score_cusum import RobustScoreCUSUM
from detection.run_length import exact_run_length, exact_threshold
from detection.score_cusum import ScoreCUSUM
from detection.uncertainty import FiniteSet, GaussianBox, Singleton, UncertaintySet, confidence_box, default_post

__all__ = [
    "CUSUM",
    "Delay",
    "Detector",
    "DetectorState",
    "ExponentialFamily",
    "FiniteSet",
    "FittedScores",
    "GaussBernoulliRBM",
    "Gaussian",
    "GaussianBox",
    "GaussianStreams",
    "Increment",
    "KernelDensity",
    "Law",
    "LeastFavourablePair",
    "Mixture",
    "NormalScores",
    "Polynomial",
    "Promise",
    "Quartic",
    "QuarticFeature",
    "ReflectedSum",
    "RobustScoreCUSUM",
    "RunLengths",
    "SampledDivergence",
    "ScoreCUSUM",
    "ScoredLaw",
    "Singleton",
    "Standardised",
    "UncertaintySet",
    "average_run_length",
    "block_bootstrap",
    "confidence_box",
    "default_post",
    "detection_delay",
    "exact_run_length",
    "exact_threshold",
    "fisher_divergence",
    "fit_exponential",
    "hyvarinen_score",
    "least_favourable",
    "likelihood_increment",
    "multiplier_for",
    "positive_root",
    "sampled_divergence",
    "score_increment",
    "threshold_for",
]
