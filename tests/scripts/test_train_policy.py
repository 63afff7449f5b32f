"""`train_policy` from nothing to a report, small: the tabletop's own expert, pictures of 32 pixels and six steps."""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from cogvla.envs.suite import get_suite
from cogvla.policy.checkpoint import FORECAST, load_policy
from cogvla.policy.data.config import DataConfig, DataEntry
from cogvla.policy.inputs.tokenizer import PretrainedTokenizer
from cogvla.policy.interface import ActionChunk, Observation
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.training.run_log import RunLog
from cogvla.scripts import console, train_policy
from cogvla.scripts.command import compose
from cogvla.scripts.training.build import build_trainer
from cogvla.scripts.training.suites import outdated
from cogvla.tests.support.console_command import ended
from cogvla.tests.support.paths import SHIPPED
from cogvla.tests.support.point_suite import ToyPolicy, toy_suite
from cogvla.tests.support.small_data import LABELLED, MODEL, ROBOT, settings, small_data

CAMERAS = "[{name:agentview,height:32,width:32},{name:wrist,height:32,width:32}]"


def overrides(root: Path, *more: str) -> list[str]:
    """Command-line arguments of a small run in a folder."""
    return [
        "suite=tabletop_object",
        f"output={root}/run",
        f"data.root={root}/demonstrations",
        f"data.cache={root}/cache",
        f"embodiment.cameras={CAMERAS}",
        "demonstrations.episodes=10",
        "demonstrations.workers=0",
        "training.steps=6",
        "training.batch_size=4",
        "training.cpu_parts=1",
        "training.validate_every=3",
        "training.checkpoint_every=3",
        "training.validation_fraction=0.1",
        "evaluation.episodes_per_task=1",
        "+evaluation.max_steps=12",
        "evaluation.workers=0",
        "evaluation.videos=1",
        "wandb.mode=disabled",
        "threads=1",
        *more,
    ]


def run(root: Path, *more: str) -> dict[str, Any]:
    config = compose("train_policy", overrides(root, *more))
    return train_policy.run(config, "train_policy")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    root = tmp_path_factory.mktemp("train_policy")
    result = run(root, "training.rollout_every=6")
    assert result["success"] is not None
    return root


TWO = ("suite=[tabletop_object,tabletop_goal]", "data.root={root}/${{suite}}")


def run_two(root: Path, *more: str) -> dict[str, Any]:
    return run(root, *(word.format(root=root) for word in TWO), *more)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one policy for two suites."""
    root = tmp_path_factory.mktemp("two_suites")
    run_two(root, "training.rollout_every=6", "evaluation.episodes_per_task=1")
    return root


def test_one_policy_for_two_suites(two: Path) -> None:
    summary = json.loads((two / "run" / "summary.json").read_text())
    reports = {
        name: json.loads((two / "run" / "evaluation" / name / "report.json").read_text())
        for name in ("tabletop_object", "tabletop_goal")
    }
    rates = {name: report["total"]["success"]["value"] for name, report in reports.items()}
    assert all(report["total"]["success"]["trials"] == 10 for report in reports.values())
    assert summary["suites"] == rates
    assert summary["success"] == sum(rates.values()) / 2
    for name in rates:
        assert name in (two / "run" / "evaluation" / "index.html").read_text()
        assert summary["data"][name]["episodes"] == 10
    assert sum(data["samples"] for data in summary["data"].values()) == 6 * 4
    sets = load_policy(two / "run" / "policy").describe()["data_set"]["sets"]
    assert sets.keys() == rates.keys()
    rows = [json.loads(row) for row in (two / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {f"validation/{name}/action_l1" for name in rates} <= rows[0].keys()
    assert {f"data/{name}/{kind}" for name in rates for kind in ("samples", "epochs")} <= rows[1].keys()
    assert rows[3].keys() == {"step", "rollout/success", *(f"rollout/{name}/success" for name in rates)}


def test_a_killed_run_of_two_suites_goes_on_exactly(two: Path, tmp_path: Path) -> None:
    for name in ("tabletop_object", "tabletop_goal", "cache"):
        (tmp_path / name).symlink_to(two / name)
    shutil.copytree(two / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_0000006")
    shutil.rmtree(tmp_path / "run" / "policy")
    left = tmp_path / "run" / "evaluation" / "tabletop_goal" / "episodes.jsonl"
    left.write_text("of another policy")
    run_two(tmp_path, "training.rollout_every=6", "evaluation.episodes_per_task=1")
    for file in ("policy/model.safetensors", "policy/statistics.json", "metrics.jsonl"):
        assert (tmp_path / "run" / file).read_bytes() == (two / "run" / file).read_bytes(), file
    assert len(left.read_text().splitlines()) == 10
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("episodes.jsonl")}
    run_two(tmp_path, "training.rollout_every=6", "evaluation.episodes_per_task=1")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("episodes.jsonl")} == before


def test_one_data_set_may_hold_several_suites(two: Path, tmp_path: Path) -> None:
    """As data sets of the hub do: it is read once, and not recorded."""
    result = run_two(
        tmp_path,
        f"data.root={two}/tabletop_goal",
        f"data.cache={two}/cache",
        "demonstrations=null",
        "training.steps=1",
        "evaluation=null",
    )
    assert "data" not in result
    assert load_policy(tmp_path / "run" / "policy").describe()["data_set"]["name"] == "tabletop_goal"


def test_each_suite_is_played_with_the_statistics_of_its_own_data(two: Path, tmp_path: Path) -> None:
    for name in ("tabletop_object", "tabletop_goal", "cache"):
        (tmp_path / name).symlink_to(two / name)
    run_two(tmp_path, "data.statistics=each", "training.steps=1", "training.rollout_every=1")
    names = ("tabletop_object", "tabletop_goal")
    assert json.loads((tmp_path / "run" / "policy" / "statistics.json").read_text()).keys() == set(names)
    for folder in ("evaluation", "rollouts/step_0000001/evaluation"):
        for name in names:
            report = json.loads((tmp_path / "run" / folder / name / "report.json").read_text())
            assert report["reproduce"]["policy"]["statistics"] == name


def test_a_mixture_beside_the_recording_of_a_suite(two: Path, tmp_path: Path) -> None:
    """As corrections are: the suite's own demonstrations, and another folder."""
    result = run(
        tmp_path,
        f"data.root={two}/tabletop_object",
        f"data.cache={two}/cache",
        f"data.mixture=[{{}},{{root: {two}/tabletop_goal, weight: 3, episodes: 0.5, name: more}}]",
        "training.steps=1",
        "evaluation=null",
    )
    assert result["data"]["more"]["weight"] == 3
    assert result["data"]["more"]["episodes"] == 5
    assert result["data"].keys() == {"tabletop_object", "more"}


def contents(root: Path) -> dict[str, bytes]:
    """What a second run must not do again: demonstrations, decoded frames, training steps, episodes."""
    files = [
        *(root / "demonstrations").rglob("*.parquet"),
        *(root / "cache").rglob("*.frames"),
        *(root / "run" / "checkpoints").rglob("*.*"),
        root / "run" / "metrics.jsonl",
        root / "run" / "evaluation" / "episodes.jsonl",
    ]

    def written(file: Path) -> int:
        """When a file was written; the time of frames is that of their last use, but new ones are another file."""
        return file.stat().st_ino if file.suffix == ".frames" else file.stat().st_mtime_ns

    return {f"{file} {written(file)}": file.read_bytes() for file in files if file.is_file()}


def test_it_leaves_demonstrations_checkpoints_metrics_and_a_report(root: Path) -> None:
    info = json.loads((root / "demonstrations" / "meta" / "info.json").read_text())
    assert info["total_episodes"] == 10
    metrics = [json.loads(row) for row in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [3, 6, 6, 6]
    assert {"train/action_l1", "train/grounding_l1", "train/pointing_ce"} <= metrics[1].keys()
    assert {"validation/wrong_instruction_l1", "validation/target_cm"} <= metrics[2].keys()
    assert metrics[3].keys() == {"step", "rollout/success"}
    assert list((root / "run" / "rollouts" / "step_0000006" / "evaluation").rglob("*.mp4"))
    report = json.loads((root / "run" / "evaluation" / "report.json").read_text())
    assert report["total"]["success"]["trials"] == 10
    assert (root / "run" / "evaluation" / "report.html").stat().st_size > 10_000
    summary = json.loads((root / "run" / "summary.json").read_text())
    assert summary["success"] == report["total"]["success"]["value"]
    assert summary["seconds"].keys() == {"demonstrations", "training", "evaluation", "forecast"}
    policy = load_policy(root / "run" / "policy")
    assert policy.describe()["data_set"]["episodes"] == 10
    assert policy.embodiment.cameras[0].height == 32


def test_a_longer_training_that_is_killed_before_its_evaluation_is_evaluated_by_the_same_command(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("demonstrations", "cache"):
        (tmp_path / name).symlink_to(root / name)
    shutil.copytree(root / "run", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(train_policy, "usable_device", Mock(return_value="a GPU"))
        patch.setattr(train_policy, "load_policy", opened := Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "training.steps=8")
    assert opened.call_args.args[1] == "a GPU"
    run(tmp_path, "training.steps=8")
    report = json.loads((tmp_path / "run" / "evaluation" / "report.json").read_text())
    assert report["reproduce"]["policy"]["step"] == 8


def test_the_second_time_nothing_is_done_twice(root: Path) -> None:
    before = contents(root)
    assert any("episodes.jsonl" in name for name in before)
    run(root, "wandb=null")
    assert contents(root) == before


def test_a_full_disk_leaves_the_summary(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rounds=N` takes a round with a summary for finished."""
    before = (root / "run" / "summary.json").read_bytes()
    monkeypatch.setattr(train_policy, "write_atomic", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        run(root)
    assert (root / "run" / "summary.json").read_bytes() == before


def test_the_forecast_changes_neither_the_policy_nor_its_evaluation(root: Path, tmp_path: Path) -> None:
    """It comes last: an evaluation from before it goes on. Without it, or for a policy that reads a prefix, none."""
    for part in ("demonstrations", "cache"):
        (tmp_path / part).symlink_to(root / part)
    short = "embodiment.chunk=4"  # of which the few frames tell enough
    result = run(tmp_path, short, "forecast=false")
    file = tmp_path / "run" / "policy" / FORECAST
    assert "forecast" not in result["seconds"]
    assert not file.exists()
    before = contents(tmp_path)
    assert run(tmp_path, short)["seconds"]["forecast"] > 0
    assert contents(tmp_path) == before
    assert load_policy(tmp_path / "run" / "policy").describe()["committed"] == "forecast"
    fitted = json.dumps({**json.loads(file.read_text()), "about": {"by": "fit_forecast"}})
    file.write_text(fitted)
    run(tmp_path, short)
    assert contents(tmp_path) == before
    assert file.read_text() == fitted
    more = ("policy.head.prefix=2", "training.steps=1", "evaluation=null")
    run(tmp_path, short, f"output={tmp_path}/prefix", *more)
    assert not (tmp_path / "prefix" / "policy" / FORECAST).exists()


def test_more_steps_go_on_and_are_evaluated_anew(root: Path, tmp_path: Path) -> None:
    for part in ("demonstrations", "cache"):
        (tmp_path / part).symlink_to(root / part)
    run(tmp_path, "training.steps=2", "evaluation=null")
    assert not (tmp_path / "run" / "evaluation").exists()
    left = tmp_path / "run" / "evaluation"
    left.mkdir()
    for name in ("run.json", "episodes.jsonl"):  # of another policy
        (left / name).write_bytes((root / "run" / "evaluation" / name).read_bytes())
    result = run(tmp_path, "training.steps=3")
    described = json.loads((left / "report.json").read_text())["reproduce"]["policy"]
    assert described["step"] == 3
    assert result["success"] is not None


def test_a_pretrained_language_model_brings_its_weights_and_its_tokenizer(tmp_path: Path) -> None:
    words = ["<unk>", "<s>", "touch", "the", "red", "green", "blue", "square", "one"]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>").save_pretrained(
        tmp_path / "hub"
    )
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    published = LlamaModel(LlamaConfig(**sizes, num_attention_heads=2))
    published.save_pretrained(tmp_path / "hub")
    config = CogVLAConfig.from_dict({**MODEL, "language": {**MODEL["language"], "hub": str(tmp_path / "hub")}})
    parts = (settings(steps=1), config, LABELLED, ROBOT, small_data(), tmp_path / "run")
    trainer = build_trainer(*parts, lambda metrics, step: None)
    weights = trainer.raw.model.decoder.llm.state_dict()
    assert all(weights[name].equal(value) for name, value in published.state_dict().items())
    trainer.run()
    assert isinstance(load_policy(tmp_path / "run" / "policy").preprocessor.tokenizer, PretrainedTokenizer)
    shutil.rmtree(tmp_path / "hub")
    policy = load_policy(tmp_path / "run" / "policy")  # needs nothing but its folder
    assert policy.preprocessor.text(["touch"])[0].tolist()[0].count(2) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["suite=tabletop_objects"], r"error: unknown suite 'tabletop_objects'.*tabletop_object"),
        (["training.batch_size=7", "training.accumulation=2"], "error: batch_size 7 is not a multiple"),
        (["training.steps=many"], "error: training.steps must be a whole number, got 'many'"),
        (["training.ema_decay=1"], "error: training.ema_decay must be at least 0 and below 1, got 1"),
        (
            ["training.validation_fraction=2", "data.root=/new"],
            "error: training.validation_fraction must be at least 0",
        ),
        (["seed=-1", "data.root=/new"], "error: seed must not be negative, got -1"),
        (["policy.head.prefix=9", "data.root=/new"], "error: head.prefix is 9, but a chunk has 8 actions"),
        (
            ["objective.distillation=1", "objective.teacher=nowhere", "data.root=/new"],
            r"error: objective\.teacher=nowhere is no checkpoint folder of train_policy",
        ),
        (
            ["routing=no_efa", "routing.fusion=sum", "data.root=/new"],
            r"error: routing\.fusion=sum changes nothing with",
        ),
        (["demonstrations.seed=-1", "data.root=/new"], r"error: demonstrations\.seed must not be negative, got -1"),
        (
            ["+demonstrations.video=true", "demonstrations.noise=-1", "data.root=/new"],
            "error: episodes and image_size must be positive whole",
        ),
        (["evaluation.videos=-1", "data.root=/new"], "error: videos per task must be a whole number of at least 0"),
        (
            ["training.rollout_every=3", "evaluation=null", "data.root=/new"],
            r"error: training\.rollout_every=3 plays nothing with suite=null or evaluation=null",
        ),
        (["evaluation.workers=-1", "data.root=/new"], "error: workers must be a whole number, 0"),
        (["evaluation.episodes_per_task=51", "data.root=/new"], "error: suite 'tabletop_object' has 50 initial states"),
        (["+evaluation.execute_steps=9", "data.root=/new"], "error: execute_steps is 9, but the policy predicts 8"),
        (["finetune.train=[nonsense]", "data.root=/new"], "error: finetune names 'nonsense', but the policy has "),
        (["objective.pointer=1", "data.root=/new"], r"error: objective\.pointer points at patches, but with routing"),
        (["data.paraphrases=/nowhere.yaml", "data.root=/new"], r"error: .*No such file .*: '/nowhere\.yaml'"),
        (["base=nowhere", "data.root=/new"], "error: base=nowhere is neither a folder nor USER/NAME of the hub"),
        (
            [f"base={SHIPPED}", "data.root=/new"],  # of larger images
            "error: .*tabletop_object has other towers or another language model than the configuration",
        ),
        (["+training.stepss=5"], "error: unknown key stepss in training; valid keys are steps, .*"),
        (["+routing.efaa=true"], r"error: unknown key efaa in model\.routing; valid keys are efa, "),
        (
            ["routing.router.budget=16"],
            r"error: routing\.router\.budget=16 changes nothing without routing\.router\.name",
        ),
        (["routing.attention=sideways"], r"error: routing\.attention is 'sideways'; it must be one of coupled, causal"),
        (["evaluation.protocol=libero_x"], "error: protocol 'libero_x' is neither a YAML file nor one of "),
        (["data.cameras.wrist=observation.images.hand"], r"error: .*no camera 'observation\.images\.hand'; it has "),
        (["embodiment.state_dim=7", "data.root=/new"], r"error: the policy has state \[7\] .*_object' has \(8,"),
        (
            ["embodiment.state_dim=7", "suite=null"],
            r"error: 'observation\.state' has shape \(8,\) .*state_dim is 7; choose",
        ),
        (["data.state=state"], r"error: .* has no 'state'; it has observation\.state, "),
        (["suite=null", "data.root=/nowhere"], "error: there is no LeRobotDataset in /nowhere: record one with"),
        (["demonstrations.episodes=11"], "error: .* was recorded with episodes=10; choose another output, or delete"),
        (
            ["policy.language.bos_token=9"],
            r"error: the data has \d+ words with other wordings, .*leave room for 9: increase all three",
        ),
        (["wordings.share=0.9"], r"error: wordings\.share must be in \[0,0\.7\], got 0\.9"),
        (["data.paraphrases=/nowhere.yaml"], r"error: .*No such file or directory: '/nowhere\.yaml'"),
        (
            ["suite=[tabletop_object,tabletop_goal]", "data.paraphrases=${suite}.yaml"],
            r"error: data\.paraphrases=tabletop_object\.yaml is for one suite, .* into one file, and give its name",
        ),
        (["+evaluation.speed=2"], "error: unknown key speed in protocol; valid keys are name, .*"),
        (
            ["suite=[tabletop_object,tabletop_goal]"],
            r"error: data\.root=.* is one folder for tabletop_object and tabletop",
        ),
        (["suite=[]"], "error: suite is empty; give a name, a list of names, all_tabletop or all_libero"),
        (["suite=[tabletop_object,tabletop_goals]"], r"error: unknown suite 'tabletop_goals'.*tabletop_goal"),
        (["data=[tabletop,libero]"], r"error: data=\[tabletop,libero\]: Hydra would merge .* 'data\.mixture=\[\{root"),
        (["data=[{root: A},{root: B}]"], r"error: data=.*: Hydra would merge"),
        (["+policy=[tiny,small]"], r"error: \+policy=.*: Hydra would merge .* change its keys with policy\.KEY=VALUE"),
        (
            ["data.statistics=each", "data.mixture=[{root: A},{root: B}]"],
            r"error: data\.statistics=each: no entry of data\.mixture is data\.root=.* of tabletop_object: give",
        ),
        (["data.mixture=[{},{}]"], r"error: data\.mixture has the data set .* twice: give it once"),
        (["data.mixture=[]"], r"error: data\.mixture must be a list of data sets"),
        (["data.mixture=[{root: A, weight: 0}]"], r"error: data\.mixture\[0\]\.weight must be a positive number"),
        (["forecast=perhaps"], "error: forecast must be true or false, got 'perhaps'"),
        (["wandb.mode=loud", "data.root=/new"], "error: wandb.mode is 'loud'; it must be one of auto, online"),
        (["routing=no_efa"], "error: .* was trained with another policy or routing; choose another output, or delete"),
    ],
)
def test_mistakes_end_in_one_line(root: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], said: str) -> None:
    code = ended(console.train_policy, *overrides(root, *wrong))
    assert isinstance(code, str)
    assert len(code.splitlines()) == 1
    assert re.search(said, code), code
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("speed=3", "Could not override 'speed'"), ("policy=huge", "Could not find 'policy/huge'")],
)
def test_unknown_keys_and_options_are_explained_by_hydra(
    capsys: pytest.CaptureFixture[str], wrong: str, said: str
) -> None:
    assert ended(console.train_policy, wrong) == 1
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message


def raising(error: BaseException) -> Callable[..., Any]:
    def run(*args: Any) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (OSError(28, "cannot write run: No space left on device"), "error: [Errno 28] cannot write run"),
        (FloatingPointError("loss is not finite at step 3"), "error: loss is not finite at step 3"),
    ],
)
def test_how_the_command_ends(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: str | int) -> None:
    monkeypatch.setattr(train_policy, "run", raising(error))
    end = ended(console.train_policy)
    assert end == code if isinstance(code, int) else str(end).startswith(code)


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_policy, "run", raising(ZeroDivisionError()))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ZeroDivisionError):
        ended(console.train_policy)


def test_an_offline_log_is_on_disk(tmp_path: Path) -> None:
    with RunLog({"mode": "offline", "project": "cogvla"}, {"seed": 0}, tmp_path) as log:
        log.write({"train/loss": 0.5}, 20)
    written = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 1
    assert written[0].stat().st_size > 0


def test_a_disabled_log_leaves_nothing(tmp_path: Path) -> None:
    with RunLog({"mode": "disabled", "project": "cogvla"}, {}, tmp_path) as log:
        log.write({"train/loss": 0.5}, 20)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["training.optimiser=adamw8bit"], "adamw8bit needs bitsandbytes"),
        (["finetune.bits=4", "finetune.train=[head.*]", "finetune.adapt=[decoder.*]"], "in 4 bits need bitsandbytes"),
        (["training.batch_size=6", "training.cpu_parts=1"], r"batch_size 6 must be a multiple .* \(4 x 1\)"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_told_before_a_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: list[str], said: str
) -> None:
    for name in ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(train_policy, "record", lambda *_, **__: pytest.fail("recorded"))
    monkeypatch.setattr(train_policy, "PartialState", lambda **_: SimpleNamespace(num_processes=4))
    with pytest.raises(ValueError, match=said):
        run(tmp_path, *wrong)


@pytest.mark.parametrize(("recorded", "said"), [(3, False), (2, True), (None, True)])
def test_a_recording_whose_labels_meant_something_else_is_noted(
    tmp_path: Path, recorded: int | None, said: bool
) -> None:
    suite = replace(get_suite("tabletop_long"), labels=3)
    entries = [DataEntry(DataConfig({}, root=str(tmp_path / name))) for name in ("made", "bare", "missing")]
    (tmp_path / "bare").mkdir()
    (tmp_path / "made/meta").mkdir(parents=True)
    (tmp_path / "made/meta/recording.json").write_text(json.dumps({"suite": suite.name, "labels": recorded}))
    notes = outdated([suite], entries)
    assert [note.partition(": ")[0] for note in notes] == ([str(tmp_path / "made")] if said else [])
    assert not outdated([replace(suite, name="another")], entries)


def test_rollouts_are_those_of_these_weights_though_an_earlier_attempt_reached_this_step(tmp_path: Path) -> None:
    class Trained(ToyPolicy):
        def with_statistics(self, name: str | None) -> Trained:
            return self

    class Worse(Trained):
        def act(self, observation: Observation) -> ActionChunk:
            return ActionChunk(0 * super().act(observation).actions)

    few = {"protocol": "tabletop", "episodes_per_task": 10, "workers": 0, "videos": 0}
    log: Any = SimpleNamespace(videos=lambda *_: None)
    play: Any = train_policy._rollouts([toy_suite()], few, tmp_path, log, {"point": None})
    assert [play(policy, 500)["rollout/success"] for policy in (Trained(), Worse())] == [0.5, 0.0]
