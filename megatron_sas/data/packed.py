"""Opening packed data (docs/architecture.md, "Packed data") and refusing what does not fit together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import sha256_file
from megatron_sas.data.checksums import CheckedMap
from megatron_sas.data.indexed_dataset import IndexedDataset

FORMAT = "megatron_sas packed sequences"
FORMAT_VERSION = 1
FILES = ("bin", "idx", "heads.bin", "marks.bin", "relns.bin")
OPEN_FILES = 2  # that `PackedData` keeps open for training

WORD_START = 1  # bits of the boundaries, PREFIX.marks.bin
SENTENCE_START = 2


@dataclass(frozen=True)
class TokenizerIdentity:
    """What tells tokenizers apart: `hash` is of what they consist of, `digest` of what they do; earlier versions
    recorded no `digest`."""

    hash: str
    digest: str | None = None

    def matches(self, other: TokenizerIdentity) -> bool:
        """Whether both are of the same tokenizer, by what both record."""
        return self.hash == other.hash and (None in (self.digest, other.digest) or self.digest == other.digest)


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the data, as recorded in the header. `path` is a hint."""

    path: str
    hash: str
    vocab_size: int
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    unk_id: int
    digest: str | None = None

    @property
    def identity(self) -> TokenizerIdentity:
        """What tells it from other tokenizers."""
        return TokenizerIdentity(self.hash, self.digest)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that masking must never select. [UNK] stands for a word, so it is not among them."""
        return (self.pad_id, self.cls_id, self.sep_id, self.mask_id)


class PackedData:
    """Packed sequences through memory maps: `tokens` (N, S) uint16 or int32, `heads` (N, S) int16, `boundaries` and
    `deprels` (N, S) uint8. Indexing rows of them compares these with checksums (`CheckedMap`). Every map keeps a file
    open: those of `tokens` and `heads` from the beginning (`OPEN_FILES`), the others from their first use on.

    Attributes: `header` (the parsed PREFIX.json), `seq_length` S, `num_sequences` N, `relations` (index 0 is ""),
    `tokenizer` (`TokenizerInfo`), `fingerprint` (SHA-256 of PREFIX.bin), `heads_path`, `heads_fingerprint` (SHA-256 of
    the heads). With `heads_name` the heads come from PREFIX.heads-NAME.bin instead, and `heads_header` is its JSON.

    Raises:
        InputError: a file is missing, has another size than the header says, or the index disagrees with the header;
            the heads of that name were made for other tokens or from other parses.
    """

    def __init__(self, prefix: str | Path, heads_name: str | None = None) -> None:
        self.prefix = str(prefix)
        self.header = packed_header(prefix)
        self._check_header()
        shape = (self.num_sequences, self.seq_length)
        for name in FILES:
            _check_size(f"{prefix}.{name}", self.header["files"][name]["size"])
        index = IndexedDataset(prefix)
        if len(index) != self.num_sequences or not np.all(index.sequence_lengths == self.seq_length):
            raise InputError(f"{prefix}.idx: does not hold {shape[0]} sequences of {shape[1]} tokens; preprocess again")
        files = self.header["files"]
        self.tokens = CheckedMap(f"{prefix}.bin", index.dtype, shape, files["bin"])
        self.heads_name = heads_name
        self.heads_header: dict[str, Any] | None = None
        heads_path, heads_record = f"{prefix}.heads.bin", files["heads.bin"]
        if heads_name is not None:
            heads_path = f"{prefix}.heads-{heads_name}.bin"
            self.heads_header = heads_record = self._read_heads_header()
            _check_size(heads_path, 2 * shape[0] * shape[1])
        self.heads_path = heads_path
        self.heads_fingerprint: str | None = heads_record.get("sha256")
        self.heads = CheckedMap(heads_path, "<i2", shape, heads_record)

    @cached_property
    def boundaries(self) -> CheckedMap:
        """Word and sentence starts, `WORD_START` and `SENTENCE_START`."""
        return self._bytes("marks.bin")

    @cached_property
    def deprels(self) -> CheckedMap:
        """Numbers into `relations`."""
        return self._bytes("relns.bin")

    def _bytes(self, name: str) -> CheckedMap:
        shape = (self.num_sequences, self.seq_length)
        return CheckedMap(f"{self.prefix}.{name}", np.uint8, shape, self.header["files"][name])

    def _check_header(self) -> None:
        path, header = f"{self.prefix}.json", self.header
        self.num_sequences: int = header["num_sequences"]
        if self.num_sequences == 0:
            raise InputError(
                f"{path}: holds no sequence, its text does not fill one; leave it out or give it more text"
            )
        try:
            self.seq_length = int(header["seq_length"])
            self.relations: list[str] = list(header["relations"])
            self.tokenizer = TokenizerInfo(**header["tokenizer"])
            self.fingerprint: str = header["files"]["bin"]["sha256"]
            missing = [name for name in FILES if "size" not in header["files"].get(name, {})]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: missing or malformed field ({error}); preprocess the text again") from error
        if missing or self.num_sequences < 0 or self.seq_length < 3:
            raise InputError(f"{path}: sizes missing or sequence counts out of range; preprocess the text again")

    def _read_heads_header(self) -> dict[str, Any]:
        path = f"{self.prefix}.heads-{self.heads_name}.json"
        header = read_header(path, "make this heads stream with tools/make_control.py")
        if header.get("base_fingerprint") != self.fingerprint:
            raise InputError(
                f"{path}: was made for other tokens than those of {self.prefix}.bin; run tools/make_control.py again"
            )
        for name, digest in header.get("base_files", {}).items():  # streams of earlier versions have none
            if self.header["files"][name].get("sha256") != digest:
                raise InputError(
                    f"{path}: was made from another {self.prefix}.{name} than the present one; run "
                    "tools/make_control.py again"
                )
        return header

    def verify(self) -> None:
        """Compare every file's SHA-256 with the headers (reads it all); `InputError` at the first mismatch."""
        expected = {f"{self.prefix}.{name}": self.header["files"][name].get("sha256") for name in FILES}
        if self.heads_header is not None:
            expected[f"{self.prefix}.heads-{self.heads_name}.bin"] = self.heads_header.get("sha256")
        for path, digest in expected.items():
            if sha256_file(path) != digest:
                raise InputError(f"{path}: content does not match its checksum; copy it anew or preprocess again")

    @property
    def parts(self) -> list[PackedData]:
        """The data that this consists of: itself (`MixedData` has several)."""
        return [self]

    def locate(self, row: int) -> tuple[PackedData, int]:
        """The part that sequence `row` lies in, and its number there."""
        return self, row

    def __len__(self) -> int:
        return self.num_sequences


def check_same_form(field: str, part: PackedData, first: PackedData) -> None:
    """Raise `InputError`, with the name of the field, for data of other tokenizers or lengths, which do not mix."""
    if not part.tokenizer.identity.matches(first.tokenizer.identity):
        raise InputError(
            f"{field}: {part.prefix} and {first.prefix} were made with different tokenizers; preprocess with one "
            "--tokenizer"
        )
    if part.seq_length != first.seq_length:
        raise InputError(
            f"{field}: {part.prefix} has sequences of {part.seq_length} tokens, {first.prefix} of {first.seq_length}; "
            "preprocess with one --seq-length"
        )


def packed_header(prefix: str | Path) -> dict[str, Any]:
    """PREFIX.json; `InputError` when it is missing or no header of packed data that this program reads."""
    path = f"{prefix}.json"
    header = read_header(path, "give the --output prefix of a finished tools/preprocess_data.py")
    if header.get("format") != FORMAT:
        raise InputError(f"{path}: field format is not {FORMAT!r}; this is not the header of packed data")
    if header.get("version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {header.get('version')}, this program reads {FORMAT_VERSION}; preprocess again"
        )
    if not isinstance(header.get("num_sequences"), int):
        raise InputError(f"{path}: missing or malformed field (num_sequences); preprocess the text again")
    return header


def read_header(path: str | Path, remedy: str) -> dict[str, Any]:
    """The JSON object in `path`; `InputError` with `remedy` when there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {remedy}") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object; {remedy}")
    return value


def _check_size(path: str, size: int) -> None:
    try:
        actual = Path(path).stat().st_size
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; copy it beside its header or preprocess again") from None
    if actual != size:
        raise InputError(
            f"{path}: {actual} bytes where the header says {size}; the file is cut off or belongs to other data: "
            "copy it anew or preprocess again"
        )
