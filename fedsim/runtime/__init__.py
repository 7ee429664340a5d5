"""Executors: where work runs. ``RayExecutor`` is imported on use, so that this package costs no Ray."""

from typing import TYPE_CHECKING, Any

from fedsim.runtime.executor import Executor, Needs, Shared
from fedsim.runtime.serial import SerialExecutor

if TYPE_CHECKING:
    from fedsim.runtime.ray import RayExecutor

__all__ = ["Executor", "Needs", "RayExecutor", "SerialExecutor", "Shared"]


def __getattr__(name: str) -> Any:
    if name == "RayExecutor":
        from fedsim.runtime.ray import RayExecutor

        return RayExecutor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
