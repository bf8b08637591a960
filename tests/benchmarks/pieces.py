"""
What do word pieces change? Models of characters and of pieces, in one table.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --vocab_size=512 --out_dir=data/pieces512
    python train.py --save_filename=chars
    python train.py --dataset=pieces512 --save_filename=p512
    python tests/benchmarks/pieces.py chars p512        # any checkpoints, causal ones too

Nats per character on the validation text of Tiny Shakespeare, encoded in the vocabulary of each
model; the share of the words in 32 pages that occur in the training text; and seconds per 1,000
characters, of pages written one at a time by main.py's defaults.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train  # noqa: E402
from main import DEFAULTS, ENOUGH_STEPS, TWIN_DEFAULTS  # noqa: E402
from metrics import words_of, write  # noqa: E402
from model import load_checkpoint, pick_dtype, resolve_path  # noqa: E402
from tokenizer import decode  # noqa: E402


def main():
    dtype, _ = pick_dtype("auto", torch.device("cpu"))
    print(f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, {dtype}\n\n"
          "| model | vocabulary | characters per token | minutes | train nats per character | "
          "validation nats per character | words that exist | seconds per 1,000 characters |\n"
          "|" + "---|" * 8)
    for name in sys.argv[1:]:
        model, chars, info = load_checkpoint(resolve_path(name))
        train_data, val_data, _ = train.load_data(train.TrainConfig(), 256, chars)
        autocast = train.autocast_to(dtype, torch.device("cpu"))
        (measure, nats, se), (_, train_nats, _) = (
            train.measure(model, data, chars, 8, 16, autocast)
            for data in (val_data, train_data[:len(val_data)]))
        torch.backends.cuda.enable_flash_sdp(True)  # which autocast_to disables on a CPU
        model.to(dtype)
        how = TWIN_DEFAULTS if model.config.causal else dict(DEFAULTS, steps=ENOUGH_STEPS)
        pages = [decode(ids, chars) for ids in write(model, how, 32, 16)[0]]
        ids, seconds, _ = write(model, how, 3, 1)
        length = sum(len(decode(page, chars)) for page in ids) / len(ids)
        known = set(words_of(decode(train_data, chars)))
        words = [word for page in pages for word in words_of(page)[1:-1]]
        share = sum(word in known for word in words) / len(words)
        print(f"| {name} | {len(chars):,} | {train.characters_per_token(val_data, chars):.2f} | "
              f"{info['minutes']:.1f} | {train_nats:.3f} | {measure} {nats:.4f} ± {se:.4f} | "
              f"{share:.3f} | {1000 * seconds / length:.2f} |", flush=True)


if __name__ == "__main__":
    main()
