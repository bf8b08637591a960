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
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from diffusion import unmask
from lib.tokenizer import encode
from lib.twin import left_to_right, next_token_losses
from main import PAGE

ROOT = Path(__file__).resolve().parents[2]
GROUP = 8  # pages that are scored together
JUDGED, DISTINCT = "judged nats", "distinct 4-grams"
TITLES = {  # of the pictures
    "sampling": "How near to real text does each setting write?",
    "claims": "After equal training time, the autoregressive twin's text is closer "
              "to real text than diffusion's",
}
LABELS = {  # what the legend says of a row whose name begins like this, without and with revision
    "LLaDA's rule": ("LLaDA's rule: low confidence, 256 steps",) * 2,
    "random": ("random order", "random order with revision"),
    "low_confidence": ("low confidence", "low confidence with revision"),
    "dilated": ("spread apart (dilated)", "dilated with revision"),
    "the twin": ("autoregressive twin",) * 2,
    "twin": ("autoregressive twin",) * 2,
}


def words_of(text):
    return re.findall(r"[a-z']+", text.lower())


def ngrams(text, n):
    return [text[i:i + n] for i in range(len(text) - n + 1)]


def entropy(items):
    """Return the entropy of the distribution of items, in bits."""
    counts = Counter(items)
    return -sum(c / counts.total() * math.log2(c / counts.total()) for c in counts.values())


def longest_copy(page, text):
    """Return the length of the longest piece of page that also occurs in text."""
    best = 0
    for i in range(len(page)):
        while i + best < len(page) and page[i:i + best + 1] in text:
            best += 1
    return best


class Metrics:
    """The scores of pages. judge: a causal GPT in eval mode, of another seed and size than what it
    judges; its vocabulary vocab holds characters only. Without a judge, its score is left out."""

    def __init__(self, judge, vocab, train_text):
        self.judge, self.vocab, self.train_text = judge, vocab, train_text
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
        eights = [ngrams(page, 8) for page in pages]
        others = [set().union(*eights[:i], *eights[i + 1:]) for i in range(len(pages))]
        n_eights = sum(map(len, eights))
        shared = sum(gram in other for grams, other in zip(eights, others) for gram in grams)
        judged = {JUDGED: self.judged(pages)} if self.judge else {}
        return {
            **judged,
            "corpus words": sum(word in self.known for word in words) / max(1, len(words)),
            DISTINCT: len(set(fours)) / len(fours),
            "repeated 8-grams": 1 - sum(len(set(grams)) for grams in eights) / n_eights,
            "shared 8-grams": shared / n_eights,
            "bits, characters": entropy("".join(pages)),
            "bits, words": entropy(words),
            "longest copy": sum(longest_copy(page, self.train_text) for page in pages) / len(pages),
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
    T, mask_id, done, spent, steps = model.config.block_size, model.config.mask_id, [], 0.0, 0
    generator = torch.Generator().manual_seed(1)
    while len(done) < pages:
        x = torch.full((batch, T), mask_id)
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


def name_of(how):
    """Return the name of unmask(**how) in a table."""
    extra = [f"revise {how['revise']}"] if how.get("revise") else []
    return ", ".join([how["remasking"], f"temperature {how['temperature']}",
                      f"{how['steps']} steps", *extra])


# -----------------------------------------------------------------------------
# the picture

def describe(name):
    """Return three things about the row of this name: its entry in the legend, the text beside its
    point, and whether a line joins it to other points of the entry. A line joins points whose
    settings differ in one number alone."""
    rule, *settings = name.split(", ")
    revised = any(setting.startswith("revise") for setting in settings)
    label = LABELS[rule][revised]
    if rule == "LLaDA's rule":
        return label, "256 steps", False
    if "twin" in rule:
        return label, settings[0], True
    temperature, steps, *rest = settings
    defaults = [f"{name} {PAGE[name]}" for name in ("temperature", "revise")]
    usual = defaults if revised else [temperature]
    unusual = [setting for setting in (temperature, *rest) if setting not in usual]
    return label, ", ".join([steps, *unusual]), not unusual


def draw(rows, path, title):
    """Draw the rows (name, distinct 4-grams, judged nats), of which the first is real text, and
    write the picture to path."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(10, 7.2), layout="constrained")
    groups = {}
    for name, *point in rows[1:]:
        label, text, joined = describe(name)
        groups.setdefault(label, []).append((*point, text, joined))
    labels = list(dict.fromkeys(label for pair in LABELS.values() for label in pair))
    for label, points in groups.items():
        style = labels.index(label)  # the same in every picture
        line = sorted((y, x) for x, y, _, joined in points if joined)
        ax.plot([x for _, x in line], [y for y, _ in line], "-", lw=1, color=f"C{style}")
        ax.plot([p[0] for p in points], [p[1] for p in points], "os^XPDvp"[style], ms=7.5,
                color=f"C{style}", label=label)
    _, *real = rows[0]
    ax.plot(*real, "k*", ms=16, label="real text (the target)")
    ax.set(xlabel="diversity: share of distinct 4-grams",
           ylabel="likelihood of the text according to a third model,\n"
                  "nats per character (lower: more predictable)")
    ax.set_title(title, fontsize=12, pad=10)
    ax.margins(x=0.12, y=0.08)
    ax.grid(alpha=0.2)
    fig.legend(loc="outside lower center", ncols=2, frameon=False)
    place_labels(fig, ax, [(x, y, text, f"C{labels.index(label)}")
                           for label, points in groups.items() for x, y, text, _ in points], real)
    fig.savefig(path, dpi=120)


def place_labels(fig, ax, points, real):
    """Write the text of each point (x, y, text, colour) where it covers no other text, point or
    line, as near as possible, and join it to its point by a thin line of the same colour."""
    from matplotlib.transforms import Bbox
    fig.canvas.draw()
    fig.set_layout_engine("none")  # what is measured now stays where it is
    taken = []
    for line in ax.lines:  # small boxes along the lines and around the points
        xy = ax.transData.transform(line.get_xydata())
        for (x0, y0), (x1, y1) in zip(xy, xy[1:] if line.get_linestyle() == "-" else []):
            taken += [Bbox.from_bounds(x0 + (x1 - x0) * i / 50 - 2, y0 + (y1 - y0) * i / 50 - 2,
                                       4, 4) for i in range(51)]
    for x, y in ax.transData.transform([real, *(point[:2] for point in points)]):
        taken.append(Bbox.from_bounds(x - 13, y - 13, 26, 26))
    spots = [(distance * math.cos(angle), distance * math.sin(angle))
             for distance in (12, 18, 26, 40, 60, 90, 130)
             for angle in (k * math.pi / 8 for k in range(16))]
    for x, y, text, colour in sorted(points):
        for dx, dy in spots:
            label = ax.annotate(text, (x, y), (dx, dy), textcoords="offset points", fontsize=9,
                                ha="left" if dx > 1 else "right" if dx < -1 else "center",
                                va="center", color=colour,
                                arrowprops=dict(arrowstyle="-", lw=0.6, color=colour, shrinkB=4))
            text_box = Bbox.from_extents(*text_extents(label))
            inside = ax.bbox.contains(*text_box.min) and ax.bbox.contains(*text_box.max)
            if inside and not any(text_box.overlaps(other) for other in taken):
                break
            label.remove()
        taken.append(text_box)


def text_extents(label):
    """Return the extents of the text alone, without the line to its point."""
    from matplotlib.text import Text
    label.update_positions(label.figure.canvas.get_renderer())
    return Text.get_window_extent(label).extents


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
