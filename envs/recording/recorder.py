"""Record demonstrations of a scripted expert, or its corrections of a policy, as a LeRobotDataset v3.

Worker processes play the expert; this process writes the data set, and runs the policy. An interruption, even
`kill -9`, loses no finished episode, and a reader never sees an incomplete data set: finished episodes wait in
`OUTPUT.recording/episodes/N.npz` until all are there (`dataset_folder`).

An episode depends on its number only. Any number of workers therefore gives the same data set, and a finished data set
can grow: its episodes are the first ones of a longer data set.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cogvla.envs.contract import Expert
from cogvla.envs.perturbation.perturbation import OF_THE_PLAYER, OF_THE_SCENE
from cogvla.envs.recording.correction_pool import Corrected, CorrectionPool, check_robot
from cogvla.envs.recording.dataset_folder import DatasetFolder
from cogvla.envs.recording.demonstration import Demonstration
from cogvla.envs.recording.demonstration_pool import DemonstrationPool
from cogvla.envs.recording.demonstrator import INTERVENTION, DemonstratorSettings
from cogvla.envs.suite import Suite, get_suite

if TYPE_CHECKING:
    from cogvla.envs.recording.dataset_writer import DatasetWriter

ROBOT_TYPE = "panda"
RECORDING_FILE = "meta/recording.json"
"""File in a finished data set: the settings that it was recorded with."""


def record(
    suite: Suite | str,
    episodes: int,
    output: str | Path,
    *,
    image_size: int = 128,
    workers: int = 2,
    noise: float = 1.0,
    seed: int = 0,
    resume: bool = True,
    video: bool = False,
    grow: bool = False,
    randomise: Sequence[str] | None = None,
    counterfactual: float = 0.0,
    expert: Callable[..., Expert] | None = None,
    corrected: Corrected | None = None,
    tasks: Sequence[int] | None = None,
) -> Path:
    """Record successful episodes of the suite's expert, spread evenly over tasks, and return the data set's folder.

    With a policy to be corrected, the policy acts until it is stuck (`corrections`).

    Does nothing if the folder already holds this data set.

    Args:
        suite: a suite, or its name.
        episodes: total number of episodes.
        output: folder of the data set.
        image_size: height and width of the images in pixels.
        workers: number of processes that play episodes; 0 plays them in this process.
        noise: scale of the execution noise of the expert, never of the policy; the clean action is the one to learn.
        seed: seed of initial states and noise.
        resume: True goes on with an interrupted recording; False starts from the beginning. A finished one stays.
        video: store the cameras as videos: smaller on disk, slower to write and read, not lossless.
        grow: add episodes to a finished data set that has fewer; a training on that data set cannot go on afterwards.
        randomise: dimensions of the robustness benchmark (`envs/perturbation`) in which episodes differ; for each
            episode and dimension, one of the levels or no change is drawn.
        counterfactual: share of the episodes, in [0,1], that show another task that is possible in the scene, with its
            instruction and labels. Scenes without one show their own task.
        expert: function `expert(env, rng, noise=...)`; None: the suite's own expert.
        corrected: the policy to be corrected; None: the expert acts from the beginning.
        tasks: indices of the tasks whose scenes are shown; None: all.

    Raises:
        ValueError: an argument is out of its range, the suite has no expert or cannot be randomised in this way, the
            policy does not fit the suite, or the folder holds something else.
        OSError: the folder cannot be written, or the disk is full; finished episodes are kept.
        ExpertFailedError: the expert failed on `MAX_ATTEMPTS` initial states of a task.
        ContractError: the environment or the expert lacks what recording needs.
    """
    output = Path(output)
    suite = get_suite(suite) if isinstance(suite, str) else suite
    expert = expert or suite.expert
    check_recording(
        suite, episodes, image_size=image_size, workers=workers, noise=noise, seed=seed, randomise=randomise,
        counterfactual=counterfactual, expert=expert, tasks=tasks,
    )  # fmt: skip
    assert expert is not None
    chosen = () if tasks is None else suite.chosen_tasks(tasks)
    randomised = _dimensions(randomise or (), suite)
    if corrected is not None:
        check_robot(corrected.policy.embodiment, suite, image_size, corrected.execute_steps)
    request = {
        "suite": suite.name,
        "image_size": image_size,
        "noise": noise,
        "seed": seed,
        "video": video,
        "randomise": list(randomised) or None,  # recordings from before this key were not randomised
        "counterfactual": float(counterfactual) or None,  # likewise
        "chosen_tasks": list(chosen) or None,  # likewise: all
        "labels": suite.labels,
        "tasks": [task.instruction for task in suite.tasks],
        "policy": None if corrected is None else corrected.request(),
    }
    expert_name = "the suite's own" if expert == suite.expert else _name(expert)
    made: dict[str, Any] = {"simulation": {"mujoco": version("mujoco"), **suite.settings}, "expert": expert_name}
    folder = DatasetFolder(output, "recording", "recorded", RECORDING_FILE)
    before = folder.existing or {}
    there = before.get("episodes", 0)
    grows = grow and 0 < there < episodes
    if grows and video:
        raise ValueError(f"{output} has videos, which are not lossless and cannot be written again: give grow=false")
    wanted: dict[str, Any] = {"simulation": made["simulation"]} if grows else {"episodes": episodes}
    if suite.settings and not grows:  # a finished data set is used with any MuJoCo, unless the suite names its own
        wanted["simulation"] = {"mujoco": (before.get("simulation") or {}).get("mujoco"), **suite.settings}
    if folder.is_finished(request | wanted, resume or grows, {"expert": expert_name}) and not grows:
        return output
    settings = DemonstratorSettings(
        make=suite.make,
        expert=expert,
        instructions=tuple(task.instruction for task in suite.tasks),
        max_steps=suite.max_steps,
        settling_steps=suite.settling_steps,
        image_size=image_size,
        noise=noise,
        seed=seed,
        randomise=randomised,
        counterfactual=counterfactual,
        corrects=corrected is not None,
        tasks=chosen,
    )

    def play(missing: list[int]) -> DemonstrationPool | CorrectionPool:
        if corrected is None:
            return DemonstrationPool(settings, paths, missing, min(workers, len(missing)))
        return CorrectionPool(corrected, suite, settings, paths, missing, workers)

    with _explained(folder):
        folder.prepare(request, resume, made)
        paths = [folder.episodes / f"{slot:06d}.npz" for slot in range(episodes)]
        if grows:
            _take_over(output, paths[:there], settings)
        help_given = _assemble(folder, paths, play, video, suite.name)
        folder.publish(
            request | {"episodes": episodes} | made | ({} if corrected is None else help_given), instead=grows
        )
    return output


def check_recording(
    suite: Suite,
    episodes: int,
    *,
    image_size: int = 128,
    workers: int = 2,
    noise: float = 1.0,
    seed: int = 0,
    randomise: Sequence[str] | None = None,
    counterfactual: float = 0.0,
    expert: Callable[..., Expert] | None = None,
    tasks: Sequence[int] | None = None,
    **_: Any,
) -> None:
    """Raise a ValueError if arguments of `record` are out of their range, or the suite cannot be recorded so.

    Its other arguments are accepted and not checked.
    """
    fits = all(type(n) is int and n >= least for n, least in ((episodes, 1), (image_size, 1), (workers, 0), (seed, 0)))
    if not fits or not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
        raise ValueError(
            "episodes and image_size must be positive whole numbers, workers and seed whole and not negative, noise a "
            f"number of at least 0; got {episodes=}, {image_size=}, {workers=}, {seed=}, {noise=}"
        )
    if isinstance(counterfactual, bool) or not isinstance(counterfactual, (int, float)) or not 0 <= counterfactual <= 1:
        raise ValueError(f"counterfactual must be a share of the episodes, 0 to 1, got {counterfactual!r}")
    if expert is None and suite.expert is None:
        raise ValueError(f"{suite.name} has no scripted expert; record its demonstrations in another way")
    if tasks is not None:
        suite.chosen_tasks(tasks)
    _dimensions(randomise or (), suite)


def _dimensions(given: Sequence[str], suite: Suite) -> tuple[str, ...]:
    """Return the dimensions to randomise in their usual order; ValueError if the suite's scenes do not offer one."""
    offered = [name for name in OF_THE_SCENE if name in suite.perturbations]
    if isinstance(given, str):
        raise ValueError(f"randomise must be a list of dimensions, got {given!r}: write randomise=[{given}]")
    for name in given:
        if name in OF_THE_PLAYER:
            raise ValueError(f"randomise: {name} changes no scene; train with augmentation=light wordings=paraphrased")
        if name not in offered:
            known = f"one of {', '.join(offered)}" if offered else "its scenes cannot be changed"
            raise ValueError(f"{suite.name} cannot be randomised in {name!r}; {known}")
    return tuple(name for name in offered if name in given)


def _name(expert: Callable[..., Expert]) -> str:
    """Return what tells an expert from another one in later processes, too."""
    if hasattr(expert, "__qualname__"):
        return f"{expert.__module__}.{expert.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(expert))


@contextmanager
def _explained(folder: DatasetFolder) -> Iterator[None]:
    """Add to Ctrl-C and to an OSError how many episodes are kept, and that the same command goes on."""

    def kept() -> str:
        count = len(list(folder.episodes.glob("[0-9]*"))) if folder.episodes.is_dir() else 0
        return f"{count} finished episodes are kept in {folder.work}; the same command goes on from there"

    try:
        yield
    except KeyboardInterrupt:
        print(f"\nrecording stopped: {kept()}", file=sys.stderr)
        raise
    except OSError as error:
        where = error.filename or folder.work
        raise OSError(
            error.errno,
            f"recording cannot write to {where}: {error.strerror or error}. Free or choose another place (output=...). "
            f"{kept()}",
        ) from error


def _take_over(finished: Path, paths: list[Path], settings: DemonstratorSettings) -> None:
    """Save the episodes of a finished data set to the files of waiting episodes.

    Raises:
        ValueError: the data set is damaged, or its episodes are not those that were recorded.
    """
    from cogvla.envs.recording.recorded_dataset import EditedError, recorded_episodes

    count = 0
    try:
        for episode in tqdm(recorded_episodes(finished), f"{finished.name} grows", len(paths), unit="episode"):
            if count == len(paths) or not settings.recorded(episode, count):
                raise EditedError(f"{finished} was edited after it was recorded: episode {count} is another one")
            if not Demonstration.is_complete(paths[count]):
                episode.save(paths[count])
            count += 1
        if count != len(paths):
            raise EditedError(f"{finished} was edited after it was recorded: it has {count} episodes, not {len(paths)}")
    except EditedError as error:
        raise ValueError(f"{error}, so it cannot grow; record more episodes into another output") from error


def _assemble(
    folder: DatasetFolder,
    paths: list[Path],
    play: Callable[[list[int]], DemonstrationPool | CorrectionPool],
    video: bool,
    name: str,
) -> dict[str, Any]:
    """Record the missing episodes, and write all episodes in order; return how much the expert helped a policy."""
    episodes = len(paths)
    missing = [slot for slot, path in enumerate(paths) if not Demonstration.is_complete(path)]
    with ExitStack() as stack:
        loading = stack.enter_context(ThreadPoolExecutor(1)).submit(_load_writer)
        pool = play(missing)
        stack.enter_context(pool)
        bar = stack.enter_context(tqdm(total=episodes, initial=episodes - len(missing), unit="episode", desc=name))
        writer: DatasetWriter | None = None
        written = frames = helped = interventions = 0
        while written < episodes:
            # Receive before writing: a worker gets its next episode only when its last one is received.
            if written in pool.pending or (pool.pending and (not loading.done() or pool.ready())):
                pool.next()
                bar.update()
                bar.set_postfix(success=f"{pool.successes / pool.attempts:.1%}")
                continue
            episode = Demonstration.load(paths[written])
            if writer is None:
                writer = loading.result()(folder.dataset, f"cogvla/{name}", episode, ROBOT_TYPE, video)
                stack.callback(writer.close)
            writer.add(episode)
            written += 1
            frames += len(episode)
            if INTERVENTION in episode.arrays:
                by_expert = int(episode.arrays[INTERVENTION].sum())
                helped, interventions = helped + (by_expert > 0), interventions + by_expert
    return {"solved_alone": episodes - helped, "intervention_share": round(interventions / frames, 4)}


def _load_writer() -> type[DatasetWriter]:
    """Import the writer. Runs in a thread, because importing lerobot takes seconds; workers play in that time."""
    from cogvla.envs.recording.dataset_writer import DatasetWriter

    return DatasetWriter
