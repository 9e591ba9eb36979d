"""Evaluations in a real process group: equal results, and no rank is left waiting in a forward pass."""

from __future__ import annotations

import json

import all_evaluations
import numpy as np
import pytest
from synthetic_data import write_packed


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(fork_server, data_dir, model_directory, tmp_path):
    treebank, blimp = data_dir / "ud_ewt" / "en_ewt-ud-test.conllu", data_dir / "blimp"
    inputs = [str(path) for path in (model_directory, treebank, blimp, write_packed(tmp_path / "packed", sequences=28))]
    arguments = (tmp_path / "store", tmp_path / "result", *inputs)
    fork_server.call("all_evaluations:main", *arguments, log=tmp_path / "log", ranks=2)
    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]

    ours, alone = results[0], all_evaluations.evaluate(*inputs)
    of_text = (alone["forwards"] - sum(alone["batches"])) // 2  # batches of unmasked text, and as many of masked text
    assert of_text % 2, "the text should leave a rank without a batch"
    assert ours["forwards"] == sum(-(-number // 2) for number in [*alone["batches"], of_text, of_text])
    dimension = alone["dimension"]
    assert dimension["num_points"] + dimension["duplicates"] == 27 and dimension["twonn"] is not None
    assert ours["dimension"] == pytest.approx(dimension, rel=1e-4)
    assert ours["sets"] == alone["sets"]
    assert ours["validation"]["validation_mlm_loss"] == pytest.approx(
        alone["validation"]["validation_mlm_loss"], rel=1e-5
    )
    for one, other in (
        (ours["attention"], alone["attention"]),
        (ours["validation"]["validation_attention"], alone["validation"]["validation_attention"]),
    ):
        assert one["uniform_entropy"] == pytest.approx(other["uniform_entropy"], rel=1e-12)
        for name in ("entropy", "to_cls", "to_sep"):
            np.testing.assert_allclose(one[name]["per_head"], other[name]["per_head"], rtol=1e-4)
    one, other = (np.array(result["syntax"]["counts"]["correct"]) for result in (ours, alone))
    assert np.abs(one - other).sum() <= 2  # near ties: another number of threads rounds differently
