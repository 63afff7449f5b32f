"""A hook of mkdocs.yml: lay out the API reference, the pages from the root, links and formulas.

- README, CHANGELOG and CONTRIBUTING are pages of the site, with the links that they have in the repository.
- Each folder of the package has a page of the API reference.
- Links to files of the repository outside of docs/ lead to the API reference, or to a copy of the file.
- Formulas become MathML, which browsers draw without a script.
"""

from __future__ import annotations

import html
import os
import re
import tomllib
from pathlib import Path, PurePosixPath
from shutil import rmtree

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / ".cache" / "site" / "cogvla"
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
}
"""Files of the repository outside of docs/ -> pages of the site."""
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def on_startup(**_: object) -> None:
    """Lay the package out as griffe looks for it, in a folder `cogvla`, before mkdocstrings leaves out missing paths.

    The repository itself is the package, whatever its folder is called, and holds environments and outputs besides.
    """
    rmtree(PACKAGE, ignore_errors=True)
    for folder, modules in {Path(): [], **_folders()}.items():
        (PACKAGE / folder).mkdir(parents=True)
        for module in modules:
            (PACKAGE / folder / module.name).symlink_to(module)
        (PACKAGE / folder / "__init__.py").touch()  # libero/ has none, see docs/architecture.md


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the API reference to the navigation."""
    assert config.nav is not None
    sections: dict[str, list[dict[str, str]]] = {}
    for folder in _folders():
        sections.setdefault(folder.parts[0], []).append({_name(folder): _page(folder)})
    config.nav[-1] = {"Reference": [{section: pages} for section, pages in sections.items()]}
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/, and the files of the repository that pages link to."""
    for source, target in PAGES.items():
        if (ROOT / source).is_file():
            files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for folder, modules in _folders().items():
        names = [".".join((_name(folder), module.stem)) for module in modules if module.read_text()]
        text = "\n\n".join(f"::: {name.removesuffix('.__init__')}" for name in names)
        files.append(File.generated(config, _page(folder), content=f"# {_name(folder)}\n\n{text}\n"))
    for page in [*ROOT.glob("docs/*.md"), *(ROOT / source for source in PAGES)]:
        for _, link, _ in LINK.findall(page.read_text()) if page.is_file() else ():
            file = (page.parent / link).resolve()
            target = _target(file)
            if target.parts[0] == "files" and file.is_file() and str(target) not in files.src_uris:
                files.append(File.generated(config, str(target), abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site."""
    source = next((ROOT / name for name, target in PAGES.items() if target == page.file.src_uri), None)
    folder = (source or Path(config.docs_dir) / page.file.src_uri).parent

    def translated(match: re.Match[str]) -> str:
        file = (folder / match[2]).resolve()
        if not file.exists():
            return match[0]  # mkdocs warns
        return match[1] + os.path.relpath(_target(file), PurePosixPath(page.file.src_uri).parent) + match[3]

    return LINK.sub(translated, markdown)


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draw the formulas."""
    inline = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
    block = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
    content = inline.sub(lambda match: convert(html.unescape(match[1])), content)
    return block.sub(lambda match: convert(html.unescape(match[1]), display="block"), content)


def _target(file: Path) -> PurePosixPath:
    """Where a file of the repository is on the site."""
    path = PurePosixPath(file.relative_to(ROOT))
    if str(path) in PAGES:
        return PurePosixPath(PAGES[str(path)])
    if path.parts[0] == "docs":
        return path.relative_to("docs")
    folder = file.parent if file.is_file() else file
    if file.suffix in ("", ".py") and folder.relative_to(ROOT) in _folders():
        return PurePosixPath(_page(folder.relative_to(ROOT)))
    return PurePosixPath("files") / path


def _folders() -> dict[Path, list[Path]]:
    """Folders of the package, relative to the repository, with their modules."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [Path(*package.split(".")[1:]) for package in sorted(packages)]
    modules = {folder: sorted((ROOT / folder).glob("*.py")) for folder in folders if folder.parts}
    return {folder: files for folder, files in modules.items() if folder.parts[0] != "configs"}


def _name(folder: Path) -> str:
    return ".".join(("cogvla", *folder.parts))


def _page(folder: Path) -> str:
    return f"reference/{_name(folder)}.md"
