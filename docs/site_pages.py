"""The pages of the site that `make docs` builds: the project's own, where they lie, and one for each module.

A link to a module's file leads to its page; a link to another file or folder of the project stays as plain text.
What else is linked must be there: mkdocs says what is not, and `--strict` makes that an error.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "benchmarks/reports/*.md")
INSIDE = tuple(f"docs/{name}.md" for name in ("architecture", "data_flow", "formats", "guarantees"))
PACKAGES = ("pairvpr", "ray_jobs")
LINK = re.compile(r"\[([^\[\]]*)\]\((?!https?:|#)([^()\s#]+)(#[^()\s]*)?\)")
LOADED = re.compile(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"?(?:https?:)?//[^>]*>|<link\b[^>]*stylesheet[^>]*//[^>]*>")


def on_config(config: MkDocsConfig) -> None:
    """Modules are read from the project, never imported."""
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(ROOT)]
    config.nav = [
        "README.md",
        {"Guide": [path for path in _pages("docs/*.md") if path not in INSIDE]},
        {"Inside": [path for path in _pages("docs/*.md") if path in INSIDE]},
        {"Decisions": _pages("docs/decisions/*.md")},
        {"Reports": _pages("benchmarks/reports/*.md")},
        {"Modules": [_module_page(path) for path in _modules()]},
        *_pages("CONTRIBUTING.md"),
        "CHANGELOG.md",
    ]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """All pages, at the paths that they have in the project."""
    for file in list(files.documentation_pages()) + list(files.media_files()):
        files.remove(file)
    for path in (path for pattern in PAGES for path in _pages(pattern)):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for path in _pages("docs/*.webp"):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for path in _modules():
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        files.append(File.generated(config, _module_page(path), content=f"# {name}\n\n::: {name}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to modules lead to their pages, those to other files of the project are plain text."""
    here = posixpath.dirname(page.file.src_uri)

    def lead(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(here, target))
        for known in (path, _module_page(path), _module_page(f"{path}/__init__.py")):
            if known in files.src_uris:
                return f"[{text}]({posixpath.relpath(known, here or '.')}{anchor})"
        return text if (ROOT / path).exists() else match[0]

    return LINK.sub(lead, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> None:
    """The site is whole without a network."""
    if loaded := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another server: {loaded[0]}")


def _pages(pattern: str) -> list[Any]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def _modules() -> list[str]:
    return [path for package in PACKAGES for path in _pages(f"{package}/**/*.py") if not path.endswith("__main__.py")]


def _module_page(path: str) -> str:
    return f"modules/{path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}.md"
