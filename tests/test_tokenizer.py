"""Word pieces: learned, encoded, and in all three commands."""

import io
import json
import random
import re
import sys
import unicodedata
from types import SimpleNamespace

import numpy as np
import prepare
import pytest
import torch
from conftest import assert_one_line_error
from helpers import replay, save_gpt

import main as main_script
import train as train_script
from diffusion import estimate_nelbo
from lib.checkpoint import load_checkpoint
from lib.data import characters_per_token
from lib.evaluate import measure
from lib.tokenizer import decode, encode, learn_pieces
from lib.twin import estimate_nll

ALPHABET = "abc AB'.\n\t\r\u2028é中\U0001f389\u0301_1"


def random_text(rng, length):
    return "".join(rng.choices(ALPHABET, weights=[9, 9, 9, 6] + [1] * (len(ALPHABET) - 4),
                               k=length))


def vocabulary(seed=0, size=60):
    return learn_pieces(random_text(random.Random(seed), 3_000), size, alphabet=ALPHABET)


def test_pieces_are_the_most_frequent_pairs():
    """By hand. Pairs of "ab abab abc": ab 4 times, then " ab" twice, as it follows a space."""
    assert learn_pieces("ab abab abc", 100) == [" ", "a", "b", "c", "ab", " ab"]
    assert learn_pieces("ab abab abc", 5) == [" ", "a", "b", "c", "ab"]
    assert learn_pieces("aaaa", 10) == ["a", "aa"]  # a second "aa aa" would occur once
    assert learn_pieces("ba ba", None, alphabet="z") == [" ", "a", "b", "z"]


def is_letter(char):
    return char.isalnum() or char == "_"


def is_mark(char):
    return unicodedata.category(char)[0] == "M" or char in "\u200c\u200d"


def words_of(text):
    """The words of a text, as they are defined: a run of letters, which may hold marks, or of other
    signs, at most 32 characters, with the space before it. Other white space stands alone."""
    words, i = [], 0
    while i < len(text):
        j = i + (text[i] == " " and not text[i + 1:i + 2].isspace())
        end = j + 1
        if j < len(text) and not text[j].isspace():
            def belongs(char, first=text[j]):
                if is_letter(first):
                    return is_letter(char) or is_mark(char)
                return not is_letter(char) and not char.isspace()
            while end < len(text) and end - j < 32 and belongs(text[end]):
                end += 1
        words.append(text[i:end])
        i = end
    return words


def naive_pieces(text, size):
    """Byte-pair encoding as it is defined: count all pairs anew for every piece. Returns the
    vocabulary and the tokens of the text."""
    words = [list(word) for word in words_of(text)]
    vocab = sorted(set(text))
    while len(vocab) < size:
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts or max(counts.values()) < 2:
            break
        a, b = min(counts, key=lambda pair: (-counts[pair], pair))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (a, b):
                    word[i:i + 2] = [a + b]
                i += 1
        if a + b not in vocab:
            vocab.append(a + b)
    return vocab, [token for word in words for token in word]


@pytest.mark.parametrize("seed", range(4))
def test_learning_agrees_with_the_definition(seed):
    text = random_text(random.Random(seed), 1_500)
    vocab = learn_pieces(text, 80)
    expected, _ = naive_pieces(text, 80)
    assert vocab == expected and len(vocab) == len(set(vocab)) > len(set(text))


@pytest.mark.parametrize("seed", range(4))
def test_encoding_divides_the_text_as_learning_did(seed):
    text = random_text(random.Random(seed), 1_500)
    vocab = learn_pieces(text, 50)
    assert [vocab[i] for i in encode(text, vocab)] == naive_pieces(text, 50)[1]


# -----------------------------------------------------------------------------
# combining marks

HINDI = "हिन्दी विकिपीडिया है\n"
THAI = "ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอน\n"
ARABIC = "اَلْعَرَبِيَّةُ لُغَةٌ سَامِيَّةٌ قَدِيمَةٌ\n"
PERSIAN = "می\u200cخواهم کتاب\u200cها\n"  # with zero-width non-joiners


@pytest.mark.parametrize("line, n_vocab, n_tokens", [
    (HINDI, 32, 4), (THAI, 62, 3), (ARABIC, 52, 5), (PERSIAN, None, 3)])
def test_a_word_may_hold_combining_marks_and_zero_width_joiners(line, n_vocab, n_tokens):
    """So a line that is repeated becomes a token for each word (for 32 characters, where there are
    no spaces) and one for the line's end."""
    text = line * 500
    vocab = learn_pieces(text, 200)
    ids = encode(text, vocab)
    assert len(ids) == n_tokens * 500 and decode(ids, vocab) == text
    assert n_vocab is None or len(vocab) == n_vocab
    assert all(word in vocab for word in words_of(line))


def test_a_piece_that_begins_with_a_mark_is_used_in_encoding():
    """The letters before the accent differ, so accent and b are joined first."""
    text = "".join(f"{letter}\u0301b " for letter in "acdefghijk") * 5
    vocab = learn_pieces(text, len(set(text)) + 1)
    assert vocab[-1] == "\u0301b"
    assert [vocab[i] for i in encode(text, vocab)] == naive_pieces(text, len(vocab))[1]


# -----------------------------------------------------------------------------
# encoding

def test_any_text_of_known_characters_comes_back():
    rng, vocab = random.Random(2), vocabulary()
    assert any(len(token) > 2 for token in vocab)
    for _ in range(300):
        text = random_text(rng, rng.randrange(40))
        ids = encode(text, vocab)
        assert ids.dtype == np.uint16 and decode(ids, vocab) == text
    with pytest.raises(ValueError, match=r"does not know: 'X' \(U\+0058\) 'Z' \(U\+005A\)"):
        encode("aXbZX", vocab)


def test_a_text_without_spaces_takes_no_quadratic_time():
    """It is cut into words of 32 characters."""
    assert learn_pieces("a" * 10_000, 100) == ["a", "aa", "a" * 4, "a" * 8, "a" * 16, "a" * 32]
    assert encode("a" * 100_000, ["a", "aa"]).tolist() == [1] * 50_000


def test_characters_are_one_id_each():
    vocab = sorted(ALPHABET)
    text = random_text(random.Random(3), 500)
    assert encode(text, vocab).tolist() == [vocab.index(c) for c in text]


def test_no_piece_crosses_a_line_or_a_word():
    """So the lines of a text are encoded alike wherever they stand."""
    rng, vocab = random.Random(4), vocabulary(size=120)
    assert not any("\n" in token and token != "\n" for token in vocab)
    assert not any(re.search(r"\w \w|\s\s|\w[.']|[.']\w", token) for token in vocab)
    for _ in range(100):
        lines = [random_text(rng, 20) + "\n" for _ in range(3)]
        together = encode("".join(lines), vocab).tolist()
        assert together == sum((encode(line, vocab).tolist() for line in lines), [])


def test_holes_are_one_token_each_and_the_rest_is_encoded():
    vocab = vocabulary()
    ab, abc = encode("ab", vocab).tolist(), encode("abc", vocab).tolist()
    assert encode("abc__ab.", vocab, "_.", 999).tolist() == [*abc, 999, 999, *ab, 999]
    assert encode("ab^-]", vocab, "-^]", 9).tolist() == [*ab, 9, 9, 9]
    assert encode("a_b", ["a", "b", "_"], "_", 3).tolist() == [0, 3, 1]


# -----------------------------------------------------------------------------
# the three commands

@pytest.fixture(scope="module")
def pieces_dir(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "input.txt").write_text(text, encoding="utf-8")
    prepare.prepare(folder / "input.txt", folder, vocab_size=200)
    return folder


@pytest.fixture(scope="module")
def pieces(pieces_dir, tmp_path_factory):
    """A model of word pieces, untrained."""
    vocab = json.loads((pieces_dir / "meta.json").read_text(encoding="utf-8"))["chars"]
    return save_gpt(tmp_path_factory.mktemp("model") / "pieces.pt", vocab, 16)


def test_prepare_learns_on_the_training_part_alone(call, tmp_path):
    (tmp_path / "a.txt").write_text("ab " * 30 + "xyz" * 3, encoding="utf-8")
    result = call(prepare, f"--input={tmp_path}/a.txt", f"--out_dir={tmp_path}", "--vocab_size=99")
    vocab = json.loads((tmp_path / "meta.json").read_text())["chars"]
    assert vocab == [" ", "a", "b", "x", "y", "z", "ab", " ab"]
    assert "the first word pieces: 'ab' ' ab'" in result.out
    assert "length of dataset in characters: 99\n" in result.out


def test_the_files_hold_the_text(text, pieces_dir):
    vocab = json.loads((pieces_dir / "meta.json").read_text(encoding="utf-8"))["chars"]
    splits = [np.fromfile(pieces_dir / f"{name}.bin", "<u2") for name in ("train", "val")]
    assert len(vocab) == 200 and "".join(decode(ids, vocab) for ids in splits) == text
    assert len(decode(splits[0], vocab)) == int(0.9 * len(text))


def test_measures_are_per_character(pieces, pieces_dir):
    """The sum over the windows' tokens, over their characters: a guess that gives all tokens the
    same probability costs log(V) a token."""
    model, vocab, _ = load_checkpoint(pieces)
    for p in model.parameters():
        p.data.zero_()
    data = np.fromfile(pieces_dir / "val.bin", "<u2")
    used = data[:len(data) // 16 * 16]
    expected = len(used) * np.log(len(vocab)) / len(decode(used, vocab))
    for causal in (False, True):
        model.config.causal = causal
        text = SimpleNamespace(vocab=vocab, prompt_length=0)
        nats, _ = measure(model, data, text, 2, 8, torch.autocast("cpu", enabled=False))
        assert nats == pytest.approx(expected, rel=1e-5)
    assert characters_per_token(used, vocab) == len(decode(used, vocab)) / len(used) > 1.2
    assert characters_per_token(np.array([0, 1, 1]), ["a", "b"]) == 1
    windows, mask_id = torch.from_numpy(used.astype(np.int64)).view(-1, 16), len(vocab)
    for estimate in (estimate_nelbo, estimate_nll):  # these are per token
        nats = estimate(model, windows, mask_id)[0]
        assert nats == pytest.approx(np.log(len(vocab)), rel=1e-5)


def test_train_and_continue_on_characters(call, pieces_dir, data_dir, tmp_path):
    """A model of pieces goes on on data of characters, and the other way round: the text is
    encoded in the model's vocabulary."""
    tiny = ("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
            "--device=cpu", "--dtype=float32", "--max_iters=2", "--eval_tokens=64",
            "--warmup_iters=1")
    x, y = tmp_path / "x.pt", tmp_path / "y.pt"
    result = call(train_script, *tiny, f"--save_filename={x}", f"--data_dir={pieces_dir}")
    assert result.code == 0 and "nats per character" in result.out
    _, vocab, _ = load_checkpoint(x)
    assert len(vocab) == 200
    per_iteration = int(re.search(r"(\d+) characters per iteration", result.out)[1])
    assert 64 * 1.2 < per_iteration < 64 * 3
    assert call(train_script, *tiny, f"--save_filename={y}", f"--data_dir={data_dir}").code == 0
    sizes = tiny[3:]
    for start, data in ((x, data_dir), (y, pieces_dir)):
        result = call(train_script, *sizes, f"--init_from={start}", f"--data_dir={data}",
                      f"--save_filename={tmp_path}/z")
        assert result.code == 0
        assert load_checkpoint(tmp_path / "z.pt")[1] == load_checkpoint(start)[1]
        one, other = (call(train_script, "--eval_only", f"--init_from={start}", "--device=cpu",
                           "--dtype=float32", f"--data_dir={folder}").out
                      for folder in (data_dir, pieces_dir))
        assert one == other  # the same text


def test_pages_prompts_and_holes(sample, pieces, tmp_path):
    vocab = load_checkpoint(pieces)[1]
    many = ("--gen_length=40", "--num_samples=2", f"--path={pieces}")
    result = sample(*many, "--prompt=the king and ", f"--html={tmp_path}/run.html")
    first, second = result.out.removesuffix("\n").split("\n\f")
    assert first.startswith("the king and ") and second.startswith("the king and ")
    length = len(first + second) - 2 * len("the king and")  # the space is part of what is written
    assert length > 80 * 1.1
    assert (tmp_path / "run.html").exists()

    result = sample(f"--path={pieces}", "--infill=the __ of th_")
    start, end = re.fullmatch(r"the (.*) of th(.+)\n", result.out, re.DOTALL).groups()
    assert end in vocab and any(a + b == start for a in vocab for b in vocab)
    assert_one_line_error(sample(f"--path={pieces}", "--infill=th_ \u4e2d"), "--infill", "'\u4e2d'")


@pytest.mark.parametrize("prompt", ["the king and ", " ", "the \n ", "the  "])
@pytest.mark.parametrize("how", ["command line", "stdin"])
@pytest.mark.parametrize("causal", [False, True])
def test_after_a_prompt_that_ends_in_a_space_a_new_word_begins(sample, pieces_dir, tmp_path, causal,
                                                               monkeypatch, how, prompt):
    """In training, a space belongs to the word after it. So the prompt comes back with its space,
    which is the beginning of the first token written."""
    vocab = json.loads((pieces_dir / "meta.json").read_text(encoding="utf-8"))["chars"]
    vocab = [*vocab, "\u00e9"]  # a new character comes last, as train.py --init_from adds it
    path = save_gpt(tmp_path / "x.pt", vocab, 16, causal=causal)
    flags = (f"--path={path}", "--prompt=-" if how == "stdin" else f"--prompt={prompt}")
    firsts = set()
    for seed in range(4):
        html = tmp_path / "run.html"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
        result = sample(*flags, f"--seed={seed}", f"--html={html}", "--dtype=float32")
        assert result.code == 0 and result.out.startswith(prompt), result
        shown = replay(html.read_text(encoding="utf-8"))[2]["start"][0]
        given = [token for token in shown if token is not None]
        assert "".join(given[:-1]) == prompt[:-1] and given[-1].startswith(" ")
        firsts.add(given[-1])
    assert len(firsts) > 1  # which word begins is the model's choice


def test_without_a_space_at_its_end_a_prompt_may_go_on_within_a_word(sample, pieces, monkeypatch):
    """Nothing is added: not to a prompt of the command line or of stdin, nor to an empty one."""
    monkeypatch.setattr(main_script, "begin_word", None)
    for prompt, text in (("the king", ""), ("-", "the king"), ("-", ""), ("", "")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert sample(f"--path={pieces}", f"--prompt={prompt}").code == 0
    assert sample(f"--path={pieces}").code == 0
    assert sample(f"--path={pieces}", "--infill=the _ing ").code == 0
