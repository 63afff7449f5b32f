"""Settings of a GPU report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Settings of all parts.

    Attributes:
        output: folder of the report.
        device: torch device.
        rehearse: measure small stand-ins for the networks, with few calls; traces replace CUDA graphs.
        demonstrations: file from `gpu_report --pack`; None: nothing is learned, except in a rehearsal.
        threads: threads of torch on the CPU.
        limits: limit in seconds by name of the part; other parts have their own.
    """

    output: str
    device: str
    rehearse: bool = False
    demonstrations: str | None = None
    threads: int = 8
    limits: tuple[tuple[str, float], ...] = ()

    @property
    def graph(self) -> str:
        """The engine that stands for CUDA graphs."""
        return "trace" if self.rehearse else "cuda_graph"

    @property
    def smallest(self) -> int:
        """Least number of inputs and of outputs of an 8-bit layer."""
        return 32 if self.rehearse else 256
