"""Tasks: from rows to what a transformers Trainer needs, and the model that goes with it.

`prepare` reads the data of a task, finds the columns and the classes, tokenises or processes every row once,
and returns a `TaskData`; `load_base_model` loads the model with a head for the target's classes.
"""

from nblora.tasks.kinds import LANGUAGE_TASKS, TASKS, Task, TaskError
from nblora.tasks.models import BaseModel, load_base_model
from nblora.tasks.preparation import TaskData, prepare
from nblora.tasks.rows import IGNORED, Collator, ImageRows, Ragged, Rows, TensorRows

__all__ = [
    "IGNORED",
    "LANGUAGE_TASKS",
    "TASKS",
    "BaseModel",
    "Collator",
    "ImageRows",
    "Ragged",
    "Rows",
    "Task",
    "TaskData",
    "TaskError",
    "TensorRows",
    "load_base_model",
    "prepare",
]
