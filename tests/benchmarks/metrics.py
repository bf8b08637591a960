"""
What the benchmarks of generated text measure, and how: a judge and a few counts, on pages cut like real ones.

Pages are scored in groups of 8, since some counts depend on how many pages are looked at together; what is reported is the mean
over the groups and its standard error. Real validation text, cut the same way, is the mark: for every score but the judge's
there is a way to be "better" than real text that is worse, and a judge can be pleased by repetition.
"""

import math
import re
from collections import Counter

import torch

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


def cut(text, pages, length):
    """Pages of real text, spread evenly."""
    stride = (len(text) - length) // (pages - 1)
    return [text[i * stride:i * stride + length] for i in range(pages)]
