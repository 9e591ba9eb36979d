"""Opening packed data, and refusing what is damaged or does not belong together."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from megatron_sas.core.cli import InputError
from megatron_sas.data.packed import PackedData


def edit(prefix, change):
    path = prefix.with_name(f"{prefix.name}.json")
    header = json.loads(path.read_text())
    change(header)
    path.write_text(json.dumps(header))


def test_streams(make_packed):
    prefix = make_packed(n=7, s=16)
    packed = PackedData(prefix)
    packed.verify()
    assert len(packed) == packed.num_sequences == 7 and packed.seq_length == 16
    for name, dtype in (("tokens", np.uint16), ("heads", np.int16), ("boundaries", np.uint8), ("deprels", np.uint8)):
        stream = getattr(packed, name)
        assert stream.shape == (7, 16) and stream.dtype == dtype
    raw = np.fromfile(f"{prefix}.bin", "<u2").reshape(7, 16)
    np.testing.assert_array_equal(packed.tokens, raw)
    np.testing.assert_array_equal(packed.heads, np.fromfile(f"{prefix}.heads.bin", "<i2").reshape(7, 16))
    assert packed.relations == ["", "nsubj"] and packed.tokenizer.vocab_size == 33
    assert packed.tokenizer.special_ids == (0, 2, 3, 4)
    assert packed.fingerprint == hashlib.sha256(raw.tobytes()).hexdigest()


@pytest.mark.parametrize("name", ["bin", "idx", "heads.bin", "marks.bin", "relns.bin"])
def test_wrong_size_missing_or_changed(make_packed, name):
    prefix = make_packed()
    path = prefix.with_name(f"{prefix.name}.{name}")
    content = path.read_bytes()
    for damaged in (content[:-1], content + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="bytes where the header says") as error:
            PackedData(prefix)
        assert str(path) in str(error.value)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError):
        PackedData(prefix).verify()
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        PackedData(prefix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(format="x"), "field format"),
        (lambda h: h.update(version=2), "format version 2"),
        (lambda h: h.pop("tokenizer"), "tokenizer"),
        (lambda h: h["tokenizer"].pop("hash"), "hash"),
        (lambda h: h["files"].pop("idx"), "sizes missing"),
        (lambda h: h.update(num_sequences="many"), "malformed"),
        (lambda h: h.update(num_sequences=0), r"packed.json: holds no sequence, its text does not fill one; leave it"),
        (lambda h: h.update(num_sequences=-1), "out of range"),
        (lambda h: h.update(num_sequences=10), "does not hold 10 sequences"),
        (lambda h: h.update(seq_length=8, num_sequences=22), "does not hold 22 sequences of 8"),
    ],
)
def test_wrong_headers(make_packed, change, message):
    prefix = make_packed()
    edit(prefix, change)
    with pytest.raises(InputError, match=message):
        PackedData(prefix)


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_headers_that_are_no_object(make_packed, content):
    prefix = make_packed()
    prefix.with_name("packed.json").write_text(content)
    with pytest.raises(InputError, match=r"packed.json: not"):
        PackedData(prefix)


def test_no_header(make_packed, tmp_path):
    with pytest.raises(InputError, match=r"none.json: no such file; give the --output prefix"):
        PackedData(tmp_path / "none")


def test_control_heads(make_packed, tmp_path):
    prefix = make_packed(n=5)
    other = np.full((5, 16), -1, "<i2")
    other[:, 3] = 4
    other.tofile(f"{prefix}.heads-offset.bin")
    header = {"base_fingerprint": PackedData(prefix).fingerprint, "sha256": hashlib.sha256(other.tobytes()).hexdigest()}
    path = tmp_path / "packed.heads-offset.json"
    path.write_text(json.dumps(header))
    packed = PackedData(prefix, "offset")
    packed.verify()
    np.testing.assert_array_equal(packed.heads, other)
    assert packed.heads_header == header
    path.write_text(json.dumps(header | {"base_fingerprint": "other"}))
    with pytest.raises(InputError, match="was made for other tokens"):
        PackedData(prefix, "offset")
    path.write_text(json.dumps(header | {"sha256": "other"}))
    with pytest.raises(InputError, match=r"heads-offset.bin: content does not match"):
        PackedData(prefix, "offset").verify()
    with pytest.raises(InputError, match="make this heads stream"):
        PackedData(prefix, "none")
