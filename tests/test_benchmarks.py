"""The benchmarks are not run here, but all of them can be imported and asked for --help."""

import subprocess
import sys

from conftest import ROOT

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
