"""Tasks: data, objective and metrics behind one contract. See `base.Task`."""

from .base import Batch, Task, create_task, list_tasks, task_class, task_options

__all__ = ["Batch", "Task", "create_task", "list_tasks", "task_class", "task_options"]
