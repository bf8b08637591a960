"""Pairs of a prompt and an answer: the data, training on the answers, and answers that end."""

import builtins
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error
from helpers import LETTERS, UNIFORM_MASK, load_script, save_gpt, uniform_model

import lib.evaluate
import main as main_script
import train as train_script
from diffusion import estimate_nelbo
from lib.checkpoint import load_checkpoint
from lib.data import load_data
from lib.dialogue import ANSWER, END, PROMPT, RECORD, converse, prompt_tokens, readable
from lib.tokenizer import decode
from lib.twin import estimate_nll

dialogue = load_script(ROOT / "data" / "dialogue" / "prepare.py")
PLAY = "\n\n".join(f"{name}:\nthe line of {name} number {i}" for i in range(60)
                   for name in ("KING", "QUEEN"))
PAIRS = [("how are you", "well"), ("who is there", "it is i"), ("what", "a very long answer"),
         ("when", "now"), ("why", "who knows")]


@pytest.fixture
def play(tmp_path, monkeypatch):
    """What prepare.py makes of a play, in tmp_path / "out"."""
    (tmp_path / "input.txt").write_text(PLAY)
    monkeypatch.setattr(dialogue, "TEXT", tmp_path / "input.txt")
    return tmp_path / "out"


def records(folder, split):
    vocab = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["chars"]
    ids = np.fromfile(folder / f"{split}.bin", "<u2").reshape(-1, RECORD)
    return [decode(row, vocab) for row in ids]


# -----------------------------------------------------------------------------
# the data

def test_a_record_is_a_prompt_and_its_answer_each_filled_up(call, play):
    assert call(dialogue, f"--out_dir={play}").code == 0
    first = records(play, "train")[0]
    prompt, answer = first[:PROMPT], first[PROMPT:]
    assert prompt == "KING:\nthe line of KING number 0".rjust(PROMPT - 1, END) + ANSWER
    assert answer == "QUEEN:\nthe line of QUEEN number 0".ljust(RECORD - PROMPT, END)
    assert readable(first) == ("KING:\nthe line of KING number 0 -> "
                               "QUEEN:\nthe line of QUEEN number 0")


def test_no_speech_of_the_validation_text_is_in_the_training_data(call, play):
    assert call(dialogue, f"--out_dir={play}").code == 0
    numbers = {split: {int(n) for record in records(play, split)
                       for n in re.findall(r"(\d+)[^\d]*?(?=\x02|\x03)", record)}
               for split in ("train", "val")}
    assert max(numbers["train"]) <= min(numbers["val"]) and len(numbers["val"]) > 3
    assert len(records(play, "train")) > 8 * len(records(play, "val"))


def test_what_is_too_long_is_cut_at_the_end_of_a_line_or_left_out_and_counted(call, tmp_path):
    long_lines = "\n".join(f"line {i} of a long speech, which goes on" for i in range(9))
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(dict(prompt=p, answer=a)) for p, a in (
        (long_lines, "short"), ("short", long_lines), ("short", "x" * 200), ("a", "b"), ("c", "d"),
        ("e", "f"))))
    result = call(dialogue, f"--input={tmp_path}/x.jsonl", f"--out_dir={tmp_path}/out")
    assert result.code == 0
    assert "5 pairs, of which 2 were cut; 1 were left out\n" not in result.out
    assert "4 pairs, of which 2 were cut; 1 were left out\n" in result.out
    first, second, *_ = records(tmp_path / "out", "train")
    lines = long_lines.split("\n")
    assert first[:PROMPT - 1].strip(END) == "\n".join(lines[-3:])     # the end of a prompt
    assert second[PROMPT:].strip(END) == "\n".join(lines[:3])         # the beginning of an answer


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.jsonl"])
def test_five_pairs_of_ones_own_are_enough(call, sample, tmp_path, name):
    lines = ["\t".join(pair) for pair in PAIRS] if name.endswith("tsv") else [
        json.dumps(dict(prompt=prompt, answer=answer)) for prompt, answer in PAIRS]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    out, x = tmp_path / "out", tmp_path / "x.pt"
    assert call(dialogue, f"--input={tmp_path / name}", f"--out_dir={out}").code == 0
    assert [readable(r) for r in records(out, "val")] == ["why -> who knows"]
    tiny = [flag for flag in TINY if "block_size" not in flag]
    result = call(train_script, *tiny, f"--data_dir={out}", "--max_iters=2", "--eval_tokens=256",
                  f"--save_filename={x}")
    assert result.code == 0 and re.search(r"^sample: why -> ", result.out, re.M), result
    assert sample(f"--path={x}", "--prompt=what").code == 0


@pytest.mark.parametrize("name, text, words", [
    ("x.tsv", "a\tb\nno tab\n", ["line 2"]),
    ("x.tsv", "a\tb\nc\t\n", ["line 2"]),
    ("x.tsv", "a\tb\nc\td\te\n", ["line 2"]),
    ("x.tsv", "", ["fewer than two"]),
    ("x.tsv", "a\tb\n", ["fewer than two"]),
    ("x.tsv", f"a\tb\na\tb{END}\n", ["line 2", "ETX"]),
    ("x.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n', ["line 2"]),
    ("x.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt": 1, "answer": 2}\n', ["line 2"]),
    ("x.jsonl", '[1]\n', ["line 1"]),
    ("x.jsonl", 'a\tb\n', ["line 1"]),
])
def test_what_is_no_pair_is_one_line_that_names_its_line(call, tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    result = call(dialogue, f"--input={tmp_path / name}", f"--out_dir={tmp_path}/out")
    assert_one_line_error(result, name, *words)
    assert not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# training and evaluation

def test_only_answers_are_masked_and_the_loss_is_per_token_of_an_answer(call, play, tmp_path,
                                                                        monkeypatch):
    batches, real = [], train_script.diffusion_loss
    monkeypatch.setattr(train_script, "diffusion_loss",
                        lambda *batch: batches.append(batch[2:]) or real(*batch))
    assert call(dialogue, f"--out_dir={play}").code == 0
    tiny = [flag for flag in TINY if "block_size" not in flag]
    assert call(train_script, *tiny, f"--data_dir={play}", "--max_iters=4", "--eval_tokens=256",
                f"--save_filename={tmp_path}/x").code == 0
    for input_ids, noisy_batch, masked_indices, p_mask in batches:
        assert torch.equal(noisy_batch[:, :PROMPT], input_ids[:, :PROMPT])
        assert not masked_indices[:, :PROMPT].any() and masked_indices[:, PROMPT:].any()
        assert torch.equal(noisy_batch != input_ids, masked_indices)
        # 1 / p_mask for each masked token, over the 128 tokens of an answer and not over all 256
        share = masked_indices[:, PROMPT:].double().mean(1)
        assert (share - 2 * p_mask[:, 0]).abs().max() < 0.25
    model, vocab, info = load_checkpoint(tmp_path / "x.pt")
    assert vocab[-2:] == [ANSWER, END] and info["prompt"] == PROMPT and info["record"] == RECORD


def test_the_bound_given_a_prompt_counts_the_other_tokens_alone():
    """Five equally likely tokens: ln 5 for each that counts. The prompt is never masked."""
    windows, seen = torch.randint(5, (6, 8), generator=torch.Generator().manual_seed(0)), []

    def model(x):
        seen.append(x)
        return uniform_model(x)
    nelbo, _ = estimate_nelbo(model, windows, UNIFORM_MASK, passes=3, prompt_length=3)
    assert nelbo == pytest.approx(math.log(5), rel=1e-6)
    for x in seen:
        assert torch.equal(x[:, :3], windows[:, :3]) and (x[:, 3:] == UNIFORM_MASK).any(1).all()
    counts = torch.cat(seen)[:, 3:].eq(UNIFORM_MASK).sum(1).bincount(minlength=6)
    assert counts[0] == 0 and counts[1:].min() >= 3     # 18 rows, evenly over 1 to 5
    nll, _ = estimate_nll(uniform_model, windows, UNIFORM_MASK, prompt_length=3)
    assert nll == pytest.approx(math.log(5), rel=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_per_character_of_the_answers(call, play, tmp_path, causal):
    """A guess that gives each token the same probability costs ln V for each of the 128 tokens of
    an answer, END tokens too."""
    assert call(dialogue, f"--out_dir={play}").code == 0
    data = load_data(play, RECORD)
    path = save_gpt(tmp_path / "x.pt", data.vocab, RECORD, causal=causal)
    model, _, _ = load_checkpoint(path)
    for p in model.parameters():
        p.data.zero_()
    off = torch.autocast("cpu", enabled=False)
    nats, _ = lib.evaluate.measure(model, data.val, data, 2, 8, off)
    answers = [record[PROMPT:].strip(END) for record in records(play, "val")]
    expected = len(answers) * 128 * math.log(len(data.vocab)) / sum(map(len, answers))
    assert nats == pytest.approx(expected, rel=1e-5)


# -----------------------------------------------------------------------------
# main.py

@pytest.fixture
def model(tmp_path):
    """A model of pairs that was not trained, and so writes anything."""
    return save_gpt(tmp_path / "x.pt", [*LETTERS, "\n", ANSWER, END], RECORD, record=RECORD,
                    prompt=PROMPT)


def test_the_answer_alone_is_printed_up_to_its_end(sample, model, monkeypatch):
    seen = []

    def answers(config, model, predictor, x, generator):
        seen.append(x)
        x = x.clone()
        x[:, PROMPT:] = 0                                             # aaa ...
        x[:, PROMPT + 3:PROMPT + 5] = x[:, 0]                         # ... END END aaa
        yield x
    monkeypatch.setattr(main_script, "sample", answers)
    result = sample(f"--path={model}", "--prompt=hello", "--num_samples=2")
    assert result.out == "aaa\n\faaa\n" and result.err.count("---") == 2
    vocab = load_checkpoint(model)[1]
    assert decode(seen[0][0, :PROMPT].tolist(), vocab) == prompt_tokens("hello")
    assert (seen[0][:, PROMPT:] == len(vocab)).all() and seen[0].shape == (2, RECORD)


def test_any_flags_work_and_a_long_prompt_is_cut_at_its_left(sample, model, tmp_path):
    result = sample(f"--path={model}", "--prompt=" + "x" * 300 + " hello", "--steps=3",
                    f"--html={tmp_path}/run.html", "--dtype=float32")
    assert result.code == 0 and "its last 127 characters count" in result.err
    assert (tmp_path / "run.html").exists() and ANSWER not in result.out + result.err
    assert sample(f"--path={model}", "--prompt=hello", "--remasking=low_confidence", "--steps=4",
                  "--block_length=64").code == 0
    infilled = sample(f"--path={model}", "--infill=hell_ there")
    assert infilled.code == 0 and re.fullmatch("hell(.|\n) there\n", infilled.out)


def test_a_conversation_goes_on_until_ctrl_d(sample, model, monkeypatch):
    """Each prompt is the exchange so far."""
    lines, prompts = iter(["hello", "who are you"]), []

    def say(*_):
        for line in lines:
            return line
        raise EOFError

    def answer(config, *_):
        prompts.append(config.prompt)
        print("i am")
        return "i am"
    monkeypatch.setattr(builtins, "input", say)
    monkeypatch.setattr(main_script, "write_pages", answer)
    monkeypatch.setattr(main_script, "at_terminal", lambda: True)
    result = sample(f"--path={model}")
    assert result.code == 0 and result.out == "i am\ni am\n\n"
    assert prompts == ["hello", "hello\ni am\nwho are you"]


def test_a_line_that_the_model_can_t_read_does_not_end_a_conversation(monkeypatch, capsys):
    lines, heard = iter(["h\u00e9llo", "hello"]), []

    def say(*_):
        for line in lines:
            return line
        raise EOFError

    def answer(text):
        heard.append(text)
        if "\u00e9" in text:
            raise ValueError("unknown character")
        return "well"
    monkeypatch.setattr(builtins, "input", say)
    converse(answer)
    assert heard == ["h\u00e9llo", "hello"] and capsys.readouterr().err == "unknown character\n"
