"""Points of a trajectory on disk: read back as written, one writer at a time, one set of settings."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from megatron_sas.core.cli import InputError
from megatron_sas.evaluation.items import BlimpItems, UasItems
from megatron_sas.trajectory.points import (
    is_whole,
    point_directory,
    read_items,
    read_points,
    read_settings,
    write_point,
    writing,
)

SETTINGS = {"treebank": {"path": "a.conllu", "sha256": "12", "sentences": 4}, "blimp": None}


def random_items(edges=11, shape=(2, 3, 5), pairs=7):
    rng = np.random.default_rng(0)
    correct = rng.random((edges, *shape)) < 0.4
    uas = UasItems(rng.integers(0, 9, (edges, 2)).astype(np.int32), correct)
    blimp = BlimpItems(rng.random(pairs) < 0.5, np.arange(pairs, dtype=np.int16) // 4, ["a", "longer"])
    return {"uas": uas, "blimp": blimp}


def test_points_are_read_back_as_written_and_repeat_bit_for_bit(tmp_path):
    items = random_items()
    with writing(tmp_path / "t", SETTINGS):
        for step, value in ((200, 0.5), (3, float("nan"))):
            write_point(tmp_path / "t", step, {"uas": {"uas": value}}, items)
    assert read_points(tmp_path / "t") == [{"step": 3, "uas": {"uas": None}}, {"step": 200, "uas": {"uas": 0.5}}]
    again = read_items(tmp_path / "t", 200)
    assert np.array_equal(again["uas"].edges, items["uas"].edges)
    assert again["uas"].correct.dtype == bool
    assert np.array_equal(again["uas"].correct, items["uas"].correct)
    assert np.array_equal(again["blimp"].correct, items["blimp"].correct)
    assert (again["blimp"].sets.tolist(), again["blimp"].names) == ([0, 0, 0, 0, 1, 1, 1], ["a", "longer"])
    with np.load(point_directory(tmp_path / "t", 3) / "items.npz") as arrays:
        assert arrays["uas_correct"].shape == (11, -(-2 * 3 * 5 // 8))
        expected = np.packbits(items["uas"].correct.reshape(11, 30), axis=1)
        assert np.array_equal(arrays["uas_correct"], expected)
        assert arrays["uas_shape"].tolist() == [2, 3, 5]
    first, second = (point_directory(tmp_path / "t", step) / "items.npz" for step in (3, 200))
    assert first.read_bytes() == second.read_bytes()


def test_a_damaged_point_is_not_whole_and_is_replaced(tmp_path):
    write_point(tmp_path, 5, {"weight_norm": 2.0}, {})
    assert is_whole(tmp_path, 5)
    assert not is_whole(tmp_path, 6)
    for name, content in (("items.npz", b"PK\x03\x04 cut off"), ("point.json", b'{"step": 6}'), ("point.json", b"{")):
        write_point(tmp_path, 5, {"weight_norm": 2.0}, random_items())
        assert is_whole(tmp_path, 5)
        (point_directory(tmp_path, 5) / name).write_bytes(content)
        assert not is_whole(tmp_path, 5)


def test_other_settings_are_refused_but_inputs_may_move(tmp_path):
    with writing(tmp_path / "t", SETTINGS):
        pass
    moved = {**SETTINGS, "treebank": {**SETTINGS["treebank"], "path": "elsewhere/a.conllu"}}
    leftover = tmp_path / "t" / "points" / ".step_00000001.xyz.tmp"
    leftover.mkdir()
    with writing(tmp_path / "t", moved):
        assert not leftover.exists()
    assert read_settings(tmp_path / "t") == {"format": "megatron_sas trajectory", "version": 1, **SETTINGS}
    other = {**SETTINGS, "treebank": {**SETTINGS["treebank"], "sha256": "13"}}
    with pytest.raises(InputError, match=r"settings.json: was measured with another treebank .*another --output"):
        writing(tmp_path / "t", other).__enter__()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="is no trajectory"):
        writing(tmp_path / "other", SETTINGS).__enter__()


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path):
    script = (
        "import sys, json; from megatron_sas.trajectory.points import writing\n"
        "with writing(sys.argv[1], json.loads(sys.argv[2])): print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "t"), json.dumps(SETTINGS)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "ready\n"
        with pytest.raises(InputError, match=r"is running in this directory; wait for it or choose another --output"):
            writing(tmp_path / "t", SETTINGS).__enter__()
    finally:
        first.kill()
        first.communicate()
    with writing(tmp_path / "t", SETTINGS):
        pass
