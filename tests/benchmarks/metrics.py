"""
What the benchmarks of generated text measure, and how: pages are written and timed, then scored by a judge and a few counts, cut
like real ones.

Pages are scored in groups of 8, since some counts depend on how many pages are looked at together; what is reported is the mean
over the groups and its standard error. Real validation text, cut the same way, is the mark: for every score but the judge's
there is a way to be "better" than real text that is worse, and a judge can be pleased by repetition.
"""

import math
import re
import time
from collections import Counter

import torch

from main import unmask, write_left_to_right
from train import next_token_losses

GROUP = 8


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
        """judge: a causal GPT (of another seed and size than what it judges) in eval mode; its vocabulary is chars."""
        self.judge, self.chars, self.train_text = judge, chars, train_text
        self.known = set(words_of(train_text))

    @torch.no_grad()
    def judged(self, pages):
        """Negative log-likelihood under the judge, in nats per character."""
        ids = torch.tensor([[self.chars.index(c) for c in page] for page in pages])
        return next_token_losses(self.judge, ids, self.judge.config.mask_id).mean().item()

    def of_group(self, pages):
        words = [word for page in pages for word in words_of(page)[1:-1]]  # a page cuts words at both ends
        fours = [gram for page in pages for gram in ngrams(page, 4)]
        eights = [ngrams(page, 8) for page in pages]
        others = [set().union(*eights[:i], *eights[i + 1:]) for i in range(len(pages))]
        return {
            "judged nats": self.judged(pages),
            "corpus words": sum(word in self.known for word in words) / max(1, len(words)),
            "distinct 4-grams": len(set(fours)) / len(fours),
            "repeated 8-grams": 1 - sum(len(set(grams)) for grams in eights) / sum(map(len, eights)),
            "shared 8-grams": sum(gram in o for grams, o in zip(eights, others) for gram in grams) / sum(map(len, eights)),
            "bits, characters": entropy("".join(pages)),
            "bits, words": entropy(words),
            "longest copy": sum(longest_copy(page, self.train_text) for page in pages) / len(pages),
        }

    def __call__(self, pages):
        """pages: strings of one length, a multiple of 8 of them. -> {name: (mean over groups of 8, standard error)}."""
        groups = [self.of_group(pages[i:i + GROUP]) for i in range(0, len(pages), GROUP)]
        columns = {name: torch.tensor([group[name] for group in groups], dtype=torch.float64) for name in groups[0]}
        return {name: (x.mean().item(), x.std().item() / math.sqrt(len(x))) for name, x in columns.items()}


def cut(text, length):
    """All of a real text as pages, in groups of 8 whose pages stand far apart, as generated ones do."""
    groups = len(text) // length // GROUP
    stride = (len(text) - length) // (groups * GROUP - 1)
    starts = [stride * (i * groups + g) for g in range(groups) for i in range(GROUP)]
    return [text[start:start + length] for start in starts]


def write(model, how, pages, batch):
    """Pages of one block, by unmask(**how) or, from a causal model, by write_left_to_right(**how), batch of them at a time.
    -> (ids (pages, T), seconds per page)."""
    T, mask_id, done, spent = model.config.block_size, model.config.mask_id, [], 0.0
    generator = torch.Generator().manual_seed(1)
    while len(done) < pages:
        x = torch.full((batch, T), mask_id)
        start = time.perf_counter()
        *_, x = (write_left_to_right if model.config.causal else unmask)(model, x, mask_id, generator=generator, **how)
        spent += time.perf_counter() - start
        done += x.tolist()
    return done, spent / len(done)


def name_of(how):
    """What a row of a table calls unmask(**how)."""
    extra = [f"blocks of {how['block_length']}"] if how.get("block_length") else []
    extra += [f"remask {how['remask']}"] if how.get("remask") else []
    return ", ".join([how["remasking"], f"temperature {how['temperature']}", f"{how['steps']} steps", *extra])


def draw(groups, real, path, title):
    """groups: {label: [(distinct 4-grams, judged nats, text beside the point), ...]}, joined by lines; real: its two scores."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(10, 5))
    for marker, (label, points) in zip("os^Dvp*X", groups.items()):
        ax.plot([p[0] for p in points], [p[1] for p in points], marker + "-", label=label)
        for i, (x, y, text) in enumerate(points):
            ax.annotate(text, (x, y), fontsize=7, xytext=(7 if i % 2 else -7, -3), ha="left" if i % 2 else "right",
                        textcoords="offset points")
    ax.plot(*real, "k*", markersize=14, label="real text")
    ax.set(xlabel="distinct 4-grams (share, 8 pages of 256 characters)", ylabel="judged nats per character", title=title)
    ax.margins(x=0.15)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    fig.tight_layout()
    fig.savefig(path, dpi=150)
