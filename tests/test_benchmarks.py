"""The benchmarks are not run here, but all of them can be imported and asked for --help, and their
pages are short and in the index."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

FOLDER = ROOT / "tests" / "benchmarks"
PAGES = sorted(FOLDER.glob("*.md"))
SCRIPTS = sorted([*ROOT.glob("tests/benchmarks/*.py"), ROOT / "tests" / "hostile.py"])
ASK_ALL = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv, sys.path[0] = [path, "--help"], path.rsplit("/", 1)[0]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as e:
        assert not e.code, path
    else:
        raise AssertionError(path + " ignores --help")
"""


def test_every_benchmark_can_be_imported_and_explains_itself():
    paths = [path.as_posix() for path in SCRIPTS]
    assert len(paths) > 10
    asked = subprocess.run([sys.executable, "-c", ASK_ALL, *paths], capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.count("usage: ") == len(paths)


def words_of(page):
    return len(page.read_text(encoding="utf-8").split())


def test_the_index_has_a_row_for_each_script_and_page():
    index = (FOLDER / "README.md").read_text(encoding="utf-8").split("## The index")[1]
    assert set(re.findall(r"`(\w+\.py)`", index)) >= {path.name for path in FOLDER.glob("*.py")}
    rows = "\n".join(line for line in index.splitlines() if line.startswith("|"))
    assert set(re.findall(r"\((\w+\.md)\)", rows)) == {
        path.name for path in PAGES} - {"README.md", "peers.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_are_short_and_their_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    findings = text.split("## The index")[0]
    assert len(findings.split()) <= (900 if page.name == "README.md" else 600)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (FOLDER / target).exists(), target
    for name in re.findall(r"tests/benchmarks/(\w+\.py)", text):
        assert (FOLDER / name).exists(), name


def test_all_pages_together_are_short():
    assert sum(map(words_of, PAGES)) <= 5500
