"""`bag_to_dataset`: convert ROS 2 bags to a LeRobotDataset v3; robot, topics and embodiment are those of the bridge.

    bag_to_dataset bags='[bag1, bag2]' robot=my_arm embodiment=my_arm topics=my_arm output=FOLDER
    bag_to_dataset bags='[bag1]' instruction="pick up the cube" output=FOLDER

Each bag is read separately. The same command resumes an interrupted conversion, also where the bags were moved, but not
of other bags. Needs the extra `bags`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from omegaconf import DictConfig

from cogvla.configs.build import build
from cogvla.policy.interface import Embodiment
from cogvla.real_robot.control.settings import RobotConfig
from cogvla.real_robot.recording.recorder import SHORTEST, RecordingFolder
from cogvla.real_robot.ros.topics import RosTopics
from cogvla.scripts import console
from cogvla.scripts.command import plain

RATE_TOLERANCE = 0.05
"""Relative difference of the commands' rate from `control_hz` that is not worth a note."""


def main(config: DictConfig) -> None:
    """Convert the bags, and print how many seconds and commands were left out and why.

    Raises:
        ValueError: the bags have no episode or do not fit the configuration, or the extra `bags` is not installed.
    """
    try:
        from cogvla.real_robot.recording.bag_reader import BagReader
    except ModuleNotFoundError as error:
        raise ValueError(f"bags need {error.name}: install the extra `bags`") from error
    robot = build(RobotConfig, plain(config.robot), "robot")
    embodiment = build(Embodiment, plain(config.embodiment), "embodiment")
    topics = build(RosTopics, plain(config.topics), "topics")
    listed = plain(config)["bags"]
    bags = [Path(bag) for bag in listed] if isinstance(listed, list) else []
    if not bags:
        raise ValueError(f"give bags='[FOLDER, ...]', got {listed!r}")
    readers = [BagReader(bag, embodiment, robot, topics, config.distro) for bag in bags]
    contents = []
    for bag in readers:  # all of them before the first is converted, which takes long
        with bag:
            bag.check_instruction(config.instruction)
            contents.append(bag.content())
    source = {"bags": contents, "instruction": config.instruction, "topics": plain(config.topics)}
    ages = {"state_age_s": robot.loop.state_age_s, "image_age_s": robot.loop.image_age_s}
    # they decide where episodes begin and end
    source |= {"kind": robot.limits.kind, **ages, "ticks": "of the commands"}
    video, names = bool(config.video), topics.names(embodiment)
    folder = RecordingFolder(Path(config.output), embodiment, robot.name, video, config.resume, source, names)
    done = set(folder.numbers())
    skipped: Counter[str] = Counter()
    number = unused = 0
    for reader in readers:
        with reader:
            for episode in reader.episodes(config.instruction):
                if len(episode) < SHORTEST:
                    skipped["an episode of one tick"] += len(episode)
                    continue
                if number not in done:
                    folder.save(number, episode.instruction, episode.states, episode.actions, reader.pictures(episode))
                number += 1
            skipped.update(reader.skipped)
            unused += reader.unused
            rate, wanted = reader.command_hz, embodiment.control_hz
            if rate is not None and abs(rate / wanted - 1) > RATE_TOLERANCE:
                print(
                    f"note: commands come at {rate:.3g} Hz, and embodiment.control_hz is {wanted:g}: a frame of the "
                    "data set lasts longer or shorter than its action; give the rate of the commands"
                )
    count = folder.assemble()
    for reason, ticks in skipped.most_common():
        print(f"left out {ticks / embodiment.control_hz:.1f} s: {reason}")
    if unused:
        print(f"left out {unused} commands: another one came for the same tick of control_hz={embodiment.control_hz:g}")
    if not count:
        raise ValueError("there is no episode in these bags; see above what was left out")
    print(f"{count} episodes in {config.output}")


if __name__ == "__main__":
    console.bag_to_dataset()
