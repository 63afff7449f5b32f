"""Parts of the cards of policies and data sets: front matter, tables, the mark of a generated card, private paths."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

MARK = re.compile(r"\n<!-- written by cogvla, sha256 ([0-9a-f]{64}); edit it, and it is not replaced -->\n\Z")
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_PATH = re.compile(r"(?<![\w:/.])(?:local-dir:|file://)?(?:~|/[^/\s]+|[A-Za-z]:)[/\\]\S*")


def card(front: Mapping[str, Any], body: str) -> str:
    """Return a card with a mark that shows whether it was edited since."""
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in front.items() if value]  # is YAML
    text = f"---\n{''.join(lines)}---\n\n{body.strip()}\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n<!-- written by cogvla, sha256 {digest}; edit it, and it is not replaced -->\n"


def is_ours(text: str) -> bool:
    """Return whether a card was generated, and not edited since."""
    text = text.replace("\r\n", "\n")
    found = MARK.search(text)
    return found is not None and hashlib.sha256(text[: found.start()].encode()).hexdigest() == found[1]


def check_license(license: str | None) -> None:
    """Raise ValueError for a text that is no identifier of a licence on the hub."""
    if license is not None and not LICENSE.fullmatch(license):
        raise ValueError(f"license={license} must be an identifier of the hub, such as mit, apache-2.0 or other")


def license_lines(license: str | None, owner: str) -> str:
    """Return the section on the licence."""
    if license is None:
        return "## Licence\n\nNone was given: ask the owner before you use or share this.\n"
    said = f"`{license}`" + ("; ask the owner for its terms" if license == "other" else "")
    return f"## Licence\n\n{said}, given by {owner}.\n"


def without_paths(value: Any) -> Any:
    """Return plain data in which paths of this machine are cut down to their last part."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str):
        return _PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], value)
    return value


def cleaned(content: bytes) -> bytes:
    """Return a JSON file without paths of this machine; unchanged if it has none, so that its digest stays."""
    body = json.loads(content)
    clean = without_paths(body)
    return content if clean == body else (json.dumps(clean, indent=2) + "\n").encode()


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [list(map(str, head)), ["---"] * len(head), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    text = "–" if value is None or value == "" else str(value)
    return " ".join(text.replace("|", r"\|").replace("<", "&lt;").split())
