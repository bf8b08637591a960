"""
What do word pieces change? This script compares models of characters and of pieces in one table.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --vocab_size=512 --out_dir=data/pieces512
    python train.py --save_filename=chars
    python train.py --dataset=pieces512 --save_filename=p512
    python tests/benchmarks/pieces.py chars p512        # any checkpoints, causal ones too

It measures the nats per character on the text of Tiny Shakespeare, encoded in the vocabulary of
each model; the share of the words in 32 pages that occur in the training text; and the seconds per
1,000 characters of pages that are written one at a time, with main.py's defaults.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from metrics import words_of, write

from lib.checkpoint import load_checkpoint, resolve_path
from lib.data import characters_per_token, data_folder, load_data
from lib.device import autocast, choose_attention, pick_dtype
from lib.evaluate import measure
from lib.tokenizer import decode
from main import PAGE, TWIN


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="checkpoints")
    args = parser.parse_args()
    device = torch.device("cpu")
    dtype = pick_dtype("auto", device)
    print(f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, {dtype}\n\n"
          "| model | vocabulary | characters per token | minutes | train nats per character | "
          "validation nats per character | words that exist | seconds per 1,000 characters |\n"
          "|" + "---|" * 8)
    for name in args.models:
        model, vocab, info = load_checkpoint(resolve_path(name))
        text = load_data(data_folder("shakespeare_char"), 256, vocab)
        train_data, val_data = text.train, text.val
        choose_attention(device)
        measured = "NLL" if model.config.causal else "NELBO"
        (nats, se), (train_nats, _) = (
            measure(model, ids, text, 8, 16, autocast(dtype, device))
            for ids in (val_data, train_data[:len(val_data)]))
        torch.backends.cuda.enable_flash_sdp(True)  # main.py does without choose_attention
        model.to(getattr(torch, dtype))
        how = TWIN if model.config.causal else PAGE
        pages = [decode(ids, vocab) for ids in write(model, how, 32, 16)[0]]
        ids, seconds, _ = write(model, how, 3, 1)
        length = sum(len(decode(page, vocab)) for page in ids) / len(ids)
        known = set(words_of(decode(train_data, vocab)))
        words = [word for page in pages for word in words_of(page)[1:-1]]
        share = sum(word in known for word in words) / len(words)
        print(f"| {name} | {len(vocab):,} | {characters_per_token(val_data, vocab):.2f} | "
              f"{info['minutes']:.1f} | {train_nats:.3f} | {measured} {nats:.4f} ± {se:.4f} | "
              f"{share:.3f} | {1000 * seconds / length:.2f} |", flush=True)


if __name__ == "__main__":
    main()
