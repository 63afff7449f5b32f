"""Batches of demonstrations, in an order from which training resumes exactly.

A batch is built by a few array operations, without a Python loop over samples and without loader processes.

Shape legend: N frames of the data, B batch, V views, H, W image, S state, A action, K chunk, O earlier frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.mixture.interleaving import Interleaving

BATCH_ORDER = 1_000_000_007
"""Seed of the order within a batch of a mixture, beside (seed, step)."""


class TrainingBatches:
    """Batches in an order that depends on (seed, step) only, so that training resumes exactly at any step.

    An epoch is a permutation of the data's frames; its last batch is filled with the first frames of the next epoch.
    The data sets of a mixture take turns (`Interleaving`), each with epochs of its own: in proportion to its frames
    times its weight. Iteration increments `step`; `rows(step)` and `gather(rows)` do not change it.

    Args:
        data: demonstrations.
        batch_size: B.
        seed: seed of the order.
        history: number O of earlier frames of the same episode that come with each sample, and the steps between them.
    """

    def __init__(
        self,
        data: DemonstrationData,
        batch_size: int,
        seed: int,
        history: tuple[int, int] = (0, 1),
    ) -> None:
        self.history = history
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        if not len(data):
            raise ValueError("there are no demonstrations to draw batches from")
        self.data, self.batch_size, self.seed, self.step = data, batch_size, seed, 0
        rows = data.taught_rows
        if not len(rows):
            raise ValueError("a policy acted in all frames, so that there is nothing to learn")
        mine = {part.name: rows[part.holds(rows)] for part in data.parts}
        self._names = [name for name, chosen in mine.items() if len(chosen)]
        weights = [part.weight for part in data.parts if part.name in self._names] or [1.0]
        self._epochs = [_Epochs(mine[name], seed, i) for i, name in enumerate(self._names)] or [_Epochs(rows, seed)]
        self._turns = Interleaving([w * len(e.rows) for w, e in zip(weights, self._epochs, strict=True)])
        changes = data.episode_N.diff().nonzero().flatten() + 1
        ends = torch.cat([changes, torch.tensor([len(data.episode_N)])])
        starts = torch.cat([torch.tensor([0]), changes])
        self._start_N = starts[torch.searchsorted(ends, torch.arange(len(data.episode_N)), right=True)]
        self._end_N = ends[torch.searchsorted(ends, torch.arange(len(data.episode_N)), right=True)]

    def rows(self, step: int) -> Tensor:
        """Return the frames of batch number `step`, int64 [B]."""
        position_B = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        if len(self._epochs) == 1:
            return self._epochs[0].take(position_B)
        set_B, index_B = self._turns.turns(position_B)
        rows_B = torch.empty_like(position_B)
        for number, epochs in enumerate(self._epochs):
            rows_B[set_B == number] = epochs.take(index_B[set_B == number])
        # processes and parts of a batch take regular positions, which must not be those of one data set
        return rows_B[torch.randperm(self.batch_size, generator=_generator(self.seed, step, BATCH_ORDER))]

    def drawn(self, step: int) -> dict[str, dict[str, float]]:
        """Return the samples and epochs of each data set of a mixture before this step; {} if there is only one."""
        counts = self._turns.counts(step * self.batch_size)
        return {
            name: {"samples": count, "epochs": count / len(epochs.rows)}
            for name, count, epochs in zip(self._names, counts, self._epochs, strict=False)
        }

    def gather(self, rows_B: Tensor) -> dict[str, Any]:
        """Return the samples that start at these frames.

        Returns:
            `pixels` uint8 [B,V,3,H,W], `state` float32 [B,S], `actions` float32 [B,K,A] (the episode's last action is
            repeated), `executed` float32 [B,K,A], the actions that were executed, `action_is_pad` bool [B,K] (True
            after the end of the episode, and where there is nothing to learn), `instruction_id` int64 [B], and
            `labels`, name -> [B,...]; with statistics of each data set, `set` int64 [B], its index; where frames differ
            in it, `weight` float32 [B]. With a history, `past_pixels` uint8 [B,O,V,3,H,W] and `past_state` float32
            [B,O,S], the oldest first, and `past_age` int64 [B], the number of them that are in the episode; the others
            repeat its first frame.
        """
        samples = {"pixels": torch.from_numpy(self.data.frames.take(rows_B.numpy())), **self.columns(rows_B)}
        if self.history[0]:
            past_BO, _ = self._past(rows_B)
            past = torch.from_numpy(self.data.frames.take(past_BO.flatten().numpy()))
            samples["past_pixels"] = past.unflatten(0, past_BO.shape)
        return samples

    def _past(self, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the frames of the history [B,O], and how many of them are in the episode [B]."""
        decisions, steps = self.history
        start_B = self._start_N[rows_B]
        back_O = torch.arange(decisions, 0, -1) * steps
        age_B = ((rows_B - start_B) // steps).clamp(max=decisions)
        return torch.maximum(rows_B[:, None] - back_O, start_B[:, None]), age_B

    def columns(self, rows_B: Tensor) -> dict[str, Any]:
        """Return the samples of `gather` without the pixels."""
        data = self.data
        index_BK = rows_B[:, None] + torch.arange(data.chunk)
        end_B1 = self._end_N[rows_B][:, None]
        taught, executed_NA = data.teaching, data.action_NA if data.executed_NA is None else data.executed_NA
        last_B1 = end_B1 if taught is None else torch.minimum(end_B1, (rows_B + taught.actions_N[rows_B])[:, None])
        return {
            **({} if taught is None else {"weight": taught.weight_N[rows_B]}),
            "state": data.state_NS[rows_B],
            "actions": data.action_NA[torch.minimum(index_BK, end_B1 - 1)],
            "executed": executed_NA[torch.minimum(index_BK, end_B1 - 1)],
            "action_is_pad": index_BK >= last_B1,
            "instruction_id": data.instruction_N[rows_B],
            "labels": {name: values[rows_B] for name, values in data.frame_labels.items()},
            **({"set": data.part_of(rows_B)} if data.each else {}),
            **self._past_columns(rows_B),
        }

    def _past_columns(self, rows_B: Tensor) -> dict[str, Tensor]:
        if not self.history[0]:
            return {}
        past_BO, age_B = self._past(rows_B)
        return {"past_state": self.data.state_NS[past_BO], "past_age": age_B}

    def __iter__(self) -> TrainingBatches:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = self.gather(self.rows(self.step))
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is needed to resume."""
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a result of `state_dict`.

        Raises:
            ValueError: it is from other data, another batch size or another seed.
        """
        changed = [  # as texts: the order of the data sets counts, too
            f"{k} was {state.get(k)}, is {v}" for k, v in self._identity().items() if str(state.get(k)) != str(v)
        ]
        if changed:
            raise ValueError(f"cannot resume with another order of the data: {'; '.join(changed)}")
        self.step = state["step"]

    def _identity(self) -> dict[str, Any]:
        weights = {part.name: part.weight for part in self.data.parts}
        found = {"seed": self.seed, "batch_size": self.batch_size, "frames": sum(len(e.rows) for e in self._epochs)}
        return {**found, **({"weights": weights} if weights else {})}


class _Epochs:
    """The frames of one data set, again and again, each time in another order.

    Args:
        rows: the frames, int64.
        seed: seeds of the orders; the number of the epoch is added.
    """

    def __init__(self, rows: Tensor, *seed: int) -> None:
        self.rows, self._seed = rows, seed
        self._orders: dict[int, Tensor] = {}

    def take(self, index_B: Tensor) -> Tensor:
        """Return the frames with these numbers (ascending), counted from the start of the first epoch."""
        if not len(index_B):
            return index_B
        epoch_B = index_B // len(self.rows)
        epochs = range(int(epoch_B[0]), int(epoch_B[-1]) + 1)
        self._orders = {epoch: self._orders[epoch] if epoch in self._orders else self._order(epoch) for epoch in epochs}
        parts = [self._orders[epoch][index_B[epoch_B == epoch] % len(self.rows)] for epoch in epochs]
        return self.rows[torch.cat(parts)]

    def _order(self, epoch: int) -> Tensor:
        first, *others = self._seed
        return torch.randperm(len(self.rows), generator=_generator(first, epoch, *others))


def _generator(*entropy: int) -> torch.Generator:
    """Return a random generator that these numbers seed."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(seed)
