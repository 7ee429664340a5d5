"""Tasks: what is learned, from which data, and how its loss is measured."""

from typing import TYPE_CHECKING, Any

from fedsim.tasks.base import Batch, Dataset, Splits, Task
from fedsim.tasks.digits import Digits
from fedsim.tasks.images import Images, Pictures

if TYPE_CHECKING:
    from fedsim.llm.causal_lm import CausalLM as CausalLM

__all__ = ["Batch", "CausalLM", "Dataset", "Digits", "Images", "Pictures", "Splits", "Task"]


def __getattr__(name: str) -> Any:
    if name == "CausalLM":
        from fedsim.llm.causal_lm import CausalLM

        return CausalLM
    raise AttributeError(f"module 'fedsim.tasks' has no attribute {name!r}")
