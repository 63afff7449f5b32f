"""Four ways to run a function of tensors repeatedly on inputs of one shape.

    eager       operation by operation, from Python
    trace       recorded by torch.jit.trace, replayed without Python; for CPUs
    cuda_graph  recorded as one CUDA graph, replayed by one launch; for NVIDIA GPUs
    compile     torch.compile (needs a C++ compiler on CPUs); takes minutes for large models

Each recording is compared with the eager pass before it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Tensors = Mapping[str, Tensor]
"""The inputs of a function, by name."""
Result = Tensor | tuple[Tensor, ...]
Run = Callable[[Tensors], Any]
"""A function of tensors; it returns a `Result`."""

WARM_UP = 3
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest allowed difference from the eager pass, relative to the largest value of the result."""


def record(kind: str, function: Run, inputs: Tensors, others: Tensors | None = None) -> Run:
    """Record a function for inputs of these shapes.

    Args:
        kind: one of the ways that the module docstring lists.
        function: function to record.
        inputs: example inputs.
        others: inputs of the same shapes with other values, which show whether a value became a constant; None: none.

    Raises:
        RuntimeError: the recording computes other results than the function, or the function reads values of tensors,
            which would become constants.
    """
    if kind == "eager":
        return function
    with NoValues():
        function(inputs)
    recorders: dict[str, Callable[[Run, Tensors], Run]]
    recorders = {"trace": _traced, "cuda_graph": _CudaGraph, "compile": _compiled}
    run = recorders[kind](function, inputs)
    for _ in range(WARM_UP):
        run(inputs)
    for given in (inputs,) if others is None else (inputs, others):
        for expected, found in zip(_several(function(given)), _several(run(given)), strict=True):
            error, allowed = _difference(expected, found)
            if not error <= allowed:
                raise RuntimeError(
                    f"engine.kind={kind} differs from the eager pass by {error:.1e}; use engine.kind=eager"
                )
    return run


def _several(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _difference(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Return the largest difference relative to the largest value, and the largest that is allowed."""
    difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-6)
    return float(difference), TOLERANCE.get(expected.dtype, 0.0)


_aten = torch.ops.aten
_READS = (_aten._local_scalar_dense.default, _aten.item.default, _aten.is_nonzero.default, _aten.equal.default)


class NoValues(TorchDispatchMode):
    """Raises if a value of a tensor is read on the host, as `item` and `if tensor` do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            raise RuntimeError("it reads a value of a tensor in Python")
        return func(*args, **(kwargs or {}))


class _Flat(nn.Module):
    """A function with positional inputs. It is a module because torch never frees the weights of a traced function."""

    def __init__(self, function: Run, names: tuple[str, ...]) -> None:
        super().__init__()
        self.function, self.names = function, names

    def forward(self, *values: Tensor) -> Result:
        return self.function(dict(zip(self.names, values, strict=True)))


def _traced(function: Run, inputs: Tensors) -> Run:
    names = tuple(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that shapes become constants, which is intended
        traced = torch.jit.trace(_Flat(function, names), tuple(inputs.values()), check_trace=False)
    return lambda inputs: traced(*(inputs[name] for name in names))


def _compiled(function: Run, inputs: Tensors) -> Run:
    # Each shape is compiled separately, so that torch never makes a size dynamic.
    return torch.compile(function, dynamic=False, fullgraph=True)


class _CudaGraph:
    """Records a CUDA graph; a call copies the inputs into the graph's memory and replays it."""

    def __init__(self, function: Run, inputs: Tensors) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._given = dict(inputs)
        # PyTorch requires a warm-up on another stream, so that lazy initialisation is not recorded.
        here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function(self._inputs)
        here.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = function(self._inputs)

    def __call__(self, inputs: Tensors) -> Result:
        for name, tensor in self._inputs.items():
            if inputs[name] is not self._given[name]:  # the instruction's tensors are the same for a whole episode
                tensor.copy_(inputs[name], non_blocking=True)
                self._given[name] = inputs[name]
        self._graph.replay()
        if isinstance(self._output, Tensor):
            return self._output.clone()
        return tuple(output.clone() for output in self._output)
