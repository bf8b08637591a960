"""
What a token is: a character, or a word piece. A vocabulary is a list of different, non-empty
strings; the id of a token is its place in the list. ([MASK] has one more id, and no string.)

    from lib.tokenizer import decode, encode, learn_pieces
    vocab = learn_pieces(text, 512)   # learn_pieces(text): the characters alone
    ids = encode(text, vocab)         # (N,) uint16
    decode(ids, vocab) == text

Pieces are learned by byte-pair encoding (R. Sennrich et al., arXiv 1508.07909), on characters
instead of bytes: begin with the characters, join the most frequent pair of neighbours to a new
piece, repeat.
"""

import heapq
import re
import unicodedata
from array import array
from collections import Counter, defaultdict

import numpy as np

from lib.common import check

MAX_TOKENS = 65_535  # tokens of a vocabulary: ids are uint16, and [MASK] needs one
# No piece crosses the border of a word: a run of letters and digits, or of other signs, with the
# space before it. All other white space stands alone, so no piece crosses a line's end either.
# (A text without spaces is cut into words of 32 characters.) Combining marks, such as the vowel
# signs of Hindi, and zero-width joiners belong to the word that they stand in.
MARKS = "\u200c\u200d" + "".join(
    char for char in map(chr, [*range(0x300, 0x1F000), *range(0xE0100, 0xE01F0)])
    if unicodedata.category(char)[0] == "M")
WORD = re.compile(rf" ?\w[\w{MARKS}]{{0,31}}| ?[^\w\s]{{1,32}}|\s")


def learn_pieces(text, vocab_size=None, alphabet=()):
    """Return a vocabulary: the characters of text and alphabet, sorted, and then word pieces in the
    order in which they were learned, up to vocab_size (None: no pieces) or until no pair of
    neighbours occurs twice. Deterministic. ValueError if vocab_size does not fit the characters, or
    uint16 ids."""
    vocab = dict.fromkeys(sorted(set(text) | set(alphabet)))  # a set that keeps its order
    vocab_size = len(vocab) if vocab_size is None else vocab_size
    check(len(vocab) <= vocab_size <= MAX_TOKENS, f"{len(vocab):,} different characters, so "
          f"--vocab_size must be from there to {MAX_TOKENS:,}, not {vocab_size:,}")
    n_words = Counter(word[0] for word in WORD.finditer(text))
    parts_of = {word: list(word) for word in n_words}        # how each word is divided so far
    counts, words_with = Counter(), defaultdict(set)         # of each pair of neighbours

    def count(word, sign):
        pairs = list(zip(parts_of[word], parts_of[word][1:]))
        for pair in pairs:
            counts[pair] += sign * n_words[word]
            words_with[pair].add(word)
        return pairs

    for word in parts_of:
        count(word, 1)
    queue = [(-n, pair) for pair, n in counts.items()]       # the most frequent pair first
    heapq.heapify(queue)
    while queue and len(vocab) < vocab_size:
        n, pair = heapq.heappop(queue)
        if -n != counts[pair]:                               # out of date; the true count is queued
            continue
        if counts[pair] < 2:
            break
        changed = set()
        for word in words_with.pop(pair):
            changed.update(count(word, -1))
            parts_of[word] = join(parts_of[word], pair)
            changed.update(count(word, 1))
        for other in changed - {pair}:
            heapq.heappush(queue, (-counts[other], other))
        vocab["".join(pair)] = None                          # two pairs may make the same piece
    return list(vocab)


def join(parts, pair):
    """Join the two parts of pair wherever they are neighbours in the list parts, from the left."""
    joined, i = [], 0
    while i < len(parts):
        both = tuple(parts[i:i + 2]) == pair
        joined.append("".join(pair) if both else parts[i])
        i += 2 if both else 1
    return joined


def encode(text, vocab, holes="", mask_id=None):
    """Return the ids of text, (N,) uint16. A word is divided into characters; then the neighbours
    that make the piece of the lowest id are joined, again and again. Every character that is in the
    string holes becomes mask_id; the text on either side of it is encoded by itself. ValueError for
    characters that vocab does not have."""
    id_of = {token: i for i, token in enumerate(vocab)} | dict.fromkeys(holes, mask_id)
    composed = unicodedata.normalize("NFC", text)  # an accent may be a character, or part of one
    if not set(text) <= set(id_of) and set(composed) <= set(id_of):
        text = composed
    unknown = [f"{char!r} (U+{ord(char):04X})" for char in sorted(set(text) - set(id_of))]
    check(not unknown, f"characters that the model does not know: {' '.join(unknown[:20])}")
    if all(len(token) == 1 for token in vocab):
        return np.fromiter(map(id_of.get, text), dtype=np.uint16)
    ids, known = array("H"), {}                              # known: the ids of each word so far
    runs = re.split(f"([{re.escape(holes)}])", text) if holes else [text]
    for word in (match[0] for run in runs for match in WORD.finditer(run)):
        if word not in known:
            known[word] = encode_word(word, id_of)
        ids.extend(known[word])
    return np.array(ids, dtype=np.uint16)


def encode_word(word, id_of):
    """Return the ids of one word, a list."""
    parts = list(word)
    while len(parts) > 1:
        ranks = [id_of.get(a + b, MAX_TOKENS) for a, b in zip(parts, parts[1:])]
        if min(ranks) == MAX_TOKENS:
            break
        i = ranks.index(min(ranks))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return [id_of[part] for part in parts]


def decode(ids, vocab):
    """Return the text that ids, any sequence of integers, stand for."""
    return "".join(vocab[i] for i in ids)
