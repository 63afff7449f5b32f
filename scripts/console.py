"""Entry points of the console commands that Hydra composes, as `[project.scripts]` of pyproject.toml names them.

A command's module is imported when the command runs: `--help` and a mistake on the command line do not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from cogvla.envs.recording.demonstrator import ExpertFailedError
from cogvla.scripts.command import check_kinds, check_overrides, mistakes_in_one_line, register, renamed
from cogvla.scripts.help import FLAGS, command_help

STOPPED = "stopped; every finished episode is saved: the same command plays the others"
CONVERTED = "stopped; what was converted is kept: the same command goes on from there"


def _command(
    module: str, *mistakes: type[Exception], config: str | None = None, stopped: str | None = None
) -> Callable[[], None]:
    """Return the entry point that composes a configuration and gives it to `main` of a module.

    Args:
        module: of `cogvla.scripts`; its last part is the command's name.
        mistakes: what it raises for mistakes of its user, beside `command.MISTAKES`.
        config: the file of configs; None: the one of the command's name.
        stopped: what is said after Ctrl-C.
    """
    dotted, name = f"cogvla.scripts.{module}", config or module.rpartition(".")[2]

    def task(values: DictConfig) -> None:
        with mistakes_in_one_line(*mistakes, stopped=stopped):
            check_kinds(name, values)
            importlib.import_module(dotted).main(values)

    task.__module__ = dotted  # where Hydra takes the command's name from
    composed = hydra.main(version_base="1.3", config_path="pkg://cogvla.configs", config_name=name)

    def start() -> None:
        words = sys.argv[1:]
        if FLAGS.intersection(words):
            with mistakes_in_one_line(HydraException):
                print(command_help(module, name, words))
            return
        with mistakes_in_one_line():
            check_overrides(words)
        register()
        sys.argv[1:] = renamed(name, words)
        composed(task)()

    return start


train_policy = _command("train_policy", FloatingPointError, ExpertFailedError)
eval_libero = _command("eval_libero", stopped=STOPPED)
compare_routers = _command("compare_routers", stopped=STOPPED)
analyse_routing = _command("analyse_routing")
fit_foresight = _command("foresight.fit_foresight")
analyse_foresight = _command("foresight.analyse_foresight")
calibrate_monitor = _command("foresight.calibrate_monitor")
record_demonstrations = _command("record_demonstrations", ExpertFailedError)
expert_table = _command("expert_table")
convert_libero = _command("convert_libero", RuntimeError, stopped=CONVERTED)
export_policy = _command("checkpoints.export_policy", RuntimeError)
calibrate_policy = _command("measure.calibrate_policy")
calibrate_router = _command("measure.calibrate_router")
fit_forecast = _command("measure.fit_forecast")
search_schedule = _command("measure.search_schedule")
count_flops = _command("measure.count_flops")
training_memory = _command("measure.training_memory", TypeError, config="train_policy")
policy_server = _command("robot.policy_server")
vla_eval_server = _command("robot.vla_eval_server")
robot_bridge = _command("robot.robot_bridge")
sim_robot = _command("robot.sim_robot")
robot_demo = _command("robot.robot_demo")
drive_robot = _command("robot.drive_robot")
run_trials = _command("robot.run_trials")
bag_to_dataset = _command("robot.bag_to_dataset")
share_policy = _command("sharing.share_policy")
share_dataset = _command("sharing.share_dataset")
