"""The site that `make docs` builds: strict, whole, and asking nothing of other hosts."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.conftest import ROOT

MISSING = [name for name in ("mkdocs", "material", "latex2mathml") if importlib.util.find_spec(name) is None]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
built = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'capacity_gap[docs]'"),
]


FETCHED = {"src", "srcset", "poster", "data"}
FETCHING_LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload"}


class Read(HTMLParser):
    """What a page holds: its anchors, links, what a browser fetches for it, and text that was meant as a list."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.classes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.anchors |= {given[key] for key in ("id", "name") if key in given}
        self.classes |= set(given.get("class", "").split())
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and set(given.get("rel", "").split()) & FETCHING_LINKS:
            self.fetched.append(given["href"])
        self.fetched += [given[key] for key in FETCHED & given.keys() if tag != "a"]


def foreign(urls: list[str]) -> list[str]:
    return [url for url in urls if urlsplit(url).netloc]


def broken(page: Path, read: Read, others: dict[Path, Read]) -> Iterator[str]:
    for url in [*read.links, *read.fetched]:
        parts = urlsplit(url)
        if parts.netloc or parts.scheme or (page.name == "404.html" and parts.path.startswith("/")):
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        target = target / "index.html" if target.is_dir() else target
        if not target.exists():
            yield f"{page.name}: {url}"
        elif parts.fragment and target in others and parts.fragment not in others[target].anchors | {"__top"}:
            yield f"{page.name}: {url}, which has no such place"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {page: Read(page.read_text(encoding="utf-8")) for page in folder.rglob("*.html")}


class TestBuilt:
    pytestmark = built

    def test_every_page_is_there(self, site):
        names = {page.stem for page in site}
        assert names >= {page.stem for page in (ROOT / "docs").glob("*.md")}

    def test_links_and_pictures_lead_somewhere(self, site):
        assert [said for page, read in site.items() for said in broken(page, read, site)] == []

    def test_nothing_is_fetched_from_other_hosts(self, site):
        assert {page.name: found for page, read in site.items() if (found := foreign(read.fetched))} == {}
        # The theme's script would fetch Mermaid for such a block, and figures of a repository for such a header.
        assert not {"mermaid", "md-source"} & set().union(*(read.classes for read in site.values()))
        folder = next(iter(site)).parent
        for sheet in folder.rglob("*.css"):
            assert not re.search(r"(url\(|@import)[\s'\"]*(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name

    def test_lists_tables_and_formulas_are_drawn(self, site):
        """GitHub draws them right behind a line of text, and so does the site."""
        for page in site:
            text = re.sub(r"<pre.*?</pre>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
            assert not re.search(r"^(<p>)?(- |\|.*\|$|1\. )", text, re.MULTILINE), page.name
            assert not re.search(r"\$[^<$]*\\", text), page.name

    @pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
    def test_a_browser_asks_for_nothing_and_finds_words(self, site):
        playwright = pytest.importorskip("playwright.sync_api")
        folder = next(iter(site)).parent
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 390, "height": 844})
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            for name in ("index.html", "study.html", "surfaces.html"):
                page.goto((folder / name).as_uri())
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert wide <= 390, f"{name} is {wide} px wide on a screen of 390"
            page.set_viewport_size({"width": 1280, "height": 900})
            page.goto((folder / "index.html").as_uri())
            page.locator("input.md-search__input").fill("break-even")
            page.wait_for_selector(".md-search-result__item", timeout=30_000)
            browser.close()
        assert [url for url in asked if not url.startswith(("file:", "data:", "blob:", "about:"))] == []


def test_a_page_that_asks_elsewhere_is_found():
    """The checks themselves: fonts, scripts, pictures and links that lead nowhere are seen."""
    read = Read(
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css"><script src="//unpkg.com/x"></script>'
        '<img src="a.png"><a href="https://example.org">x</a><a href="b.html#c">y</a><p id="top">'
    )
    assert foreign(read.fetched) == ["https://fonts.googleapis.com/css", "//unpkg.com/x"]
    page = ROOT / "docs" / "none.html"
    assert list(broken(page, read, {})) == ["none.html: b.html#c", "none.html: a.png"]
    read = Read('<a href="#gone">z</a>')
    assert list(broken(ROOT / "README.md", read, {ROOT / "README.md": read})) == [
        "README.md: #gone, which has no such place"
    ]
