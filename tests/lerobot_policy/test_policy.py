"""The plugin's policy and processors: the same actions as ours, lerobot's interface, and clear errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

from cogvla.lerobot_versions import LeRobotDataset
from cogvla.policy.checkpoint import load_policy, load_weights
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.interface import Observation
from cogvla.tests.support.lerobot_plugin import require_plugin
from cogvla.tests.support.paths import SHIPPED

require_plugin()

from lerobot_policy_cogvla.configuration_cogvla import CogVLAConfig
from lerobot_policy_cogvla.conversion import from_lerobot, main, to_lerobot
from lerobot_policy_cogvla.modeling_cogvla import CogVLAPolicy
from lerobot_policy_cogvla.start import data_statistics

OURS = load_policy(SHIPPED)


def batch_of(observation: Observation) -> dict[str, Any]:
    """An observation as lerobot's commands give it to the preprocessor."""
    images = {
        f"observation.images.{name}": torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255
        for name, image in observation.images.items()
    }
    state = torch.from_numpy(observation.state)
    return {**images, "observation.state": state, "task": list(observation.instruction)}


def opened(folder: Path, **changes: Any) -> tuple[Any, Any, Any]:
    """The policy in a folder, as lerobot's commands open it, and its pipelines."""
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    for name, value in changes.items():
        setattr(config, name, value)
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    return policy, *make_pre_post_processors(config, pretrained_path=str(folder))


def test_the_same_actions_and_back(converted: Path, tmp_path: Path) -> None:
    policy, before, after = opened(converted)
    seen = OURS.embodiment.fake_observation(3)
    actions_BKA = after(policy.predict_action_chunk(before(batch_of(seen)))).numpy()
    expected_BKA = OURS.act(seen).actions
    np.testing.assert_allclose(actions_BKA, expected_BKA, atol=1e-5)
    from_lerobot(converted, tmp_path / "ours")
    again = load_policy(tmp_path / "ours")
    np.testing.assert_array_equal(again.act(seen).actions, expected_BKA)
    assert again.preprocessor.tokenizer.to_dict() == OURS.preprocessor.tokenizer.to_dict()
    ours = json.loads((SHIPPED / "statistics.json").read_text())
    assert json.loads((tmp_path / "ours" / "statistics.json").read_text()) == ours


def test_select_action_executes_n_action_steps_of_each_chunk(converted: Path) -> None:
    policy, before, _ = opened(converted, n_action_steps=3)
    batches = [before(batch_of(OURS.embodiment.fake_observation(2, seed))) for seed in range(4)]
    chunks = [policy.predict_action_chunk(batch) for batch in batches]
    selected = [policy.select_action(batch) for batch in batches]
    expected = [chunks[0][:, 0], chunks[0][:, 1], chunks[0][:, 2], chunks[3][:, 0]]
    torch.testing.assert_close(torch.stack(selected), torch.stack(expected))
    policy.reset()
    torch.testing.assert_close(policy.select_action(batches[1]), chunks[1][:, 0])


def test_padded_actions_teach_nothing(converted: Path) -> None:
    policy, before, _ = opened(converted)
    seen = batch_of(OURS.embodiment.fake_observation(2))
    pad_BK = torch.zeros(2, 8, dtype=torch.bool)
    pad_BK[:, 5:] = True
    action_BKA = torch.rand(2, 8, 7) * 0.1
    other_BKA = action_BKA.clone()
    other_BKA[:, 5:] = 1.0
    losses = [
        policy.forward(before({**seen, "action": action, "action_is_pad": pad}))[0].item()
        for action, pad in ((action_BKA, pad_BK), (other_BKA, pad_BK), (other_BKA, ~pad_BK & False))
    ]
    assert losses[0] == losses[1] != losses[2]
    each_B, said = policy.forward(before({**seen, "action": action_BKA, "action_is_pad": pad_BK}), reduction="none")
    assert each_B.shape == (2,)
    assert each_B.mean().item() == pytest.approx(losses[0], abs=1e-6)
    assert said["action_l1"] == pytest.approx(losses[0], abs=1e-6)


@pytest.mark.parametrize(("delay", "left", "padded"), [(0, 3, 8), (2, 6, 8), (3, 3, 3), (5, 2, 8)])
def test_a_chunk_goes_on_from_what_is_left(converted: Path, delay: int, left: int, padded: int) -> None:
    policy, before, _ = opened(converted)
    assert policy.supports_rtc()
    batch = before(batch_of(OURS.embodiment.fake_observation(1)))
    new_KA = policy.predict_action_chunk(batch)[0]
    old_HA = torch.zeros(padded, 7)
    old_HA[:left] = 5.0
    chunk_KA = policy.predict_action_chunk(batch, inference_delay=delay, prev_chunk_left_over=old_HA)[0]
    kept = min(max(delay - 1, 0), left)  # the first action of the chunk is executed before what is left
    torch.testing.assert_close(chunk_KA[1 : kept + 1], old_HA[:kept])
    torch.testing.assert_close(chunk_KA[left + 1 :], new_KA[left + 1 :])
    share_K = ((chunk_KA - new_KA) / (5.0 - new_KA)).mean(dim=1)[1 : left + 2]
    assert (share_K.diff() <= 1e-6).all(), "it turns to the new actions step by step"
    assert (share_K.diff()[kept - 1 if kept else 0 :] < -1e-3).all()
    torch.testing.assert_close(policy.predict_action_chunk(batch, prev_chunk_left_over=old_HA * 0)[0], new_KA)


def test_lerobots_async_server(converted: Path) -> None:
    pytest.importorskip("grpc", reason="needs lerobot[async]")
    import pickle

    from lerobot.async_inference.configs import PolicyServerConfig
    from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
    from lerobot.async_inference.policy_server import PolicyServer

    from lerobot_policy_cogvla.async_server import register

    register()
    register()
    server = PolicyServer(PolicyServerConfig())
    client = SimpleNamespace(peer=lambda: "test")
    server.Ready(None, client)
    joints = [f"joint_{i}" for i in range(8)]
    features = {
        "observation.state": {"dtype": "float32", "shape": (8,), "names": joints},
        **{
            f"observation.images.{name}": {"dtype": "image", "shape": (128, 128, 3), "names": ["h", "w", "c"]}
            for name in OURS.embodiment.camera_names
        },
    }
    asked = RemotePolicyConfig("cogvla", str(converted), features, actions_per_chunk=5)
    server.SendPolicyInstructions(SimpleNamespace(data=pickle.dumps(asked)), client)
    seen = OURS.embodiment.fake_observation(1)
    raw = {name: image[0] for name, image in seen.images.items()} | dict(zip(joints, seen.state[0], strict=True))
    timed = TimedObservation(timestamp=0.0, timestep=0, observation={**raw, "task": seen.instruction[0]}, must_go=True)
    assert server._enqueue_observation(timed)
    answer = pickle.loads(server.GetActions(None, client).data)
    actions = np.stack([action.get_action().numpy() for action in answer])
    np.testing.assert_allclose(actions, OURS.act(seen).actions[0, :5], atol=1e-5)


def meta(recording: Path) -> Any:
    return LeRobotDataset("local/tabletop", root=recording).meta


def new_config(**changes: Any) -> CogVLAConfig:
    return CogVLAConfig(device="cpu", push_to_hub=False, embodiment="tabletop", **changes)


def test_statistics_are_those_of_all_frames(recording: Path) -> None:
    import pyarrow.parquet as pq

    policy = CogVLAPolicy(new_config(), dataset_meta=meta(recording))
    table = pq.read_table(recording / "data")
    for key, column in (("state", "observation.state"), ("action", "action")):
        expected = Statistics.of(np.stack(table[column].to_numpy()))
        assert policy.config.cogvla["statistics"][key] == expected.to_dict()
    mask = policy.config.cogvla["embodiment"]["action_normalise_mask"]
    assert mask == [True] * 6 + [False]


def test_a_base_gives_weights_and_words(recording: Path) -> None:
    policy = CogVLAPolicy(new_config(base=str(SHIPPED)), dataset_meta=meta(recording))
    weights = load_weights(SHIPPED)
    changed = {name for name, value in policy.model.state_dict().items() if not torch.equal(value, weights[name])}
    assert changed == {"state.0.weight", "state.0.bias", "head.net.6.weight", "head.net.6.bias"}  # with the statistics
    words = policy.config.cogvla["tokenizer"]["words"]
    assert tuple(words[:60]) == tuple(OURS.preprocessor.tokenizer.to_dict()["words"][:60])
    assert policy.config.cogvla["statistics"] != json.loads((SHIPPED / "statistics.json").read_text())


@pytest.mark.parametrize(
    ("name", "value"), [("embodiment", "libero"), ("preset", "small"), ("routing", "no_efa"), ("image_size", 64)]
)
def test_what_a_base_says_itself_is_not_said_twice(recording: Path, name: str, value: Any) -> None:
    config = new_config(base=str(SHIPPED))
    setattr(config, name, value)
    with pytest.raises(ValueError, match=f"leave out --policy.{name}$"):
        CogVLAPolicy(config, dataset_meta=meta(recording))


def changed(**values: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for name, value in values.items():
            setattr(data, name, value)

    return change


def features(data: Any, **shapes: Any) -> dict[str, Any]:
    kept = {key: value for key, value in data.features.items() if shapes.get(key, 0) is not None}
    return {key: {**value, "shape": shapes.get(key, value["shape"])} for key, value in kept.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: {"features": features(data, action=(6,))}, r"has shape \[6\] of action; .* needs \[7\]"),
        (lambda data: {"features": features(data, **{"observation.state": (14,)})}, r"\[14\] of observation.state"),
        (lambda data: {"features": features(data, **{"observation.state": None})}, "has no observation.state"),
        (lambda data: {"fps": 30}, "30 frames per second; .* acts 20 times"),
        (lambda data: {"camera_keys": ["observation.images.top"]}, "the cameras observation.images.top; .*wrist"),
        (lambda data: {}, "other statistics than the checkpoint: dimension . has q01 to q99"),
    ],
)
@pytest.mark.parametrize("new", [False, True])
def test_another_data_set(recording: Path, converted: Path, change: Any, said: str, new: bool) -> None:
    """For a checkpoint, and for a new policy of a named embodiment."""
    data = meta(recording)
    plain = SimpleNamespace(
        **{name: getattr(data, name) for name in ("features", "fps", "camera_keys", "repo_id", "root", "tasks")},
        total_episodes=3,
        total_frames=data.total_frames,
    )
    changes = change(data)
    if new and not changes:
        return
    config = new_config() if new else PreTrainedConfig.from_pretrained(converted)
    with pytest.raises(ValueError, match=said):
        CogVLAPolicy(config, dataset_meta=SimpleNamespace(**{**vars(plain), **changes}))


def test_a_checkpoint_keeps_its_statistics_if_asked(recording: Path, converted: Path) -> None:
    config = PreTrainedConfig.from_pretrained(converted)
    before = json.dumps(config.cogvla)
    config.keep_statistics = True
    CogVLAPolicy(config, dataset_meta=meta(recording))
    assert json.dumps(config.cogvla) == before


JOINTS = [f"joint_{i}" for i in range(7)]


def named(recording: Path, names: Any) -> Any:
    """The metadata of a data set whose actions have names."""
    data = meta(recording)
    data.features["action"]["names"] = names
    return data


@pytest.mark.parametrize("saved", [JOINTS, {"motors": JOINTS}])
def test_actions_in_another_order(recording: Path, saved: Any) -> None:
    config = new_config()
    CogVLAPolicy(config, dataset_meta=named(recording, saved))
    assert config.action_feature_names == JOINTS, "lerobot-rollout reads it"
    for fits in (JOINTS, {"motors": JOINTS}, [f"{name}.pos" for name in JOINTS], None):
        CogVLAPolicy(config, dataset_meta=named(recording, fits))
    config.keep_statistics = True
    for other in (JOINTS[::-1], {"motors": JOINTS[::-1]}):
        with pytest.raises(
            ValueError, match=r"action of data set .* another order than the checkpoint: joint_6, .*not"
        ):
            CogVLAPolicy(config, dataset_meta=named(recording, other))


def test_a_data_set_that_is_only_begun(recording: Path, converted: Path, tmp_path: Path) -> None:
    """What `lerobot-record` of 0.4 gives: features are compared, statistics are not there yet."""
    data = meta(recording)
    config = PreTrainedConfig.from_pretrained(converted)
    begun = LeRobotDataset.create(
        "local/begun", fps=20, features=data.features, root=tmp_path / "begun", use_videos=False
    )
    CogVLAPolicy(config, dataset_meta=begun.meta)
    slow = LeRobotDataset.create("local/slow", fps=10, features=data.features, root=tmp_path / "slow", use_videos=False)
    with pytest.raises(ValueError, match="has 10 frames per second"):
        CogVLAPolicy(config, dataset_meta=slow.meta)


def test_statistics_need_files(recording: Path, tmp_path: Path) -> None:
    data = SimpleNamespace(root=tmp_path, repo_id="me/data")
    with pytest.raises(ValueError, match="has no parquet files"):
        data_statistics(OURS.embodiment, data)


def test_statistics_of_nan(recording: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = shutil.copytree(recording, tmp_path / "nan")
    (file,) = (folder / "data").rglob("*.parquet")
    table = pq.read_table(file)
    values = np.stack(table["action"].to_numpy())
    values[3, 2] = np.nan
    column = table.column_names.index("action")
    pq.write_table(table.set_column(column, "action", pa.array(list(values), table.schema.field("action").type)), file)
    with pytest.raises(ValueError, match="action is NaN or infinite in frame 3, dimension 2"):
        data_statistics(OURS.embodiment, SimpleNamespace(root=folder, repo_id="me/data"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b.pop("observation.images.wrist"), "no observation.images.wrist; it has .*agentview: rename"),
        (lambda b: b.update({"observation.images.wrist": torch.zeros(2, 4, 8, 8)}), r"\[B,3,H,W\], got \[2, 4, 8, 8\]"),
        (lambda b: b.update({"observation.images.wrist": torch.full((2, 3, 8, 8), 200.0)}), "divide them by 255"),
        (lambda b: b.pop("observation.state"), "observation.state is missing"),
        (lambda b: b.update({"observation.state": torch.zeros(2, 6)}), r"shape \[2, 6\]; the policy needs \[B,8\]"),
        (lambda b: b.update({"observation.state": torch.full((2, 8), torch.nan)}), "NaN or infinite"),
        (lambda b: b.update(action=torch.full((2, 8, 7), torch.nan)), "action holds NaN"),
        (lambda b: b.pop("task"), "an instruction for each of 2"),
        (lambda b: b.update(task=["", "go"]), "an instruction for each of 2"),
    ],
)
def test_wrong_batches(converted: Path, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    _, before, _ = opened(converted)
    batch = batch_of(OURS.embodiment.fake_observation(2))
    change(batch)
    with pytest.raises(ValueError, match=said):
        before(batch)


def test_a_raw_batch_is_refused(converted: Path) -> None:
    policy, _, _ = opened(converted)
    with pytest.raises(ValueError, match="not preprocessed"):
        policy.predict_action_chunk(batch_of(OURS.embodiment.fake_observation(1)))


@pytest.mark.parametrize("name", ["policy_preprocessor.json", "policy_postprocessor.json"])
@pytest.mark.parametrize("version", [0, 2])
def test_processors_of_another_version(converted: Path, tmp_path: Path, name: str, version: int) -> None:
    folder = shutil.copytree(converted, tmp_path / "copy")
    pipeline = json.loads((folder / name).read_text())
    steps = [step for step in pipeline["steps"] if step["registry_name"].startswith("cogvla_")]
    steps[0]["config"]["version"] = version
    (folder / name).write_text(json.dumps(pipeline))
    with pytest.raises(ValueError, match=f"another version of lerobot_policy_cogvla .*version {version}"):
        opened(folder)


CONFIG, BEFORE, AFTER = "config.json", "policy_preprocessor.json", "policy_postprocessor.json"


def step_of(body: dict[str, Any]) -> dict[str, Any]:
    """The configuration of our step in a saved pipeline."""
    (found,) = [step for step in body["steps"] if step["registry_name"].startswith("cogvla_")]
    config: dict[str, Any] = found["config"]
    return config


Change = Callable[[dict[str, Any]], Any]
DAMAGED: dict[str, tuple[str, Change | str, str]] = {
    "before is half written": (BEFORE, '{"steps": [', "policy_preprocessor.json is damaged"),
    "before is empty": (BEFORE, "", "policy_preprocessor.json is damaged"),
    "after is a list": (AFTER, "[]", "policy_postprocessor.json is damaged"),
    "our step is gone": (BEFORE, lambda b: b["steps"].pop(2), "has no step cogvla_inputs"),
    "a step that is not installed": (
        BEFORE,
        lambda b: b["steps"].append({"registry_name": "fold_laundry", "config": {}}),
        "has the step fold_laundry, which is not installed",
    ),
    "no steps": (AFTER, lambda b: b.pop("steps"), "has no step cogvla_actions"),
    "a field of another version": (
        BEFORE,
        lambda b: step_of(b).update(colour=1),
        "by another version of lerobot_policy",
    ),
    "no words": (BEFORE, lambda b: step_of(b)["saved"].pop("tokenizer"), "cogvla_inputs .* does not say its tokenizer"),
    "no statistics": (AFTER, lambda b: step_of(b)["saved"].pop("statistics"), "does not say its statistics"),
    "nothing saved": (AFTER, lambda b: step_of(b).pop("saved"), "does not say its embodiment, statistics"),
    "before of another policy": (
        BEFORE,
        lambda b: step_of(b)["saved"]["statistics"]["state"].update(q99=[9.0] * 8),
        "policy_preprocessor.json is of another checkpoint than the policy: other statistics",
    ),
    "after of another policy": (
        AFTER,
        lambda b: step_of(b)["saved"]["embodiment"].update(gripper_open=0.0),
        "policy_postprocessor.json is of another checkpoint than the policy: other embodiment",
    ),
    "a format of the future": (
        CONFIG,
        lambda b: b["cogvla"].update(format=99),
        "has format 99; this version .* reads 1",
    ),
    "no network": (CONFIG, lambda b: b["cogvla"].pop("model"), "description is damaged .*model"),
    "no robot": (CONFIG, lambda b: b["cogvla"].pop("embodiment"), "description is damaged .*embodiment"),
    "no statistics of the policy": (
        CONFIG,
        lambda b: b["cogvla"].pop("statistics"),
        "description is damaged .*statistics",
    ),
    "an unknown field of the network": (CONFIG, lambda b: b["cogvla"]["model"].update(colour=1), "unknown key colour"),
    "another state": (
        CONFIG,
        lambda b: b["input_features"]["observation.state"].update(shape=[6]),
        r"declares observation.state of shape \[6\], .* has \[8\]",
    ),
    "another action": (
        CONFIG,
        lambda b: b["output_features"]["action"].update(shape=[14]),
        r"declares action of shape \[14\], .* has \[7\]",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_and_mixed_folders(converted: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(converted, tmp_path / "copy")
    file, change, said = DAMAGED[name]
    if isinstance(change, str):
        (folder / file).write_text(change)
    else:
        body = json.loads((folder / file).read_text())
        change(body)
        (folder / file).write_text(json.dumps(body))
    with pytest.raises(ValueError, match=said) as error:
        opened(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b["cogvla"].pop("statistics"), "description is damaged"),
        (lambda b: b.update(field_of_the_future=1), "config.json cannot be read .*field_of_the_future"),
        (lambda b: b.update(cogvla="nothing"), "config.json cannot be read"),
        (lambda b: b.update(n_action_steps=9), "n_action_steps is 9; it must be from 1 to chunk_size"),
    ],
)
def test_converting_what_is_damaged(converted: Path, tmp_path: Path, change: Change, said: str) -> None:
    folder = shutil.copytree(converted, tmp_path / "copy")
    body = json.loads((folder / CONFIG).read_text())
    change(body)
    (folder / CONFIG).write_text(json.dumps(body))
    with pytest.raises(SystemExit, match=said) as error:
        main([str(folder), str(tmp_path / "ours")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_missing_weights_are_an_error(converted: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = shutil.copytree(converted, tmp_path / "copy")
    weights = load_weights(folder)
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit its config.json .*Missing key"):
        opened(folder)


@pytest.mark.parametrize("changes", [{"n_obs_steps": 2}, {"n_action_steps": 9}, {"n_action_steps": 0}])
def test_wrong_configurations(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        new_config(**changes)


def test_a_new_policy_needs_data() -> None:
    with pytest.raises(ValueError, match="a new policy needs a data set"):
        CogVLAPolicy(new_config())


def test_chunks_of_another_size(recording: Path, converted: Path) -> None:
    config = PreTrainedConfig.from_pretrained(converted)
    config.chunk_size = 16
    with pytest.raises(ValueError, match=r"predicts 8 actions at once: give --policy.chunk_size=8"):
        CogVLAPolicy(config)


def test_the_command_ends_in_one_line(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(converted), str(tmp_path / "ours")])
    assert "saved to" in capsys.readouterr().out
    for source, said in (
        (converted, "exists already"),
        (tmp_path / "none", "no checkpoint folder"),
        (tmp_path, "not a complete checkpoint"),
    ):
        output = tmp_path / "ours" if source == converted else tmp_path / "new"
        with pytest.raises(SystemExit, match=said):
            main([str(source), str(output)])


def test_policies_of_others_are_not_converted(tmp_path: Path) -> None:
    from lerobot.policies.act.configuration_act import ACTConfig

    tmp_path.joinpath("act").mkdir()
    ACTConfig(device="cpu")._save_pretrained(tmp_path / "act")
    with pytest.raises(ValueError, match="type 'act'; only cogvla"):
        from_lerobot(tmp_path / "act", tmp_path / "new")


def test_statistics_of_several_data_sets_must_be_chosen(tmp_path: Path) -> None:
    folder = shutil.copytree(SHIPPED, tmp_path / "several")
    saved = json.loads((folder / "statistics.json").read_text())
    (folder / "statistics.json").write_text(json.dumps({"one": saved, "two": saved}))
    with pytest.raises(ValueError, match="statistics of several data sets"):
        to_lerobot(folder, tmp_path / "new")
    to_lerobot(folder, tmp_path / "new", "two")
    seen = OURS.embodiment.fake_observation(1)
    policy, before, after = opened(tmp_path / "new")
    actions = after(policy.predict_action_chunk(before(batch_of(seen)))).numpy()
    np.testing.assert_allclose(actions, OURS.act(seen).actions, atol=1e-5)
