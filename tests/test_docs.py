"""The pages say what the code does, lead where they say, and become a site."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from browser import open_browser
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from transformers import HfArgumentParser

import smt_dist
from smt_dist.cli.select import SelectArguments
from smt_dist.training.arguments import SMTTrainingArguments

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "configs" / "README.md", *DOCS.rglob("*.md")])
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
# Flags of launchers and other programs, with an underscore as ours have.
FOREIGN_FLAGS = {"num_gpus", "nproc_per_node", "no_ssh", "use_fsdp", "config_file", "machine_rank", "rdzv_backend"}


@cache
def load_generator():
    """The script that writes the generated parts of the reference."""
    spec = importlib.util.spec_from_file_location("generate_reference", DOCS / "generate_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def reference() -> dict[Path, str]:
    return load_generator().pages()


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# -- what the pages say ------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    """It is for somebody in a hurry; all else has a page."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", ["flags.md", "config.md"])
def test_the_reference_is_what_the_code_says(name):
    """After a change of flags or config: python docs/generate_reference.py."""
    path = DOCS / "reference" / name
    assert path.read_text() == reference()[path]


def test_the_api_page_has_what_the_package_exports():
    shown = re.findall(r"^::: smt_dist\.(\w+)$", (DOCS / "reference" / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(smt_dist.__all__)


def test_flags_that_pages_name_exist():
    """A flag that was renamed, or never was, would be found out on the cluster."""
    known = set(re.findall(r"^\| `--(\w+)`", "\n".join(reference().values()), re.MULTILINE)) | FOREIGN_FLAGS
    known |= {action.dest for action in HfArgumentParser([SelectArguments, SMTTrainingArguments])._actions}
    pages = [page for page in PAGES if page.name != "migration.md"]  # it has the authors' flags
    named = {(page.name, flag) for page in pages for flag in re.findall(r"(?<![\w-])--([a-z]+_\w+)", page.read_text())}
    assert len(named) > 100
    assert {(page, flag) for page, flag in named if flag not in known} == set()


def test_configs_in_pages_are_taken():
    blocks = [text for page in PAGES for text in re.findall(r"^```json\n(.*?)^```", page.read_text(), re.M | re.DOTALL)]
    assert len(blocks) >= 3
    for text in blocks:
        smt_dist.SMTConfig.from_json(text)
    assert smt_dist.SMTConfig.from_json(blocks[0]) == smt_dist.SMTConfig()  # README: "this is the default config"


@each_page
def test_links_lead_somewhere(page):
    """Files, headings and pictures, as GitHub reads the page."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


# -- the site ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. Where MkDocs isn't installed: fails on CI, skips elsewhere."""
    program = shutil.which("mkdocs", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)('no mkdocs: pip install ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [program, "build", "--strict", "--config-file", str(ROOT / "configs" / "mkdocs.yml"), "--site-dir"]
    built = subprocess.run([*command, str(folder)], capture_output=True, text=True, cwd=folder)
    assert built.returncode == 0, built.stderr
    return folder


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder: a browser reads no search index from a file."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_the_site_needs_no_other_host(site):
    """Neither fonts nor scripts are fetched; links are for the reader to follow."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        assert not re.search(r"<(?:script|img|iframe)[^>]* src=\"?(?:https?:)?//", text), page
        assert not re.search(r"<link[^>]* rel=\"?stylesheet\"?[^>]* href=\"?(?:https?:)?//", text), page


def test_the_site_has_a_search_box_that_finds_the_api_page(site, tmp_path):
    with served(site) as address, open_browser(tmp_path / "profile") as browser:
        browser.get(f"{address}/index.html")
        wait = WebDriverWait(browser, 30)
        box = browser.find_element(By.CSS_SELECTOR, "input[name=query]")
        browser.execute_script("arguments[0].focus()", box)
        wait.until(lambda _: box.is_displayed())
        box.send_keys("apply_selection")
        hits = ".md-search-result__list a[href*='reference/api']"
        wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, hits))
        browser.get(f"{address}/reference/api.html")
        assert "Python API" in browser.title
        for name in smt_dist.__all__:
            assert browser.find_elements(By.ID, f"smt_dist.{name}"), name
