"""model.pt, the weights that a run ends with, and model.json, which says what they are.

    model.json    {"schema": "worldsize.model/1",
                   "files": size and SHA-256 of model.pt, and of tokenizer.json where there is one,
                   "model": every field of the model that the weights were trained in}

and any other entry that `save_model` is given. model.pt holds tensors only. No torch here unless
weights are written: `generate` checks a run before it imports torch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from costs.outside import read_json
from experiments.checkpoints import are_files, check_file, facts_of
from experiments.same_model import check_same, unverified
from minigpt.config import ModelConfig, require
from minigpt.tokenizer import BPE_FILE, WITH_FILE
from parallel.damaged import Damaged

if TYPE_CHECKING:
    from torch import Tensor

    from minigpt.corpus import Corpus

SCHEMA = "worldsize.model/1"
MODEL, ABOUT = "model.pt", "model.json"


def save_model(
    folder: Path, weights: dict[str, Tensor], corpus: Corpus, about: dict[str, Any]
) -> None:
    """Write what `generate` reads: model.pt, model.json, and the tokenizer if one was trained.

    `about` has `model`, every field of the model, and may have further entries of model.json. A
    crash at any moment leaves either file whole, and never the model.json of other weights.
    """
    import torch

    parts = {name: folder / f"{name}.part" for name in (MODEL, ABOUT)}
    try:
        torch.save(weights, parts[MODEL])
        files = {MODEL: facts_of(parts[MODEL])}
        if corpus.tokenizer in WITH_FILE:
            if not (folder / BPE_FILE).exists():  # write_config keeps one, this is no run's folder
                shutil.copyfile(corpus.folder / BPE_FILE, folder / BPE_FILE)
            files[BPE_FILE] = facts_of(folder / BPE_FILE)
        parts[ABOUT].write_text(json.dumps({"schema": SCHEMA, "files": files, **about}, indent=1))
        (folder / ABOUT).unlink(missing_ok=True)
        for name, part in parts.items():
            part.replace(folder / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def read_about(folder: Path) -> dict[str, Any] | None:
    """Return what model.json says, None without one. Raises ValueError, one line."""
    path = folder / ABOUT
    try:
        about = read_json(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: is damaged: {error}") from error
    known = isinstance(about, dict) and about.get("schema") == SCHEMA
    require(known, f"{path}: is damaged: it has no schema {SCHEMA!r}")
    right = are_files(about.get("files")) and MODEL in about["files"]
    require(right and isinstance(about.get("model"), dict), f"{path}: is damaged")
    return about


def check_model_file(folder: Path, model: ModelConfig) -> list[str]:
    """Return warnings, one line each, about what cannot be verified of model.pt in `folder`.

    Raises ValueError, one line, if a byte of it or of the tokenizer is not what was written, or if
    it was trained in another model than `model`, which config.yaml beside it names.
    """
    about = read_about(folder)
    if about is None:
        unhashed = f"run={folder}: no {ABOUT} beside {MODEL}: its bytes are unverified"
        return [*unverified(f"run={folder}", check_same("", {}, model)), unhashed]
    for name, facts in about["files"].items():
        try:
            check_file(folder / name, facts)
        except Damaged as error:
            raise ValueError(str(error)) from error
    said = f"run={folder}: config.yaml is not of {MODEL} beside it"
    return unverified(f"run={folder}", check_same(said, about["model"], model))
