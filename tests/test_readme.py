"""What the README shows must be what the code is, and its commands must work as written."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)
INLINE = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
IN_BLOCKS, IN_SENTENCES = (
    [" ".join(text.split()) for text in texts if text.startswith("python ") and "…" not in text]
    for texts in ("".join(FENCED).splitlines(), INLINE))
TOY = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=32", "--max_iters=4",
       "--eval_interval=2", "--eval_chars=256"]


def code_of(name):
    """A script without its docstrings."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r'    """.*?"""\n', "", text, flags=re.DOTALL)


@pytest.mark.parametrize("start, script", [("def forward_process", "train.py"),
                                           ("    for num_revised", "main.py")])
def test_the_listings_are_the_code_s_own(start, script):
    [listing] = [text for text in FENCED if text.startswith(start)]
    for part in re.split(r"\n\n+(?=\S)", listing.rstrip()):
        assert part in code_of(script), part


def test_flags_that_it_names_exist():
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("data/*/prepare.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in scripts)
    elsewhere = {"standalone", "nproc_per_node", "index-url", "help"}  # of torchrun, pip, argparse
    for flag in set(re.findall(r"[\s`]--([\w-]+)", README)) - elsewhere:
        assert re.search(rf'"--{flag}"|^    {flag}: ', code, re.MULTILINE), flag


def test_files_that_it_names_exist():
    linked = re.findall(r"\]\(((?:assets|tests)/[^)]+)\)", README)
    quoted = re.findall(r"`((?:\w+/)*\w+\.(?:py|pt|txt))`", README)
    written_by_commands = {"X.pt", "prepare.py"}  # the latter is short for the one of data/
    for name in {*linked, *quoted} - written_by_commands:
        assert (ROOT / name).exists(), name


@pytest.fixture(scope="module")
def clone(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("clone")
    for path in (*ROOT.glob("*.py"), ROOT / "pretrained_gpt_last.pt", ROOT / "assets"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    for name in ("data/shakespeare_char/prepare.py", "data/sudoku/prepare.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("data/shakespeare_char/input.txt", "my.txt"):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_every_command_works_in_its_order(clone):
    """As pasted, but that training and Sudoku's grids are cut to a toy; commands that the README
    repeats run once. Those in sentences need the data, but no model of those in blocks, and run
    beside them."""
    assert len(IN_BLOCKS) > 9 and len(IN_SENTENCES) > 5
    subprocess.run([sys.executable, "data/shakespeare_char/prepare.py"], cwd=clone, check=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(run_in_order, (IN_BLOCKS, IN_SENTENCES), [clone] * 2))


def run_in_order(commands, clone):
    for command in dict.fromkeys(commands):
        words = shlex.split(command)
        words += TOY if words[1] == "train.py" else []
        words += ["--grids=1000"] if words[1] == "data/sudoku/prepare.py" else []
        if "--dataset=sudoku" in words:
            words.remove("--block_size=32")  # it has records of its own length
        done = subprocess.run([sys.executable, *words[1:]], cwd=clone, capture_output=True,
                              text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
        assert done.returncode == 0, command + done.stderr
        assert "Traceback" not in done.stderr


def test_the_restored_text_is_what_the_shipped_model_restores(run):
    """Sampling depends a little on the machine's arithmetic: most of what is shown must come."""
    damaged, shown = (text for text in FENCED if "dr" in text and "pp'd" in text)
    assert damaged == (ROOT / "assets/damaged.txt").read_text()
    restored = run(ROOT / "main.py", "--infill=assets/damaged.txt", "--seed=1", cwd=ROOT).stdout
    holes = [i for i, char in enumerate(damaged) if char == "_"]
    assert len(restored) == len(shown) == len(damaged)
    assert all(restored[i] == damaged[i] for i in range(len(damaged)) if i not in holes)
    assert sum(restored[i] == shown[i] for i in holes) > 0.8 * len(holes)
