"""Log metrics and videos of a training run to Weights & Biases: online if the user is logged in, else on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import wandb

MODES = ("auto", "online", "offline", "disabled")


class RunLog:
    """Context manager that logs one run.

    Args:
        settings: `mode` (one of `MODES`; `auto`: online if logged in, else offline) and `project`.
        config: configuration to save with the run.
        output: folder for the log's files.

    Raises:
        ValueError: the mode is unknown.
    """

    def __init__(self, settings: dict[str, Any], config: dict[str, Any], output: Path) -> None:
        mode = settings["mode"]
        if mode not in MODES:
            raise ValueError(f"wandb.mode is {mode!r}; it must be one of {', '.join(MODES)}")
        if mode == "auto":
            mode = "online" if wandb.api.api_key else "offline"
        self.settings, self.mode, self.config, self.output = settings, mode, config, output

    def __enter__(self) -> RunLog:
        self.output.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=self.settings["project"],
            mode=self.mode,
            dir=self.output,
            config=self.config,
            settings=wandb.Settings(silent=True, console="off"),
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.run.finish()

    def write(self, metrics: dict[str, float], step: int) -> None:
        """Log the metrics of a step."""
        self.run.log(metrics, step=step)

    def videos(self, files: list[Path], step: int, above: str = "") -> None:
        """Log rollout videos (MP4 files); `above` comes before their names."""
        self.run.log({f"rollout/{above}{file.stem}": wandb.Video(str(file), format="mp4") for file in files}, step=step)
