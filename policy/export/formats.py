"""The formats of exported policies: how each is written, and how it runs.

onnx          onnxruntime on CPUs and NVIDIA GPUs; TensorRT and OpenVINO read it, too
openvino      OpenVINO's own files, for Intel and AMD CPUs
torch_export  torch.export; needs torch, and nothing of this package
"""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvla.errors import first_line
from cogvla.policy.checkpoint import write_errors
from cogvla.policy.export.graph import ACTIONS, PolicyGraph

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch_export": ".pt2"}
"""Format -> ending of its files."""
OPSETS = range(18, 21)
"""Versions of ONNX's operators that the exporter writes and that were tried."""

Arrays = Mapping[str, np.ndarray]
"""The inputs of a file, by name."""
Runtime = Callable[[Arrays], np.ndarray]
"""Runs a file: inputs -> actions float32 [1,K,A]."""


def library(name: str) -> Any:
    """Import a library of the extra `export`; ValueError says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{name.partition('.')[0]} is not installed: pip install 'cogvla[export]' ({error})"
        ) from error


def write(kind: str, graph: PolicyGraph, inputs: Sequence[Tensor], path: Path, opset: int) -> None:
    """Write a policy for inputs of these shapes to a file of the format `kind`.

    Raises:
        ValueError: a library is missing, or the exporter does not know an operation of the policy.
        OSError: the file cannot be written.
    """
    for name in () if kind == "torch_export" else ("onnx", "onnxscript", *(("openvino",) * (kind == "openvino"))):
        library(name)
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(graph, tuple(inputs), strict=False)
            written = None
            if kind != "torch_export":
                written = torch.onnx.export(
                    program,
                    (),
                    input_names=graph.inputs,
                    output_names=[ACTIONS],
                    opset_version=opset,
                    dynamo=True,
                    verbose=False,
                    custom_translation_table=library("cogvla.policy.export.onnx_operations").translations(),
                )
    except Exception as error:  # exporters have errors of their own, without a common class
        other = "" if kind == "torch_export" else "; format=torch_export may know it"
        reason = first_line(error.__cause__ or error)
        raise ValueError(f"{kind} cannot hold an operation of this policy ({reason}){other}") from error
    file = path.with_suffix(FORMATS["onnx"])
    with write_errors(), _quiet():
        if written is None:
            whole = io.BytesIO()  # given a path on a full disk, torch ends the process
            torch.export.save(program, whole)
            path.write_bytes(whole.getbuffer())
            return
        written.save(file)
    stored = library("onnx").load(str(file), load_external_data=False)
    found = {each.domain: each.version for each in stored.opset_import}.get("")
    if found != opset:
        raise ValueError(f"the exporter wrote opset {found}, not {opset}: give opset={found}")
    if kind == "openvino":
        to_openvino(file, path)
        file.unlink()


def to_openvino(onnx_file: Path, path: Path) -> None:
    """Convert an ONNX file to OpenVINO's files `path` and the weights beside it, in full precision.

    Raises:
        ValueError: OpenVINO does not know an operation.
        OSError: the files cannot be written.
    """
    openvino = library("openvino")
    try:
        model = openvino.convert_model(str(onnx_file))
    except Exception as error:  # errors of its own, without a common class
        raise ValueError(
            f"openvino cannot hold an operation of this policy ({first_line(error)}); format=onnx can"
        ) from error
    with write_errors():
        openvino.save_model(model, str(path), compress_to_fp16=False)


def quantise(onnx_file: Path, path: Path, calibration: Iterable[Arrays]) -> None:
    """Write an ONNX file that computes its matrix products in int8, with a scale per output.

    Args:
        onnx_file: file in float32.
        path: file to write.
        calibration: recorded inputs, from which the range of each layer's input is taken.
    """
    quantization = library("onnxruntime.quantization")
    shaped = path.with_suffix(".shaped.onnx")
    with _quiet():
        library("onnxruntime.quantization.shape_inference").quant_pre_process(str(onnx_file), str(shaped))
        quantization.quantize_static(
            str(shaped),
            str(path),
            _Reader(iter(calibration)),
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            extra_options={"MatMulConstBOnly": True},
        )
    shaped.unlink()


class _Reader:
    """`CalibrationDataReader` of onnxruntime."""

    def __init__(self, inputs: Iterator[Arrays]) -> None:
        self._inputs = inputs

    def get_next(self) -> Arrays | None:
        return next(self._inputs, None)


def device_of(kind: str, device: str | None) -> str:
    """Return the device that runs files of a format: the wanted one; None: cuda if its runtime has it, else cpu."""
    return device or ("cuda" if kind == "onnx" and _has_cuda() else "cpu")


def _has_cuda() -> bool:
    return "CUDAExecutionProvider" in library("onnxruntime").get_available_providers()


def open_file(kind: str, path: Path, device: str, threads: int | None = None) -> Runtime:
    """Open a file of the format `kind`.

    Args:
        kind: format.
        path: file.
        device: `cpu` or `cuda`, see `device_of`.
        threads: threads of the runtime; None: its default.

    Raises:
        ValueError: the runtime or device is missing, or cannot read the file.
    """
    try:
        with _quiet():
            return {"onnx": _onnxruntime, "openvino": _openvino, "torch_export": _torch_export}[kind](
                path, device, threads
            )
    except ValueError:
        raise
    except Exception as error:  # each runtime has errors of its own, without a common class
        raise ValueError(f"{path} cannot be opened; export it again ({first_line(error)})") from error


def _onnxruntime(path: Path, device: str, threads: int | None) -> Runtime:
    onnxruntime = library("onnxruntime")
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device={device}: onnxruntime runs on CPUs and NVIDIA GPUs here; give device=cpu or cuda")
    if kind == "cuda" and not _has_cuda():
        raise ValueError(f"device={device} needs onnxruntime-gpu; give device=cpu")
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    gpu = [] if kind == "cpu" else [("CUDAExecutionProvider", {"device_id": number or "0"})]
    session = onnxruntime.InferenceSession(str(path), options, providers=[*gpu, "CPUExecutionProvider"])
    if gpu and gpu[0][0] not in session.get_providers():  # it only warns, and runs on the CPU
        raise ValueError(
            f"device={device}: onnxruntime cannot use the GPU, often because its CUDA or cuDNN is of another "
            "version; give device=cpu"
        )
    return lambda inputs: session.run([ACTIONS], dict(inputs))[0]


def _openvino(path: Path, device: str, threads: int | None) -> Runtime:
    openvino = library("openvino")
    if device != "cpu":
        raise ValueError(f"device={device}: openvino runs on CPUs here; give device=cpu")
    # Without the hint, machines with units for bfloat16 would compute in it.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda inputs: request.infer(dict(inputs))[ACTIONS].copy()


def _torch_export(path: Path, device: str, _threads: int | None) -> Runtime:
    if device != "cpu":
        raise ValueError(
            f"device={device}: a torch_export file runs where it was exported, on the CPU; give device=cpu"
        )
    module = torch.export.load(path).module()

    @torch.inference_mode()
    def run(inputs: Arrays) -> np.ndarray:
        return module(*(torch.from_numpy(np.ascontiguousarray(array)) for array in inputs.values())).numpy()

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what exporters and runtimes say of their own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "root")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
