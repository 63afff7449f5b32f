"""Four ways to run a network again and again on inputs of one shape.

    eager       operation by operation, from Python
    trace       recorded by torch.jit.trace, played without Python; for CPUs
    cuda_graph  recorded as one CUDA graph, one launch; for NVIDIA GPUs
    compile     torch.compile (needs a C++ compiler on CPUs); takes minutes for large models

Whatever is recorded is compared with the eager pass before it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from cogvla.policy.engine.decoder import Tensors
from cogvla.policy.engine.network import FusedNetwork

Run = Callable[[Tensor, Tensor, Tensors], Tensor]
"""Pixels uint8 [B,V,3,H,W], normalised state [B,S] and `FusedNetwork.prepare`d instructions to actions [B,K,A]."""

WARM_UP = 3
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference from the eager pass, of normalised actions in [-1,1], by precision."""


def record(kind: str, network: FusedNetwork, pixels_BVCHW: Tensor, state_BS: Tensor, text: Tensors) -> Run:
    """The network for inputs of these shapes; see the module's docstring for the kinds.

    Raises:
        RuntimeError: what was recorded does not compute what the network does.
    """
    if kind == "eager":
        return network
    example = (pixels_BVCHW, state_BS, text)
    run = {"trace": _traced, "cuda_graph": _CudaGraph, "compile": _compiled}[kind](network, *example)
    expected = network(*example)
    for _ in range(WARM_UP):
        found = run(*example)
    error = float((found - expected).abs().max())
    if not error <= TOLERANCE[expected.dtype]:
        raise RuntimeError(
            f"engine.kind={kind} differs from the eager pass by {error:.1e}; use engine.kind=eager and report it"
        )
    return run


def _traced(network: FusedNetwork, pixels_BVCHW: Tensor, state_BS: Tensor, text: Tensors) -> Run:
    names = tuple(text)

    def function(pixels: Tensor, state: Tensor, *values: Tensor) -> Tensor:
        return network(pixels, state, dict(zip(names, values, strict=True)))

    with warnings.catch_warnings():
        # It warns that shapes become constants, which is the purpose.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(function, (pixels_BVCHW, state_BS, *text.values()), check_trace=False)
    return lambda pixels, state, text: traced(pixels, state, *(text[name] for name in names))


def _compiled(network: FusedNetwork, pixels_BVCHW: Tensor, state_BS: Tensor, text: Tensors) -> Run:
    # A module of its own per shape, so that no shape is ever made dynamic.
    return torch.compile(network.forward, dynamic=False, fullgraph=True)


class _CudaGraph:
    """Copies the inputs to where the graph reads them, and replays it."""

    def __init__(self, network: FusedNetwork, pixels_BVCHW: Tensor, state_BS: Tensor, text: Tensors) -> None:
        self._pixels, self._state = pixels_BVCHW.clone(), state_BS.clone()
        self._text = {name: tensor.clone() for name, tensor in text.items()}
        self._copied: Tensors | None = text
        # As PyTorch asks: first on another stream, so that lazy initialisation is not recorded.
        stream = torch.cuda.Stream(pixels_BVCHW.device)
        stream.wait_stream(torch.cuda.current_stream(pixels_BVCHW.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                network(self._pixels, self._state, self._text)
        torch.cuda.current_stream(pixels_BVCHW.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._actions = network(self._pixels, self._state, self._text)

    def __call__(self, pixels_BVCHW: Tensor, state_BS: Tensor, text: Tensors) -> Tensor:
        self._pixels.copy_(pixels_BVCHW, non_blocking=True)
        self._state.copy_(state_BS, non_blocking=True)
        if text is not self._copied:
            for name, tensor in self._text.items():
                tensor.copy_(text[name])
            self._copied = text
        self._graph.replay()
        return self._actions.clone()
