"""A small packed data set with a learnable pattern and random edges, half of it without a parse; for engine tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_sas.core.files import sha256_file, write_json_atomic
from megatron_sas.data.indexed_dataset import write_index
from megatron_sas.data.packed import FILES, FORMAT, FORMAT_VERSION
from megatron_sas.data.tokenizer import load_tokenizer, tokenizer_info

WORDS = 60


def write_vocabulary(path: Path) -> Path:
    """A vocabulary of the special tokens and `WORDS` words."""
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"w{i}" for i in range(WORDS)]) + "\n")
    return path


def write_packed(directory: Path, *, sequences: int = 24, seq_length: int = 32, seed: int = 0) -> str:
    """Write PREFIX.* into `directory` and return the prefix. Every second sequence has no edges."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = directory / "vocab.txt"
    if not vocabulary.exists():
        write_vocabulary(vocabulary)
    rng = np.random.default_rng(seed)
    prefix = str(directory / f"data{seed}")
    start = rng.integers(0, WORDS, (sequences, 1))
    tokens = 5 + (start + np.arange(seq_length)[None] * rng.integers(1, 4, (sequences, 1))) % WORDS
    tokens[:, 0], tokens[:, -1] = 2, 3
    heads = rng.integers(1, seq_length - 1, (sequences, seq_length))
    heads[rng.random(heads.shape) < 0.3] = -1
    heads[:, [0, -1]] = -1
    heads[::2] = -1
    boundaries = np.ones((sequences, seq_length), np.uint8)
    boundaries[:, [0, -1]] = 0
    boundaries[:, 1] = 3
    tokens.astype("<u2").tofile(f"{prefix}.bin")
    write_index(f"{prefix}.idx", np.uint16, np.full(sequences, seq_length))
    heads.astype("<i2").tofile(f"{prefix}.heads.bin")
    boundaries.tofile(f"{prefix}.marks.bin")
    (heads >= 0).astype(np.uint8).tofile(f"{prefix}.relns.bin")
    info = tokenizer_info(load_tokenizer(vocabulary), vocabulary)
    write_json_atomic(
        f"{prefix}.json",
        {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "seq_length": seq_length,
            "num_sequences": sequences,
            "relations": ["", "dep"],
            "tokenizer": json.loads(json.dumps(vars(info))),
            "files": {
                name: {"size": Path(f"{prefix}.{name}").stat().st_size, "sha256": sha256_file(f"{prefix}.{name}")}
                for name in FILES
            },
        },
    )
    return prefix
