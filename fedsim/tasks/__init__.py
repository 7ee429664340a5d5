"""Tasks: what is learned, from which data, and how its loss is measured."""

from fedsim.tasks.base import Batch, Dataset, Splits, Task
from fedsim.tasks.digits import Digits
from fedsim.tasks.images import Images, Pictures

__all__ = ["Batch", "Dataset", "Digits", "Images", "Pictures", "Splits", "Task"]
