"""What makes a site of ``docs/``: pages and links as they stand in the repository, docstrings as they are written.

MkDocs calls the functions (``hooks`` of mkdocs.yml); mkdocstrings loads :class:`Docstrings`. Links are to files of the
repository, so that they work where it is read as it is. In the site the README is the first page, and a linked file
outside ``docs/`` is part of it, under ``repository/``.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import d3tom_export

ROOT = Path(__file__).parents[1]
_ELSEWHERE = "repository"
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def site_path(path: str) -> str:
    """Where a file of the repository is in the site's sources."""
    if path == "README.md":
        return "index.md"
    return path[len("docs/") :] if path.startswith("docs/") else f"{_ELSEWHERE}/{path}"


def repository_path(source: str) -> str:
    """The other way round."""
    if source == "index.md":
        return "README.md"
    return source[len(_ELSEWHERE) + 1 :] if source.startswith(f"{_ELSEWHERE}/") else f"docs/{source}"


def replace_links(text: str, replace: Callable[[str], str]) -> str:
    """``text`` with the targets of its links to files replaced; what is fenced in is no text."""
    parts = _FENCED.split(text)
    for number in range(0, len(parts), 2):
        parts[number] = _LINK.sub(
            lambda found: found[1] + (found[2] if "://" in found[2] else replace(found[2])) + found[3], parts[number]
        )
    return "".join(parts)


def linked(path: str) -> list[str]:
    """The files that a page of the repository links to, by their paths in it."""
    found: list[str] = []

    def note(target: str) -> str:
        found.append(posixpath.normpath(posixpath.join(posixpath.dirname(path), target)))
        return target

    replace_links((ROOT / path).read_text(encoding="utf-8"), note)
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, and what it and other pages link to outside ``docs/``."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting, seen = ["README.md", *pages], {"README.md", *pages}
    while waiting:
        path = waiting.pop()
        if not path.startswith("docs/"):
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
        for target in linked(path) if path.endswith(".md") else ():
            if target not in seen and not target.startswith("docs/") and (ROOT / target).is_file():
                seen.add(target)
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to where they are in the site."""
    here = posixpath.dirname(repository_path(page.file.src_uri))
    start = posixpath.dirname(page.file.src_uri) or "."

    def moved(target: str) -> str:
        return posixpath.relpath(site_path(posixpath.normpath(posixpath.join(here, target))), start)

    return replace_links(markdown, moved)


_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`~?([\w.]+)`")
_TOGETHER = re.compile(r"^( +)(\w+(?:, \w+)+): (.*)$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Docstrings as Markdown: references become code or links, and arguments that are told of together stand apart."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _ROLE.sub(_reference, obj.docstring.value)
            obj.docstring.value = _TOGETHER.sub(_apart, text)


def _reference(found: re.Match[str]) -> str:
    name = found[1].rsplit(".", 1)[-1]
    return f"[`{name}`][d3tom_export.{name}]" if name in d3tom_export.__all__ else f"`{name}`"


def _apart(found: re.Match[str]) -> str:
    return "\n".join(f"{found[1]}{name}: {found[3]}" for name in found[2].split(", "))
