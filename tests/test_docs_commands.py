"""Every command line and every Python block of the documentation is understood, without being run.

Hydra's overrides are composed, argparse's options are parsed, and imports are imported. What a reader has to fill in is
written in capitals, as `FOLDER` or `routing=NAME`; files of the reader's own lie in `my_configs`.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import itertools
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from cogvla.scripts.command import register, renamed
from cogvla.scripts.help import keys_of_groups
from cogvla.tests.support.extras import needs
from cogvla.tests.support.paths import CONFIGS, ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS: dict[str, str] = PROJECT["scripts"]
FILES = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "scripts").rglob("*.py") if path.stem in SCRIPTS]
MODULES = {".".join(("cogvla", *file.parts)): file.name for file in FILES}
CONSOLE = ROOT / "scripts" / "console.py"
FLAGS = {"-m", "--multirun", "--help"}
WITH_VALUE = {"--config-dir", "--cfg"}
SEPARATORS = {"&&", "||", "|", "&", ";", "do"}
Command = tuple[str, list[str]]


def commands(text: str) -> Iterator[Command]:
    """Calls of our commands with their arguments: in blocks of shell, and in backticks where they have arguments."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield from called(line)
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for line in re.findall(r"`([^`]+)`", outside):
        if " " in line.strip() and any(re.search(rf"\b{name}\b", line) for name in SCRIPTS):
            yield from called(" ".join(line.split()))


def called(line: str) -> Iterator[Command]:
    """Calls of our commands in one line of a shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&")
    lexer.whitespace_split = True
    for separator, words in itertools.groupby(lexer, SEPARATORS.__contains__):
        if separator:
            continue
        names = [MODULES.get(word, word) for word in words]
        places = [place for place, name in enumerate(names) if name in SCRIPTS]
        if places and all(is_prefix(word) for word in names[: places[0]]):
            yield names[places[0]], [word for word in names[places[0] + 1 :] if word != "..."]


def is_prefix(word: str) -> bool:
    """Whether a word may stand before the command: `uv run`, `accelerate launch`, options, variables."""
    known = {"uv", "run", "accelerate", "launch", "python", "time"}
    return (
        word in known
        or word in PROJECT["optional-dependencies"]
        or word.startswith("-")
        or word.isdigit()
        or "=" in word
        or word.endswith(".yaml")
    )


def understand(name: str, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose or parse the arguments of a command.

    Args:
        folder: the reader's own configurations.

    Raises:
        Exception: what the command says about arguments that it does not know.
    """
    config = configuration(name)
    if config is None:
        return parse(name, arguments, monkeypatch)
    if "--help" in arguments:
        keys_of_groups(config, [word for word in arguments if word != "--help"])
        return None
    overrides: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in WITH_VALUE:
            next(words)
        elif "=" in word:
            overrides.append(word)
        elif word not in FLAGS and (word.startswith("-") or name not in ("check_conventions", "import_checkpoint")):
            raise ValueError(f"{name} has no {word}")
    if "--config-dir" in arguments:
        overrides.append(f"hydra.searchpath=[file://{folder}]")
    register()
    with initialize_config_module("cogvla.configs", version_base="1.3"):
        for combination in combinations(renamed(config, overrides)):
            compose(config, list(combination))
    return None


def configuration(name: str) -> str | None:
    """The YAML file that a command composes; None if it knows nothing of Hydra."""
    found = re.search(rf'^{name} = _command\(.*config="(\w+)"', CONSOLE.read_text(), re.MULTILINE)
    return found[1] if found else name if (CONFIGS / f"{name}.yaml").is_file() else None


def combinations(overrides: list[str]) -> Iterator[tuple[str, ...]]:
    """The jobs of a multirun. A group whose option is for the reader to fill in (`NAME`) stays as it is."""
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, ConfigLoaderImpl)
    choices = []
    for override in OverridesParser.create(config_loader=loader).parse_overrides(overrides):
        group = override.key_or_group
        if (CONFIGS / group).is_dir() and re.fullmatch(r"[A-Z]+", str(override.value())):
            continue
        if override.is_sweep_override():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([override.input_line or ""])
    yield from itertools.product(*choices)


class ParsedError(Exception):
    """The arguments were parsed; nothing else should happen."""


def parse(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, function = SCRIPTS[name].partition(":")
    original = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, given: list[str] | None = None) -> None:
        original(parser, given)
        raise ParsedError

    main = getattr(importlib.import_module(module), function)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        with pytest.raises(ParsedError):
            main(arguments)


@pytest.fixture(scope="module")
def my_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of docs/data.md, and copies of `six_joints` as docs/real_robot.md tells."""
    folder = tmp_path_factory.mktemp("my_configs")
    text = (ROOT / "docs" / "data.md").read_text()
    for path, content in re.findall(r"`my_configs/([\w/]+\.yaml)`.*?```yaml\n(.*?)```", text, re.DOTALL):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(content)
    for group in ("robot", "topics"):
        (folder / group).mkdir()
        shutil.copy(CONFIGS / group / "six_joints.yaml", folder / group / "my_robot.yaml")
    assert sorted(path.parent.name for path in folder.glob("*/my_robot.yaml")) == [
        "data", "embodiment", "robot", "topics",
    ]  # fmt: skip
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page: Path, my_configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mistakes = []
    for name, arguments in commands(page.read_text()):
        try:
            understand(name, arguments, my_configs, monkeypatch)
        except (ValueError, SystemExit, HydraException, OmegaConfBaseException) as error:
            mistakes.append(f"{shlex.join([name, *arguments])}: {error}")
    assert not mistakes, "\n".join(mistakes)


@pytest.mark.parametrize(
    "line",
    [
        "uv run eval_libero checkpoint=FOLDER epsiodes_per_task=3",
        "pip install uv && uv run train_policy training.step=3",
        "uv run train_policy +ablation=no_such",
        "uv run train_policy -m '+ablation=glob(*)' sed=0,1",
        "uv run train_policy data=my_robot",
        "uv run eval_libero --checkpoint FOLDER",
        "uv run benchmark_policy --thread-s 1",
        "training_memory finetun=lora",
        "train_policy --help trainin",
        "accelerate launch --multi_gpu --num_processes 8 -m cogvla.scripts.train_policy bas=x",
    ],
)
def test_mistakes_are_found(line: str, my_configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((name, arguments),) = commands(f"```bash\n{line}\n```")
    with pytest.raises((ValueError, SystemExit, HydraException, OmegaConfBaseException)):
        understand(name, arguments, my_configs, monkeypatch)


def test_commands_are_found() -> None:
    text = "```bash\nuv run --extra ros sim_robot &  # b\nx && python -m cogvla.scripts.eval_libero a=1 \\\n  b=2\n```"
    assert list(commands(f"{text}\n`eval_libero c='[1, 2]'`, `eval_libero` and `my eval_libero`")) == [
        ("sim_robot", []),
        ("eval_libero", ["a=1", "b=2"]),
        ("eval_libero", ["c=[1, 2]"]),
    ]
    found = {name for page in PAGES for name, _ in commands(page.read_text())}
    assert not set(SCRIPTS) - found, "these commands are called nowhere in the documentation"


def python_blocks() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
            yield f"{page.name}-{number}", block


@pytest.mark.parametrize("block", [pytest.param(block, id=name) for name, block in python_blocks()])
def test_python_compiles_and_its_imports_exist(block: str) -> None:
    imports: list[ast.stmt] = [
        node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    if any(name.name == "vla_eval" for node in imports if isinstance(node, ast.Import) for name in node.names):
        pytest.importorskip("vla_eval", reason=needs("harness"))
    exec(compile(ast.Module(imports, []), "<documentation>", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_without_a_command_exist(page: Path) -> None:
    for script, options in re.findall(r"\bpython ((?:tests|docs|examples)/\S+\.py)([^`\n#]*)", page.read_text()):
        text = (ROOT / script).read_text()
        assert not [option for option in re.findall(r"--[\w-]+", options) if f'"{option}"' not in text], script
