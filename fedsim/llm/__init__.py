"""Language models: tasks on text, structures, pruning that keeps reasoning, compression while they run, and models on disk.

Names are imported where first used: most need transformers, which takes seconds to load.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "fedsim.llm.arithmetic": ("Arithmetic", "characters"),
    "fedsim.llm.causal_lm": ("CausalLM",),
    "fedsim.llm.decoder": ("Decoder", "Folder"),
    "fedsim.llm.eviction": ("H2O", "TOVA", "AdaKV", "SnapKV", "StreamingLLM"),
    "fedsim.llm.generation": ("Trace", "generate"),
    "fedsim.llm.history": ("History",),
    "fedsim.llm.kv_budget": ("budget_for", "kv_bytes_per_token"),
    "fedsim.llm.obcache": ("CacheSession", "OBCache"),
    "fedsim.llm.objectives": ("Checkpointed", "Choices", "Margin"),
    "fedsim.llm.probe_pruning": ("FlopCount", "ProbePruning", "ProbeSession"),
    "fedsim.llm.probing": (
        "FLAPImportance",
        "FixedRatio",
        "FullBatch",
        "HistoryOnly",
        "ImportanceScaled",
        "PPImportance",
        "ProbeOnly",
        "RandomProbe",
        "ResidualImportance",
        "WandaImportance",
    ),
    "fedsim.llm.reasoning": ("GSM8K", "MathQA", "Problems", "exact_match"),
    "fedsim.llm.reasoning_task": ("Reasoning",),
    "fedsim.llm.resp": ("RESP",),
    "fedsim.llm.saving": ("load_pruned", "save_pruned"),
    "fedsim.llm.structures": ("language_structures",),
    "fedsim.llm.text": ("Columns", "Documents", "JSONLines", "Parquet", "Play", "PythonSource", "TextFile", "WikiText"),
    "fedsim.llm.token_scores": (
        "Attention",
        "AttentionTimesValueNorm",
        "Evict",
        "Joint",
        "Key",
        "RandomScore",
        "Value",
        "eviction_error",
    ),
    "fedsim.llm.tokens": ("Bytes", "Characters", "Pretrained"),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fedsim.llm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
