"""The documentation's site builds without a warning, and its pages refer to no other server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOADED = re.compile(
    r"""<(?:link|script|img|iframe)\b[^>]*?\b(?:src|href)=["']?(https?://[^"' >]+)"""
)


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(config)]
    return subprocess.run(
        [*argv, "--site-dir", str(folder)],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_of_the_documentation_is_on_the_site(site: Path) -> None:
    """Each Markdown page of docs/ has a page, and so have README, CONTRIBUTING and CHANGELOG."""
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    expected = {
        str(page.with_name("index.html" if page.stem == "README" else f"{page.stem}.html"))
        for page in pages
    }
    built = {str(page.relative_to(site)) for page in site.rglob("*.html")}
    assert expected | {"about.html", "contributing.html", "changelog.html"} <= built


def test_links_between_pages_lead_to_pages(site: Path) -> None:
    """No link ends at a Markdown file or at a file that is not on the site."""
    for page in {*site.rglob("*.html")} - {site / "404.html"}:  # its links begin at the host
        links = re.findall(r'<a [^>]*?href="([^"#]+)', page.read_text(encoding="utf-8"))
        local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
        assert [link for link in local if not (page.parent / link).exists()] == [], page


def test_the_site_loads_nothing_from_another_server(site: Path) -> None:
    """Fonts, scripts and pictures come with the site."""
    for page in site.rglob("*.html"):
        assert LOADED.findall(page.read_text(encoding="utf-8")) == [], page


def test_lists_keep_their_paragraphs(site: Path) -> None:
    """The text below a key of the job spec belongs to the entry of that key."""
    page = (site / "jobs.html").read_text(encoding="utf-8")
    entry = page.split("<code>base_model</code>")[1].split("</li>")[0]
    assert "The frozen language model." in entry


def test_a_broken_link_would_be_noticed(tmp_path: Path) -> None:
    """A link to a page or a heading that is not there stops the build."""
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    settings = re.sub(
        r"^(hooks|nav|not_in_nav|exclude_docs):.*?(?=^\w|\Z)", "", config, flags=re.M | re.S
    )
    (tmp_path / "mkdocs.yml").write_text(settings, encoding="utf-8")
    (tmp_path / "docs").mkdir()
    index = tmp_path / "docs" / "index.md"
    index.write_text("# Index\n\n[here](#index)\n", encoding="utf-8")
    assert build(tmp_path / "site", tmp_path / "mkdocs.yml").returncode == 0
    for target in ("missing.md", "#missing"):
        index.write_text(f"# Index\n\n[there]({target})\n", encoding="utf-8")
        assert build(tmp_path / "site", tmp_path / "mkdocs.yml").returncode != 0, target
