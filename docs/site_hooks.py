"""Hooks of the documentation's site: pages from outside docs/, and links to them.

Links in pages are relative to the page's place in the repository, so that they work where the
repository is browsed. The site has only docs/ and the pages of OUTSIDE: a link to any other file
becomes the file's name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "about.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "deploy/mlflow/README.md": "mlflow-server.md",
}
"""Files of the repository that the site has too, by their paths; and the names of their pages."""
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of OUTSIDE."""
    for source, name in OUTSIDE.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let the links of a page lead to pages of the site."""
    name = page.file.src_uri
    sources = {site_name: source for source, site_name in OUTSIDE.items()}
    source = PurePosixPath(sources.get(name, f"docs/{name}"))
    parts = CODE.split(markdown)
    # Every second part is code, in which nothing is a link.
    parts[::2] = [LINK.sub(lambda link: site_link(link, source, name), part) for part in parts[::2]]
    return "".join(parts)


def site_link(link: re.Match[str], source: PurePosixPath, name: str) -> str:
    """Return a link as it is written on the site.

    ``source`` is the page's path in the repository, and ``name`` its path on the site.
    """
    target = link["target"]
    if not target or "://" in target or target.startswith("mailto:"):
        return link[0]
    path = os.path.normpath(source.parent / target)
    goal = OUTSIDE.get(path) or path.removeprefix("docs/")
    if path not in OUTSIDE and not path.startswith("docs/"):
        return str(link["text"])
    if path == "docs":
        goal = "README.md"
    relative = os.path.relpath(goal, PurePosixPath(name).parent)
    return f"{link['image']}[{link['text']}]({relative}{link['anchor'] or ''})"
