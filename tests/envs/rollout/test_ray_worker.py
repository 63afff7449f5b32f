"""Environments on a Ray cluster of two nodes: the same results, and none is lost with a node."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cogvla.envs.episodes import EpisodeResult, EpisodeSpec
from cogvla.envs.rollout.player import Failed, PlayerSettings, Recorded
from cogvla.envs.rollout.ray_worker import UV_HOOK, RayWorker, ray_cluster
from cogvla.envs.rollout.rollout import rollout
from cogvla.tests.support.extras import needs
from cogvla.tests.support.full_disk import files_limited_to
from cogvla.tests.support.point_suite import ToyPolicy, solvable, toy_suite

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason=needs("ray"))

SPECS = [EpisodeSpec(task, state) for task in range(3) for state in range(4)]
Start = Callable[[PlayerSettings], RayWorker]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv(UV_HOOK, "0")  # read when Ray is imported
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    yield made, small
    made.shutdown()
    patch.undo()


@pytest.fixture(scope="module")
def start(cluster: Any) -> Iterator[Start]:
    made, small = cluster
    made.add_node(**small)
    with ray_cluster(made.address) as start_worker:
        yield start_worker


def play(start: Start, **options: Any) -> dict[tuple[int, int], EpisodeResult]:
    options = {"workers": 2, **options}
    suite = options.pop("suite", toy_suite())
    results = list(rollout(ToyPolicy(), suite, SPECS, start_worker=start, **options))
    assert len(results) == len(SPECS), "every episode gives exactly one result"
    return {(result.task, result.initial_state): result for result in results}


def assert_right(results: dict[tuple[int, int], EpisodeResult]) -> None:
    assert {key: result.success for key, result in results.items()} == {key: solvable(key[1]) for key in results}
    assert not any(result.error for result in results.values())


@pytest.mark.slow  # starts a cluster: a minute
@needs_ray
def test_the_same_results_as_in_processes(start: Start, tmp_path: Path) -> None:
    found = play(
        start, choose_video=lambda result: tmp_path / "deep" / f"{result.task}.mp4" if result.success else None
    )
    assert_right(found)
    here = {(r.task, r.initial_state): r for r in rollout(ToyPolicy(), toy_suite(), SPECS, workers=0)}
    assert {key: result.steps for key, result in found.items()} == {key: result.steps for key, result in here.items()}
    videos = sorted(tmp_path.rglob("*.mp4"))
    assert len(videos) == 3
    assert all(video.stat().st_size > 1000 for video in videos), "they came back over the wire"


@pytest.mark.slow  # starts a cluster: a minute
@needs_ray
def test_an_actor_that_dies_is_replaced_and_its_episode_repeated(start: Start, tmp_path: Path) -> None:
    found = play(start, suite=toy_suite(fault="kill", at=(1, 1), once=tmp_path / "struck"))
    assert_right(found)
    assert found[1, 1].attempts == 2


@pytest.mark.slow  # starts a cluster: a minute
@needs_ray
def test_an_exception_is_an_error_of_its_episode_only(start: Start) -> None:
    found = play(start, suite=toy_suite(fault="raise", at=(1, 1)))
    assert "the toy is broken" in str(found.pop((1, 1)).error)
    assert_right(found)


@pytest.mark.slow  # starts a cluster: a minute
@needs_ray
def test_losing_a_node_loses_no_episode(cluster: Any, start: Start) -> None:
    made, small = cluster
    lost = made.add_node(**small)
    made.wait_for_nodes()
    suite = toy_suite(sleep_s=0.02)
    results: list[EpisodeResult] = []
    for result in rollout(ToyPolicy(), suite, SPECS, workers=6, start_worker=start):
        results.append(result)
        if lost is not None and len(results) == 2:
            made.remove_node(lost)
            lost = None
    assert len(results) == len(SPECS)
    assert_right({(result.task, result.initial_state): result for result in results})
    assert max(result.attempts for result in results) == 2, "the lost worker's episode was played again"


@needs_ray
def test_no_cluster_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: (_ for _ in ()).throw(ConnectionError("nobody there")))
    with pytest.raises(ValueError, match=r"no Ray cluster at '1.2.3.4:5' .*ray start --head"), ray_cluster("1.2.3.4:5"):
        pass


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="uv sync --extra ray"), ray_cluster("auto"):
        pass


def test_a_full_disk_leaves_no_part_of_a_video(tmp_path: Path) -> None:
    worker = RayWorker.__new__(RayWorker)
    worker.connection = SimpleNamespace(recv_bytes=lambda: b"")  # type: ignore[assignment]
    worker._answer, worker._path = (Recorded(Path("far/video.mp4")), bytes(1000)), tmp_path / "video.mp4"
    errors = SimpleNamespace(RayActorError=KeyError, RayError=IndexError)
    worker._ray = SimpleNamespace(get=lambda answer: answer, exceptions=errors)
    with files_limited_to(100):
        assert isinstance(worker.receive(), Failed)
    assert list(tmp_path.iterdir()) == []
    assert worker.receive() == Recorded(tmp_path / "video.mp4")
