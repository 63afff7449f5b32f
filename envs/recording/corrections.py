"""Record corrections (DAgger): a policy acts, and the suite's expert says in every state what should be done.

A policy drives until it has succeeded or is stuck (`progress`), or the step limit is reached. A stuck one hands over to
the expert until the next subgoal, so that the policy is seen in all of them; at the step limit the expert does the
rest, and has as many steps for it. The recorded action is always the expert's. Episodes that the expert cannot finish
are not recorded, since nobody knows whether its advice was good there; the next initial state is tried. The last of
`MAX_ATTEMPTS` is the expert's alone.

This is a player for `envs/rollout`: the policy stays in the process of the rollout.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cogvla.envs.contract import ContractError, picture
from cogvla.envs.episodes import EpisodeSpec
from cogvla.envs.perturbation.perturbation import CrowdedSceneError
from cogvla.envs.recording.demonstrator import (
    MAX_ATTEMPTS,
    Attempt,
    DemonstratorSettings,
    ExpertFailedError,
    expert_failed,
)
from cogvla.envs.recording.progress import Progress
from cogvla.envs.rollout.player import Failed, Finished, Observed, Player, PlayerReply, PlayerRequest, PlayerSettings


@dataclass(frozen=True)
class CorrectingPlayers:
    """Settings of all players of a recording; called, it builds one.

    Attributes:
        settings: settings of the recording.
        paths: the file for each episode of the data set.
        patience: control steps without progress after which the policy is stuck.
    """

    settings: DemonstratorSettings
    paths: tuple[Path, ...]
    patience: int

    def __call__(self, settings: PlayerSettings) -> CorrectingPlayer:
        return CorrectingPlayer(settings, self)

    def spec(self, slot: int) -> EpisodeSpec:
        """Return the specification of an episode of the data set; it names the first initial state to try."""
        return EpisodeSpec(self.settings.task(slot), self.settings.initial_state(slot, 0))


class CorrectingPlayer(Player):
    """Player of episodes in which a policy is corrected; saves each as the file of a `Demonstration`.

    `Finished.success` says whether the policy needed no help, `Finished.steps` counts all recorded steps.
    """

    def __init__(self, settings: PlayerSettings, shared: CorrectingPlayers) -> None:
        super().__init__(settings)
        self._shared = shared
        self._slots = {shared.spec(slot): slot for slot in range(len(shared.paths))}

    def handle(self, request: PlayerRequest) -> PlayerReply:
        """See `Player.handle`; what another attempt would not mend is a `mistake`."""
        self._mistake: Exception | None = None
        reply = super().handle(request)
        return Failed(reply.text, mistake=self._mistake) if isinstance(reply, Failed) else reply

    def _play(self, spec: EpisodeSpec) -> PlayerReply:
        self._started = time.perf_counter()
        self._slot, self._number = self._slots[spec], 0
        return self._begin()

    def _begin(self) -> PlayerReply:
        """Start the next attempt at the episode."""
        how = self._shared.settings
        try:
            while self._number < MAX_ATTEMPTS:
                self._number += 1
                try:
                    self._attempt = Attempt(self._environment(), how, self._slot, self._number - 1)
                except CrowdedSceneError:
                    continue
                self._progress = Progress(self._shared.patience)
                self._stuck()
                self._alone = self._number < MAX_ATTEMPTS
                if self._alone:
                    return self._observe(anew=True)
                if self._finish():
                    return self._save()
            raise expert_failed(how, self._slot)
        except (ContractError, ExpertFailedError) as mistake:
            self._mistake = mistake
            raise

    def _observe(self, anew: bool = False) -> Observed:
        seen = self._attempt.observation
        images = {name: picture(seen, name) for name in self._settings.cameras}
        return Observed(images, np.asarray(seen["state"], np.float32), self._attempt.instruction, anew)

    def _advance(self, actions_TA: np.ndarray) -> PlayerReply:
        attempt = self._attempt
        for action_A in actions_TA:
            attempt.step(action_A)
            if attempt.success:
                if attempt.over:
                    return self._save()
            elif attempt.over or self._stuck():
                return self._help()
        return self._observe()

    def _help(self) -> PlayerReply:
        """Let the expert act until the next subgoal, where the policy goes on; at the step limit it does the rest."""
        attempt, self._alone = self._attempt, False
        while not attempt.over:
            attempt.step()
            self._stuck()
            if self._progress.at_next and not attempt.success and not attempt.over:
                return self._observe(anew=True)
        return self._save() if attempt.success or self._finish() else self._begin()

    def _stuck(self) -> bool:
        """Take note of the state; return True if the policy is stuck."""
        return self._progress.stuck(self._attempt.observation["state"][:3], self._attempt.labels)

    def _finish(self) -> bool:
        """Let the expert do the rest; return True if it succeeds."""
        self._attempt.left = self._shared.settings.max_steps
        while not self._attempt.over:
            self._attempt.step()
        return self._attempt.success

    def _save(self) -> Finished:
        episode = self._attempt.demonstration()
        try:
            episode.save(self._shared.paths[self._slot])
        except OSError as mistake:
            self._mistake = mistake
            raise
        return Finished(
            asked=None,
            instruction=episode.instruction,
            success=self._alone,
            scene_task_success=None,
            steps=len(episode),
            reward=float(self._alone),
            reset_s=0.0,
            environment_s=time.perf_counter() - self._started,
            loop_ms=(),
            perturbation=None,
        )
