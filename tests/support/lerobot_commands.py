"""Run commands of lerobot one after the other in one process, because importing lerobot takes seconds.

Standard input has {name: [module, argument, ...]}; the file that the first argument names gets {name: error or null}.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import cogvla.tests.support.planearm  # noqa: F401  registers a robot for `lerobot-replay`


def run(module: str, arguments: list[str]) -> str | None:
    """Run the command and return its error, if any."""
    sys.argv = [module, *arguments]
    try:
        importlib.import_module(module).main()
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    output, commands = Path(sys.argv[1]), json.load(sys.stdin)
    results = {name: run(module, arguments) for name, (module, *arguments) in commands.items()}
    output.write_text(json.dumps(results))
