"""
What the benchmarks of generated text measure, and how: pages are written and timed, then scored by
a judge and a few counts, cut like real ones.

    python tests/benchmarks/metrics.py    # draw assets/{sampling,claims}.png again from the tables

Pages are scored in groups of 8, since some counts depend on how many pages are looked at together;
what is reported is the mean over the groups and its standard error. Real validation text, cut the
same way, is the target: for every score but the judge's there is a way to be "better" than real
text that is worse, and a judge can be pleased by repetition.
"""

import math
import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from main import DEFAULTS, left_to_right, unmask  # noqa: E402
from train import next_token_losses  # noqa: E402

GROUP = 8
JUDGED, DISTINCT = "judged nats", "distinct 4-grams"
TITLES = {  # of the pictures
    "sampling": "In likelihood and in diversity, the default is near to real text",
    "claims": "After equal training time, the autoregressive twin's text is closer "
              "to real text than diffusion's",
}
LABELS = {  # what the legend says of a row whose name begins like this, without and with revision
    "LLaDA's rule": ("LLaDA's rule: low confidence, 256 passes",) * 2,
    "random": ("random order", "random order with revision"),
    "low_confidence": ("low confidence", "low confidence with revision"),
    "dilated": ("spread apart (dilated)", "dilated with revision (the default)"),
    "the twin": ("autoregressive twin",) * 2,
    "twin": ("autoregressive twin",) * 2,
}


def words_of(text):
    return re.findall(r"[a-z']+", text.lower())


def ngrams(text, n):
    return [text[i:i + n] for i in range(len(text) - n + 1)]


def entropy(items):
    """Of the distribution of items, in bits."""
    counts = Counter(items)
    return -sum(c / counts.total() * math.log2(c / counts.total()) for c in counts.values())


def longest_copy(page, text):
    """The length of the longest piece of page that stands in text as it is."""
    best = 0
    for i in range(len(page)):
        while i + best < len(page) and page[i:i + best + 1] in text:
            best += 1
    return best


class Metrics:
    def __init__(self, judge, chars, train_text):
        """judge: a causal GPT (of another seed and size than what it judges) in eval mode; its
        vocabulary is chars."""
        self.judge, self.chars, self.train_text = judge, chars, train_text
        self.known = set(words_of(train_text))

    @torch.no_grad()
    def judged(self, pages):
        """Negative log-likelihood under the judge, in nats per character."""
        ids = torch.tensor([[self.chars.index(c) for c in page] for page in pages])
        return next_token_losses(self.judge, self.judge.config.mask_id, ids).mean().item()

    def of_group(self, pages):
        # a page cuts words at both ends
        words = [word for page in pages for word in words_of(page)[1:-1]]
        fours = [gram for page in pages for gram in ngrams(page, 4)]
        eights = [ngrams(page, 8) for page in pages]
        others = [set().union(*eights[:i], *eights[i + 1:]) for i in range(len(pages))]
        n_eights = sum(map(len, eights))
        shared = sum(gram in other for grams, other in zip(eights, others) for gram in grams)
        return {
            JUDGED: self.judged(pages),
            "corpus words": sum(word in self.known for word in words) / max(1, len(words)),
            DISTINCT: len(set(fours)) / len(fours),
            "repeated 8-grams": 1 - sum(len(set(grams)) for grams in eights) / n_eights,
            "shared 8-grams": shared / n_eights,
            "bits, characters": entropy("".join(pages)),
            "bits, words": entropy(words),
            "longest copy": sum(longest_copy(page, self.train_text) for page in pages) / len(pages),
        }

    def __call__(self, pages):
        """pages: strings of one length, a multiple of 8 of them. -> {name: (mean over groups of 8,
        standard error)}."""
        groups = [self.of_group(pages[i:i + GROUP]) for i in range(0, len(pages), GROUP)]
        columns = {name: torch.tensor([group[name] for group in groups], dtype=torch.float64)
                   for name in groups[0]}
        return {name: (x.mean().item(), x.std().item() / math.sqrt(len(x)))
                for name, x in columns.items()}


def cut(text, length):
    """All of a real text as pages, in groups of 8 whose pages stand far apart, as generated ones
    do."""
    groups = len(text) // length // GROUP
    stride = (len(text) - length) // (groups * GROUP - 1)
    starts = [stride * (i * groups + g) for g in range(groups) for i in range(GROUP)]
    return [text[start:start + length] for start in starts]


def write(model, how, pages, batch):
    """Pages of one block, by unmask(**how) or, from a causal model, by left_to_right(**how), batch
    of them at a time. -> (ids (pages, T), seconds per page, forward passes per batch)."""
    T, mask_id, done, spent, passes = model.config.block_size, model.config.mask_id, [], 0.0, 0
    generator = torch.Generator().manual_seed(1)
    while len(done) < pages:
        x = torch.full((batch, T), mask_id)
        states = (left_to_right if model.config.causal else unmask)(
            model, x, mask_id, generator=generator, **how)
        start = time.perf_counter()
        passes = 0
        for state in states:  # where masks have become fewer, there was a forward pass
            passes += int((state == mask_id).sum() < (x == mask_id).sum())
            x = state
        spent += time.perf_counter() - start
        done += x.tolist()
    return done, spent / len(done), passes


def name_of(how):
    """What a row of a table calls unmask(**how)."""
    extra = [f"blocks of {how['block_length']}"] if how.get("block_length") else []
    extra += [f"revise {how['revise']}"] if how.get("revise") else []
    return ", ".join([how["remasking"], f"temperature {how['temperature']}",
                      f"{how['steps']} steps", *extra])


# -----------------------------------------------------------------------------
# the picture

def describe(name):
    """The name of a row -> (its entry in the legend, the text beside its point, whether a line
    joins it to the other points of the entry, which differ in one number alone)."""
    rule, *settings = name.replace("steps", "passes").split(", ")
    revised = any(setting.startswith("revise") for setting in settings)
    label = LABELS[rule][revised]
    if rule == "LLaDA's rule":
        return label, "256 passes", False
    if "twin" in rule:
        return label, settings[0], True
    temperature, passes, *rest = settings
    defaults = [f"{name} {DEFAULTS[name]}" for name in ("temperature", "revise")]
    usual = defaults if revised else [temperature]
    unusual = [setting for setting in (temperature, *rest) if setting not in usual]
    return label, ", ".join([passes, *unusual]), not unusual


def draw(rows, path, title):
    """rows: (name, distinct 4-grams, judged nats); the first is real text. A label stands where it
    covers no other label, point or line."""
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
    place_labels(fig, ax, [point for points in groups.values() for point in points], real)
    fig.savefig(path, dpi=120)


def place_labels(fig, ax, points, real):
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
    for x, y, text, _ in sorted(points):
        spots = [(distance * dx, distance * dy, ha, va) for distance in (9, 14, 20, 28)
                 for dx, dy, ha, va in ((1, 0, "left", "center"), (-1, 0, "right", "center"),
                                        (0, 1, "center", "bottom"), (0, -1, "center", "top"),
                                        (-.7, .7, "right", "bottom"), (.7, -.7, "left", "top"),
                                        (-.7, -.7, "right", "top"), (.7, .7, "left", "bottom"))]
        for dx, dy, ha, va in spots:
            label = ax.annotate(text, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va,
                                fontsize=9)
            box = label.get_window_extent()
            inside = ax.bbox.contains(*box.min) and ax.bbox.contains(*box.max)
            if inside and not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        taken.append(box)


def rows_of(table):
    """The first table of a .md file with both scores -> the rows that draw wants."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in table.read_text(encoding="utf-8").splitlines()]
    start = next(i for i, row in enumerate(rows) if JUDGED in row and DISTINCT in row)
    columns = rows[start].index(DISTINCT), rows[start].index(JUDGED)
    end = rows.index([], start)
    return [(row[0], *(float(row[i].split()[0]) for i in columns)) for row in rows[start + 2:end]]


if __name__ == "__main__":
    for name, title in TITLES.items():
        table = Path(__file__).with_name(f"{name}.md")
        draw(rows_of(table), ROOT / "assets" / f"{name}.png", title)
