"""What docs/check_site.py finds wrong with a site."""

import importlib.util

import pytest
from support.installed import ROOT

if not (ROOT / "docs" / "check_site.py").exists():
    pytest.skip("needs the repository", allow_module_level=True)

spec = importlib.util.spec_from_file_location("check_site", ROOT / "docs" / "check_site.py")
check_site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_site)

SOUND = '<link rel="stylesheet" href="s.css"><img src="p.png" alt="two words"><a href="b.html#here">b</a>'
FAULTS = {
    '<script src="https://cdn.example/x.js"></script>': "a.html: loads https://cdn.example/x.js from elsewhere",
    '<link rel="stylesheet" href="//fonts.example/f.css">': "a.html: loads //fonts.example/f.css from elsewhere",
    '<img src="p.png">': "a.html: no text that describes p.png",
    '<img src="p.png" alt="p.png">': "a.html: no text that describes p.png",
    '<a href="c.html">c</a>': "a.html: c.html leads nowhere",
    '<img src="q.png" alt="two words">': "a.html: q.png leads nowhere",
    '<a href="b.html#there">b</a>': "a.html: nothing is called b.html#there",
    '<a href="#there">b</a>': "a.html: nothing is called #there",
}


@pytest.fixture
def site(tmp_path):
    (tmp_path / "a.html").write_text(SOUND)
    (tmp_path / "b.html").write_text('<p id="here"><a href="https://elsewhere.example">a link may lead out</a>')
    (tmp_path / "p.png").write_bytes(b"")
    (tmp_path / "s.css").write_text("a { src: url(p.png), url('data:,') }")
    return tmp_path


def test_a_sound_site_has_no_faults(site):
    assert [*check_site.faults_of_pages(site), *check_site.faults_of_styles(site)] == []


@pytest.mark.parametrize("code", FAULTS)
def test_a_fault_is_named_with_its_page(site, code):
    (site / "a.html").write_text(SOUND + code)
    assert list(check_site.faults_of_pages(site)) == [FAULTS[code]]


@pytest.mark.parametrize("rule", ['@import "https://fonts.example/f.css";', "a { src: url(//fonts.example/f.woff) }"])
def test_a_style_that_loads_from_elsewhere_is_a_fault(site, rule):
    (site / "s.css").write_text(rule)
    (fault,) = check_site.faults_of_styles(site)
    assert fault.startswith("s.css: loads ")


def test_a_public_name_that_the_reference_or_the_search_lacks_is_a_fault(site):
    names = list(check_site.public_names())
    assert {"jbn.bn_apply", "jbn.networks.mlp", "jbn.linen.BatchNorm", "jbn.convert.from_torch"} <= set(names)
    (site / "docs" / "api").mkdir(parents=True)
    (site / "docs" / "api" / "all.html").write_text("".join(f'<dt id="{name}">' for name in names[1:]))
    (site / "searchindex.js").write_text(" ".join(f'"{name.split(".")[-1]}"' for name in names[:-1]))
    assert list(check_site.faults_of_reference(site)) == [
        f"docs/api: {names[0]} is missing",
        f"searchindex.js: {names[-1]} is not found",
    ]
