"""The published code's numbers, stage by stage, from weights in its own naming."""

from __future__ import annotations

import pytest

from cogvla.scripts.checkpoints.verify_reference import main
from cogvla.tests.support.paths import SHARED

FIXTURE = SHARED / "fixtures" / "cogvla_reference"


@pytest.mark.skipif(not FIXTURE.is_dir(), reason="the reference's outputs are not beside this checkout")
def test_every_stage_is_that_of_the_published_code(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(FIXTURE)])
    *stages, summary = capsys.readouterr().out.splitlines()
    # Per case: 2 views x 2 towers, 32 layers, 24 of them routed, action states, actions, actions in physical units.
    assert len(stages) == 3 * (4 + 32 + 24 + 3)
    assert all("  ok" in line for line in stages)
    assert summary.startswith("189 of 189 stages within 0.0001")
