"""
Make pairs of a prompt and an answer, to fine-tune on: train.bin, val.bin and meta.json. The model
learns to answer, and where an answer ends (LLaDA, arXiv 2502.09992, sec. 2.3).

    python data/dialogue/prepare.py                    # speeches of Tiny Shakespeare, each answered
    python train.py --dataset=dialogue --init_from=pretrained_gpt_last --save_filename=dialogue
    python main.py --path=dialogue --prompt="I have a daughter, sir."
    python data/dialogue/prepare.py --input=pairs.tsv --out_dir=data/mine    # pairs of your own

A pair of your own is a line: prompt, tab, answer (.tsv), or {"prompt": "...", "answer": "..."}
(.jsonl).
The last tenth of the pairs is for validation. Without --input, the pairs are consecutive speeches
of data/shakespeare_char/input.txt, which prepare.py in that folder downloads, split as it splits.

A record has 256 tokens: the prompt, before it as many END tokens as fill 127; ANSWER; the answer,
and as many END tokens as fill 128. What is longer is cut where a line ends, or left out.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.common import check, knob, one_line_errors, open_streams, parse_knobs, read_text
from lib.data import write_dataset
from lib.dialogue import ANSWER, END, PROMPT, RECORD, prompt_tokens
from lib.tokenizer import encode

TEXT = HERE.parent / "shakespeare_char" / "input.txt"
# train.py's defaults for this data: a short fine-tuning, with small steps
TRAINING = dict(block_size=RECORD, max_iters=250, learning_rate=1e-3, muon_lr=1e-3, warmup_iters=25,
                eval_interval=125)


@dataclass
class PrepareConfig:
    input: str = knob("", "pairs of your own, a .tsv or .jsonl file; needs --out_dir", "files")
    out_dir: str = knob("", "folder for the three files; without it, the one of this script")


def speeches(text):
    """Return the pairs of consecutive speeches of a play, whose speeches an empty line divides."""
    parts = [part.strip("\n") for part in text.split("\n\n")]
    return [pair for pair in zip(parts, parts[1:]) if all("\n" in part for part in pair)]


def read_pairs(path):
    """Return the pairs of a .tsv or .jsonl file. ValueError for a line that holds none."""
    pairs = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            pair = json.loads(line) if path.suffix == ".jsonl" else None
            pair = [pair["prompt"], pair["answer"]] if pair else line.split("\t")
            prompt, answer = (part.strip("\n") for part in pair)
        except (ValueError, TypeError, KeyError, AttributeError):
            prompt = answer = ""
        check(prompt and answer and not {ANSWER, END} & set(prompt + answer),
              f"line {number} of {path} must be a prompt and an answer, without STX and ETX")
        pairs.append((prompt, answer))
    check(len(pairs) > 1, f"{path} holds fewer than two pairs")
    return pairs


def cut(lines, most):
    """Return as many of the first lines as have at most so many characters together."""
    while lines and len("\n".join(lines)) > most:
        lines = lines[:-1]
    return "\n".join(lines)


def to_records(pairs, vocab):
    """Return the ids of the records of pairs, (N * RECORD,), and say what was cut or left out."""
    text, n_cut, n_out = [], 0, 0
    for prompt, answer in pairs:
        short_answer = cut(answer.split("\n"), RECORD - PROMPT - 1)
        short_prompt = cut(prompt.split("\n")[::-1], PROMPT - 1)
        short_prompt = "\n".join(short_prompt.split("\n")[::-1])
        if short_prompt and short_answer:
            text += [prompt_tokens(short_prompt), short_answer.ljust(RECORD - PROMPT, END)]
            n_cut += (short_prompt, short_answer) != (prompt, answer)
        else:
            n_out += 1
    print(f"{len(pairs) - n_out:,} pairs, of which {n_cut:,} were cut; {n_out:,} were left out")
    check(text, "no pair is short enough")
    return encode("".join(text), vocab)


def main():
    with one_line_errors("take fewer pairs"):
        config = PrepareConfig(**parse_knobs(PrepareConfig, __doc__))
        check(config.out_dir or not config.input, "--input needs --out_dir")
        if config.input:
            pairs = read_pairs(Path(os.path.expanduser(config.input)))
            n = max(1, len(pairs) // 10)
            parts = pairs[:-n], pairs[-n:]
        else:
            text = read_text(TEXT)
            n = int(0.9 * len(text))
            parts = speeches(text[:n]), speeches(text[n:])
        vocab = sorted(set("".join(part for pairs in parts for pair in pairs for part in pair)))
        vocab += [ANSWER, END]
        write_dataset(config.out_dir or HERE, *(to_records(pairs, vocab) for pairs in parts), vocab,
                      record=RECORD, prompt=PROMPT, training=TRAINING)


if __name__ == "__main__":
    open_streams()
    main()
