"""Tasks: data, objective and metrics behind one contract. See `base.Task`."""

from .base import Batch, Task, create_task, list_tasks, task_class, task_options
from .preprocessing import Preprocessing, preprocessing_of

__all__ = [
    "Batch",
    "Preprocessing",
    "Task",
    "create_task",
    "list_tasks",
    "preprocessing_of",
    "task_class",
    "task_options",
]
