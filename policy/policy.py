"""A trained CogVLA network as a `Policy`.

Shape legend: C entries of the state with the hand's position.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvla.policy.engine.engine import AUTO, EncodedText, Engine, EngineConfig, starting
from cogvla.policy.engine.float8 import Calibration
from cogvla.policy.engine.network import not_fusible
from cogvla.policy.engine.precision import Choice, choose_precision
from cogvla.policy.episode_memory import EpisodeMemory
from cogvla.policy.inputs.forecast import shifted
from cogvla.policy.inputs.normalise import Normaliser
from cogvla.policy.inputs.preprocess import Preprocessor, padded
from cogvla.policy.inputs.text_encoder import TextEncoder
from cogvla.policy.interface import ActionChunk, Embodiment, Observation
from cogvla.policy.model.cogvla import CogVLA, ModelInput, TextFeatures
from cogvla.policy.model.routers.memory import Memory
from cogvla.policy.model.weight_watch import WeightWatch

CHOICE_OBSERVATIONS = 8
"""Random observations on which precisions are compared."""
USUAL_PICTURES = {"crop_area": 1.0, "resize_kernel": "bilinear"}
"""Preparation of images that descriptions of policies leave out."""


class CogVLAPolicy:
    """Preprocess observations, run one batched forward pass, and unnormalise the actions.

    A policy with token routers that remember keeps the memory of each robot (`policy.interface.Remembering`).

    Args:
        model: the network, on its device.
        preprocessor: the preprocessor that it was trained with.
        description: facts for reports (checkpoint, step, data set); the number of parameters, device, precision and
            engine are added.
        engine: engine that runs the network; None: run the model itself, operation by operation.
        calibration: the model's calibration, for engines that compute in 8 bits; None: not calibrated.
        choice: the measurement that chose the engine's precision; None: it was given.
    """

    def __init__(
        self,
        model: CogVLA,
        preprocessor: Preprocessor,
        description: dict[str, Any] | None = None,
        engine: Engine | None = None,
        calibration: Calibration | None = None,
        choice: Choice | None = None,
    ) -> None:
        self.model = model.eval()
        device = next(p.device for p in model.parameters() if not p.is_meta)  # an engine may have taken some weights
        self.preprocessor = preprocessor.to(device)
        self.engine, self.calibration, self.choice = engine, calibration, choice
        self._description = description or {}
        self._text: dict[bool, tuple[tuple[str, ...], TextFeatures | EncodedText]] = {}  # of sparse and dense passes
        self._weights = WeightWatch(model)
        self._memory = self._build_memory()
        self._said = False  # that committed actions are ignored
        self._state_normaliser: Normaliser | None = None  # on the CPU, for routers with a gate

    def _build_memory(self) -> EpisodeMemory | None:
        model = self.model if self.engine is None else self.engine.model
        router = model.router
        if router is None or router.memory is None:
            return None

        def empty(batch: int) -> Memory:
            memory = model.empty_memory(batch)
            assert memory is not None, "its routers remember"
            return memory

        return EpisodeMemory(router.memory, empty, router.gate)

    def with_statistics(self, name: str | None) -> CogVLAPolicy:
        """Return the same policy with the statistics of another of its data sets, see `Preprocessor.choosing`."""
        chosen = self.preprocessor.choosing(name)
        return CogVLAPolicy(self.model, chosen, self._description, self.engine, self.calibration, self.choice)

    def with_engine(self, config: EngineConfig, release: bool = False) -> CogVLAPolicy:
        """Return the same policy with an engine; with `auto`, a model that cannot be fused runs without one.

        Args:
            config: configuration of the engine.
            release: let the engine take the model's weights; this policy cannot act any more then.

        Raises:
            ValueError: see `Engine`; or another precision is asked for, and the model runs without an engine.
        """
        reason = not_fusible(self.model) if config.kind == "auto" else None
        if config.kind != "plain" and reason is None:
            choice = self._choose_precision(config) if config.dtype == AUTO else None
            if choice is not None:
                config = replace(config, dtype=None if choice.dtype == choice.measured[0].dtype else choice.dtype)
            engine = Engine(self.model, config, release, self.calibration)
            return CogVLAPolicy(self.model, self.preprocessor, self._description, engine, self.calibration, choice)
        own = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        if config.dtype not in (None, AUTO, own):
            raise ValueError(
                f"engine.dtype={config.dtype} needs an engine, and this model runs without one, in {own}: {reason}; "
                "give engine.dtype=null"
            )
        return CogVLAPolicy(self.model, self.preprocessor, self._description, calibration=self.calibration)

    @torch.inference_mode()
    def _choose_precision(self, config: EngineConfig) -> Choice:
        seen = [self.embodiment.fake_observation(1, seed) for seed in range(CHOICE_OBSERVATIONS)]
        inputs = [starting(self.model, self.preprocessor.observation(observation)) for observation in seen]
        return choose_precision(self.model, config, inputs, self.calibration)

    @property
    def embodiment(self) -> Embodiment:
        return self.preprocessor.embodiment

    @property
    def resize_kernel(self) -> str:
        """Kernel that resizes images of other sizes, see `policy.inputs.resize`; a policy server tells its clients."""
        return self.preprocessor.resize_kernel

    @property
    def reads_committed(self) -> bool:
        """True if `Observation.committed` changes the actions."""
        return self._way is not None

    @property
    def _way(self) -> str | None:
        """How the policy uses committed actions; None: not at all."""
        if self.model.config.head.prefix:
            return "prefix"
        if self.preprocessor.forecast is not None:
            return "forecast"
        return "guidance" if self.model.reads_committed else None

    def unknown_words(self, instruction: str) -> list[str]:
        """Return the words of an instruction that the tokenizer does not know, so that the model cannot tell them."""
        return self.preprocessor.tokenizer.unknown_words(instruction)

    def describe(self) -> dict[str, Any]:
        """Return checkpoint, parameters, device, precision and engine, for reports."""
        own = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        precision = own if self.engine is None else self.engine.precision
        encoder = self.preprocessor.tokenizer
        measured = self.calibration if precision == "float8" else None
        pictures = {"crop_area": self.preprocessor.crop_area, "resize_kernel": self.preprocessor.resize_kernel}
        return {
            "policy": "cogvla",
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "device": str(self.preprocessor.device),
            "dtype": precision,
            "engine": "plain" if self.engine is None else self.engine.kind,
            **({"text_encoder": encoder.source} if isinstance(encoder, TextEncoder) else {}),
            **({} if self.preprocessor.chosen is None else {"statistics": self.preprocessor.chosen}),
            **({} if self._way is None else {"committed": self._way}),
            **({} if pictures == USUAL_PICTURES else {"pictures": pictures}),
            **({} if measured is None else {"float8": dict(measured.about)}),
            **self._description,
        }

    @torch.inference_mode()
    def reset(self) -> None:
        """Forget the encoded instruction of the episode, and what is remembered of all robots."""
        self._text = {}
        if self._memory is not None:
            self._memory.restart()

    @torch.inference_mode()
    def begin(self, slots: Sequence[Hashable]) -> None:
        """See `Remembering.begin`; without token routers that remember it does nothing."""
        if self._memory is not None:
            self._memory.begin(slots)

    def end(self, slots: Sequence[Hashable]) -> None:
        """See `Remembering.end`."""
        if self._memory is not None:
            self._memory.end(slots)

    @torch.inference_mode()
    def act(self, observation: Observation) -> ActionChunk:
        """Predict actions float32 [B,K,A] in physical units for B observations, with the time of each stage in ms."""
        start = time.perf_counter()
        if observation.committed is not None and self._way == "forecast":
            return self._act_later(observation)
        inputs = self._with_committed(self.preprocessor.observation(observation), observation)
        ready = time.perf_counter()
        normalised_BKA = self._run(observation, inputs)
        actions = self.preprocessor.actions(normalised_BKA.float()).cpu().numpy()
        end = time.perf_counter()
        timing = {"preprocess_ms": 1e3 * (ready - start), "inference_ms": 1e3 * (end - ready)}
        return ActionChunk(actions, timing)

    def _act_later(self, observation: Observation) -> ActionChunk:
        """Act from the state that the committed actions lead to; the chunk begins with these actions."""
        observation.validate(self.embodiment)
        assert observation.committed is not None
        assert self.preprocessor.forecast is not None
        committed_BKA, delay_B, _ = padded(observation.committed, self.embodiment)
        state_BS = self.preprocessor.forecast.after(observation.state, committed_BKA, delay_B)
        chunk = self.act(replace(observation, state=state_BS, committed=None))
        return ActionChunk(shifted(chunk.actions, committed_BKA, delay_B), chunk.timing)

    @torch.inference_mode()
    def to_float8(self, observations: Sequence[Observation], smallest: int = 256) -> None:
        """Calibrate the engine on these observations, and run its large layers in 8 bits from now on.

        Args:
            observations: recorded observations, see `Engine.calibrate`.
            smallest: see `Engine.calibrate`.

        Raises:
            ValueError: the policy has no engine.
        """
        if self.engine is None:
            raise ValueError("8-bit layers need an engine: call `policy.with_engine` first")
        inputs = [self.preprocessor.observation(observation) for observation in observations]
        self.calibration = self.engine.calibrate(inputs, smallest)
        self.engine.to_float8(self.calibration)

    @torch.inference_mode()
    def warm_up(self, batch: int, instructions: Sequence[str] = ()) -> None:
        """See `Policy.warm_up`."""
        self.reset()
        inputs = self.preprocessor.observation(self.embodiment.fake_observation(batch))
        if self.engine is not None:
            lengths: set[int | None] = {len(self.preprocessor.text([text])[0][0]) for text in instructions}
            for words in lengths or {None}:
                self.engine.warm_up(inputs, words)
        for _ in range(2):
            self.act(self.embodiment.fake_observation(batch))
        self.reset()

    def normalised_actions(self, inputs: ModelInput) -> Tensor:
        """Return the network's normalised actions [B,K,A]; the encoded instructions are not cached.

        For token routers that remember, every sample without `memory` is the first of its episode.
        """
        inputs = starting(self.model, inputs) if inputs.memory is None else inputs
        if self.engine is None:
            return self.model(inputs).actions
        return self.engine.run(inputs, self.engine.encode(inputs.text_ids, inputs.text_mask))

    @torch.inference_mode()
    def inputs(self, observation: Observation) -> ModelInput:
        """Return the model's input for an observation with all that is remembered, without deciding anything.

        Raises:
            ValueError: see `Preprocessor.observation` and `EpisodeMemory.slots_of`; or robots of one batch differ in
                whether a token router works now.
        """
        inputs = self._with_committed(self.preprocessor.observation(observation), observation)
        if self._memory is None:
            return inputs
        slots = self._memory.slots_of(observation.slots, observation.batch_size)
        dense = set(self._memory.dense(slots, self._hand(observation)))
        if len(dense) > 1:
            raise ValueError("the token router removes tokens of some of these robots only: give one robot at a time")
        return replace(inputs, memory=self._memory.recall(slots), dense=dense.pop())

    def _with_committed(self, inputs: ModelInput, observation: Observation) -> ModelInput:
        """Return the input with the committed actions, if the policy reads them; else say once that it does not."""
        if observation.committed is None:
            return inputs
        if not self.reads_committed:
            if not self._said:
                print(
                    "note: this policy ignores committed actions: `fit_forecast checkpoint=FOLDER`, or a training with "
                    "policy.head.prefix, lets it use them"
                )
            self._said = True
            return inputs
        longest = self.model.config.head.prefix or None
        return replace(inputs, committed=self.preprocessor.committed(observation.committed, longest))

    def _hand(self, observation: Observation) -> Tensor:
        """Return the normalised state's entries of `RouterConfig.hand`, on the CPU; nothing without a gate."""
        router = self.model.router
        assert router is not None, "its routers remember"
        if router.gate is None:
            return torch.empty(0)
        if self._state_normaliser is None:
            self._state_normaliser = copy.deepcopy(self.preprocessor.state_normaliser).cpu()
        state_BS = torch.as_tensor(np.array(observation.state, np.float32))
        return self._state_normaliser(state_BS)[:, list(router.config.hand)]

    def _run(self, observation: Observation, inputs: ModelInput) -> Tensor:
        """Return normalised actions [B,K,A], and remember the decision."""
        instructions, memory = tuple(observation.instruction), self._memory
        if memory is None:
            return self._step(instructions, inputs)[0]
        slots = memory.slots_of(observation.slots, len(instructions))
        state_BC = self._hand(observation)
        dense = memory.dense(slots, state_BC)
        inputs = replace(inputs, memory=memory.recall(slots))
        if len(set(dense)) == 1:
            actions_BKA, new = self._step(instructions, inputs, dense[0])
        else:
            actions_BKA, new = self._in_two(instructions, inputs, dense)
        assert new is not None, "its routers remember"
        memory.store(slots, new, state_BC, dense)
        return actions_BKA

    def _in_two(
        self, instructions: tuple[str, ...], inputs: ModelInput, dense: Sequence[bool]
    ) -> tuple[Tensor, Memory]:
        """Run the samples that keep all tokens, and the others, one after the other."""
        rows = [[row for row, each in enumerate(dense) if each is kind] for kind in (False, True)]
        parts = []
        for kind, chosen in zip((False, True), rows, strict=True):
            some = inputs.rows(torch.tensor(chosen, device=inputs.state.device))
            parts.append(self._step(tuple(instructions[row] for row in chosen), some, kind))
        order_B = torch.tensor([*rows[0], *rows[1]]).argsort().to(inputs.state.device)
        (sparse_BKA, some_new), (dense_BKA, other_new) = parts
        assert some_new is not None
        assert other_new is not None
        new = {name: torch.cat((value, other_new[name]))[order_B] for name, value in some_new.items()}
        return torch.cat((sparse_BKA, dense_BKA))[order_B], new

    def _step(
        self, instructions: tuple[str, ...], inputs: ModelInput, dense: bool = False
    ) -> tuple[Tensor, Memory | None]:
        """Return normalised actions [B,K,A] and the new memory.

        The encoded instructions are cached until they change, which usually is a whole episode, or the weights do.

        Raises:
            ValueError: the weights changed after the engine was built.
        """
        if self.engine is None and self._weights.changed():
            self._text, self._weights = {}, WeightWatch(self.model)
        known = self._text.get(dense)
        if known is None or known[0] != instructions:
            if self.engine is not None:
                self._weights.check()  # the engine's model may be a copy in another precision
            encode = self.model.encode_text if self.engine is None else self.engine.encode
            known = self._text[dense] = (instructions, encode(inputs.text_ids, inputs.text_mask, dense=dense))
        text = known[1]
        if isinstance(text, EncodedText):
            assert self.engine is not None, "only an engine gives EncodedText"
            return self.engine.step(inputs, text)
        output = self.model(replace(inputs, dense=dense), text)
        return output.actions, output.memory
