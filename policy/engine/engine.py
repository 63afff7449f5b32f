"""The inference engine: runs a trained CogVLA faster, with the same results up to rounding.

Shape legend: B batch, T text tokens, K chunk, A action dimension.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvla.errors import first_line
from cogvla.policy.engine.float8 import Calibration, largest_inputs, to_float8
from cogvla.policy.engine.int8 import to_int8
from cogvla.policy.engine.network import FusedNetwork
from cogvla.policy.engine.nf4 import to_nf4
from cogvla.policy.engine.recording import Run, record
from cogvla.policy.model.cogvla import CogVLA, ModelInput
from cogvla.policy.model.heads.committed import none_committed
from cogvla.policy.model.routers.memory import Memory
from cogvla.policy.model.weight_watch import WeightWatch

KINDS = ("auto", "plain", "eager", "trace", "cuda_graph", "compile")
DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.bfloat16, "int8": torch.float32, "nf4": None,
}  # fmt: skip
"""Precision of the layers that are not in 8 or 4 bits; None: as saved."""


AUTO = "auto"
"""`EngineConfig.dtype` that measures; an `Engine` gets what was chosen."""


@dataclass(frozen=True)
class EngineConfig:
    """Settings of the inference engine.

    Attributes:
        kind: plain, eager, trace, cuda_graph, compile, or auto (cuda_graph on a GPU, else trace).
            `plain` runs the model as it was trained. The others run `FusedNetwork`: `eager` directly; `trace`,
            `cuda_graph` and `compile` as recorded for each shape that was announced by `warm_up`.
        text_buckets: instruction lengths in tokens; an instruction is padded to the next of them.
            Few shapes then cover all instructions. Longer instructions run without a recording.
        dtype: float32, bfloat16, float8, int8, nf4 or auto; None: as saved (the only choice for `plain`).
            `float8` is bfloat16 with large layers in 8 bits, for checkpoints that `calibrate_policy` has measured.
            `int8` is float32 with large layers in 8 bits, for CPUs.
            `nf4` is as saved with the weights of large layers in 4 bits (bitsandbytes), to save memory; it is slower.
            `auto` measures which of the others is fastest here (`policy.engine.precision`).
        smallest: minimum number of inputs and of outputs of a layer in `int8` or `nf4`; smaller ones stay as they are.
        bound: largest mean deviation of normalised actions that `auto` accepts; 0.02 is 1 % of their range, -1 to 1.
    """

    kind: str = "auto"
    text_buckets: tuple[int, ...] = (8, 16, 32)
    dtype: str | None = None
    smallest: int = 256
    bound: float = 0.02

    def __post_init__(self) -> None:
        object.__setattr__(self, "text_buckets", tuple(self.text_buckets))
        if self.kind not in KINDS:
            raise ValueError(f"unknown engine.kind {self.kind!r}; one of {', '.join(KINDS)}")
        if self.dtype is not None and self.dtype not in (AUTO, *DTYPES):
            raise ValueError(f"unknown engine.dtype {self.dtype!r}; one of null, {AUTO}, {', '.join(DTYPES)}")
        if self.kind == "plain" and self.dtype is not None:
            raise ValueError(
                f"engine.kind=plain runs the model as it was saved, in its own precision, not in {self.dtype}: give "
                "engine.dtype=null, or another engine.kind"
            )
        if self.dtype == "int8" and self.kind in ("cuda_graph", "compile"):
            raise ValueError(f"engine.dtype=int8 is for CPUs, with engine.kind=trace or auto, not {self.kind}")
        if self.dtype == "nf4" and self.kind not in ("auto", "eager"):
            raise ValueError(f"engine.dtype=nf4 needs engine.kind=eager or auto, not {self.kind}")
        if not self.bound > 0:
            raise ValueError(f"engine.bound must be positive, got {self.bound}")
        if self.smallest < 1:
            raise ValueError(f"engine.smallest must be at least 1, got {self.smallest}")
        if sorted(set(self.text_buckets)) != list(self.text_buckets) or min(self.text_buckets, default=1) < 1:
            raise ValueError(f"engine.text_buckets must be increasing positive lengths, got {self.text_buckets}")

    def check_trained(self) -> None:
        """Check that a newly trained policy can run in this engine.

        Raises:
            ValueError: the engine cannot run it.
        """
        if self.dtype in ("float8", "int8", "nf4"):
            raise ValueError(
                f"engine.dtype={self.dtype} works for trained checkpoints only: train with engine.dtype=null, "
                f"then evaluate with `eval_libero engine.dtype={self.dtype}`"
            )


@dataclass(frozen=True)
class EncodedText:
    """Encoded instructions.

    Attributes:
        tensors: the network's tensors by name.
        words: padded length in tokens.
        dense: see `ModelInput`.
    """

    tensors: dict[str, Tensor]
    words: int
    dense: bool = False


class Engine:
    """Runs a model: `encode` instructions once, then `run` on every observation.

    A shape is a number of observations and a text bucket. `warm_up` records shapes; any other shape runs operation by
    operation. So does a policy whose token router cannot be recorded, if `config.kind` is `auto`.

    Args:
        model: trained model.
        config: settings of the engine; not `plain`.
        release: free the model's layers that are copied, see `FusedNetwork`. A change of precision then converts the
            model in place.
        calibration: input ranges of this model; needed for `float8`.

    Attributes:
        model: the model, which encodes instructions.
        precision: one of the values of `EngineConfig.dtype`.

    Raises:
        ValueError: the model cannot be fused, its device does not support the kind or precision, or the calibration is
            missing.
    """

    def __init__(
        self, model: CogVLA, config: EngineConfig, release: bool = False, calibration: Calibration | None = None
    ) -> None:
        assert config.kind != "plain", "`plain` runs without an engine"
        assert config.dtype != AUTO, "the policy chooses before it builds an engine"
        first = next(model.parameters())
        self.kind, self._automatic = config.kind, config.kind == "auto"
        if config.kind == "auto":
            self.kind = "eager" if config.dtype == "nf4" else "cuda_graph" if first.is_cuda else "trace"
        if self.kind == "cuda_graph" and not first.is_cuda:
            raise ValueError(
                f"engine=cuda_graph needs a GPU, the policy is on {first.device}; use engine.kind=trace or auto"
            )
        if config.dtype == "float8" and calibration is None:
            raise ValueError(
                "engine.dtype=float8 needs the range of each layer's inputs: run `calibrate_policy "
                "checkpoint=FOLDER` once, or give engine.dtype=bfloat16"
            )
        dtype = (None if config.dtype is None else DTYPES[config.dtype]) or first.dtype
        self.buckets, self.precision = config.text_buckets, config.dtype or str(dtype).removeprefix("torch.")
        if dtype != first.dtype:
            if not release:
                model, release = copy.deepcopy(model), True
            for parameter in model.parameters():  # `model.to` would also round the frequencies of the positions
                parameter.data = parameter.data.to(dtype)
        self.model = model
        self._recorded: dict[tuple[int, int, bool], Run] = {}
        with torch.no_grad():
            self.network = FusedNetwork(model, release)
            if config.dtype == "float8":
                assert calibration is not None
                self.to_float8(calibration)
            if config.dtype == "int8":
                to_int8(self.network, config.smallest)
            if config.dtype == "nf4":
                to_nf4(self.network, config.smallest)
            self.dense = self._keeping_all()
        self._weights = WeightWatch(model)

    def _keeping_all(self) -> FusedNetwork | None:
        router = self.network.router
        return None if router is None or router.gate is None else self.network.keeping_all(self.model)

    def with_router(self, model: CogVLA) -> Engine:
        """Return an engine for the same model with other token routers (`CogVLA.with_router`); it shares the weights.

        The engine must not have released the model's layers.

        Raises:
            ValueError: the engine runs in another precision than the model's, or the weights have changed since.
        """
        mine, theirs = (next(each.parameters()).dtype for each in (self.model, model))
        if mine != theirs or self.precision in ("int8", "float8", "nf4"):
            raise ValueError(
                f"other routers need the model's own precision, not {self.precision}: give engine.dtype=null"
            )
        self._weights.check()
        other = copy.copy(self)
        other.model, other._recorded, other.network = model, {}, self.network.with_router(model)
        other._weights = WeightWatch(model)
        other.dense = other._keeping_all()
        return other

    def bucket(self, words: int) -> int:
        """Return the length to which an instruction of this many tokens is padded."""
        return next((bucket for bucket in self.buckets if bucket >= words), words)

    def encode(self, text_ids_BT: Tensor, text_mask_BT: Tensor, dense: bool = False) -> EncodedText:
        """Compute everything that depends on the instructions only; the result can be used for many observations.

        Args:
            text_ids_BT: see `ModelInput`.
            text_mask_BT: see `ModelInput`.
            dense: see `ModelInput`; for token routers with a gate only.

        Raises:
            ValueError: the model's weights changed after they were copied.
        """
        self._weights.check()
        words = self.bucket(text_ids_BT.shape[1])
        missing = (0, words - text_ids_BT.shape[1])
        of_states = (0, 0) * (text_ids_BT.ndim - 2)  # a text encoder's [B,T,E]
        ids_BT, mask_BT = F.pad(text_ids_BT, of_states + missing), F.pad(text_mask_BT, missing)
        text = self.model.encode_text(ids_BT, mask_BT, dense=dense)
        return EncodedText(self._network(dense).prepare(text), words, dense)

    def _network(self, dense: bool) -> FusedNetwork:
        if not dense:
            return self.network
        assert self.dense is not None, "only a router with a gate keeps all tokens at times"
        return self.dense

    def run(self, inputs: ModelInput, text: EncodedText) -> Tensor:
        """Return normalised actions [B,K,A]."""
        return self.step(inputs, text)[0]

    def step(self, inputs: ModelInput, text: EncodedText) -> tuple[Tensor, Memory | None]:
        """Return normalised actions [B,K,A], and the new memory of token routers (None: they remember nothing)."""
        run = self._recorded.get((len(inputs.state), text.words, text.dense), self._network(text.dense))
        result = run(self._inputs(inputs, text))
        if isinstance(result, Tensor):
            return result, None
        return result[0], dict(zip(self.network.remembered, result[1:], strict=True))

    def _inputs(self, inputs: ModelInput, text: EncodedText) -> dict[str, Tensor]:
        tensors = {"pixels": inputs.pixels, "state": inputs.state, **text.tensors}
        if self.network.reads_committed:
            robot = self.model.embodiment
            committed = inputs.committed or none_committed(
                len(inputs.state), robot.chunk, robot.action_dim, inputs.state.device
            )
            tensors |= {"committed": committed.actions, "committed_weight": committed.weight}
        router = self.network.router
        if router is not None and router.memory is not None:
            if inputs.memory is None:
                raise router.forgetful()
            tensors |= {f"memory_{name}": value for name, value in inputs.memory.items()}
        return tensors

    def calibrate(self, observations: Iterable[ModelInput], smallest: int = 256) -> Calibration:
        """Measure the input ranges of large layers.

        Args:
            observations: recorded observations.
            smallest: least number of inputs and of outputs of a large layer.

        Raises:
            ValueError: there are no observations; or see `policy.engine.float8.largest_inputs`.
        """

        def play() -> None:
            for inputs in observations:
                self.run(starting(self.model, inputs), self.encode(inputs.text_ids, inputs.text_mask))

        largest = largest_inputs(self.network, play, smallest)
        if not largest:
            raise ValueError("8-bit layers need recorded observations to measure their input ranges")
        return Calibration(largest)

    def to_float8(self, calibration: Calibration) -> None:
        """Convert large layers to 8 bits, see `policy.engine.float8`.

        Raises:
            ValueError: shapes were recorded before; or see `policy.engine.float8.to_float8`.
        """
        if self._recorded:
            raise ValueError("calibrate before warm_up: shapes are already recorded with the old layers")
        to_float8(self.network, calibration.largest_inputs)
        self.precision, self.dense = "float8", self._keeping_all()

    def warm_up(self, inputs: ModelInput, words: int | None = None) -> None:
        """Record shapes with this number of observations, which takes about a second each on a CPU.

        Not thread-safe, like `run`.

        Args:
            inputs: inputs of the policy's image size and precision; their values do not matter.
            words: length of an instruction in tokens; None: all text buckets.

        Raises:
            ValueError: a token router cannot be recorded, and the kind is not `auto`.
            RuntimeError: another part cannot be recorded.
        """
        batch = len(inputs.state)
        buckets = sorted({self.bucket(words)} if words is not None else set(self.buckets))
        for bucket, dense in itertools.product(buckets, (False,) if self.dense is None else (False, True)):
            ids_BT = inputs.text_ids.new_zeros((batch, bucket, *inputs.text_ids.shape[2:]))
            mask_BT = torch.ones((batch, bucket), dtype=torch.bool, device=ids_BT.device)
            shape = (batch, bucket, dense)
            if shape not in self._recorded:
                text = self.encode(ids_BT, mask_BT, dense)
                tensors = self._inputs(starting(self.model, inputs), text)
                shorter_BT, vocabulary = mask_BT.clone(), self.model.config.language.vocab_size
                shorter_BT[:, max(1, bucket // 2) :] = False
                other = self.encode(_another(ids_BT) % vocabulary, shorter_BT, dense)
                others = {**tensors, **other.tensors, "pixels": inputs.pixels.flip(-1), "state": 1 - inputs.state}
                others |= {name: _another(value) for name, value in tensors.items() if name.startswith("memory_")}
                if self.network.reads_committed:  # weights from 1/7 to 1
                    others["committed"] = _another(tensors["committed"]).sin()
                    others["committed_weight"] = _another(tensors["committed_weight"]) / 7
                try:
                    self._recorded[shape] = record(self.kind, self._network(dense), tensors, others)
                except RuntimeError as error:
                    if self.network.router is None:
                        raise
                    fault = f"the router {self.network.router.config.name!r} cannot be recorded"
                    if not self._automatic:
                        raise ValueError(f"{fault}, give engine.kind=auto or eager: {first_line(error)}") from error
                    print(f"note: {fault}, the policy runs operation by operation: {first_line(error)}")
                    self.kind = "eager"
                    self._recorded.clear()


def starting(model: CogVLA, inputs: ModelInput) -> ModelInput:
    """Return the same inputs as first observations of their episodes, for token routers that remember."""
    return replace(inputs, memory=model.empty_memory(len(inputs.state)))


def _another(given: Tensor) -> Tensor:
    """Return other values, 1 to 7: words, committed actions, or a part of the memory of an episode that has gone on."""
    return torch.arange(given.numel(), device=given.device).remainder(7).view_as(given).to(given.dtype) + 1
