"""The site is built of the documents and the docstrings, without a network; broken links fail."""

import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import yaml
from pages import ROOT

import dape
from dape.figures.view import View
from dape.positions.scheme import BASES

pytest.importorskip("mkdocs", reason="needs the extra `docs`")

BUILD = """
import socket, sys
def refuse(*_): raise OSError("the site asks for a network")
socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli()
"""
RESOURCE = re.compile(
    r'<(?:script|img|iframe|source)[^>]*\bsrc="([^"]*)"|<link[^>]*\bhref="([^"]*)"'
)


def build(pages, out, config=ROOT / "mkdocs.yml"):
    environment = {**os.environ, "SITE_PAGES": str(pages), "NO_MKDOCS_2_WARNING": "1"}
    words = ["build", "--strict", "--config-file", str(config), "--site-dir", str(out)]
    return subprocess.run(
        [sys.executable, "-c", BUILD, *words], env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return the folder of the pages that the site is built of."""
    spec = spec_from_file_location("site_pages", ROOT / "docs/site/pages.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("site") / "pages"
    module.write(folder, View(heads=2, length=16))
    return folder


@pytest.fixture(scope="module")
def site(pages):
    out = pages.parent / "site"
    done = build(pages, out)
    assert done.returncode == 0, done.stderr
    return out


def html(site, page):
    return (site / page / "index.html").read_text(encoding="utf-8")


def test_nothing_on_the_site_is_loaded_from_elsewhere(site):
    found = {
        first or second
        for page in site.rglob("*.html")
        for first, second in RESOURCE.findall(page.read_text(encoding="utf-8"))
    }
    assert found and not {each for each in found if re.match(r"\w+:(?!image/)|//", each)}


def test_every_document_is_a_page(site):
    documents = {file.stem for file in ROOT.glob("docs/*.*")} - {"index"}
    for name in (
        *documents,
        ".",
        "overview",
        "contributing",
        "changelog",
        "results/paper/core/table",
    ):
        assert "<h1" in html(site, name)


def test_links_out_of_the_documents_lead_to_pages(site):
    assert 'href="../results/demo/table/"' in html(site, "compare")
    assert 'href="results/paper/report.html"' in html(site, ".")
    assert (site / "results/paper/report.html").is_file()


def test_every_table_of_the_results_has_a_title(site):
    entries = re.findall(r'<li><a href="[^"]*">[^<]*</a>: ([^<]*)</li>', html(site, "results"))
    assert len(entries) > 10 and not [each for each in entries if "|" in each or not each]
    assert (site / "explorer.html").is_file()


def test_every_public_name_is_in_the_reference_and_no_private_one(site):
    found = set()
    for page in site.glob("reference/*/index.html"):
        found |= set(re.findall(r'<h[2-4] id="(dape[^"]*)"', page.read_text(encoding="utf-8")))
    public = {f"dape.{name}" for name in dape.__all__}
    public |= {f"dape.train.{name}" for name in dape.train.__all__}
    public |= {f"dape.evaluate.{name}" for name in dape.evaluate.__all__}
    assert public <= found
    assert not {name for name in found if re.search(r"\._", name)}


def test_every_encoding_has_its_docstring_and_its_picture(site):
    page = html(site, "encodings")
    sections = dict(re.findall(r'<h3 id="([^"]+)">(.*?)(?=<h[23] |\Z)', page, flags=re.DOTALL))
    for name in BASES.keys() - {"nope", "cope"}:
        assert "<img" in sections[name] and "Docstring of" in sections[name], name
    pictures = re.findall(r'<img[^>]*src="([^"]+)"', page)
    assert all((site / "encodings" / picture).resolve().is_file() for picture in pictures)


@pytest.mark.parametrize(
    ("link", "fault"),
    [("other.md#part", None), ("absent.md", "absent.md"), ("other.md#absent", "absent")],
)
def test_a_broken_link_fails(tmp_path, link, fault):
    whole = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)
    config = {"site_name": "a", "docs_dir": "pages", "validation": whole["validation"]}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/index.md").write_text(f"# A\n\n[link]({link})\n")
    (tmp_path / "pages/other.md").write_text("# B\n\n## Part\n")
    done = build(tmp_path / "pages", tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode == (0 if fault is None else 1), done.stderr
    assert (fault or "") in done.stderr
