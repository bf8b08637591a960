"""The command main.py: its flags, what it prints, and what it says about bad input."""

import io
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT, assert_one_line_error, read_help
from helpers import LETTERS, replay, save_gpt

import main as main_script
from model import GPT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_gpt(tmp_path_factory.mktemp("model") / "tiny.pt", LETTERS, 24)


@pytest.fixture(scope="module")
def with_line_ends(tmp_path_factory):
    """A model that knows line ends, too."""
    return save_gpt(tmp_path_factory.mktemp("model") / "lines.pt", LETTERS + "\n", 16)


@pytest.fixture
def stdin(monkeypatch):
    """stdin(text): what standard input holds."""
    def stdin(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    return stdin


# -----------------------------------------------------------------------------
# pages

def test_stdout_is_the_text_and_nothing_else(sample, checkpoint):
    flags = ("--prompt=hello ", "--num_samples=2", "--steps=14")
    result = sample(f"--path={checkpoint.with_suffix('')}", *flags)
    assert result.code == 0
    first, second = result.out.split("\f")
    for page in (first, second):
        assert re.fullmatch("hello [a-z ]{18}\n", page)
    assert first != second
    assert re.search(r"\n\[14 steps in \d+\.\d s; seed 1337\]\n$", result.err)


def test_the_same_seed_writes_the_same_text_and_another_seed_another(sample, checkpoint):
    flags = (f"--path={checkpoint}", "--num_samples=2", "--dtype=float32")
    first = sample(*flags).out
    assert sample(*flags).out == first and sample(*flags, "--seed=1337").out == first
    assert sample(*flags, "--seed=2").out != first


def test_form_feeds_separate_pages(sample, checkpoint, with_line_ends):
    """Also where the pages have line ends and empty lines of their own."""
    for path, n in itertools.product((checkpoint, with_line_ends), (1, 2, 5)):
        result = sample(f"--path={path}", f"--num_samples={n}", "--prompt=a")
        pages = result.out.split("\f")
        assert result.code == 0 and len(pages) == n and len(set(pages)) == n
        assert {len(page) for page in pages} == {25 if path == checkpoint else 17}
        assert all(page.startswith("a") and page.endswith("\n") for page in pages)
        numbers = [f"--- {i} of {n}" for i in range(1, n + 1)]
        assert result.err.splitlines()[:-1] == (numbers if n > 1 else [])


def test_a_page_without_a_prompt_begins_at_a_line_s_start(sample, with_line_ends, tmp_path,
                                                          monkeypatch):
    """The model sees a line end, which is not shown."""
    seen, forward = [], GPT.forward

    def seen_forward(self, idx):
        seen.append(idx)
        return forward(self, idx)
    monkeypatch.setattr(GPT, "forward", seen_forward)
    flags = (f"--path={with_line_ends}", f"--html={tmp_path}/run.html", "--dtype=float32")
    result = sample(*flags)
    line_end, mask_id = 27, 28
    assert result.code == 0 and seen[0].tolist() == [[line_end] + [mask_id] * 15]
    assert all((idx[:, 0] == line_end).all() for idx in seen)
    pages, _, run = replay((tmp_path / "run.html").read_text(encoding="utf-8"))
    assert run["start"] == [[None] * 15] and result.out == pages[0] + "\n"
    assert sample(*flags, "--prompt=\n").out == "\n" + result.out  # a given one is shown
    assert len(sample(*flags, "--gen_length=7").out) == 8


def test_a_prompt_from_stdin_is_the_same_as_on_the_command_line(sample, with_line_ends, stdin):
    """\\r\\n and a lone \\r are line ends. Nothing at all is no prompt."""
    flags = (f"--path={with_line_ends}", "--dtype=float32")
    expected = sample(*flags, "--prompt=romeo\nwhat ").out
    assert expected.startswith("romeo\nwhat ")
    for text in ("romeo\nwhat ", "romeo\rwhat ", "romeo\r\nwhat ", "\ufeffromeo\nwhat "):
        stdin(text)
        assert sample(*flags, "--prompt=-").out == expected
    stdin("")
    assert sample(*flags, "--prompt=-").out == sample(*flags).out


def test_flags_do_what_they_say(sample, checkpoint):
    result = sample(f"--path={checkpoint}", "--gen_length=12", "--steps=3", "--block_length=4",
                    "--remasking=low_confidence", "--cfg_scale=0.5", "--temperature=0",
                    "--prompt=a", "--revise=0", "--dtype=float32")
    assert result.code == 0 and len(result.out) == 14
    assert result.err.startswith("[3 steps in ")
    few = (f"--path={checkpoint}", "--gen_length=2", "--steps=8")
    # a draft of 2 steps, and 6 of revision; without revision, one for each character
    assert sample(*few).err.startswith("[8 steps in ")
    assert sample(*few, "--revise=0").err.startswith("[2 steps in ")
    # every prediction is more probable than 0 and less than 1
    sure = (f"--path={checkpoint}", "--steps=9", "--revise=0")
    assert sample(*sure, "--threshold=0").err.startswith("[1 steps in ")
    assert sample(*sure, "--threshold=1").err.startswith("[9 steps in ")


def test_longer_than_the_block(sample, checkpoint):
    """--steps counts the forward passes of each window."""
    result = sample(f"--path={checkpoint}", "--gen_length=100", "--prompt=hello ", "--steps=12")
    assert result.code == 0 and len(result.out) == 107 and result.out.startswith("hello "), result
    # after 18 characters, 6 windows of 12 and one of 10
    assert result.err.startswith(f"[{8 * 12} steps in "), result.err
    # the first window is of 24 characters, and 18 are of 12
    default, steps = sample(f"--path={checkpoint}", "--gen_length=240"), main_script.PAGE["steps"]
    assert default.err.startswith(f"[{19 * steps} steps in ") and len(default.out) == 241, default
    prompt = "the quick brown fox jumps over the lazy dog"  # longer than the block
    assert sample(f"--path={checkpoint}", f"--prompt={prompt}").out.startswith(prompt)


# -----------------------------------------------------------------------------
# holes

@pytest.mark.parametrize("how", ["text", "file", "stdin"])
def test_infill_brings_back_what_was_given(sample, tmp_path, stdin, with_line_ends, how):
    text = "_he cat sat___ the mat" + ("" if how == "text" else "\n")
    # a file as Windows saves it
    (tmp_path / "damaged_text").write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    stdin(text)
    arg = {"text": text, "file": tmp_path / "damaged_text", "stdin": "-"}[how]
    result = sample(f"--path={with_line_ends}", f"--infill={arg}", "--num_samples=20",
                    "--temperature=1")
    pages = result.out.split("\f")
    assert result.code == 0 and len(pages) == 20 and len(set(pages)) > 10, result
    for page in pages:
        assert "_" not in page
        assert re.fullmatch(text.rstrip("\n").replace("_", "(.|\n)") + "\n", page)


@pytest.mark.parametrize("ends", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize("how", ["file", "stdin"])
def test_line_ends_of_infill_become_those_of_the_model(sample, tmp_path, stdin, with_line_ends, how,
                                                       ends):
    text = f"the c_t{ends}sat{ends}{ends}on it{ends}"
    (tmp_path / "text").write_bytes(text.encode())
    stdin(text)
    arg = {"file": tmp_path / "text", "stdin": "-"}[how]
    result = sample(f"--path={with_line_ends}", f"--infill={arg}")
    assert result.code == 0 and re.fullmatch("the c(.|\n)t\nsat\n\non it\n", result.out), result


def test_any_text_of_known_characters_comes_back_with_its_holes_filled(sample, tmp_path):
    """Random texts, also longer than the model's block. 0, . and the other signs that are empty
    cells of puzzles are characters here: only _ is a hole."""
    chars, rng = LETTERS + "\n0123.*?-|+#,", random.Random(0)
    path = save_gpt(tmp_path / "model.pt", chars, 16)
    for _ in range(40):
        length = rng.randrange(1, 50)
        text = " " + "".join(rng.choices(chars + "_" * rng.randrange(1, 20), k=length)) + "_."
        result = sample(f"--path={path}", f"--infill={text}")
        assert result.code == 0, (text, result)
        assert len(result.out) == len(text) + 1 and "_" not in result.out
        assert all(given in ("_", char) for given, char in zip(text, result.out)), text


def test_infill_notices_which_characters_are_missing(sample, monkeypatch):
    text = ("NATHANIEL:\nPeter, didst ever see the like?\n\nPETER:\nHe kills her in her own humour."
            "\n\nGRUMIO:\nWhere is he?\n\nCURTIS:\nIn her chamber, making a sermon of continency "
            "to her;\nAnd rails, and swears, and rates, that she, poor soul,\n")
    flags = (f"--infill={text.replace('e', '_')}", "--dtype=float32")

    def wrong():
        return sum(a != b for a, b in zip(sample(*flags).out, text, strict=True))
    with_rates = wrong()
    monkeypatch.setattr(main_script, "missing_rates", lambda _, x, mask_id, __: torch.ones(mask_id))
    assert with_rates <= 1 and wrong() >= 3


def test_only_the_holes_of_a_text_are_weighted(sample, monkeypatch, with_line_ends, tmp_path):
    """Neither the masks of a page to be written nor the empty cells of a puzzle."""
    calls = []
    monkeypatch.setattr(main_script, "missing_rates",
                        lambda _, x, mask_id, __: calls.append(x) or torch.ones(mask_id))
    assert sample(f"--path={with_line_ends}", "--prompt=a").code == 0 and not calls
    assert sample(f"--path={with_line_ends}", "--infill=a_b").code == 0 and len(calls) == 1
    puzzle = save_gpt(tmp_path / "puzzle.pt", "\n1234", 21, record=21)
    assert sample(f"--path={puzzle}", "--infill=1" + "_" * 15).code in (0, 3) and len(calls) == 1


def test_another_character_for_the_holes(sample, checkpoint):
    result = sample(f"--path={checkpoint}", "--infill=what is this?", "--mask_char=?")
    assert result.code == 0 and re.fullmatch("what is this[a-z ]\n", result.out)
    # a character that has an id
    known = sample(f"--path={checkpoint}", "--infill=banana", "--mask_char=n", "--num_samples=5",
                   "--temperature=1")
    pages = known.out.split("\f")
    assert known.code == 0 and all(re.fullmatch("ba.a.a\n", page) for page in pages)
    assert len(set(pages)) > 1


# -----------------------------------------------------------------------------
# the process

def test_main_changes_no_signal_handler(sample, checkpoint, monkeypatch):
    """Neither for a while nor for good: those that are set here stay set."""
    def mine(*_):
        pass
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGPIPE")
               if hasattr(signal, name)]
    during, forward = [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, idx: during.extend(
        map(signal.getsignal, numbers)) or forward(self, idx))
    previous = {number: signal.signal(number, mine) for number in numbers}
    try:
        assert sample(f"--path={checkpoint}").code == 0
        after = [signal.getsignal(number) for number in numbers]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    assert during and set(during) == set(after) == {mine}


def start(*flags, stdout):
    """Start main.py as a process that writes to stdout, with Python's usual buffer."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, ROOT / "main.py", "--device=cpu", *flags], text=True,
                            env=env, stdout=stdout, stderr=subprocess.PIPE)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes differ")
@pytest.mark.parametrize("flags, shown", [(["--num_samples=3"], "--- 1 of 3\n"),
                                          (["--score=hello"], "")])
def test_a_reader_that_leaves_ends_it_quietly(checkpoint, flags, shown):
    """As in python main.py | head -1."""
    process = start(f"--path={checkpoint}", *flags, stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == shown
    assert process.wait(timeout=60) in (1, -signal.SIGPIPE)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
def test_a_full_disk_is_one_line(checkpoint):
    with open("/dev/full", "w") as full:
        process = start(f"--path={checkpoint}", stdout=full)
    err = process.stderr.read()
    assert err.startswith("error: ") and err.count("\n") == 1 and "No space left" in err
    assert process.wait(timeout=60) == 2


def test_the_shipped_model_writes_shakespeare_from_any_folder(run, tmp_path):
    """Nothing prepared; 2 pages must use many of the commonest words. Random letters would use none
    of the long ones."""
    result = run(ROOT / "main.py", "--num_samples=2", "--device=cpu", cwd=tmp_path)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    # a block of 256, but for the line end that it begins after, and one line end more
    assert [len(page) for page in result.stdout.split("\f")] == [256] * 2
    common = "that with this have your thou shall will what lord him not for the and you".split()
    assert len(set(common) & set(result.stdout.lower().split())) >= 5


def test_the_lines_of_python_in_the_docstring_write_a_page(monkeypatch, capsys):
    """As they stand, from the repository's root."""
    code = textwrap.dedent(main_script.__doc__.split("The same in Python:\n\n")[1])
    assert len(code.strip().splitlines()) == 8
    monkeypatch.chdir(ROOT)
    exec(code, {})
    assert len(capsys.readouterr().out) == 256 + 1


# -----------------------------------------------------------------------------
# bad input, and help

def test_a_backslash_n_is_explained(sample):
    """A shell does not make a line end of it."""
    result = sample("--prompt=ROMEO:\\n")
    assert_one_line_error(result, "'\\\\'", "--prompt=-", "printf")
    assert_one_line_error(sample("--infill=ROMEO:\\n_"), "--infill=-", "printf")
    assert "printf" not in sample("--prompt=ROMEO\\").err


@pytest.mark.parametrize("flags, words", [
    (["--prompt=h\N{SNOWMAN}llo"], ["--prompt", "\N{SNOWMAN}"]),
    (["--gen_length=0"], ["--gen_length"]),
    (["--infill=no holes"], ["--infill", "no holes"]),
    (["--infill="], ["--infill"]),
    (["--infill=/nowhere/text"], ["--infill", "/nowhere/text"]),
    (["--infill=my_damaged_play.txt"], ["no file my_damaged_play.txt", "pipe"]),
    (["--seed=--"], ["--seed", "value"]),
    (["--gen_length=--"], ["--gen_length", "value"]),
    (["--infill=h\N{SNOWMAN}l_o"], ["--infill", "does not know", "\N{SNOWMAN}"]),
    (["--infill=h_", "--prompt=h"], ["--infill", "--prompt"]),
    (["--infill=h_", "--gen_length=3"], ["--infill", "--gen_length"]),
    (["--infill=h_", "--mask_char="], ["--mask_char"]),
    (["--infill=h_", "--mask_char=__"], ["--mask_char"]),
    (["--infill=h_", "--tries=2"], ["--tries", "puzzles"]),
    ([f"--infill={ROOT / 'pretrained_gpt_last.pt'}"], ["pretrained_gpt_last.pt", "UTF-8"]),
    (["--revise=2"], ["revise"]),
    (["--threshold=2"], ["threshold"]),
    (["--remask=0.3"], ["--remask"]),
    (["--html=/nowhere/run.html"], ["--html", "/nowhere/run.html"]),
    (["--block_length=x"], ["--block_length"]),
    (["--html=/"], ["--html", ".html"]),
    (["--html="], ["--html"]),
    ([f"--html={ROOT / 'LICENSE'}"], ["LICENSE", ".html"]),
    ([f"--infill={ROOT / 'LICENSE'}", "--mask_char=#"], ["LICENSE", "no holes", "#"]),
    (["--infill=a", "--mask_char=\n"], ["no holes"]),
    (["--gen_length=1" + "0" * 20], ["--gen_length", "at most 1000000"]),
    (["--block_length=-1"], ["block_length"]),
    (["--dtype=int4"], ["--dtype=int4"]),
    (["--steps=0"], ["steps"]),
    (["--steps=0", "--infill=a_"], ["steps"]),
    (["--steps=few"], ["--steps", "few"]),
    (["--temperature=-0.1"], ["temperature"]),
    (["--temperature=nan"], ["temperature"]),
    (["--cfg_scale=-1"], ["cfg_scale"]),
    (["--block_length=0"], ["block_length", "not 0"]),
    (["--remasking=best"], ["remasking"]),
    (["--num_samples=0"], ["--num_samples"]),
    (["--seed=-1"], ["--seed"]),
    (["--device=cuda:99"], ["cuda:99"]),
    (["--device=tpu"], ["tpu"]),
    (["--path=/nowhere/model"], ["/nowhere/model.pt"]),
    (["--path=/"], ["'/'"]),
    (["--path=no/"], ["'no/'"]),
    (["--length=3"], ["--length"]),
    (["hello"], ["hello"]),
])
def test_bad_input_is_one_line(sample, checkpoint, flags, words):
    result = sample(f"--path={checkpoint}", *flags)
    assert_one_line_error(result, *words)
    assert result.out == ""


def test_help_is_grouped_and_shows_every_default(sample):
    result = sample("--help")
    groups = read_help(result.out)
    assert result.code == 0
    flags = {name: set(groups[name]) for name in ("page", "sampler", "watching", "device")}
    assert flags == {
        "page": {"path", "prompt", "gen_length", "infill", "mask_char", "score", "num_samples",
                 "seed"},
        "sampler": {"steps", "temperature", "revise", "remasking", "threshold", "tries",
                    "block_length", "cfg_scale"},
        "watching": {"animate", "html"},
        "device": {"device", "dtype"},
    }
    for name in flags:
        for flag, text in groups[name].items():
            assert "(default: " in text, flag
    # a default that depends on what is written says so
    for where, defaults in (("of a page", main_script.PAGE), ("with --infill", main_script.INFILL),
                            ("of a twin", main_script.TWIN)):
        assert f"{where} {defaults['temperature']}" in groups["sampler"]["temperature"]
    for name in ("tries", "threshold"):
        assert f"of puzzles {main_script.PUZZLE[name]}" in groups["sampler"][name]
    assert f"of a page {main_script.PAGE['steps']}" in groups["sampler"]["steps"]
