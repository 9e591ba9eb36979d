#!/usr/bin/env bash
# datasets 5.2.0: the same records come out differently from a list and from a JSON file, and neither way as they went
# in.
#
# One would guess that `Dataset.from_list(records)` and `load_dataset("json")` of a file with these records agree. The
# list takes its columns from the first record: if that has no parse, `heads` is gone for all. The file keeps `heads`,
# but a text column whose strings all look like dates becomes one of points in time: "2020-05-05" is a datetime now, and
# a comparison with the string is false. One other string in the column, and all of it stays text: the type of a row
# depends on the other rows.
#
# Seen on 2026-12-01: from_list ['text'], json ['text', 'heads']; text[0] '2020-05-05' and datetime.datetime(2020, 5, 5,
# 0, 0)
# Source: datasets/arrow_dataset.py, from_list ("the keys of the first entry will be used"); pyarrow.json, type
# inference: strings that can all be read as ISO 8601 become timestamp[s].
set -euo pipefail
source "$(dirname "$0")/common.sh"
install datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
run 2> log <<'PY' || { cat log; exit 1; }
import json
from pathlib import Path

from datasets import Dataset, load_dataset
from finding import report

records = [{"text": "2020-05-05"}, {"text": "1984-01-01", "heads": [-1]}]
Path("records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
listed = Dataset.from_list(records)
loaded = load_dataset("json", data_files="records.jsonl", split="train", cache_dir="cache")
report(
    "datasets pyarrow",
    expected="columns text, heads and the string '2020-05-05' both times",
    seen=f"{listed.column_names} {listed[0]['text']!r}; {loaded.column_names} {loaded[0]['text']!r}",
    stated="['text'] '2020-05-05'; ['text', 'heads'] datetime.datetime(2020, 5, 5, 0, 0)",
)
PY
