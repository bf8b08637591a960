"""
The checkpoint file: one self-contained file that holds a model.

    from lib.checkpoint import load_checkpoint
    model, vocab, info = load_checkpoint("pretrained_gpt_last.pt")
"""

import io
import os
import warnings
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import torch

from lib.common import check, write_atomically
from model import GPT, GPTConfig


def resolve_path(name):
    """Return the file that a user means by X: X.pt, or X itself if it ends in .pt already."""
    path = Path(os.path.expanduser(name))
    wrong = path.name in ("", "..") or str(name).endswith(("/", os.sep, ".pt.state", ".pt.csv"))
    check(not wrong, f"{str(name)!r} is not the name of a checkpoint, which ends in .pt")
    return path if path.suffix == ".pt" else path.with_name(path.name + ".pt")


def save_object(path, content):
    """torch.save, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def load_object(path):
    """Return what torch.save wrote to path, on the CPU. Never runs code from the file. OSError if
    it can't be read, ValueError if it is damaged: every part must match its checksum."""
    data = io.BytesIO(Path(path).read_bytes())
    try:
        with zipfile.ZipFile(data) as z:
            check(z.testzip() is None, "a checksum does not match")
        data.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, about foreign files
            return torch.load(data, map_location="cpu", weights_only=True)
    except Exception as e:  # the file may hold any bytes: torch.load fails in many ways
        raise ValueError(f"{path} is not a checkpoint, or is damaged or cut short "
                         f"({type(e).__name__})") from e


def save_checkpoint(path, model, vocab, **info):
    """Write one self-contained file, atomically: weights (in the model's dtype), config, vocabulary
    (vocab[i] is the token of id i) and info, which says how the model was made (numbers, strings,
    lists, dicts)."""
    save_object(path, {
        "config": asdict(model.config),
        "chars": list(vocab),
        "model": {name: p.detach().cpu() for name, p in model.state_dict().items()},
        "info": {**info, "torch_version": str(torch.__version__)},
    })


def load_checkpoint(path, device="cpu"):
    """Return (model in float32 and eval mode, vocab, info). Never runs code from the file. OSError
    if it can't be opened, ValueError unless it is a complete checkpoint with finite weights."""
    checkpoint = load_object(path)
    try:
        config = GPTConfig(**{"qk_norm": False, **checkpoint["config"]})  # old ones lack the key
        check(all(isinstance(getattr(config, f.name), (f.type, int)) for f in fields(GPTConfig)),
              "its config has a value of another type")
        vocab, info = list(checkpoint["chars"]), dict(checkpoint["info"])
        check(len(set(vocab)) == len(vocab) == config.mask_id and all(vocab),
              "its vocabulary does not fit its config")
        with torch.device("meta"):  # takes no memory before the shapes are compared
            model = GPT(config)
        model.load_state_dict(checkpoint["model"], assign=True)
        check(all(p.isfinite().all() for p in model.parameters()), "its weights are not finite")
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as e:
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint of this model: {reason}") from e
    return model.float().to(device).eval(), vocab, info
