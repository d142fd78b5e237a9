"""Whether a stored dataset can serve a task, from what was found when it was uploaded."""

from __future__ import annotations

from artifacts.errors import FieldError, RequestInvalid
from storage.tables import DatasetRow
from train.settings import TaskSettings


def check_suitable(dataset: DatasetRow, task: TaskSettings, pointer: str = "/dataset") -> None:
    """Refuse a dataset that was found unfit when it was uploaded, unless the task names columns of its own."""
    if (dataset.format == "images") != (task.type == "text-to-image"):
        what = "a zip of images" if dataset.format == "images" else "no zip of images"
        problem = f"the dataset {dataset.name!r} is {what}: it can not serve {task.type}"
        raise RequestInvalid(f"T{problem[1:]}.", errors=[FieldError(pointer, problem)])
    forms = [item for item in dataset.tasks if item["task"] == task.type]
    own_columns = any(name.endswith("_column") for name in task.model_fields_set)
    if own_columns or not forms or any(item["usable"] for item in forms):
        return
    reasons = "; ".join(f"as {item['form']}: {item['reason']}" for item in forms)
    problem = f"the dataset {dataset.name!r} can not serve {task.type}: {reasons}"
    raise RequestInvalid(
        f"T{problem[1:]}.",
        hint="GET /datasets/{id} tells what a dataset can serve; task.…_column names other columns.",
        errors=[FieldError(pointer, problem)],
    )
