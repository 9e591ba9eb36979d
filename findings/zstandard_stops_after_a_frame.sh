#!/usr/bin/env bash
# zstandard 0.25.0: of a .zst file with two frames some functions give all of it, others the first frame, without an
# error.
#
# A .zst file may be several frames one after another: `cat a.zst b.zst`, pzstd, and tools that make seekable archives
# write such files, and `zstd -d` reads them whole. One would guess that the functions of one library agree.
# `stream_reader` (whose option `read_across_frames` is False by default) and `open` read on; `decompress`,
# `read_to_iter` and `decompressobj` end with the first frame as if the file ended there: a corpus is silently cut.
#
# Seen on 2026-12-01: open 6 lines, stream_reader 6, decompress 3, read_to_iter 3, decompressobj 3
# Source: the documentation says it of `decompress`; zstandard/backend_cffi.py, read_to_iter: `if zresult == 0: return`.
# `decompressobj` leaves the rest in `unused_data`, as zlib does.
set -euo pipefail
source "$(dirname "$0")/common.sh"
install zstandard==0.25.0
run <<'PY'
from pathlib import Path

import zstandard
from finding import report

path = Path("corpus.txt.zst")
path.write_bytes(zstandard.compress(b"one\ntwo\nthree\n") + zstandard.compress(b"four\nfive\nsix\n"))
reader = zstandard.ZstdDecompressor()
with path.open("rb") as file:
    iterated = b"".join(reader.read_to_iter(file))
with path.open("rb") as file:
    streamed = reader.stream_reader(file).read()
with zstandard.open(path) as file:
    opened = file.read()
data = path.read_bytes()
texts = {
    "open": opened,
    "stream_reader": streamed,
    "decompress": reader.decompress(data),
    "read_to_iter": iterated,
    "decompressobj": reader.decompressobj().decompress(data),
}
report(
    "zstandard",
    expected="6 lines from each",
    seen=", ".join(f"{name} {len(text.splitlines())}" for name, text in texts.items()),
    stated="open 6, stream_reader 6, decompress 3, read_to_iter 3, decompressobj 3",
)
PY
