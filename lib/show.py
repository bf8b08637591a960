"""
Watching text being written: a progress bar, the terminal animation, and the replay page.
"""

import json
import shutil
import sys
import time
import unicodedata
from contextlib import contextmanager, nullcontext
from pathlib import Path

from tqdm import tqdm

from lib.common import printable, write_atomically
from lib.tokenizer import decode

TEMPLATE = Path(__file__).resolve().parents[1] / "assets" / "replay.html"


def watch(states, page, steps, vocab, mask_id, config):
    """Go through the states (B, T) of a page while it is written, about steps forward passes, and
    show a progress bar or, with config.animate, the first row in the terminal. Returns the states
    for save_replay (without config.html, the last one alone) and a line that sums up the run."""
    kept, passes, started = [page], 0, time.perf_counter()
    animate = config.animate and sys.stdout.isatty()
    bar = tqdm(total=steps, desc="unmasking", unit="step", leave=False, delay=0.1,
               disable=animate or None)  # None: unless stderr is a terminal

    def draw(state):
        footer = f"step {passes} of {max(steps, passes)}"
        print(frame(state[0].tolist(), kept[-1][0].tolist(), mask_id, vocab, footer,
                    shutil.get_terminal_size()), end="", flush=True)
        time.sleep(0.05)

    with bar, animation() if animate else nullcontext():
        if animate:
            draw(page)
        for state in states:
            if (state == mask_id).sum() < (kept[-1] == mask_id).sum():  # else: masked again
                passes += 1
                bar.update()
            if animate:
                draw(state)
            kept = [*kept, state] if config.html else [state]
    seconds = time.perf_counter() - started
    return kept, f"[{passes} steps in {seconds:.1f} s; seed {config.seed}]"


def shown(ids, vocab, ends=""):
    """Return the text of ids, up to the first of the characters ends, and with escapes for control
    characters if it goes to a terminal."""
    text = decode(ids, vocab)
    for end in ends:
        text = text.split(end)[0]
    return printable(text) if sys.stdout.isatty() else text


@contextmanager
def animation():
    """The terminal's alternate screen, without a cursor and without wrapping; afterwards the
    terminal is as it was."""
    sys.stdout.write("\x1b[?1049h\x1b[?25l\x1b[?7l")
    try:
        yield
        time.sleep(1.5)
    finally:
        print("\x1b[?7h\x1b[?25h\x1b[?1049l", end="", flush=True)


def columns_of(char):
    """Return how many columns a terminal gives a character."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def frame(row, before, mask_id, vocab, footer, size):
    """Return what the terminal shows of a page: row and before are its ids (T,) now and a state
    ago; what has changed is highlighted. size: columns and lines of the terminal. Of a page that is
    too tall, the lines around the first mask are shown, or the last ones."""
    lines, column, first_mask = [""], 0, None
    for now, old in zip(row, before):
        for char in "░" if now == mask_id else vocab[now]:
            char = char if char.isprintable() or char == "\n" else "·"
            width = columns_of(char)
            if char == "\n" or column + width > size[0]:
                lines.append("")
                column = 0
            if now == mask_id and first_mask is None:
                first_mask = len(lines) - 1
            if char != "\n":
                style = "30;43" if now != old else "2" if now == mask_id else "0"
                lines[-1] += f"\x1b[{style}m{char}\x1b[0m"
                column += width
    height = max(1, size[1] - 2)  # an empty line and the footer
    top = len(lines) if first_mask is None else first_mask - height // 2
    top = max(0, min(top, len(lines) - height))
    shown = [*lines[top:top + height], "", f"\x1b[2m{footer}\x1b[0m"]
    return "\x1b[H" + "\r\n".join(line + "\x1b[K" for line in shown) + "\x1b[J"


def save_replay(path, states, mask_id, vocab):
    """Write one self-contained page that replays a run: states, a list of (B, T) tensors. A state
    that is equal to the one before it is left out."""
    states, token_of = [state.cpu() for state in states], {**dict(enumerate(vocab)), mask_id: None}
    start = [[token_of[i] for i in row] for row in states[0].tolist()]
    changes = [[(b, i, token_of[int(new[b, i])]) for b, i in (new != old).nonzero().tolist()]
               for old, new in zip(states, states[1:])]
    run = json.dumps(dict(start=start, changes=[*filter(None, changes)]), separators=(",", ":"))
    html = TEMPLATE.read_text(encoding="utf-8").replace("{{RUN}}", run.replace("<", "\\u003c"))
    write_atomically(path, html.encode())  # without any "<", no tag can begin in run
