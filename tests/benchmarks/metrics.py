"""
What the benchmarks of generated text measure. Pages are written and timed, and then scored: by a
judge, which is an autoregressive model, and by a few counts.

    python tests/benchmarks/metrics.py    # draw assets/{sampling,claims}.png again from the tables

Pages are scored in groups of 8, because some counts depend on how many pages are looked at
together. The tables report the mean over the groups and its standard error. The target is real
validation text, cut into pages and scored in the same way. A "better" score than that of real text
is not better: repetition, for example, pleases the judge.
"""

import argparse
import math
import re
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from diffusion import unmask
from lib.tokenizer import encode
from lib.twin import left_to_right, next_token_losses

ROOT = Path(__file__).resolve().parents[2]
GROUP = 8  # pages that are scored together
JUDGED, WORDS, DISTINCT = "judged nats", "words that exist", "distinct 4-grams"
SCORES = (JUDGED, WORDS, DISTINCT)
TITLES = {  # of the pictures
    "sampling": "How near to real text does each setting of main.py write?",
    "claims": "What diffusion and its twin write, beside real text",
}


def words_of(text):
    return re.findall(r"[a-z']+", text.lower())


def ngrams(text, n):
    return [text[i:i + n] for i in range(len(text) - n + 1)]


class Metrics:
    """The scores of pages. judge: a causal GPT in eval mode, of another seed and size than what it
    judges; its vocabulary vocab holds characters only. Without a judge, its score is left out."""

    def __init__(self, judge, vocab, train_text):
        self.judge, self.vocab = judge, vocab
        self.known = set(words_of(train_text))

    @torch.no_grad()
    def judged(self, pages):
        """Return the negative log-likelihood under the judge, in nats per character."""
        ids = torch.tensor([encode(page, self.vocab).tolist() for page in pages])
        return next_token_losses(self.judge, self.judge.config.mask_id, ids).mean().item()

    def of_group(self, pages):
        # a page cuts words at both ends
        words = [word for page in pages for word in words_of(page)[1:-1]]
        fours = [gram for page in pages for gram in ngrams(page, 4)]
        judged = {JUDGED: self.judged(pages)} if self.judge else {}
        return {
            **judged,
            WORDS: sum(word in self.known for word in words) / max(1, len(words)),
            DISTINCT: len(set(fours)) / len(fours),
        }

    def __call__(self, pages):
        """Return {name: (mean over groups of 8, standard error)} for pages, strings of equal
        length, whose number is a multiple of 8."""
        groups = [self.of_group(pages[i:i + GROUP]) for i in range(0, len(pages), GROUP)]
        columns = {name: torch.tensor([group[name] for group in groups], dtype=torch.float64)
                   for name in groups[0]}
        return {name: (x.mean().item(), x.std().item() / math.sqrt(len(x)))
                for name, x in columns.items()}


def cut(text, length):
    """Cut all of a real text into pages. The pages of a group stand far apart in the text, because
    generated pages do not continue each other, either."""
    groups = len(text) // length // GROUP
    stride = (len(text) - length) // (groups * GROUP - 1)
    starts = [stride * (i * groups + g) for g in range(groups) for i in range(GROUP)]
    return [text[start:start + length] for start in starts]


def write(model, how, pages, batch):
    """Write pages of one block with unmask(**how) or, if the model is causal, with
    left_to_right(**how), batch of them at a time. Returns the ids (pages, T), the seconds per page
    and the steps per batch."""
    T, mask_id, device = model.config.block_size, model.config.mask_id, model.wte.weight.device
    done, spent, steps, generator = [], 0.0, 0, torch.Generator(device).manual_seed(1)
    while len(done) < pages:
        x = torch.full((batch, T), mask_id, device=device)
        states = (left_to_right if model.config.causal else unmask)(
            model, x, mask_id, generator=generator, **how)
        start = time.perf_counter()
        steps = 0
        for state in states:  # in a step, the masks become fewer
            steps += int((state == mask_id).sum() < (x == mask_id).sum())
            x = state
        spent += time.perf_counter() - start
        done += x.tolist()
    return done, spent / len(done), steps


# -----------------------------------------------------------------------------
# the picture

def draw(rows, path, title):
    """Draw the rows (name, distinct 4-grams, judged nats), of which the first is real text, and
    write the picture to path. Rows whose names begin with "the twin" have a colour of their own."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 5.2), layout="constrained")
    for name, x, y in rows[1:]:
        colour, marker = ("C3", "s") if name.startswith("the twin") else ("C0", "o")
        ax.plot(x, y, marker, color=colour, ms=8)
        ax.annotate(name, (x, y), (0, 9), textcoords="offset points", color=colour, ha="center",
                    fontsize=9)
    _, x, y = rows[0]
    ax.plot(x, y, "k*", ms=16)
    ax.annotate("real text (the target)", (x, y), (0, 11), textcoords="offset points", ha="center")
    ax.set(xlabel="distinct 4-grams: a low value means that the text repeats itself",
           ylabel="judged nats per character:\na low value means that the text is predictable")
    ax.set_title(title, fontsize=12, pad=10)
    ax.margins(x=0.28, y=0.12)
    ax.grid(alpha=0.2)
    fig.savefig(path, dpi=110)


def rows_of(table):
    """Return the rows of a .md file's first table with both scores, as draw takes them."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in table.read_text(encoding="utf-8").splitlines()]
    start = next(i for i, row in enumerate(rows) if JUDGED in row and DISTINCT in row)
    columns = rows[start].index(DISTINCT), rows[start].index(JUDGED)
    end = rows.index([], start)
    return [(row[0], *(float(row[i].split()[0]) for i in columns)) for row in rows[start + 2:end]]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, title in TITLES.items():
        table = Path(__file__).with_name(f"{name}.md")
        draw(rows_of(table), ROOT / "assets" / f"{name}.png", title)
