"""
Text -> train.bin and val.bin (its characters as uint16 ids: the first 90 %, the last 10 %) and
meta.json (the characters; a character's id is its place in the list).

    python data/shakespeare_char/prepare.py                                     # Tiny Shakespeare
    python data/shakespeare_char/prepare.py --input=my.txt --out_dir=data/mine  # any UTF-8 text
    python train.py --dataset=mine                                              # train on it

Without flags the text is the input.txt beside this script; if there is none, Tiny Shakespeare is
downloaded there. Characters are Unicode code points; a byte order mark is dropped, and Windows line
ends become \\n.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

import numpy as np
import requests
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from common import FILES, fail, one_line_errors, write_atomically, write_dataset  # noqa: E402

URLS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)
SIZE = 1_115_394
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def fetch(url, seconds=300):
    """-> the bytes at url. ValueError if they are not Tiny Shakespeare, requests.RequestException
    if it can't be reached, or takes longer than so many seconds."""
    data, deadline = bytearray(), time.monotonic() + seconds
    with requests.get(url, stream=True, timeout=15) as response:
        response.raise_for_status()
        with tqdm(total=SIZE, unit="B", unit_scale=True, desc="input.txt") as bar:
            for chunk in response.iter_content(chunk_size=1 << 16):
                data += chunk
                bar.update(len(chunk))
                if len(data) > SIZE:
                    break
                if time.monotonic() > deadline:
                    raise requests.Timeout
    if len(data) != SIZE or hashlib.sha256(data).hexdigest() != SHA256:
        raise ValueError(f"{len(data):,} bytes that are not Tiny Shakespeare")
    return bytes(data)


def download(path, tries=3):
    """Tiny Shakespeare -> path, from the first of URLS that has it, or ConnectionError."""
    failures = []
    for url in URLS:
        for attempt in range(tries):
            try:
                return write_atomically(path, fetch(url))
            except requests.RequestException as e:
                failure = f"{type(e).__name__} from {url}"
            except ValueError as e:
                failure = f"{e} from {url}"
            time.sleep(attempt)
        failures.append(failure)
    raise ConnectionError(f"could not download Tiny Shakespeare ({'; '.join(failures)}). Without a "
                          f"network: save that file as {path} by hand and run this again")


def encode(text):
    """-> (ids, chars): uint16 ids (len(text),), and the sorted different characters as one string.
    One table look-up over the code points: 100 MB in seconds. ValueError if uint16 can't hold the
    ids and, later, one more for [MASK]."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)  # (len(text),)
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    seen[codes] = True
    alphabet = np.flatnonzero(seen)                                   # (vocabulary,) code points
    if len(alphabet) > 65_535:
        raise ValueError(f"{len(alphabet):,} different characters; at most 65,535 fit uint16 ids")
    table = np.zeros(sys.maxunicode + 1, dtype=np.uint16)
    table[alphabet] = np.arange(len(alphabet))
    return table[codes], "".join(map(chr, alphabet))


def prepare(source, out_dir):
    """The UTF-8 text file source -> three files in out_dir. ValueError for a text that can't be
    used, before anything is written."""
    if source.exists() and not source.is_file():
        raise ValueError(f"{source} is a folder, a device or a pipe; a text file is needed")
    if source.resolve() in [(out_dir / name).resolve() for name in FILES]:
        raise ValueError(f"{source} would be overwritten: give another --out_dir")
    try:
        text = source.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        byte = f"byte {e.object[e.start]:#04x} at offset {e.start}"
        raise ValueError(f"{source} is not UTF-8: {byte}. Convert it first") from e
    if len(text) < 2:
        raise ValueError(f"{source} is {'empty' if not text else 'too short to split'}")
    try:
        ids, chars = encode(text)
    except ValueError as e:
        raise ValueError(f"{source} has {e}") from e
    n = int(len(ids) * 0.9)
    write_dataset(out_dir, ids[:n], ids[n:], chars)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # one line, without the usage
    parser.add_argument("--input", type=path,
                        help="a UTF-8 text of your own; needs --out_dir (default: none)")
    parser.add_argument("--out_dir", type=path,
                        help="folder for the three files (default: the one of this script)")
    args = parser.parse_args()
    with one_line_errors():
        if args.input and not args.out_dir:
            raise ValueError("--input needs --out_dir: say where the files of your own text go")
        source, out_dir = args.input or HERE / "input.txt", args.out_dir or HERE
        if args.input is None and not source.exists():
            download(source)
        prepare(source, out_dir)


def path(text):
    return Path(text).expanduser()


if __name__ == "__main__":
    main()
