"""Memory of token routers: earlier decisions of an episode, as tensors of fixed shapes.

The network is a pure function: it gets the memory of each sample (`ModelInput.memory`) and returns that of the next
decision (`ModelOutput.memory`). `policy.episode_memory` keeps it for each robot.

    age        decisions that are remembered, 0 to O         state   entries of the normalised state
    pixels     pictures, uint8                               tokens  vision tokens as they came to the router
    attention  from the action tokens to vision tokens       seen    tokens that were in the watched layer

An empty memory is zero. What is older than the episode is replaced by the present where it is read, so that no value
of another episode can be seen.

Shape legend: B batch, V views, N vision tokens of all views, n of them now, R rows of a sample for the router,
O remembered decisions, C entries of the state, S state, D width of the router's tokens, P patches of a view.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cogvla.policy.model.vision import WHITE

KEEPS: Mapping[str, frozenset[str]] = {
    "age_B": frozenset(),
    "motion_BOC": frozenset({"state"}),
    "past_pixels_BO3HW": frozenset({"pixels"}),
    "alike_BON": frozenset({"pixels"}),
    "history_BOND": frozenset({"tokens"}),
    "past_attention_BON": frozenset({"attention", "seen"}),
    "past_seen_BON": frozenset({"attention", "seen"}),
}
"""Item of `RouterContext` -> parts of the memory that it is computed from."""
FROM_MEMORY = frozenset(KEEPS)
ATTENTION = frozenset({"past_attention_BON", "past_seen_BON"})
INTEGER = {"age": torch.int64, "pixels": torch.uint8, "seen": torch.uint8}

Memory = Mapping[str, Tensor]
"""The memory of B samples, by the names in the docstring of this module."""


@dataclass(frozen=True)
class MemoryLayout:
    """Shapes of a memory.

    Attributes:
        decisions: O.
        shapes: name -> shape of one sample.
        hand: entries of the state, see `RouterConfig.hand`.
        grid: rows and columns of a view's patches; None: tokens are no patches.
        watched: language layer whose attention is remembered; None: none.
    """

    decisions: int
    shapes: Mapping[str, tuple[int, ...]]
    hand: tuple[int, ...]
    grid: tuple[int, int] | None
    watched: int | None

    @classmethod
    def of(
        cls,
        needs: Collection[str],
        decisions: int,
        hand: tuple[int, ...],
        pixels: tuple[int, ...],
        tokens: tuple[int, int],
        grid: tuple[int, int] | None,
        watched: int | None,
    ) -> MemoryLayout:
        """Build the layout for routers that read these items.

        Args:
            needs: items of `RouterContext`; those that are not of `FROM_MEMORY` are ignored.
            decisions: see the class.
            hand: see the class.
            pixels: (V, 3, H, W).
            tokens: number and width of the vision tokens that come to the router.
            grid: see the class.
            watched: see the class.
        """
        of_all = {
            "state": (len(hand),),
            "pixels": pixels,
            "tokens": tokens,
            "attention": tokens[:1],
            "seen": tokens[:1],
        }
        kept = frozenset().union(*(KEEPS[need] for need in needs if need in KEEPS))
        shapes = {name: (decisions, *shape) for name, shape in of_all.items() if name in kept}
        return cls(decisions, {"age": (), **shapes}, hand, grid, watched)

    def empty(self, batch: int, like: Tensor) -> dict[str, Tensor]:
        """Return the memory of samples whose episode begins, on the device of `like` and in its precision."""
        return {
            name: torch.zeros(batch, *shape, dtype=INTEGER.get(name, like.dtype), device=like.device)
            for name, shape in self.shapes.items()
        }


class Remembered:
    """The memory of B samples beside their present.

    Args:
        layout: shapes of the memory.
        memory: memory of each sample.
        state_BS: normalised states.
        pixels_BVCHW: pictures.

    Raises:
        ValueError: the memory has other names or shapes than the layout.
    """

    def __init__(self, layout: MemoryLayout, memory: Memory, state_BS: Tensor, pixels_BVCHW: Tensor) -> None:
        expected = {name: (len(state_BS), *shape) for name, shape in layout.shapes.items()}
        if {name: tuple(value.shape) for name, value in memory.items()} != expected:
            raise ValueError(
                f"the memory of token routers must have the shapes {expected}, got "
                f"{ {name: tuple(value.shape) for name, value in memory.items()} }"
            )
        self.layout, self.memory, self.age_B = layout, memory, memory["age"]
        order_O = torch.arange(layout.decisions, 0, -1, device=self.age_B.device)
        self.known_BO = order_O <= self.age_B[:, None]
        self.state_BC = state_BS[:, list(layout.hand)] if "state" in layout.shapes else state_BS
        self.pixels_BVCHW = pixels_BVCHW
        if "pixels" in layout.shapes and pixels_BVCHW.dtype != torch.uint8:
            self.pixels_BVCHW = (pixels_BVCHW.float() * WHITE).round().clamp(0, WHITE).to(torch.uint8)

    def items(self, needs: Collection[str], count: int, rows: int, present_BN: Tensor | None) -> dict[str, Tensor]:
        """Return the items of `FROM_MEMORY` that a router needs, but for its tokens (see `history`).

        Args:
            needs: items of `RouterContext`.
            count: number of decisions, the last ones.
            rows: R, rows of a sample: its views, or 1.
            present_BN: the vision tokens that the router gets, -1 for new ones; None: all, in order.
        """
        found: dict[str, Tensor] = {}
        if "age_B" in needs:
            found["age_B"] = self.age_B.clamp(max=count).repeat_interleave(rows)
        if "motion_BOC" in needs:
            found["motion_BOC"] = self._motion()[:, -count:].repeat_interleave(rows, dim=0)
        if "past_pixels_BO3HW" in needs:
            past_BOVCHW = self._known("pixels", self.pixels_BVCHW)[:, -count:]
            found["past_pixels_BO3HW"] = rearrange(past_BOVCHW, "b o v c h w -> (b v) o c h w").float()
        of_tokens = {}
        if "alike_BON" in needs:
            of_tokens["alike_BON"] = self._alike()
        if ATTENTION & set(needs):
            attention_BON, seen_BON = self.memory["attention"], self.memory["seen"].bool()
            of_tokens["past_attention_BON"] = attention_BON.float() * self.known_BO[..., None]
            of_tokens["past_seen_BON"] = seen_BON & self.known_BO[..., None]
        for name, value_BON in of_tokens.items():
            if name in needs:
                chosen_BON = value_BON[:, -count:] if present_BN is None else _taken(value_BON[:, -count:], present_BN)
                found[name] = rearrange(chosen_BON, "b o (r n) -> (b r) o n", r=rows)
        return found

    def history(self, tokens_BND: Tensor, count: int, rows: int) -> Tensor:
        """Return `history_BOND` of rows of a sample, given its tokens at present."""
        past_BOND = self._known("tokens", tokens_BND)[:, -count:]
        return rearrange(past_BOND, "b o (r n) d -> (b r) o n d", r=rows)

    def next(self, tokens_BND: Tensor | None, read: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
        """Return the memory for the next decision.

        Args:
            tokens_BND: tokens that came to the router; None unless they are remembered.
            read: attention [B,N] from the action tokens to vision tokens, and those that were there, bool [B,N]; None
                unless it is remembered.
        """
        new = {"age": (self.age_B + 1).clamp(max=self.layout.decisions)}
        now: dict[str, Tensor | None] = {"state": self.state_BC, "pixels": self.pixels_BVCHW, "tokens": tokens_BND}
        if read is not None:
            read_BN, seen_BN = read
            before_BN = self.memory["attention"][:, -1] * self.known_BO[:, -1:]
            now |= {"attention": torch.where(seen_BN, read_BN.to(before_BN.dtype), before_BN), "seen": seen_BN}
        for name in self.layout.shapes:
            if name != "age":
                old, latest = self.memory[name], now[name]
                assert latest is not None, f"{name} is remembered"
                new[name] = torch.cat((old[:, 1:], latest.detach().to(old.dtype)[:, None]), dim=1)
        return new

    def _known(self, name: str, now: Tensor) -> Tensor:
        """Return what is remembered [B,O,...], with the present where the episode is younger."""
        past = self.memory[name]
        known = self.known_BO.view(*self.known_BO.shape, *(1,) * (past.dim() - 2))
        return torch.where(known, past, now.to(past.dtype)[:, None])

    def _motion(self) -> Tensor:
        past_BOC = self._known("state", self.state_BC)
        moved_BOC = torch.cat((past_BOC, self.state_BC.to(past_BOC.dtype)[:, None]), dim=1).diff(dim=1).float()
        return moved_BOC * self.known_BO[..., None]  # the hand did not come from what stands for the unknown

    def _alike(self) -> Tensor:
        assert self.layout.grid is not None, "only patches have pixels"
        past_BOPC = _patches(self._known("pixels", self.pixels_BVCHW), self.layout.grid)
        now_B1PC = _patches(self.pixels_BVCHW[:, None], self.layout.grid)
        same_BOP = (past_BOPC == now_B1PC).all(-1)  # a black patch has the cosine 0 with itself
        return torch.where(same_BOP, 1.0, F.cosine_similarity(past_BOPC, now_B1PC, dim=-1))


class TokenMemory:
    """Follows the vision tokens of a forward pass through the language model, and reads the watched layer.

    Args:
        remembered: the memory.
        present_BN: tokens that enter the language model, -1 for new ones; None: all.
    """

    def __init__(self, remembered: Remembered, present_BN: Tensor | None) -> None:
        self.remembered, self.present_BN = remembered, present_BN
        self.watched = remembered.layout.watched
        self._read: tuple[Tensor, Tensor] | None = None

    def items(self, needs: Collection[str], count: int) -> dict[str, Tensor]:
        """Return the items of `FROM_MEMORY` that a router in the language model needs."""
        return self.remembered.items(needs, count, 1, self.present_BN)

    def keep(self, index_Bn: Tensor) -> None:
        """Note that these of the present tokens are left, -1 for new ones."""
        known_Bn = index_Bn.clamp_min(0)
        chosen_Bn = known_Bn if self.present_BN is None else self.present_BN.gather(1, known_Bn)
        self.present_BN = torch.where(index_Bn < 0, -1, chosen_Bn)

    def read(self, attention_Bn: Tensor) -> None:
        """Note the attention that the present tokens get in the watched layer."""
        if self.present_BN is None:
            self._read = attention_Bn, torch.ones_like(attention_Bn, dtype=torch.bool)
            return
        tokens = self.remembered.layout.shapes["attention"][1]
        place_Bn = torch.where(self.present_BN < 0, tokens, self.present_BN)  # new tokens have no place
        empty_BN = attention_Bn.new_zeros(len(attention_Bn), tokens + 1)
        seen_BN = empty_BN.scatter(1, place_Bn, torch.ones_like(attention_Bn))[:, :tokens] > 0
        self._read = empty_BN.scatter(1, place_Bn, attention_Bn)[:, :tokens], seen_BN

    def next(self, tokens_BND: Tensor | None) -> dict[str, Tensor]:
        """Return the memory for the next decision; call it after the language model."""
        return self.remembered.next(tokens_BND, self._read)


def _taken(value_BON: Tensor, present_Bn: Tensor) -> Tensor:
    """Return the values of these tokens; 0 for new ones."""
    index_BOn = present_Bn.clamp_min(0)[:, None].expand(-1, value_BON.shape[1], -1)
    return value_BON.gather(2, index_BOn) * (present_Bn >= 0)[:, None]


def _patches(pixels_BOVCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the pixels of each patch of all views, float32."""
    h, w = grid
    pattern = "b o v c (h y) (w x) -> b o (v h w) (c y x)"
    return rearrange(pixels_BOVCHW, pattern, h=h, w=w).float()
