"""Packed data and a small tokenizer made by hand."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_sas.data.indexed_dataset import write_index
from megatron_sas.data.packed import FILES, FORMAT, FORMAT_VERSION

VOCAB = [
    *(
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "cat",
        "dog",
        "sat",
        "##s",
        "run",
        "##ning",
        "can",
        "cannot",
    ),
    *("not", "don", "'", "t", ".", ",", "-", "cafe", "a", "##a", "b", "##b", "c", "##c", "q", "[", "]", "sep", "!"),
]


@pytest.fixture
def vocab_file(tmp_path):
    """A vocab.txt of 33 entries."""
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n")
    return path


@pytest.fixture
def wordless_tokenizer(vocab_file, tmp_path):
    """A directory with a tokenizer that takes a whole text for one word."""
    tokenizer = Tokenizer(models.WordPiece({entry: number for number, entry in enumerate(VOCAB)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path / "wordless")
    return tmp_path / "wordless"


@pytest.fixture
def make_packed(tmp_path):
    """Write packed data without the preprocessing code; returns the prefix."""

    def make(n=11, s=16, seed=0, name="packed"):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(5, 30, (n, s)).astype(np.uint16)
        tokens[:, 0], tokens[:, -1] = 2, 3
        heads = np.where(rng.random((n, s)) < 0.5, rng.integers(1, s - 1, (n, s)), -1).astype("<i2")
        prefix = tmp_path / name
        tokens.tofile(f"{prefix}.bin")
        write_index(f"{prefix}.idx", np.uint16, np.full(n, s))
        heads.tofile(f"{prefix}.heads.bin")
        np.ones((n, s), np.uint8).tofile(f"{prefix}.marks.bin")
        np.zeros((n, s), np.uint8).tofile(f"{prefix}.relns.bin")
        contents = {file: (tmp_path / f"{name}.{file}").read_bytes() for file in FILES}
        special = {"pad_id": 0, "unk_id": 1, "cls_id": 2, "sep_id": 3, "mask_id": 4}
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "seq_length": s,
            "num_sequences": n,
            "tokenizer": {"path": "vocab.txt", "hash": "0", "vocab_size": 33, **special},
            "relations": ["", "nsubj"],
            "files": {f: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for f, c in contents.items()},
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(header))
        return prefix

    return make
