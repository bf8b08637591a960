"""What the README shows must be what the code is, and its commands must work as written."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

import main as main_script

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LISTINGS = [text for text in PYTHON if text.startswith("def ")]
INLINE = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
IN_BLOCKS, IN_SENTENCES = (
    [" ".join(text.split()) for text in texts if text.startswith("python ") and "…" not in text]
    for texts in ("".join(FENCED).splitlines(), INLINE))
# a command in a sentence that fills holes, and the block after it, which shows what it prints
RESTORED = re.findall(r"`python main\.py (--infill=[^`]+)`(?:(?!```|\n## ).){0,200}\n```\n(.*?)```",
                      README, re.DOTALL)
SHORT = ["--max_iters=2", "--batch_size=2", "--eval_tokens=256"]
TOY = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=32", "--max_iters=4",
       "--eval_interval=2", "--eval_tokens=256"]


def without_docstrings(code):
    return re.sub(r'    """.*?"""\n', "", code, flags=re.DOTALL)


def test_the_listings_are_the_code_s_own():
    """Every function and every part of one that the README shows stands in diffusion.py, but for
    docstrings."""
    code = without_docstrings((ROOT / "diffusion.py").read_text(encoding="utf-8"))
    parts = [part for text in LISTINGS for part in re.split(r"\n\n+(?=\S)", text.rstrip())]
    assert "def forward_process" in LISTINGS[0] and len(parts) >= 3
    for part in parts:
        assert part + "\n" in code, part


def test_its_lines_of_python_are_those_that_main_py_begins_with():
    """test_main.py runs them."""
    [lines] = set(PYTHON) - set(LISTINGS)
    assert len(lines.splitlines()) == 8 and textwrap.indent(lines, "    ") in main_script.__doc__


def test_it_is_short():
    assert len(README.split()) <= 1250


def test_flags_that_it_names_exist():
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("data/*/prepare.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in scripts)
    elsewhere = {"extra-index-url", "help"}  # of pip and argparse
    for flag in set(re.findall(r"[\s`]--([\w-]+)", README)) - elsewhere:
        assert re.search(rf"^    {flag}: .* = knob\(", code, re.MULTILINE), flag


def test_files_that_it_names_exist():
    linked = re.findall(r"\]\(((?:assets|learn|tests)/[^)]+)\)", README)
    quoted = re.findall(r"`((?:\w+/)*\w+\.(?:py|pt|txt))`", README)
    written_by_commands = {"X.pt", "prepare.py"}  # the latter is short for the one of data/
    for name in {*linked, *quoted} - written_by_commands:
        assert (ROOT / name).exists(), name


def test_what_it_says_to_edit_exists():
    """The functions and constants of the section that begins with the table of what to edit."""
    section = README[README.index("| to change"):].split("\n## ")[0]
    names = set(re.findall(r"`([A-Za-z]\w*)`", section))
    paths = [*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), *ROOT.glob("data/*/prepare.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in paths)
    assert len(names) >= 4
    for name in names:
        assert re.search(rf"^(def {name}\(|{name} = )", code, re.MULTILINE), name


@pytest.fixture(scope="module")
def clone(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("clone")
    paths = (*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), *ROOT.glob("data/*/prepare.py"),
             *ROOT.glob("assets/*.*"), *ROOT.glob("learn/*.py"), ROOT / "pretrained_gpt_last.pt")
    for path in paths:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for name in ("data/shakespeare_char/input.txt", "my.txt"):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_every_command_works_in_its_order(clone):
    """As pasted, but that training and Sudoku's grids are cut to a toy; commands that the README
    repeats run once. Those in sentences need the data, but no model of those in blocks, and run
    beside them."""
    assert len(IN_BLOCKS) > 9 and len(IN_SENTENCES) > 2
    subprocess.run([sys.executable, "data/shakespeare_char/prepare.py"], cwd=clone, check=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(run_in_order, (IN_BLOCKS, IN_SENTENCES), [clone] * 2))


def run_in_order(commands, clone):
    for command in dict.fromkeys(commands):
        words = shlex.split(command)
        tuned = any(word.startswith("--init_from=pretrained") for word in words)
        words += (SHORT if tuned else TOY) if words[1] == "train.py" else []
        words += ["--grids=1000"] if words[1] == "data/sudoku/prepare.py" else []
        if "--dataset=sudoku" in words:
            words.remove("--block_size=32")  # it has records of its own length
        done = subprocess.run([sys.executable, *words[1:]], cwd=clone, capture_output=True,
                              text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
        wrong = done.returncode == 3 and "puzzle.txt" in command  # the toy solves no puzzle
        assert done.returncode == 0 or wrong, command + done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flag, shown", RESTORED or [("none", "")])
def test_what_it_shows_as_restored_is_what_the_shipped_model_restores(sample, flag, shown):
    """The probabilities depend a little on the machine's arithmetic: most of what is shown must
    come."""
    [flag] = shlex.split(flag)
    damaged = flag.split("=", 1)[1]
    if (ROOT / damaged).is_file():
        flag, damaged = f"--infill={ROOT / damaged}", (ROOT / damaged).read_text()
        assert damaged in FENCED
    restored = sample(flag).out
    holes = [i for i, char in enumerate(damaged) if char == "_"]
    assert len(restored) == len(shown) == len(damaged.rstrip("\n")) + 1
    assert all(restored[i] == char for i, char in enumerate(damaged) if char != "_")
    assert sum(restored[i] == shown[i] for i in holes) > 0.8 * len(holes)
