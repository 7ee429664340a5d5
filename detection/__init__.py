"""Quickest change detection for many streams at once, with a promise: how rare false alarms are, and how fast changes are caught.

Stands alone on NumPy and SciPy. Learned scores need PyTorch (``detection.score_matching``), figures matplotlib (``detection.figures``),
river's detectors river (``detection.river_detectors``, ``detection.river_drift``): import those modules by name.
Streams with known change points are drawn by ``detection.generators``.
"""

from detection.autocorrelation import Advice, Autocorrelation, ljung_box, pooled_autocorrelation, suggest
from detection.bank import Bank, Mirrored, TwoSided
from detection.calibration import Calibration, RunLengths, block_bootstrap, calibrated, calibration, threshold_for
from detection.costs import CostOptimum, Costs, cost_optimal_arl, cost_per_tick
from detection.counts import BernoulliCUSUM, CountsCUSUM
from detection.cusum import CUSUM
from detection.design import SimulatedPromise
from detection.detector import Detector, DetectorState, ReflectedSum
from detection.diagnosis import CommonShock, Diagnosis, common_movement, diagnose
from detection.discoveries import Discoveries, StoppedEBH
from detection.divergence import SampledDivergence, fisher_divergence, sampled_divergence
from detection.e_power import AdjustedEProcess, UniformPrior, closed_e_bh, log_boost
from detection.e_processes import EProcess, GeometricPrior, PolynomialPrior, e_bh, mean_e, product_e
from detection.evaluation import (
    Delay,
    Evaluation,
    Measured,
    average_run_length,
    detection_delay,
    evaluate,
    location_errors,
    operating_curve,
)
from detection.exponential import ExponentialFamily, Polynomial, Quartic, QuarticFeature, fit_exponential
from detection.fleet import FleetDetector, MaxOfStatistics, MixtureOfStatistics, SoftThresholdSum, SumOfStatistics, TopR, calibrate_fleet
from detection.focus import FOCuS
from detection.gaussian_means import GaussianEllipsoid, GaussianMeanBox
from detection.generators import ChangingStreams
from detection.glr import MeanVarianceGLR, WindowGLR
from detection.groups import GroupDiscoveries, Onsets, group_discoveries, onsets
from detection.hulls import MixtureHull, ObservedLaw, SampledSet
from detection.increment import Increment, Standardised, likelihood_increment, score_increment
from detection.laws import Gaussian, GaussianStreams, Law, ScoredLaw, hyvarinen_score
from detection.least_favourable import LeastFavourablePair, least_favourable
from detection.matrix_multiplier import MatrixScoreCUSUM, RobustMatrixScoreCUSUM
from detection.mixtures import KernelDensity, Mixture
from detection.monitor import Alarm, Monitor
from detection.multiplier import Multiplier, certified_multiplier, multiplier_for, positive_root
from detection.normal_scores import FittedScores, NormalScores
from detection.page_hinkley import PageHinkley
from detection.promise import Promise
from detection.rare_events import RareRunLength, split_run_length, tilted_run_length
from detection.rbm import GaussBernoulliRBM
from detection.residuals import BatchMeans, FittedResidual, Residual
from detection.robust_score_cusum import RobustScoreCUSUM
from detection.run_length import (
    exact_run_length,
    exact_threshold,
    exact_threshold_for_probability,
    late_delay,
    run_length_distribution,
    siegmund_run_length,
)
from detection.scan_b import ScanB
from detection.score_cusum import ScoreCUSUM
from detection.self_starting import SelfStarted, SelfStarting
from detection.shiryaev_roberts import ShiryaevRoberts, shiryaev_run_length
from detection.signals import cross_entropy, energy, entropy, margin, max_probability, scale_post, vector_signal
from detection.tabled_scores import TabledScores
from detection.uncertainty import FiniteSet, GaussianBox, Singleton, UncertaintySet, confidence_box, default_post
from detection.whitening import Whitening, preconditioned_increment

__all__ = [
    "CUSUM",
    "AdjustedEProcess",
    "Advice",
    "Alarm",
    "Autocorrelation",
    "Bank",
    "BatchMeans",
    "BernoulliCUSUM",
    "Calibration",
    "ChangingStreams",
    "CommonShock",
    "CostOptimum",
    "Costs",
    "CountsCUSUM",
    "Delay",
    "Detector",
    "DetectorState",
    "Diagnosis",
    "Discoveries",
    "EProcess",
    "Evaluation",
    "ExponentialFamily",
    "FOCuS",
    "FiniteSet",
    "FittedResidual",
    "FittedScores",
    "FleetDetector",
    "GaussBernoulliRBM",
    "Gaussian",
    "GaussianBox",
    "GaussianEllipsoid",
    "GaussianMeanBox",
    "GaussianStreams",
    "GeometricPrior",
    "GroupDiscoveries",
    "Increment",
    "KernelDensity",
    "Law",
    "LeastFavourablePair",
    "MatrixScoreCUSUM",
    "MaxOfStatistics",
    "MeanVarianceGLR",
    "Measured",
    "Mirrored",
    "Mixture",
    "MixtureHull",
    "MixtureOfStatistics",
    "Monitor",
    "Multiplier",
    "NormalScores",
    "ObservedLaw",
    "Onsets",
    "PageHinkley",
    "Polynomial",
    "PolynomialPrior",
    "Promise",
    "Quartic",
    "QuarticFeature",
    "RareRunLength",
    "ReflectedSum",
    "Residual",
    "RobustMatrixScoreCUSUM",
    "RobustScoreCUSUM",
    "RunLengths",
    "SampledDivergence",
    "SampledSet",
    "ScanB",
    "ScoreCUSUM",
    "ScoredLaw",
    "SelfStarted",
    "SelfStarting",
    "ShiryaevRoberts",
    "SimulatedPromise",
    "Singleton",
    "SoftThresholdSum",
    "Standardised",
    "StoppedEBH",
    "SumOfStatistics",
    "TabledScores",
    "TopR",
    "TwoSided",
    "UncertaintySet",
    "UniformPrior",
    "Whitening",
    "WindowGLR",
    "average_run_length",
    "block_bootstrap",
    "calibrate_fleet",
    "calibrated",
    "calibration",
    "certified_multiplier",
    "closed_e_bh",
    "common_movement",
    "confidence_box",
    "cost_optimal_arl",
    "cost_per_tick",
    "cross_entropy",
    "default_post",
    "detection_delay",
    "diagnose",
    "e_bh",
    "energy",
    "entropy",
    "evaluate",
    "exact_run_length",
    "exact_threshold",
    "exact_threshold_for_probability",
    "fisher_divergence",
    "fit_exponential",
    "group_discoveries",
    "hyvarinen_score",
    "late_delay",
    "least_favourable",
    "likelihood_increment",
    "ljung_box",
    "location_errors",
    "log_boost",
    "margin",
    "max_probability",
    "mean_e",
    "multiplier_for",
    "onsets",
    "operating_curve",
    "pooled_autocorrelation",
    "positive_root",
    "preconditioned_increment",
    "product_e",
    "run_length_distribution",
    "sampled_divergence",
    "scale_post",
    "score_increment",
    "shiryaev_run_length",
    "siegmund_run_length",
    "split_run_length",
    "suggest",
    "threshold_for",
    "tilted_run_length",
    "vector_signal",
]
