"""Data and tokenizers from outside: files that are no text, ids of another vocabulary, silence."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.launching import ROOT, SMALL, environment, launch, start
from tests.soak.trial import trial

WRONG, TYPED = "Silent and wrong", "Input that people type"
TEXT = "Grüße! The quick brown fox jumps over the lazy dog.\n" * 2000
ONE = ("strategy=single", *(key for key in SMALL if key != "data=generated"))


def trained(folder: Path, path: Path, *more: str) -> str:
    """Train on a file; return the SHA-256 of the text that its ledger names."""
    run = f"run.dir={path.name}-run"
    result = launch(*ONE, "data=text", f"data.path={path}", run, *more, cwd=folder)
    assert result.returncode == 0, result.stderr
    ledger = json.loads((folder / f"{path.name}-run" / "ledger.json").read_text())
    return ledger["environment"]["corpus"]["sha256"]


def refused(folder: Path, *given: str) -> str:
    """The one line of a launch that is refused before it makes its run folder."""
    result = launch(*ONE, *given, "run.dir=never", cwd=folder)
    progress = re.compile(r"launch.sh: data\S*: .* s$")  # of a busy machine
    lines = [line for line in result.stderr.splitlines() if not progress.match(line)]
    assert result.returncode == 2 and len(lines) == 1, f"{result.returncode}: {result.stderr}"
    assert not (folder / "never").exists()
    return lines[0].replace(f"{folder}/", "")


@trial(WRONG, "UTF-16, gzip, JSON lines and parquet as `data.path`")
def what_can_be_read(folder: Path) -> str:
    import pyarrow
    from pyarrow import parquet

    lines = TEXT.splitlines()
    (folder / "plain").write_text(TEXT)
    (folder / "utf16").write_bytes(TEXT.encode("utf-16"))
    (folder / "no-mark").write_bytes(TEXT.encode("utf-16-le"))
    (folder / "gz").write_bytes(gzip.compress(TEXT.encode()))
    (folder / "jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    parquet.write_table(pyarrow.table({"text": lines}), folder / "parquet")
    wanted = hashlib.sha256(TEXT.encode()).hexdigest()
    documents = hashlib.sha256("".join(f"{line}\n\n" for line in lines).encode()).hexdigest()
    for name in ("plain", "utf16", "no-mark", "gz"):
        assert trained(folder, folder / name) == wanted, name
    for name in ("jsonl", "parquet"):
        assert trained(folder, folder / name) == documents, name
    return "each is trained on as its text: the SHA-256 in the ledger is that of the text in UTF-8"


@trial(WRONG, "a zip, a PDF, weights, Latin-1 and nanoGPT's `train.bin` as `data.path`")
def what_is_refused(folder: Path) -> str:
    import torch
    from safetensors.torch import save_file

    (folder / "book").mkdir()
    (folder / "book" / "a.txt").write_text(TEXT)
    shutil.make_archive(str(folder / "zipped"), "zip", folder / "book")
    (folder / "a.pdf").write_bytes(b"%PDF-1.7\n" + bytes(range(256)) * 40)
    save_file({"weight": torch.zeros(9)}, folder / "a.safetensors")
    (folder / "latin").write_bytes("Grüße\n".encode("latin-1") * 100)
    ids = np.random.default_rng(0).integers(0, 50257, 40_000).astype("<u2")
    (folder / "train.bin").write_bytes(ids.tobytes())
    said = {
        "zipped.zip": "is a zip archive",
        "a.pdf": "is a PDF",
        "a.safetensors": "is a .safetensors file",
        "latin": "iconv -f LATIN1 -t UTF-8",
        "train.bin": f"the highest is {ids.max()}: data.tokenizer=ids data.vocab_size=",
    }
    for name, part in said.items():
        line = refused(folder, "data=text", f"data.path={folder / name}")
        assert part in line, line
    taken = ("data.tokenizer=ids", "data.vocab_size=50257", "model.vocab_size=50257")
    assert trained(folder, folder / "train.bin", *taken)
    return f"exit 2 each, the last by: {line}; with these keys it trains"


@trial(WRONG, "a text of 1 GB: memory of the launcher")
def large(folder: Path) -> str:
    path = folder / "large.txt"
    with open(path, "wb") as file:
        for _ in range(1000):
            file.write(b"0123456789abcde\n" * 62_500)
    code = (
        "import resource, sys; from minigpt.config import *; from minigpt.corpus import prepare\n"
        f"corpus = prepare(DataConfig(Source.text, path={str(path)!r}, cache={str(folder)!r}))\n"
        "print(sum(corpus.sizes.values()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    size, peak = map(int, ran.stdout.split())
    scale = 1 if sys.platform == "darwin" else 1024  # units of ru_maxrss
    private = peak * scale
    assert size == 10**9 and private < 400e6, private
    return f"1,000,000,000 tokens are encoded with at most {private / 1e6:.0f} MB resident"


@trial(WRONG, "weights of one tokenizer given the ids of another: init, resume, finetune, generate")
def another_tokenizer(folder: Path) -> str:
    path = folder / "text"
    path.write_text(TEXT)
    data = ("data=text", f"data.path={path}", f"data.cache={folder}/cache", "model.vocab_size=300")
    bpe = ("data.tokenizer=bpe", "data.vocab_size=300")
    made = launch(*ONE, *data, *bpe, "checkpoint.every=2", "run.dir=run", cwd=folder)
    assert made.returncode == 0, made.stderr
    exported = launch("export", "run=run", "out=model.safetensors", cwd=folder)
    assert exported.returncode == 0, exported.stderr
    ways = (("init=model.safetensors",), ("resume=run", "steps=6"), ("finetune=lora", "resume=run"))
    lines = [refused(folder, *data, *way) for way in ways]
    assert all("was trained with the tokenizer.json of SHA-256" in line for line in lines), lines
    given = "data.tokenizer=run/tokenizer.json"
    for number, way in enumerate(ways):
        into = f"run.dir=taken-{number}"
        taken = launch(*ONE, *data, *way, given, into, "sample.tokens=0", cwd=folder)
        assert taken.returncode == 0, taken.stderr
    shutil.rmtree(folder / "cache")
    text = launch("generate", "run=run", "prompt=The", "tokens=4", cwd=folder)
    assert text.returncode == 0 and text.stdout.startswith("The"), text.stderr
    other = (folder / "taken-0" / "model.pt", folder / "taken-0" / "model.json")
    (folder / "run" / "tokenizer.json").write_text(other[1].read_text())
    wrong = launch("generate", "run=run", "tokens=4", cwd=folder)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1, wrong.stderr
    short = re.sub(r"^launch.sh: ", "", lines[2])
    return f"exit 2 each: {short}; with that key all three train, generate needs no cache"


@trial(TYPED, "`data.tokenizer=bpe` on 3 MB without a space")
def no_spaces(folder: Path) -> str:
    letters = random.Random(0)
    (folder / "dna").write_text("".join(letters.choice("ACGT") for _ in range(3_000_000)))
    asked = ("data=text", f"data.path={folder}/dna", "data.tokenizer=bpe", "data.vocab_size=1024")
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    process = start(*ONE, *asked, "model.vocab_size=1024", f"data.cache={folder}/cache", cwd=folder)
    assert process.stderr
    first = process.stderr.readline()
    seconds = time.monotonic() - began
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "no spaces" in first and "learning 1,024 ids" in err, first + err
    busy = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    return (
        f"exit 0 after {time.monotonic() - began:.0f} s ({busy:.0f} s of a core); "
        f"the first line after {seconds:.1f} s: {first.strip()}; then {err.count('launch.sh: ')} "
        "lines of progress"
    )
