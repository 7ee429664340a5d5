"""Perplexity against sparsity of small language models: GISP beside one look at the gradients and the published rules.

Shakespeare by characters, a Llama of 0.75 M parameters trained here, three seeds that each draw model, split and calibration set;
64 runs of calibration; 20 steps to 60 %. Levels are shares of the prunable parameters. ``language_margin`` measures what a
decision task gains from its own objective.
"""

# L levels

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

from experiments.language import SHAKESPEARE, WIKITEXT, calibration, perplexity, text, trained
from experiments.study import Claim, main, save_figure, styled_lines
from fedsim.llm.causal_lm import CausalLM
from fedsim.llm.decoder import Decoder
from fedsim.llm.structures import language_structures
from fedsim.llm.tokens import Bytes
from fedsim.pruning import FLAP, GISP, FirstOrder, LLMPruner, Magnitude, OneShot, Pruner, Random, ShortGPT, WandaSP, compensate
from fedsim.pruning.activations import moments
from fedsim.runs.text import aligned

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
SEEDS = (0, 1, 2)
