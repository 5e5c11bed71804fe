"""Tasks: what the outputs of a model mean, how they are scored, and what a batch holds."""

from edge_tcur.tasks.task import TASKS, Task, find_task

__all__ = ["TASKS", "Task", "find_task"]
