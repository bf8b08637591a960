import hashlib
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import prepare
import pytest
import requests
from conftest import ROOT, assert_one_line_error, real_text

SCRIPT = ROOT / "data" / "shakespeare_char" / "prepare.py"


def read(folder):
    """The text that the three files hold."""
    chars = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["chars"]
    train, val = (np.fromfile(folder / f"{split}.bin", dtype="<u2") for split in ("train", "val"))
    return chars, "".join(chars[i] for i in train), "".join(chars[i] for i in val)


@pytest.mark.parametrize("content", [
    "plain text\n" * 20,
    "line ends of Windows\r\n\r\n" * 20,
    "line ends of old files\r\r, and of all\n\r kinds\r\n" * 20,
    ("emoji \U0001f389, a family \U0001f468\u200d\U0001f469\u200d\U0001f467, "
     "combining e\u0301 and precomposed \u00e9\n") * 20,
    "\ufeffa byte order mark, NUL \0 and the last code point \U0010ffff" * 3,
    "ab",
])
def test_the_files_hold_the_text_with_one_kind_of_line_ends(call, tmp_path, content):
    (tmp_path / "my.txt").write_bytes(content.encode("utf-8"))
    result = call(prepare, f"--input={tmp_path}/my.txt", f"--out_dir={tmp_path}/deep/out")
    chars, train, val = read(tmp_path / "deep" / "out")
    content = content.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assert result.code == 0 and train + val == content and len(train) == int(0.9 * len(content))
    assert chars == sorted(set(content))
    assert all(char.isprintable() or char in "\n\t" for char in result.out)
    assert f"length of dataset in characters: {len(content):,}" in result.out
    assert f"val has {len(val):,} tokens" in result.out
    assert sorted(os.listdir(tmp_path / "deep" / "out")) == ["meta.json", "train.bin", "val.bin"]


EVERYTHING = "".join(map(chr, (c for c in range(0x20, 0x20000) if not 0xD800 <= c < 0xE000)))


def test_the_largest_vocabulary(tmp_path):
    vocab = prepare.learn_pieces(EVERYTHING[:65_535] * 2)
    ids = prepare.encode(EVERYTHING[:65_535], vocab)
    assert len(vocab) == 65_535 and ids.tolist() == list(range(65_535))
    with pytest.raises(ValueError, match="65,536 different characters"):
        prepare.learn_pieces(EVERYTHING[:65_536])


@pytest.mark.parametrize("content, words", [
    (b"good \xff bad", ["not UTF-8", "byte 5"]),
    ("a text".encode("utf-16"), ["UTF-16"]),
    (b"", ["empty"]),
    (b"x", ["too short"]),
    (EVERYTHING.encode(), ["different characters", "65,535"]),
    (None, ["my.txt"]),
])
def test_a_text_that_can_not_be_used_changes_nothing(call, tmp_path, content, words):
    (tmp_path / "train.bin").write_bytes(b"mine")
    if content is not None:
        (tmp_path / "my.txt").write_bytes(content)
    before = sorted(os.listdir(tmp_path))
    result = call(prepare, f"--input={tmp_path}/my.txt", f"--out_dir={tmp_path}")
    assert_one_line_error(result, *words)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "train.bin").read_bytes() == b"mine"


def test_bad_flags(call, tmp_path):
    (tmp_path / "my.txt").write_text("my text")
    assert_one_line_error(call(prepare, f"--input={tmp_path}/my.txt"), "--out_dir")
    assert_one_line_error(call(prepare, "--output=x"), "--output")
    for size in (-1, 5, 65_536):  # the text has six different characters
        assert_one_line_error(call(prepare, f"--input={tmp_path}/my.txt", f"--vocab_size={size}",
                                   f"--out_dir={tmp_path}/out"), "my.txt has 6 different")
    assert not (tmp_path / "out").exists()
    folder = call(prepare, f"--input={tmp_path}", f"--out_dir={tmp_path}")
    assert_one_line_error(folder, f"{tmp_path}: ")


def test_its_own_output_is_no_input(call, tmp_path):
    (tmp_path / "train.bin").write_text("my text")
    result = call(prepare, f"--input={tmp_path}/train.bin", f"--out_dir={tmp_path}")
    assert_one_line_error(result, "train.bin", "overwritten")
    assert (tmp_path / "train.bin").read_text() == "my text"


def test_the_home_folder(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "my.txt").write_text("my text of some length")
    assert call(prepare, "--input=~/my.txt", "--out_dir=~/mine").code == 0
    assert (tmp_path / "mine" / "meta.json").exists()


def test_preparing_does_not_load_pytorch():
    code = "import prepare, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent).returncode == 0


@pytest.mark.skipif(real_text() is None, reason="needs data/shakespeare_char/input.txt, the real "
                                                "text that prepare.py downloads")
def test_tiny_shakespeare(tmp_path):
    """Run as a user does, from another folder, with input.txt beside the script."""
    folder = tmp_path / "data" / "text"
    folder.mkdir(parents=True)
    shutil.copy(SCRIPT, folder / "prepare.py")
    shutil.copytree(ROOT / "lib", tmp_path / "lib")
    (folder / "input.txt").write_bytes(real_text().encode())
    result = subprocess.run([sys.executable, str(folder / "prepare.py")], cwd="/",
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "train has 1,003,854 tokens\nval has 111,540 tokens" in result.stdout
    chars, train, val = read(folder)
    assert len(chars) == 65 and train + val == real_text()
    assert hashlib.sha256((train + val).encode()).hexdigest() == prepare.SHA256


# -----------------------------------------------------------------------------
# the download, without a network

BODY = b"the canonical text\n" * 100


@pytest.fixture
def world(monkeypatch, tmp_path):
    """world(first, second): what each mirror answers, in turn: bytes, or an error. Returns the list
    of the URLs that were asked."""
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    monkeypatch.setattr(prepare, "SHA256", hashlib.sha256(BODY).hexdigest())

    def world(*answers):
        asked = []

        def get(url, timeout):
            assert timeout
            asked.append(url)
            answer = answers[prepare.URLS.index(url)]
            answer = answer.pop(0) if isinstance(answer, list) else answer
            if isinstance(answer, Exception):
                raise answer
            return SimpleNamespace(content=answer)
        monkeypatch.setattr(requests, "get", get)
        return asked
    return world


def test_download(world, call, tmp_path):
    asked = world(BODY, None)
    assert call(prepare).code == 0 and asked == [prepare.URLS[0]]
    assert (tmp_path / "input.txt").read_bytes() == BODY and read(tmp_path)[1]
    assert call(prepare).code == 0 and len(asked) == 1  # what stands there is used


@pytest.mark.parametrize("bad", [requests.ConnectionError(), requests.Timeout(), b"", BODY[:-1],
                                 b"<html>log in first</html>"])
def test_after_a_bad_answer_the_mirror_is_asked_and_then_both_again(world, call, tmp_path, bad):
    first, second = prepare.URLS
    for answers, expected in (((bad, BODY), [first, second]),
                              (([bad, BODY], bad), [first, second, first]),
                              ((bad, [bad, BODY]), [first, second] * 2)):
        asked = world(*answers)
        assert call(prepare).code == 0 and asked == expected
        assert (tmp_path / "input.txt").read_bytes() == BODY
        (tmp_path / "input.txt").unlink()


def test_no_network_is_one_line_that_says_what_to_do(world, call, tmp_path):
    world(requests.ConnectionError(), b"<html>log in first</html>")
    assert_one_line_error(
        call(prepare), f"ConnectionError from {prepare.URLS[0]}",
        f"25 bytes that are not Tiny Shakespeare from {prepare.URLS[1]}",
        str(tmp_path / "input.txt"), "by hand")
    assert list(tmp_path.iterdir()) == []
