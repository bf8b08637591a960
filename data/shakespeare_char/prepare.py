"""
Turn a text into train.bin (the first 90 % of its tokens, as uint16 ids), val.bin (the last 10 %)
and meta.json (the vocabulary; the id of a token is its place in the list).

    python data/shakespeare_char/prepare.py                                     # Tiny Shakespeare
    python data/shakespeare_char/prepare.py --input=my.txt --out_dir=data/mine  # any UTF-8 text
    python train.py --dataset=mine                                              # train on it
    python data/shakespeare_char/prepare.py --vocab_size=512 --out_dir=data/pieces  # word pieces

Without flags the text is the input.txt beside this script; if there is none, Tiny Shakespeare is
downloaded there. Tokens are characters (Unicode code points), or with --vocab_size word pieces. A
byte order mark is dropped, and other line ends become \\n.
"""

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import requests

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.common import check, knob, one_line_errors, open_streams, parse_knobs, read_text
from lib.data import FILES, write_atomically, write_dataset
from lib.tokenizer import encode, learn_pieces

URLS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass
class PrepareConfig:
    input: str = knob("", "a UTF-8 text of your own; needs --out_dir", "files")
    out_dir: str = knob("", "folder for the three files; without it, the one of this script")
    vocab_size: int = knob(None, "tokens, at most: word pieces are learned besides the characters; "
                                 "without it, tokens are characters")


def download(path):
    """Save Tiny Shakespeare as path, from the first of URLS that has it. ConnectionError if none
    has."""
    failures = []
    for url in 2 * URLS:
        try:
            data = requests.get(url, timeout=15).content
            if hashlib.sha256(data).hexdigest() == SHA256:
                return write_atomically(path, data)
            failures.append(f"{len(data):,} bytes that are not Tiny Shakespeare from {url}")
        except requests.RequestException as e:
            failures.append(f"{type(e).__name__} from {url}")
    raise ConnectionError(f"could not download Tiny Shakespeare ({'; '.join(failures[2:])}). "
                          f"Without a network: save it as {path} by hand and run this again")


def prepare(source, out_dir, vocab_size=None):
    """Turn the UTF-8 text file source into the three files in out_dir. The vocabulary is all
    characters of the text and, up to vocab_size, word pieces learned on its first 90 %. ValueError
    for a text that can't be used, before anything is written."""
    check(source.resolve() not in [(out_dir / name).resolve() for name in FILES],
          f"{source} would be overwritten: give another --out_dir")
    text = read_text(source)
    check(len(text) >= 2, f"{source} is {'empty' if not text else 'too short to split'}")
    n = int(len(text) * 0.9)
    try:
        vocab = learn_pieces(text[:n], vocab_size, alphabet=set(text))
    except ValueError as e:
        raise ValueError(f"{source} has {e}") from e
    write_dataset(out_dir, encode(text[:n], vocab), encode(text[n:], vocab), vocab)


def main():
    with one_line_errors("take a shorter text"):
        config = PrepareConfig(**parse_knobs(PrepareConfig, __doc__))
        check(config.out_dir or not config.input,
              "--input needs --out_dir: say where the files of your own text go")
        source = Path(os.path.expanduser(config.input)) if config.input else HERE / "input.txt"
        out_dir = Path(os.path.expanduser(config.out_dir)) if config.out_dir else HERE
        if not config.input and not source.exists():
            download(source)
        prepare(source, out_dir, config.vocab_size)


if __name__ == "__main__":
    open_streams()
    main()
