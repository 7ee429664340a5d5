"""Tasks: what is learned, from which data, and how its loss is measured."""

from typing import TYPE_CHECKING, Any

from fedsim.tasks.base import Batch, Dataset, Splits, Task
from fedsim.tasks.digits import Digits
from fedsim.tasks.images import Images, Pictures

if TYPE_CHECKING:
    from fedsim.llm.causal_lm import CausalLM as CausalLM
    from fedsim.llm.reasoning_task import Reasoning as Reasoning

__all__ = ["Batch", "CausalLM", "Dataset", "Digits", "Images", "Pictures", "Reasoning", "Splits", "Task"]


def __getattr__(name: str) -> Any:
    if name in ("CausalLM", "Reasoning"):
        from fedsim import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'fedsim.tasks' has no attribute {name!r}")
