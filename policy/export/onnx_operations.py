"""Operations of ours that torch's ONNX exporter does not know, as ONNX operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18

op: Any = opset18


def translations() -> dict[Any, Callable[..., Any]]:
    """Return a function for each operation, for `custom_translation_table` of `torch.onnx.export`."""
    return {torch.ops.aten.sort.stable: stable_sort}


def stable_sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """Sort along `dim`; of equal values the earlier one comes first, as TopK promises."""
    size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]), axis=0)
    return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)
