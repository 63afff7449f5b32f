"""A policy on a hub on this machine: what is uploaded, its card, and what comes back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import hf_hub_download
from omegaconf import OmegaConf

from cogvla.envs.evaluation.evaluate import evaluate
from cogvla.envs.evaluation.protocol import load_protocol
from cogvla.envs.evaluation.robustness import CLEAN, compare, write_page
from cogvla.envs.perturbation.perturbation import Perturbation
from cogvla.envs.suite import get_suite
from cogvla.policy.checkpoint import load_policy, open_policy, weights_hash
from cogvla.policy.hub.cards import is_ours
from cogvla.policy.hub.download import find_checkpoint, load_from_hub
from cogvla.policy.hub.policy_card import policy_publication
from cogvla.policy.hub.upload import to_folder, to_hub
from cogvla.policy.weights.base import find_base, is_own
from cogvla.scripts import eval_libero
from cogvla.scripts.command import compose
from cogvla.scripts.sharing.share_policy import main
from cogvla.tests.support.paths import SHIPPED
from cogvla.tests.support.writable_hub import READER, WritableHub, writable_hub

NAME = "someone/toy"
KEY = f"models/{NAME}"
ONE_TASK = {"episodes_per_task": 1}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    with writable_hub(tmp_path / "cache", monkeypatch) as hub:
        yield hub


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "private" / "policy"))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports of one episode without a change and in two cells, and the page of the benchmark."""
    folder = tmp_path_factory.mktemp("evaluated")
    suite, protocol = get_suite("tabletop_object"), load_protocol("tabletop", **ONE_TASK)
    policy, identity = open_policy(SHIPPED)
    found = {}
    for name, cell in ((CLEAN, None), ("wording_1", Perturbation("wording", 1)), ("light_3", Perturbation("light", 3))):
        found[cell] = evaluate(
            policy, suite, protocol, folder / name, workers=0, tasks=[0], perturbation=cell, videos=0,
            command=f"eval_libero checkpoint=/home/someone/secret/policy output={folder}", identity=identity,
            progress=False,
        )  # fmt: skip
    cells = {cell: report for cell, report in found.items() if cell is not None}
    write_page(compare(found[None], cells), folder, {str(cell): str(cell) for cell in cells} | {CLEAN: CLEAN})
    return folder


def share(checkpoint: Path | str, *overrides: str) -> None:
    main(compose("share_policy", [f"checkpoint={checkpoint}", *overrides]))


def mistake(checkpoint: Path | str, *overrides: str) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        share(checkpoint, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def actions(source: Path | str) -> np.ndarray:
    policy = load_policy(source)
    return policy.act(policy.embodiment.fake_observation(2)).actions


def test_what_was_shared_comes_back(hub: WritableHub, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "training.pt").write_bytes(b"state of the training")
    (checkpoint / "notes.txt").write_text("mine")
    share(checkpoint, f"repo_id={NAME}", "license=mit")
    out = capsys.readouterr().out
    made = hub.repositories[KEY]
    of_checkpoint = {"config.json", "forecast.json", "model.safetensors", "statistics.json"}
    assert set(made.files) == {".gitattributes", "README.md", *of_checkpoint}
    assert len(made.commits) == 2, "the upload is one commit, after that of the new repository"
    assert not made.private
    assert f"{NAME}@{made.head}: written" in out
    assert "left out notes.txt" in out
    np.testing.assert_array_equal(actions(NAME), actions(checkpoint))
    assert load_policy(NAME).describe()["checkpoint"] == f"{NAME}@{made.head}"
    assert load_policy(NAME).describe()["committed"] == "forecast"


def test_the_same_again_writes_nothing(
    hub: WritableHub, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        share(checkpoint, f"repo_id={NAME}", f"folder={tmp_path / 'shared'}")
        head, writes = hub.repositories[KEY].head, len(hub.writes())
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").iterdir()}
    assert capsys.readouterr().out.count("everything is there already") == 2
    share(checkpoint, f"repo_id={NAME}", f"folder={tmp_path / 'shared'}")
    assert (hub.repositories[KEY].head, len(hub.writes())) == (head, writes)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").iterdir()} == times
    for name, content in hub.repositories[KEY].files.items():
        if name not in (".gitattributes", "README.md"):  # the card names its place, which is the id for both
            assert (tmp_path / "shared" / name).read_bytes() == content


def test_what_is_stale_goes_from_a_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = tmp_path / "shared"
    share(checkpoint, f"folder={shared}")
    card = (shared / "README.md").read_bytes()
    (shared / "float8.json").write_text("{}")  # of an earlier upload, and no part of the checkpoint any more
    share(checkpoint, f"folder={shared}")
    assert "removed  float8.json" in capsys.readouterr().out
    assert (shared / "README.md").read_bytes() == card
    assert not (shared / "float8.json").exists()


def test_a_dry_run_writes_nothing(
    hub: WritableHub, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    share(checkpoint, f"repo_id={NAME}", f"folder={tmp_path / 'shared'}", "dry_run=true")
    out = capsys.readouterr().out
    assert not hub.repositories
    assert not hub.writes()
    assert not (tmp_path / "shared").exists()
    assert out.count("would be changed, nothing is written") == 2
    assert "new      model.safetensors (4,825,564 bytes)" in out
    assert "## Limits" in out


def test_what_is_stale_goes_and_what_is_foreign_stays(hub: WritableHub, checkpoint: Path) -> None:
    share(checkpoint, f"repo_id={NAME}")
    made = hub.repositories[KEY]
    made.commit({**made.files, "float8.json": b"{}", "picture.png": b"mine"})
    share(checkpoint, f"repo_id={NAME}")
    assert "float8.json" not in made.files, "it was measured on other weights"
    assert made.files["picture.png"] == b"mine"


def test_a_commit_needs_no_network_and_a_branch_says_so(hub: WritableHub, checkpoint: Path) -> None:
    share(checkpoint, f"repo_id={NAME}")
    first = hub.repositories[KEY].head
    folder = find_checkpoint(f"{NAME}@{first}")
    hub.repositories[KEY].commit({})
    asked = len(hub.requests)
    assert find_checkpoint(f"{NAME}@{first}") == folder
    assert len(hub.requests) == asked, "a downloaded commit is not asked for"
    hub.close()
    assert find_checkpoint(f"https://huggingface.co/{NAME}@{first}") == folder
    with pytest.raises(ValueError, match=rf"cannot be reached for {NAME}.*checkpoint={NAME}@{first} is downloaded"):
        find_checkpoint(NAME)


def test_a_branch_is_followed_and_a_revision_is_kept(hub: WritableHub, checkpoint: Path) -> None:
    share(checkpoint, f"repo_id={NAME}")
    made = hub.repositories[KEY]
    first = made.head
    made.tags["v1"] = first
    second = made.commit({**made.files, "statistics.json": made.files["statistics.json"] + b"\n"})
    assert load_from_hub(NAME).name == second
    assert load_from_hub(NAME, "v1").name == first
    with pytest.raises(ValueError, match=f"the repository {NAME} has no such revision"):
        find_checkpoint(f"{NAME}@v2")


def test_an_interrupted_download_is_finished(hub: WritableHub, checkpoint: Path) -> None:
    share(checkpoint, f"repo_id={NAME}")
    hub.broken["GET", "statistics.json"] = 403
    with pytest.raises(ValueError, match="does not let you read"):
        find_checkpoint(NAME)
    hub.broken.clear()
    np.testing.assert_array_equal(actions(NAME), actions(checkpoint))


@pytest.mark.parametrize("got", [("config.json",), ("config.json", "model.safetensors", "statistics.json")])
def test_a_download_that_others_began_is_finished(got: tuple[str, ...], hub: WritableHub, checkpoint: Path) -> None:
    share(checkpoint, f"repo_id={NAME}")
    source = f"{NAME}@{hub.repositories[KEY].head}"
    for name in got:  # as an interrupted `hf download` leaves it
        hf_hub_download(NAME, name, revision=hub.repositories[KEY].head)
    folder = find_checkpoint(source)
    assert {"model.safetensors", "statistics.json", "forecast.json"} <= {path.name for path in folder.iterdir()}
    hub.close()
    assert find_checkpoint(source) == folder


def test_without_a_network_a_download_of_others_is_used_if_it_may_be_whole(
    hub: WritableHub, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    share(checkpoint, f"repo_id={NAME}")
    head = hub.repositories[KEY].head
    for name in ("config.json", "statistics.json", "model.safetensors"):
        path = hf_hub_download(NAME, name, revision=head)
    hub.close()
    assert find_checkpoint(f"{NAME}@{head}") == Path(path).parent
    assert "was downloaded by other means" in capsys.readouterr().out
    Path(path).unlink()
    with pytest.raises(ValueError, match=f"the hub cannot be reached for {NAME}"):
        find_checkpoint(f"{NAME}@{head}")


@pytest.mark.parametrize("name", ["model.safetensors", "statistics.json", "forecast.json", "config.json"])
def test_a_damaged_file_is_not_used(name: str, hub: WritableHub, checkpoint: Path) -> None:
    share(checkpoint, f"repo_id={NAME}")
    hub.flipped.add(name)
    with pytest.raises(ValueError, match=f"{name} of {NAME} came damaged"):
        find_checkpoint(NAME)
    hub.flipped.clear()
    np.testing.assert_array_equal(actions(NAME), actions(checkpoint))


def test_a_report_names_the_commit(hub: WritableHub, checkpoint: Path, tmp_path: Path) -> None:
    share(checkpoint, f"repo_id={NAME}")
    overrides = [f"checkpoint={NAME}", "tasks=[0]", "episodes_per_task=1", "workers=0", "videos=0"]
    config = compose("eval_libero", [*overrides, f"output={tmp_path / 'out'}"])
    OmegaConf.set_struct(config, True)
    [report] = eval_libero.run(config, "")
    about = report.reproduce["policy"]
    assert about["checkpoint"] == f"{NAME}@{hub.repositories[KEY].head}"
    assert about["weights_sha256"] == weights_hash(checkpoint)
    share(checkpoint, f"repo_id={NAME}", f"report={tmp_path / 'out' / 'tabletop_object' / 'report.json'}")


def test_a_base_of_the_hub(hub: WritableHub, checkpoint: Path) -> None:
    share(checkpoint, f"repo_id={NAME}")
    assert is_own(find_base(NAME))
    hub.repositories[KEY].commit({"config.json": b"{}", "model.safetensors": b"published"})
    assert find_base(NAME) == NAME, "published weights have another reader"
    said = f"has no statistics.json; for published weights, run `import_checkpoint {NAME}"
    with pytest.raises(ValueError, match=said):
        find_checkpoint(NAME)


def test_the_card_says_what_the_reports_say(evaluated: Path, checkpoint: Path) -> None:
    paths = [evaluated / CLEAN / "report.json", evaluated / "tabletop_object_robustness.json"]
    card = policy_publication(checkpoint, paths, NAME, "apache-2.0").content("README.md").decode()
    assert is_ours(card)
    assert card.startswith('---\nlicense: "apache-2.0"\n')
    clean, robustness = (json.loads(path.read_text()) for path in paths)
    rate = clean["total"]["success"]
    low, high = (f"{100 * rate[end]:.1f} %" for end in ("low", "high"))
    assert f"Success: **{100 * rate['value']:.1f} % [{low}, {high}], {rate['successes']} of 1 episodes**." in card
    assert f"{clean['inference_batch_1']['p95']:.1f} ms" in card
    for cell in robustness["cells"]:
        assert f"| {cell['perturbation']['dimension']} |" in card
    assert "All reports are from simulation" in card
    assert "eval_libero checkpoint=someone/toy suite=tabletop_object" in card
    assert clean["reproduce"]["versions"]["mujoco"] in card
    said = {f"{100 * value:.1f}" for value in shares([clean, robustness])}
    assert set(re.findall(r"(\d+\.\d) %", card)) <= said, "a share that is in no report"
    assert not re.search(r"/home|/tmp|secret", card)


def shares(value: Any) -> set[float]:
    if isinstance(value, dict | list):
        return set().union(*map(shares, value.values() if isinstance(value, dict) else value))
    return {float(value)} if isinstance(value, int | float) and 0 <= value <= 1 else set()


def test_paths_of_this_machine_stay_here(checkpoint: Path) -> None:
    body = json.loads((checkpoint / "config.json").read_text())
    body["model"]["language"]["hub"] = "/home/someone/secret/llama"
    body["description"]["data_set"]["name"] = str(checkpoint.parent / "my_data")
    (checkpoint / "config.json").write_text(json.dumps(body))
    what = policy_publication(checkpoint, [], NAME)
    for name in ("config.json", "README.md"):
        assert not re.search(r"/home|secret|private", what.content(name).decode())
    assert json.loads(what.content("config.json"))["description"]["data_set"]["name"] == "my_data"


def test_a_card_without_reports_has_no_results(checkpoint: Path) -> None:
    card = policy_publication(checkpoint, [], NAME).content("README.md").decode()
    assert "No report was given with this checkpoint." in card
    assert "How often it succeeds was not reported." in card
    assert "None was given: ask the owner" in card
    assert "license:" not in card


@pytest.mark.parametrize("place", ["repo", "folder"])
def test_a_card_by_hand_is_kept(place: str, hub: WritableHub, checkpoint: Path, tmp_path: Path) -> None:
    given = f"repo_id={NAME}" if place == "repo" else f"folder={tmp_path / 'shared'}"
    share(checkpoint, given)
    if place == "repo":
        made = hub.repositories[KEY]
        made.commit({**made.files, "README.md": made.files["README.md"] + b"\nMine.\n"})
    else:
        with (tmp_path / "shared" / "README.md").open("a") as card:
            card.write("\nMine.\n")
    said = mistake(checkpoint, given, "license=mit")
    assert "was written or changed by hand: replace_card=true replaces it" in said
    share(checkpoint, given, "license=mit", "replace_card=true")
    share(checkpoint, given, "license=mit")


@pytest.mark.parametrize(("token", "status"), [(None, 401), (READER, 403)])
def test_without_permission(token: str | None, status: int, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, writable_hub(tmp_path / "cache", patch, token) as hub:
        said = mistake(checkpoint, f"repo_id={NAME}")
        assert f"the hub does not let you write {NAME} (HTTP {status}): log in with `hf auth login`" in said
        assert not hub.repositories


def test_a_private_repository_and_a_stranger(
    hub: WritableHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share(checkpoint, f"repo_id={NAME}", "private=true")
    assert hub.repositories[KEY].private
    share(checkpoint, f"repo_id={NAME}", "private=true")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=f"the hub has no repository {NAME}, or it is private"):
        find_checkpoint(NAME)


def test_mistakes_are_one_line(hub: WritableHub, checkpoint: Path, evaluated: Path, tmp_path: Path) -> None:
    assert "give repo_id=USER/NAME, folder=DIR, or both" in mistake(checkpoint)
    assert "private=true changes nothing for folder" in mistake(checkpoint, f"folder={tmp_path / 'x'}", "private=true")
    assert "repo_id=toy is no id of the hub: give USER/NAME" in mistake(checkpoint, "repo_id=toy")
    assert "must be an identifier of the hub" in mistake(checkpoint, f"repo_id={NAME}", "license='MIT License'")
    with pytest.raises(ValueError, match="the hub has no repository someone/nothing"):
        find_checkpoint("someone/nothing")
    share(checkpoint, f"repo_id={NAME}")
    assert "is public, and private=true does not change that" in mistake(checkpoint, f"repo_id={NAME}", "private=true")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "holds other files (mine.txt)" in mistake(checkpoint, f"folder={tmp_path / 'full'}")
    no_report = tmp_path / "none.json"
    no_report.write_text("{}")
    assert "is no report of an evaluation" in mistake(checkpoint, f"repo_id={NAME}", f"report={no_report}")
    report = json.loads((evaluated / CLEAN / "report.json").read_text())
    rate = report["total"]["success"]
    for wrong in ({"successes": rate["successes"] + 1}, {"value": 0.99}):
        no_report.write_text(json.dumps({**report, "total": {**report["total"], "success": {**rate, **wrong}}}))
        assert "is not that of its episodes" in mistake(checkpoint, f"repo_id={NAME}", f"report={no_report}")
    assert "a file has this name" in mistake(checkpoint, f"folder={no_report}")
    assert no_report.is_file()


def test_a_report_of_another_checkpoint(evaluated: Path, checkpoint: Path, tmp_path: Path) -> None:
    report = json.loads((evaluated / CLEAN / "report.json").read_text())
    about = report["reproduce"]["policy"]
    about["weights_sha256"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(report))
    said = mistake(checkpoint, "folder=shared", f"report={tmp_path / 'other.json'}")
    assert f"is about another checkpoint, {SHIPPED.name}: its weights have the SHA-256 000000000000…" in said
    del about["weights_sha256"]
    (tmp_path / "other.json").write_text(json.dumps(report))
    said = mistake(checkpoint, "folder=shared", f"report={tmp_path / 'other.json'}")
    assert "does not say which weights were evaluated" in said


def test_a_late_report_with_another_forecast(evaluated: Path, checkpoint: Path, tmp_path: Path) -> None:
    report = json.loads((evaluated / CLEAN / "report.json").read_text())
    (checkpoint / "forecast.json").write_bytes((checkpoint / "forecast.json").read_bytes() + b"\n")
    for latency, refused in ((None, False), (100.0, True)):
        report["reproduce"]["protocol"] |= {"latency": latency, "committed": True}
        (tmp_path / "other.json").write_text(json.dumps(report))
        given = f"folder={tmp_path / 'shared'}", f"report={tmp_path / 'other.json'}"
        if refused:
            assert "was played late with another forecast.json" in mistake(checkpoint, *given)
        else:
            share(checkpoint, *given)


def test_a_checkpoint_that_is_half_written(hub: WritableHub, checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "is damaged or truncated" in mistake(checkpoint, f"repo_id={NAME}")
    weights.unlink()
    assert "is not a complete checkpoint: model.safetensors missing" in mistake(checkpoint, f"repo_id={NAME}")
    assert not hub.requests


def test_no_network(checkpoint: Path, hub: WritableHub) -> None:
    hub.close()
    assert f"the hub cannot be reached for {NAME}" in mistake(checkpoint, f"repo_id={NAME}")


def test_two_uploads_at_once(hub: WritableHub, checkpoint: Path) -> None:
    share(checkpoint, f"repo_id={NAME}")
    made = hub.repositories[KEY]
    hub.before_commit = lambda: made.commit({**made.files, "picture.png": b"by someone else"})
    said = mistake(checkpoint, f"repo_id={NAME}", "license=mit")
    assert "was changed by someone else at the same time: run the same command again" in said
    assert b"license" not in made.files["README.md"]


def test_a_failed_upload_leaves_what_was_there(hub: WritableHub, checkpoint: Path) -> None:
    share(checkpoint, f"repo_id={NAME}")
    made = hub.repositories[KEY]
    before = made.head
    hub.broken["POST", "/commit/"] = 403
    assert "does not let you write" in mistake(checkpoint, f"repo_id={NAME}", "license=mit")
    assert made.head == before


def test_an_encoder_elsewhere_cannot_be_shared(checkpoint: Path) -> None:
    body = json.loads((checkpoint / "config.json").read_text())
    body["model"]["language"]["encoder"] = "/home/someone/encoder"
    (checkpoint / "config.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match="needs its text encoder, /home/someone/encoder: copy it to"):
        policy_publication(checkpoint, [], NAME)


def test_a_mistyped_folder_is_not_asked_for_on_the_hub(
    hub: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(ValueError, match="no checkpoint folder at outputs/polcy"):
        find_checkpoint("outputs/polcy")
    assert not hub.requests


def test_functions_do_what_the_command_does(hub: WritableHub, checkpoint: Path, tmp_path: Path) -> None:
    what = policy_publication(checkpoint, [], NAME)
    change = to_hub(what, NAME, private=False, replace_card=False)
    assert change.commit == hub.repositories[KEY].head
    assert to_hub(what, NAME, private=False, replace_card=False).empty
    assert set(to_folder(what, tmp_path / "shared", replace_card=False).new) == set(what.files)
