"""Memory of a policy: a row for the episode of each robot, for token routers that read earlier decisions.

Each robot ("slot") has a row in tensors [M,...], one for each part of `policy.model.routers.memory`. A forward pass
gets the rows of its samples, and what it returns takes their place. A slot must begin an episode before it is used;
nothing of an earlier episode can then be seen.

Shape legend: M rows, B samples, O earlier decisions, C entries of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from cogvla.policy.model.routers.memory import Memory, MemoryLayout
from cogvla.routing.router import TokenRouter


class EpisodeMemory:
    """Rows of memory, by slot.

    Args:
        layout: shapes of a row.
        empty: function that returns the memory of some samples whose episode begins.
        gate: router that says for each decision whether tokens are removed; None: none does.
    """

    def __init__(self, layout: MemoryLayout, empty: Callable[[int], Memory], gate: TokenRouter | None) -> None:
        self._layout, self._empty, self._gate = layout, empty, gate
        self._row: dict[Hashable, int] = {}
        self._free: list[int] = []
        self._stored: dict[str, Tensor] = {}
        self._past: dict[Hashable, _Past] = {}  # for the gate, on the CPU
        self._numbered: int | None = None  # samples without slots since the last `restart`
        self._open = False

    def restart(self) -> None:
        """Forget everything. Samples without slots begin an episode, each for itself."""
        self._row, self._free, self._stored, self._past = {}, [], {}, {}
        self._numbered, self._open = None, True

    def begin(self, slots: Sequence[Hashable]) -> None:
        """Begin an episode of these slots."""
        for slot in slots:
            row = self._row.get(slot)
            if row is None:
                row = self._row[slot] = self._free.pop() if self._free else self._new_row()
            for value in self._stored.values():
                value[row].zero_()
            self._past[slot] = _Past()

    def end(self, slots: Sequence[Hashable]) -> None:
        """Forget these slots; those that are not known are ignored."""
        for slot in slots:
            if slot in self._row:
                self._free.append(self._row.pop(slot))
                del self._past[slot]

    def slots_of(self, slots: Sequence[Hashable] | None, batch: int) -> Sequence[Hashable]:
        """Return the slots of a batch of samples, checked.

        Args:
            slots: slots of the samples; None: their numbers, for callers that always give all their robots.
            batch: B.

        Raises:
            ValueError: a slot has not begun an episode, or occurs twice; or the batch does not fit.
        """
        if slots is None:
            if not self._open:
                raise ValueError(
                    "the policy remembers the episode, and none has begun: call `reset()` at the start of each episode"
                )
            if self._numbered not in (None, batch):
                raise ValueError(
                    f"the policy remembers the episode of {self._numbered} robots, and now gets {batch} observations: "
                    "say whose they are with Observation.slots, or call `reset()` if a new episode begins"
                )
            if self._numbered is None:
                self.begin(range(batch))
            self._numbered = batch
            return range(batch)
        if len(slots) != batch:
            raise ValueError(f"Observation.slots names {len(slots)} robots for {batch} observations; give one for each")
        if len(set(slots)) != len(slots):
            twice = next(slot for slot in slots if list(slots).count(slot) > 1)
            raise ValueError(f"robot {twice!r} occurs twice in one batch, and the policy remembers its episode")
        for slot in slots:
            if slot not in self._row:
                raise ValueError(
                    f"the policy remembers the episode, and robot {slot!r} has not begun one: call "
                    f"`begin([{slot!r}])` at the start of each of its episodes"
                )
        return slots

    def recall(self, slots: Sequence[Hashable]) -> Memory:
        """Return the memory of these slots."""
        rows_B = self._rows(slots)
        return {name: value.index_select(0, rows_B) for name, value in self._stored.items()}

    def store(self, slots: Sequence[Hashable], memory: Memory, state_BC: Tensor, dense: Sequence[bool]) -> None:
        """Replace the memory of these slots after a decision.

        Args:
            slots: slots.
            memory: what the forward pass returned.
            state_BC: see `dense`.
            dense: result of `dense`.
        """
        rows_B = self._rows(slots)
        for name, value in self._stored.items():
            value.index_copy_(0, rows_B, memory[name].to(value.dtype))
        if self._gate is not None:
            for slot, now_C, kept_all in zip(slots, state_BC.float(), dense, strict=True):
                self._past[slot].note(now_C, self._gate.remembers, not kept_all)

    def dense(self, slots: Sequence[Hashable], state_BC: Tensor) -> list[bool]:
        """Return for each slot whether all tokens are kept in this decision.

        Args:
            slots: slots.
            state_BC: entries `RouterConfig.hand` of the normalised states, on the CPU.
        """
        if self._gate is None:
            return [False] * len(slots)
        pasts, decisions = [self._past[slot] for slot in slots], self._gate.remembers
        states_BOC = torch.stack([p.states(decisions, c) for p, c in zip(pasts, state_BC.float(), strict=True)])
        age_B = torch.tensor([min(len(past.seen), decisions) for past in pasts])
        run_B = torch.tensor([past.run for past in pasts])
        return (~self._gate.prunes(states_BOC.diff(dim=1), age_B, run_B)).tolist()

    def _rows(self, slots: Sequence[Hashable]) -> Tensor:
        device = self._stored["age"].device
        return torch.tensor([self._row[slot] for slot in slots], dtype=torch.int64, device=device)

    def _new_row(self) -> int:
        """Return a row that is not used; double the number of rows if there is none."""
        used = len(self._row)
        if not self._stored:
            self._stored = dict(self._empty(1))
            return 0
        more = self._empty(used)
        self._stored = {name: torch.cat((value, more[name])) for name, value in self._stored.items()}
        self._free = list(range(2 * used - 1, used, -1))
        return used


class _Past:
    """The states of an episode that a gate reads, and the number of its last decisions that removed tokens."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.run = 0

    def states(self, decisions: int, now_C: Tensor) -> Tensor:
        """Return the states [O+1,C] of the last decisions and now; the first one fills up."""
        known = [*self.seen, now_C]
        return torch.stack([known[0]] * (decisions + 1 - len(known)) + known)

    def note(self, now_C: Tensor, decisions: int, pruned: bool) -> None:
        self.seen = [*self.seen, now_C][-decisions:]
        self.run = self.run + 1 if pruned else 0
