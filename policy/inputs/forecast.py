"""The state after committed actions: what a policy is told instead of the present state while its chunk is late.

A policy that is asked now for the actions of later cannot know where the arm will be by then. A linear map, fitted on
recorded frames, says so: the change of the state over d control steps, from the d actions that are executed and the
present state. The policy then sees that state beside the present pictures, and its chunk begins d steps later (VLASH,
Tang et al. 2025, where the policy is fine-tuned for it). It needs no new weights of the policy.

    train_policy                        writes `forecast.json` into the policy's folder (scripts/training/forecast.py)
    fit_forecast checkpoint=FOLDER      writes it into any checkpoint (scripts/measure/fit_forecast.py)

Shape legend: B batch, S state, K chunk, A action, N frames, D longest delay = K - 1, X = K*A + S + 1 inputs of the map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FRAMES = 20_000
"""Most frames of a fit; of more, so many are taken at even distances."""
POOR = 0.5
"""Share of a state entry's change that a forecast should explain."""


@dataclass(frozen=True, eq=False)
class Forecast:
    """Linear forecasts of the state, one for each delay from 0 on.

    Attributes:
        map_KXS: map [K,X,S] from `[executed actions, 0 after the delay; state; 1]` to the change of the state.
        explained: share of each entry's change that the map explains on the frames of its fit, for delays 1 to D, each
            S numbers.
        about: data set and versions, for reports.
    """

    map_KXS: np.ndarray
    explained: tuple[tuple[float, ...], ...]
    about: Mapping[str, Any]

    @classmethod
    def fit(
        cls, state_NS: np.ndarray, executed_NA: np.ndarray, episode_N: np.ndarray, chunk: int, about: Mapping[str, Any]
    ) -> Forecast:
        """Fit the maps by least squares.

        Args:
            state_NS: states in physical units.
            executed_NA: actions that were executed in them.
            episode_N: number of the episode of each frame, never decreasing.
            chunk: K.
            about: see the class.

        Raises:
            ValueError: there are too few frames.
        """
        states, actions = state_NS.shape[1], executed_NA.shape[1]
        map_KXS = np.zeros((chunk, chunk * actions + states + 1, states))
        explained = []
        for delay in range(1, chunk):
            row_n = np.arange(max(0, len(state_NS) - delay))
            row_n = row_n[episode_N[row_n] == episode_N[row_n + delay]]
            used = [*range(delay * actions), *range(chunk * actions, chunk * actions + states + 1)]
            if len(row_n) < 10 * len(used):
                raise ValueError(
                    f"the data set has {len(row_n)} frames with another one {delay} steps later in their episode; a "
                    f"forecast of the state needs {10 * len(used)}: record more"
                )
            row_n = row_n[:: -(-len(row_n) // FRAMES)]
            given = [*(executed_NA[row_n + step] for step in range(delay)), state_NS[row_n], np.ones((len(row_n), 1))]
            change_nS = (state_NS[row_n + delay] - state_NS[row_n]).astype(np.float64)
            inputs_nX = np.concatenate(given, axis=1).astype(np.float64)
            map_XS = np.linalg.lstsq(inputs_nX, change_nS, rcond=None)[0]
            map_KXS[delay, used] = map_XS
            left_S, all_S = (change_nS - inputs_nX @ map_XS).var(0), change_nS.var(0)
            explained.append(tuple(np.where(all_S > 0, 1 - left_S / np.maximum(all_S, 1e-300), 1.0).tolist()))
        return cls(map_KXS, tuple(explained), about)

    def after(self, state_BS: np.ndarray, actions_BKA: np.ndarray, delay_B: np.ndarray) -> np.ndarray:
        """Return the states float32 [B,S] after the first `delay` of these actions; 0 leaves a state as it is."""
        executed_BKA = actions_BKA * (np.arange(actions_BKA.shape[1]) < delay_B[:, None])[..., None]
        ones_B1 = np.ones((len(state_BS), 1))
        inputs_BX = np.concatenate([executed_BKA.reshape(len(state_BS), -1), state_BS, ones_B1], axis=1)
        return (state_BS + np.einsum("bx,bxs->bs", inputs_BX, self.map_KXS[delay_B])).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `from_dict`."""
        return {"map": self.map_KXS.tolist(), "explained": [list(row) for row in self.explained], "about": self.about}

    @classmethod
    def from_dict(cls, body: Mapping[str, Any], chunk: int, states: int, actions: int) -> Forecast:
        """Read the result of `to_dict`; ValueError if it is not for such a robot."""
        map_KXS = np.array(body["map"], np.float64)
        wanted = (chunk, chunk * actions + states + 1, states)
        if map_KXS.shape != wanted or not np.isfinite(map_KXS).all():
            raise ValueError(f"its map has shape {list(map_KXS.shape)}, the policy needs finite numbers {list(wanted)}")
        return cls(map_KXS, tuple(tuple(map(float, row)) for row in body["explained"]), dict(body["about"]))


def shifted(actions_BKA: np.ndarray, committed_BKA: np.ndarray, delay_B: np.ndarray) -> np.ndarray:
    """Return chunks whose action `delay` is the first of the given ones; before it are the committed actions."""
    chunk = actions_BKA.shape[1]
    index_BK = np.arange(chunk) - delay_B[:, None]
    later_BKA = np.take_along_axis(actions_BKA, np.maximum(index_BK, 0)[..., None], axis=1)
    return np.where(index_BK[..., None] < 0, committed_BKA, later_BKA).astype(actions_BKA.dtype)
