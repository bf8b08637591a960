"""
Watching text being written: a progress bar, the terminal animation, and the replay page.
"""

import json
import shutil
import sys
import time
from pathlib import Path

from tqdm import tqdm

from lib.common import write_atomically

TEMPLATE = Path(__file__).resolve().parents[1] / "assets" / "replay.html"


class Watcher:
    """Follows the states of a page, (B, T) tensors: counts the forward passes, keeps the states for
    the replay, and shows a progress bar or, with animate, the first row in the terminal. A context
    manager; afterwards the terminal is as it was."""

    def __init__(self, page, steps, vocab, mask_id, animate=False):
        self.states, self.passes, self.steps = [page], 0, steps
        self.vocab, self.mask_id = vocab, mask_id
        self.animate = animate and sys.stdout.isatty()
        self.bar = tqdm(total=steps, desc="unmasking", unit="step", leave=False, delay=0.1,
                        disable=self.animate or None)  # None: unless stderr is a terminal

    def __enter__(self):
        if self.animate:  # the alternate screen, without a cursor and without wrapping
            sys.stdout.write("\x1b[?1049h\x1b[?25l\x1b[?7l")
            self.draw(self.states[0])
        return self

    def __exit__(self, error, *_):
        self.bar.close()
        if self.animate:
            time.sleep(0 if error else 1.5)
            sys.stdout.write("\x1b[?7h\x1b[?25h\x1b[?1049l")
            sys.stdout.flush()

    def see(self, page, keep_all=False):
        before = self.states[-1]
        if (page == self.mask_id).sum() < (before == self.mask_id).sum():  # else: masked again
            self.passes += 1
            self.bar.update()
        self.states = [*self.states, page] if keep_all else [page]
        if self.animate:
            self.draw(before)

    def draw(self, before):
        footer = f"step {self.passes} of {max(self.steps, self.passes)}"
        rows = self.states[-1][0].tolist(), before[0].tolist()
        sys.stdout.write(frame(*rows, self.mask_id, self.vocab, footer, shutil.get_terminal_size()))
        sys.stdout.flush()
        time.sleep(0.05)


def frame(row, before, mask_id, vocab, footer, size):
    """Return what the terminal shows of a page: row and before are its ids (T,) now and a state
    ago; what has changed is highlighted. size: columns and lines of the terminal. Of a page that is
    too tall, the lines around the first mask are shown, or the last ones."""
    lines, column, first_mask = [""], 0, None
    for now, old in zip(row, before):
        for char in "░" if now == mask_id else vocab[now]:
            if char == "\n" or column == size[0]:
                lines.append("")
                column = 0
            if now == mask_id and first_mask is None:
                first_mask = len(lines) - 1
            if char != "\n":
                char = char if char.isprintable() else "·"
                style = "30;43" if now != old else "2" if now == mask_id else "0"
                lines[-1] += f"\x1b[{style}m{char}\x1b[0m"
                column += 1
    height = max(1, size[1] - 2)  # an empty line and the footer
    top = len(lines) if first_mask is None else first_mask - height // 2
    top = max(0, min(top, len(lines) - height))
    shown = [*lines[top:top + height], "", f"\x1b[2m{footer}\x1b[0m"]
    return "\x1b[H" + "\r\n".join(line + "\x1b[K" for line in shown) + "\x1b[J"


def save_replay(path, states, mask_id, vocab):
    """Write one self-contained page that replays a run: states, a list of (B, T) tensors."""
    states, token_of = [state.cpu() for state in states], {**dict(enumerate(vocab)), mask_id: None}
    start = [[token_of[i] for i in row] for row in states[0].tolist()]
    changes = [[(b, i, token_of[int(new[b, i])]) for b, i in (new != old).nonzero().tolist()]
               for old, new in zip(states, states[1:])]
    run = json.dumps(dict(start=start, changes=changes), separators=(",", ":"))
    html = TEMPLATE.read_text(encoding="utf-8").replace("{{RUN}}", run.replace("<", "\\u003c"))
    write_atomically(path, html.encode())  # without any "<", no tag can begin in run
