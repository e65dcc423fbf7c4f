"""The annotated methods: every line of a method file is on its page, and links lead somewhere."""

import importlib.util
import re
from html import unescape

import pytest
from conftest import ROOT

pytest.importorskip("latex2mathml")
SPEC = importlib.util.spec_from_file_location("build_site", ROOT / "docs/build.py")
build_site = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build_site)
METHODS = [p.stem for p in ROOT.glob("*.py") if f"\ndef {p.stem}_loss(" in p.read_text("utf-8")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build_site.build(folder)
    return folder


def plain(text: str) -> str:
    return " ".join(text.replace("`", "").split())


@pytest.mark.parametrize("name", METHODS)
def test_every_line_is_on_the_page(site, name):
    html = (site / f"{name}.html").read_text("utf-8")
    text = plain(unescape(re.sub(r"<[^>]+>", "", html)))
    source = (ROOT / f"{name}.py").read_text("utf-8").replace('"""', "\n")
    lines = {plain(line.strip().removeprefix("# ")) for line in source.splitlines()}
    assert [line for line in lines if line not in text] == []
    added = build_site.section(name, "*") + build_site.section(name, "-")
    assert "<math" in html and all(plain(line) in text for line in added)


@pytest.mark.parametrize("name", METHODS)
def test_results_are_on_the_page(site, name):
    """A table of runs; curves, unless its runs have none; published numbers with their source."""
    html = (site / f"{name}.html").read_text("utf-8")
    rows = [row for row in build_site.ROWS if row["method"] == name and row["default"]]
    assert ("<table>" in html or "Not run yet" in html) and html.count("<svg") == 2 * bool(rows)
    if rows:
        rewards = [row["measured"]["sampled/reward"]["value"] for row in rows]
        assert f"<td>{sum(rewards) / len(rewards):.3f} ({min(rewards):.3f} to " in html
    assert name != "reward_model" or "<td>accuracy<td>" in html
    for line in build_site.section(name, "*"):
        assert re.search(r"arXiv \d|README of github|documentation|\(there\)|\(its ", line), line


def test_links_lead_somewhere(site):
    for page in [*site.glob("*.html"), *site.glob("*.css")]:
        text = page.read_text("utf-8")
        assert "<script" not in text and "@import" not in text and "url(" not in text
        for link in re.findall(r"(?:src|href)=[\"']?([^\"'\s>]+)", text):
            if not link.startswith("https://arxiv.org/abs/"):
                assert (site / link).is_file(), f"{page.name}: {link}"


@pytest.mark.parametrize("name", METHODS)
def test_exercises_are_concrete(name):
    """Three each; their flags and functions exist."""
    exercises = build_site.section(name, "-")
    source = (ROOT / f"{name}.py").read_text("utf-8")
    assert len(exercises) == 3
    others = ["common.py", *re.findall(r"\w+\.py", "\n".join(exercises))]
    known = source + "\n".join((ROOT / other).read_text("utf-8") for other in others)
    for flag in re.findall(r"--([a-z][\w-]*)", "\n".join(exercises)):
        field = flag.removeprefix("no-").replace("-", "_")
        assert re.search(rf"^    {field}: ", known, re.M), f"{name}: --{flag}"
    for function in re.findall(r"in `(\w+)`|`(\w+_loss)`", "\n".join(exercises)):
        assert f"def {''.join(function)}(" in source


def test_a_method_without_an_entry_fails(tmp_path, monkeypatch):
    monkeypatch.delitem(build_site.METHODS, "dpo")
    with pytest.raises(SystemExit, match="methods.txt.*dpo"):
        build_site.build(tmp_path)


def test_another_equation_fails(monkeypatch):
    """The TeX has as many logs, betas, ... as the docstring's equation."""
    tex = build_site.METHODS["dpo"]
    monkeypatch.setitem(build_site.METHODS, "dpo", tex.replace(r"\beta @{y_l}", "@{y_l}"))
    with pytest.raises(SystemExit, match="dpo.py differ in beta"):
        build_site.write_method("dpo", None)
