"""The labels that name tasks of a suite: `task`, `possible` and `alternatives`, alone and in mixtures of suites.

Shape legend: N frames, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TASK_LABELS = ("alternatives", "possible", "task")


def contradiction(labels: Mapping[str, Tensor], instruction_N: Tensor, instructions: Sequence[str]) -> str | None:
    """Return what is wrong with the labels of tasks, or None: each task has one instruction and one column."""
    task_N, tasks = labels["task"].flatten(), labels["possible"].shape[-1]
    if labels["alternatives"].shape[1] != tasks:
        return f"label `alternatives` has {labels['alternatives'].shape[1]} tasks, label `possible` has {tasks}"
    if int(task_N.min()) < 0 or int(task_N.max()) >= tasks:
        return f"label `task` has values {int(task_N.min())} to {int(task_N.max())}, label `possible` has {tasks} tasks"
    names: dict[int, str] = {}
    for task, number in torch.stack([task_N, instruction_N], dim=1).unique(dim=0).tolist():
        text = instructions[number]
        if names.setdefault(task, text) != text:
            return (
                f"task {task} of label `task` has two instructions, {names[task]!r} and {text!r}: instructions were "
                "edited, or data sets of different suites were merged"
            )
    return None


@dataclass(frozen=True)
class TaskColumns:
    """The columns of a data set's tasks among those of a mixture: tasks of different suites are different tasks.

    Attributes:
        suite: the suite that it was recorded in; None: unknown.
        first: column of its task 0.
        instruction_of: instruction of each task that has demonstrations.
        count: T of the data set.
    """

    suite: str | None
    first: int
    instruction_of: Mapping[int, str]
    count: int

    def same_tasks(self, suite: str | None, instruction_of: Mapping[int, str], count: int) -> bool:
        """Return True for recordings of one suite, whose tasks agree."""
        agree = all(self.instruction_of.get(task, text) == text for task, text in instruction_of.items())
        return suite is not None and suite == self.suite and count == self.count and agree


def spread(name: str, values: Sequence[Tensor], first: Sequence[int], total: int) -> Tensor:
    """Return a label of tasks of all data sets, [N,...] with `total` tasks; `first` is the column of each task 0."""
    if name == "task":
        return torch.cat([part + column for part, column in zip(values, first, strict=True)])
    shape = (sum(map(len, values)), total, *values[0].shape[2:])
    joint = torch.zeros(shape, dtype=values[0].dtype)
    start = 0
    for part, column in zip(values, first, strict=True):
        joint[start : start + len(part), column : column + part.shape[1]] = part
        start += len(part)
    return joint
