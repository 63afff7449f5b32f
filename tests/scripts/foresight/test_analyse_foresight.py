"""`analyse_foresight` as a user calls it."""

from __future__ import annotations

import io
import json
import re
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cogvla.envs.analysis.foresight_page import BLANK, LABEL, choose, sheets
from cogvla.envs.analysis.routing_pictures import GAP, SIDE
from cogvla.policy.foresight.windows import Windows
from cogvla.scripts.command import compose
from cogvla.scripts.foresight import analyse_foresight
from cogvla.tests.policy.foresight.test_foresight import pushed_data, untrained
from cogvla.tests.support.small_foresight import fit, recorded


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = recorded(tmp_path_factory.mktemp("analyse"))
    fit(root, root / "foresight", "steps=20", "validation_fraction=0.3")
    return root


def run(root: Path, output: Path, *more: str) -> dict[str, Any]:
    overrides = [
        f"foresight={root}/foresight",
        f"data.root={root}/demonstrations",
        f"data.cache={root}/cache",
        f"output={output}",
        "pictures=3",
        "threads=1",
    ]
    return analyse_foresight.run(compose("analyse_foresight", [*overrides, *more]), "analyse_foresight")


def test_the_page_holds_what_the_fit_measured_and_its_pictures(root: Path, tmp_path: Path) -> None:
    found = run(root, tmp_path)
    assert found["held_out"]
    assert found["episodes"] == 3
    assert found["found"] == json.loads((root / "foresight" / "report.json").read_text())["held_out"]
    assert json.loads((tmp_path / "predictions.json").read_text())["shown"] == found["shown"]
    assert {name: len(rows) for name, rows in found["shown"].items()} == {
        "drawn by the seed": 3,
        "of the worst 5 %": 3,
    }
    page = (tmp_path / "foresight.html").read_text()
    assert "3 held-out episodes" in page
    assert "http" not in page, "it needs nothing else"
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(pictures) == 2 * 2, "two cameras, drawn and worst"
    for picture in pictures:
        assert Image.open(io.BytesIO(b64decode(picture))).width == LABEL + 3 * (SIDE + GAP)


def test_other_data_are_shown_whole(root: Path, tmp_path: Path) -> None:
    found = run(root, tmp_path, "data.episodes=[0,1]")
    assert not found["held_out"]
    assert found["episodes"] == 2
    assert "episodes of other data" in (tmp_path / "foresight.html").read_text()


def test_the_worst_are_the_worst_and_an_untrained_model_copies() -> None:
    windows = Windows(pushed_data())
    model = untrained(windows).eval()
    model.pca.fit(windows.gather(windows.rows).before_BVCHW.flatten(0, 1))
    chosen = choose(model, windows, 4, 0)
    drawn, worst = chosen["drawn by the seed"], chosen["of the worst 5 %"]
    assert torch.equal(drawn, choose(model, windows, 4, 0)["drawn by the seed"])
    assert not torch.equal(drawn, choose(model, windows, 4, 1)["drawn by the seed"])
    window = windows.gather(windows.rows)
    change_B = (model.encode(window.after_BVCHW) - model.encode(window.before_BVCHW)).square().mean((1, 2, 3))
    assert set(worst.tolist()) <= set(windows.rows[change_B >= change_B.quantile(0.9)].tolist())
    for sheet in sheets(model, windows.gather(drawn)).values():
        rows = np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB"), float)[: 7 * (SIDE + GAP), LABEL:]
        now, later, latents, predicted, copied, error, copying = np.split(rows, 7)
        assert np.abs(predicted - copied).mean() < 1
        assert np.abs(error - copying).mean() < 1
        assert np.abs(now - copied).mean() < np.abs(now - later).mean()
        assert np.abs(latents - later).mean() < np.abs(predicted - later).mean()
        assert np.abs(error[:SIDE] - BLANK).max() > 100, "what moves is marked"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pictures=0", "pictures must be at least 1, got 0"),
        ("foresight=nowhere", "nowhere holds no foresight"),
        ("data.root=nowhere", "nowhere"),
        ("~data.cameras.wrist", "data.cameras has no key for wrist"),
    ],
)
def test_mistakes_are_said(root: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(root, tmp_path / "page", override)
    assert not (tmp_path / "page").exists()
