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

from lib.common import check, regular_file, write_atomically
from model import GPT, GPTConfig


def resolve_path(name):
    """Return the file that a user means by X: X.pt, or X itself if it ends in .pt already."""
    path = Path(os.path.expanduser(name))
    check(path.name not in ("", "..") and not str(name).endswith(("/", os.sep)),
          f"{str(name)!r} is not the name of a checkpoint file")
    return path if path.suffix == ".pt" else path.with_name(path.name + ".pt")


def save_object(path, content):
    """torch.save, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def load_object(path):
    """Return what torch.save wrote to path, on the CPU. Never runs code from the file. OSError if
    it can't be opened, ValueError if it is damaged: every part must match its checksum."""
    regular_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about foreign files
        try:
            with zipfile.ZipFile(path) as z:  # torch.save does not compress: no small file is huge
                stored = all(part.compress_type == zipfile.ZIP_STORED for part in z.infolist())
                check(stored and z.testzip() is None, "a checksum does not match")
            return torch.load(path, map_location="cpu", weights_only=True)
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
        # checkpoints older than qk_norm lack the key
        values = {"qk_norm": False, **checkpoint["config"]}
        for f in fields(GPTConfig):
            types = (float, int) if f.type is float else (f.type,)
            check(type(values.get(f.name, f.default)) in types,
                  f"{f.name} is not of type {f.type.__name__}")
        config = GPTConfig(**values)
        vocab, weights, info = checkpoint["chars"], checkpoint["model"], dict(checkpoint["info"])
        check(all(isinstance(token, str) and token for token in vocab)
              and len(vocab) == len(set(vocab)) == config.mask_id,
              "its vocabulary does not fit its config")
        check(config.n_layer <= len(weights), "it holds too few weights")
        with torch.device("meta"):  # takes no memory before the shapes are compared
            model = GPT(config)
        model.load_state_dict(weights, assign=True)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"{path} is not a checkpoint of this model: {reason}") from e
    check(all(p.isfinite().all() for p in model.parameters()),
          f"{path} holds weights that are not finite")
    return model.float().to(device).eval(), list(vocab), info
