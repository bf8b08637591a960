"""Watching a page being written: the animation, the progress, and the replay page."""

import io
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from helpers import LETTERS, plain, replay, save_gpt

from lib import show
from lib.show import frame, save_replay, shown, watch

HOME, HIDE = "\x1b[H", "\x1b[?1049h\x1b[?25l\x1b[?7l"  # a frame's start; the animation's start
RESTORE = "\x1b[?7h\x1b[?25h\x1b[?1049l"
CHARS, M = "ab\n\x1b", 4
END = "\r\n\r\nstep 3"  # an empty line and the footer


def draw(row, before, size=(80, 24)):
    return frame(row, before, M, CHARS, "step 3", size)


# -----------------------------------------------------------------------------
# a frame of the animation

def test_a_frame_shows_the_text_and_no_control_character():
    assert plain(draw([0, M, 2, 1, 3], [M, M, M, 1, 3])) == "a░\r\nb·" + END


def test_what_was_written_or_masked_again_is_highlighted():
    fresh = "\x1b[30;43m"
    assert f"{fresh}a\x1b[0m" in draw([0, 0], [M, 0]) and draw([0, 0], [M, 0]).count(fresh) == 1
    assert f"{fresh}░\x1b[0m" in draw([M, 0], [0, 0])
    assert fresh not in draw([M, 0], [M, 0])


def test_a_line_as_wide_as_the_terminal_goes_on_below():
    assert plain(draw([0] * 7, [0] * 7, (3, 24))) == "aaa\r\naaa\r\na" + END
    assert plain(draw([0, 0, 0, 2, 1], [0] * 5, (3, 24))) == "aaa\r\nb" + END


@pytest.mark.parametrize("height", [10, 3, 1])
def test_of_a_tall_page_the_lines_around_the_first_mask_are_shown(height):
    tall = [0, 2] * 50 + [M] + [2, 0] * 50
    shown = plain(draw(tall, tall, (80, height)))
    assert "░" in shown and shown.endswith(END) and len(shown.split("\r\n")) == max(height, 3)


def test_of_a_tall_page_without_masks_the_last_lines_are_shown():
    full = [0, 2] * 50 + [1]
    assert plain(draw(full, full, (80, 12))) == "a\r\n" * 9 + "b" + END


def test_a_frame_shows_every_character_of_a_word_piece():
    vocab = ["\n", "the king", "a"]
    shown = plain(frame([1, 0, 3, 2], [3, 0, 3, 2], 3, vocab, "end", (80, 24)))
    assert shown == "the king\r\n░a\r\n\r\nend"


# -----------------------------------------------------------------------------
# following a run

class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def slept(monkeypatch):
    """The seconds that the animation waits, which it does not here."""
    slept = []
    monkeypatch.setattr(show.time, "sleep", slept.append)
    return slept


STATES = [torch.tensor([row]) for row in ([M, M, 0], [1, M, 0], [1, 0, 0], [M, M, 0], [0, 0, 0])]


def follow(states, animate=False, html=None):
    config = SimpleNamespace(animate=animate, html=html, seed=7)
    return watch(states, STATES[0], 3, CHARS, M, config)


def test_passes_are_states_with_fewer_masks_and_states_are_kept_on_request():
    for html in ("run.html", None):
        states, summary = follow(iter(STATES[1:]), html=html)
        # what is masked again is shown, but is no pass
        assert re.fullmatch(r"\[3 steps in \d+\.\d s; seed 7\]", summary)
        assert len(states) == (5 if html else 1) and states[-1] is STATES[-1]
        assert not html or all(map(torch.equal, states, STATES))


def test_every_state_is_a_frame_and_the_terminal_is_left_as_it_was(monkeypatch, slept):
    monkeypatch.setattr(sys, "stdout", Terminal())
    follow(STATES[1:], animate=True)
    shown = sys.stdout.getvalue()
    assert shown.startswith(HIDE) and shown.endswith(RESTORE) and shown.count(HOME) == 5
    frames = [plain(text) for text in shown.split(HOME)[1:]]
    assert [text.split("\r\n")[0] for text in frames] == ["░░a", "b░a", "baa", "░░a", "aaa"]
    assert [text.split("\r\n")[2] for text in frames] == [
        f"step {n} of 3" for n in (0, 1, 2, 2, 3)]
    assert slept[-1] == 1.5  # the finished page stays for a moment


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_after_an_error_the_terminal_is_left_as_it_was_at_once(monkeypatch, slept, error):
    def states():
        yield STATES[1]
        raise error
    monkeypatch.setattr(sys, "stdout", Terminal())
    with pytest.raises(error):
        follow(states(), animate=True)
    assert sys.stdout.getvalue().endswith(RESTORE) and max(slept) < 0.1


def test_without_a_terminal_nothing_is_animated(capsys, slept):
    follow(STATES[1:2], animate=True)
    assert capsys.readouterr().out == "" and not slept


def test_a_terminal_is_shown_no_control_characters_and_a_file_gets_the_text(monkeypatch):
    assert shown([0, 3, 2, 1], CHARS) == "a\x1b\nb"
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert shown([0, 3, 2, 1], CHARS) == "a\\x1b\nb"


# -----------------------------------------------------------------------------
# the replay page

def test_a_replay_is_one_safe_page(tmp_path):
    text = '</script>&\u2028"\\{{RUN}}'
    chars = sorted(set(text))
    start = torch.full((1, len(text)), 99)
    end = torch.tensor([[chars.index(c) for c in text]])
    save_replay(tmp_path / "r.html", [start, end], 99, chars)
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert html.count("</script>") == 2 and replay(html)[:2] == ([text], 1)
    assert "<" not in html[html.index('"application/json">') + 19:].split("</script>")[0]
    assert not re.search(r"https?://|src=|<link|@import", html)  # no external resource
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_a_replay_shows_what_is_masked_again(tmp_path):
    """Or where a search goes back to another token. A state without a change is no step."""
    states = [torch.tensor([row]) for row in ([9, 9, 0], [1, 9, 0], [1, 0, 0], [9, 1, 0], [0, 1, 0],
                                              [0, 1, 0])]
    save_replay(tmp_path / "r.html", states, 9, "ab")
    pages, passes, run = replay((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert run["start"] == [[None, None, "a"]] and pages == ["aba"] and passes == 3
    assert run["changes"] == [[[0, 0, "b"]], [[0, 1, "a"]], [[0, 0, None], [0, 1, "b"]],
                              [[0, 0, "a"]]]


# -----------------------------------------------------------------------------
# the command

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_gpt(tmp_path_factory.mktemp("model") / "tiny.pt", LETTERS, 24)


def test_html_replays_the_run(sample, checkpoint, tmp_path):
    path = tmp_path / "run.html"
    path.write_text("old")
    result = sample(f"--path={checkpoint}", f"--html={path}", "--num_samples=2", "--steps=7",
                    "--gen_length=40", "--revise=0.3")
    pages, passes, run = replay(path.read_text(encoding="utf-8"))
    assert result.code == 0 and [page + "\n" for page in pages] == result.out.split("\f")
    assert f"[{passes} steps in " in result.err and len(run["changes"]) > passes
    assert passes == 3 * 7  # windows, and the steps of each


def test_animate_without_a_terminal_writes_the_same_text(sample, checkpoint):
    plain_text = sample(f"--path={checkpoint}").out
    assert sample(f"--path={checkpoint}", "--animate").out == plain_text != ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudoterminal")
@pytest.mark.parametrize("interrupt", [False, True])
def test_animate_leaves_a_real_terminal_as_it_was(checkpoint, interrupt):
    ours, theirs = os.openpty()
    command = [sys.executable, ROOT / "main.py", f"--path={checkpoint}", "--animate",
               "--device=cpu", f"--steps={200 if interrupt else 20}", "--revise=0.2"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE,
                               text=True)
    os.close(theirs)
    shown, sent = b"", False
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # what Linux says when the other end is closed
            break
        if not chunk:
            break
        shown += chunk
        if interrupt and not sent and shown.count(HOME.encode()) >= 5:
            process.send_signal(signal.SIGINT)
            sent = True
    err = process.communicate(timeout=30)[1]
    os.close(ours)
    assert process.returncode == (130 if interrupt else 0) and "Traceback" not in err, err
    screen, after = shown.decode().split(RESTORE)
    assert screen.startswith(HIDE) and "\x1b" not in after
    frames = 1 + 20 + 15  # the start, the passes, and what three quarters of them mask again
    if interrupt:
        assert "step 200 of 200" not in screen and after == ""
    else:
        assert screen.count(HOME) == frames and len(after.strip()) == 24
        assert "step 0 of 20" in screen and "step 20 of 20" in screen
