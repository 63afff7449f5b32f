"""A trained CogVLA as one function of tensors: from pixels, state and encoded instruction to actions.

Shape legend: B batch, V views, X = B*V, N vision tokens, S state dimension, K chunk, A action dimension, L blocks,
F tower width, D language width, G towers run as one.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from cogvla.policy.engine.decoder import FusedDecoder
from cogvla.policy.engine.recording import Result, Tensors
from cogvla.policy.engine.vision import FusedTowers, shape_of, why_not
from cogvla.policy.model.cogvla import CogVLA, TextFeatures
from cogvla.policy.model.heads.committed import CommittedInput
from cogvla.policy.model.heads.interface import ActionHead, decoded
from cogvla.policy.model.routers.attention_probe import AttentionProbe
from cogvla.policy.model.routers.policy_router import PolicyRouter, Routed
from cogvla.policy.model.routers.tower_reducer import TowerReducer
from cogvla.policy.model.vision import cut_patches


class FusedNetwork(nn.Module):
    """`CogVLA.forward` in fewer and larger operations, with the same results up to rounding.

    Shapes depend on the number of views, the text length and the batch only, never on values, so that a pass can be
    recorded once and replayed.

    Args:
        model: trained model; its weights are copied.
        release: free the model's layers after copying them, so that the weights are not in memory twice. The model can
            then only encode instructions.

    Raises:
        ValueError: a part of the model cannot be fused (an adapter that was not merged, an unusual timm block).
    """

    def __init__(self, model: CogVLA, release: bool = False) -> None:
        super().__init__()
        if reason := not_fusible(model):
            raise ValueError(f"this model cannot be fused: {reason}; use engine.kind=plain")
        self.views = len(model.embodiment.cameras)
        self.fusion, self.state, self.head = (
            copy.deepcopy(module).requires_grad_(False) for module in (model.vision.fusion, model.state, model.head)
        )
        towers = [tower for _, tower in model.vision.named_towers()]
        together = shape_of(towers[0]) == shape_of(towers[1])
        groups = [towers] if together else [[tower] for tower in towers]
        self.towers = nn.ModuleList(FusedTowers(group, release) for group in groups)
        self.committed = copy.deepcopy(model.committed)
        self.reads_committed = model.reads_committed
        self.router = _copied(model.router)
        self.dense = False
        self.decoder = FusedDecoder(model.decoder, model.plan(), model.action_tokens, self.router, release)

    def with_router(self, model: CogVLA) -> FusedNetwork:
        """Return the network of the same model with other token routers; all other weights are shared."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.router = _copied(model.router)
        other.decoder = self.decoder.with_router(model.decoder, model.plan(), other.router)
        return other

    def keeping_all(self, model: CogVLA) -> FusedNetwork:
        """Return the network of this model that keeps all vision tokens (`ModelInput.dense`); it shares the weights."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.dense, other.decoder = True, self.decoder.with_plan(model.plan(dense=True))
        return other

    def prepare(self, text: TextFeatures) -> dict[str, Tensor]:
        """Compute the inputs of `forward` that depend on the instructions only, by name."""
        tensors = {"bos": text.bos_B1D, "tail": text.tail_BRD, **self.decoder.prepare(text.context)}
        if text.vision.weights_B2 is not None:
            tensors["streams"] = text.vision.weights_B2
        films = [film for film in text.vision.films if film is not None]
        if films:
            per_tower = [[t.repeat_interleave(self.views, dim=1) for t in film] for film in films]
            groups = [per_tower] if len(self.towers) == 1 else [[film] for film in per_tower]
            for index, group in enumerate(groups):  # [L,G,X,1,F]
                tensors[f"scale{index}"], tensors[f"shift{index}"] = (
                    torch.stack([film[which] for film in group], dim=1) for which in (0, 1)
                )
        return tensors

    def forward(self, inputs: Tensors) -> Result:
        """Compute normalised actions [B,K,A], and with them the new memory of routers that remember (`remembered`).

        Args:
            inputs: `pixels`, uint8 [B,V,3,H,W]; `state`, normalised, [B,S]; the tensors of `prepare` for the B
                instructions; `memory_NAME` for each part of the memory; and if `reads_committed`, `committed` [B,K,A]
                and `committed_weight` [B,K], see `CommittedInput`, or neither.
        """
        head = self.head
        assert isinstance(head, ActionHead)
        seen, committed = self.see(inputs), None
        if self.reads_committed and "committed" in inputs:
            committed = CommittedInput(inputs["committed"], inputs["committed_weight"])
        actions_BKA = decoded(head, self.decide(seen, inputs, committed), committed, self.committed is not None)
        memory = seen.next_memory()
        return actions_BKA if memory is None else (actions_BKA, *(memory[name] for name in self.remembered))

    @property
    def remembered(self) -> tuple[str, ...]:
        """Names of the parts of the memory, in the order of the results."""
        return () if self.router is None or self.router.memory is None else tuple(self.router.memory.shapes)

    def see(self, inputs: Tensors) -> Routed:
        """Run stage 1 and the token router before the language model."""
        weights_B2, router = inputs.get("streams"), self.router
        if router is None:
            return Routed(self.fusion(self.streams(inputs["pixels"], inputs), weights_B2))
        probe, reducer = (None, None) if self.dense else (router.probe(), router.reducer())
        text_mask_BT = inputs["text_mask"]
        memory = {name: inputs[f"memory_{name}"] for name in self.remembered}
        remembered = router.recall(memory, inputs["state"], inputs["pixels"])
        streams = self.streams(inputs["pixels"], inputs, probe, reducer)
        words_BTD, draw_B = inputs["tail"][:, : text_mask_BT.shape[1]], router.draws(inputs["state"])
        given = words_BTD, text_mask_BT, inputs["pixels"], draw_B, probe
        return router(
            streams, self.fusion, weights_B2, *given, reducer=reducer, remembered=remembered, dense=self.dense
        )

    def decide(self, seen: Routed, inputs: Tensors, committed: CommittedInput | None = None) -> Tensor:
        """Run stages 2 and 3; return the states of the action tokens [B,J,D]."""
        state_B1D = self.state(inputs["state"].to(seen.vision_BnD.dtype))[:, None]
        tail_BRD = inputs["tail"]
        if self.committed is not None and committed is not None:
            tail_BRD = self.committed(committed, tail_BRD)
        sequence = (inputs["bos"], seen.vision_BnD, state_B1D, tail_BRD)
        return self.decoder(torch.cat(sequence, dim=1), inputs, seen.position_Bn, seen.layers)

    def streams(
        self,
        pixels_BVCHW: Tensor,
        text: Tensors,
        probe: AttentionProbe | None = None,
        reducer: TowerReducer | None = None,
    ) -> list[Tensor]:
        """Compute the tokens of each tower before projection, [B,V*N,F]; the probe reads the first tower."""
        streams: list[Tensor] = []
        patches: dict[int, Tensor] = {}
        with _Aside(pixels_BVCHW.is_cuda and len(self.towers) > 1) as aside:
            for index, towers in enumerate(self.towers):
                assert isinstance(towers, FusedTowers)
                size = towers.patch_size
                if size not in patches:
                    patches[size] = cut_patches(pixels_BVCHW, size, towers.positions.dtype)
                films = (text[f"scale{index}"], text[f"shift{index}"]) if f"scale{index}" in text else None
                with aside.stream(index):
                    numbers = range(len(streams), len(streams) + towers.towers)
                    reduce = None if reducer is None else [partial(reducer, number) for number in numbers]
                    x_GXNF = towers(patches[size], films, None if index else probe, reduce)
                streams += rearrange(x_GXNF, "g (b v) n w -> g b (v n) w", v=self.views).unbind(0)
        return streams


def _copied(router: PolicyRouter | None) -> PolicyRouter | None:
    return None if router is None else copy.deepcopy(router).requires_grad_(False).eval()


class _Aside:
    """Runs the first piece of work on its own CUDA stream, in parallel to the others, while a CUDA graph is recorded.

    An eager pass uses one stream, because its memory could be freed while another stream still reads it. A graph keeps
    all of its memory.
    """

    def __init__(self, useful: bool) -> None:
        self._on = useful and torch.cuda.is_current_stream_capturing()

    def __enter__(self) -> _Aside:
        if self._on:
            self._here, self._there = torch.cuda.current_stream(), torch.cuda.Stream()
        return self

    def stream(self, index: int) -> AbstractContextManager[Any]:
        """Return the context in which piece number `index` runs."""
        if not self._on or index > 0:
            return nullcontext()
        self._there.wait_stream(self._here)
        return torch.cuda.stream(self._there)

    def __exit__(self, *_: object) -> None:
        if self._on:
            self._here.wait_stream(self._there)


def not_fusible(model: CogVLA) -> str | None:
    """Return the reason why a model cannot be fused; None if it can."""
    for name, tower in model.vision.named_towers():
        if reason := why_not(tower):
            return f"the {name} tower has {reason}"
    for layer in model.decoder.llm.layers:
        parts = [*layer.self_attn.children(), *layer.mlp.children()]
        linears = [part for part in parts if isinstance(getattr(part, "weight", None), Tensor)]
        if any(type(part) is not nn.Linear for part in linears) or len(linears) != 7:
            return "its language model has layers that are not plain linear layers (merge adapters first)"
    return None
