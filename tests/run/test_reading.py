"""Models from disk, also those of earlier versions."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from megatron_sas.core.cli import InputError
from megatron_sas.model.config import BertConfig
from megatron_sas.run.reading import read_model_config, write_model_config


def test_configurations_of_earlier_versions_are_read_unless_they_are_pre_ln(tmp_path):
    path, config = tmp_path / "model.json", BertConfig(num_layers=3)
    write_model_config(path, config)
    assert read_model_config(path) == config
    path.write_text(json.dumps({**asdict(config), "norm_placement": "post"}))
    assert read_model_config(path) == config
    path.write_text(json.dumps({**asdict(config), "norm_placement": "pre"}))
    with pytest.raises(InputError, match="pre-LN") as refused:
        read_model_config(path)
    assert "\n" not in str(refused.value)
    path.write_text(json.dumps({**asdict(config), "colour": "red"}))
    with pytest.raises(InputError, match="is not a configuration of this program"):
        read_model_config(path)
