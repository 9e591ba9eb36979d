"""The registry of parsers is all that knows them: a class in it is a parser for every tool."""

from __future__ import annotations

import argparse

import pytest
from preprocessing import run

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.parsers.given import NoParser
from megatron_sas.corpus.parsers.registry import (
    PARSERS,
    check_predicts,
    describe_parser,
    make_parser,
    parser_usage,
    predictor_usage,
)


class _Chain(NoParser):
    """Every word depends on the one before."""

    argument, remark, heads = "LABEL", "chains", "predicted"

    def __init__(self, label):
        self._label = label

    def parse(self, contents, encodings, names):
        for parse in super().parse(contents, encodings, names):
            parse.heads = parse.sentence_starts.cumsum() * 0 + range(-1, len(parse.heads) - 1)
            parse.relations[:] = names.number(self._label)
            yield parse


def test_a_line_makes_a_parser(vocab_file, tmp_path, monkeypatch):
    monkeypatch.setitem(PARSERS, "chain", _Chain)
    (tmp_path / "a.txt").write_text("the cat sat\n" * 9)
    header = run(tmp_path / "a.txt", vocab_file, "chain:next", tmp_path / "out", seq_length=8)
    assert header["parser"] == {"name": "chain:next"} and header["relations"] == ["", "next"]
    assert header["counts"]["edges"] > 0 and header["counts"]["unparsed_documents"] == 0
    assert parser_usage(remarks=True).endswith(", none (no heads; a line is a sentence) or chain:LABEL (chains)")
    assert predictor_usage() == "spacy:MODEL, stanza:LANGUAGE or chain:LABEL"


def test_usage():
    assert parser_usage() == "spacy:MODEL, stanza:LANGUAGE, conllu or none"
    assert predictor_usage() == "spacy:MODEL or stanza:LANGUAGE"
    help_text = argparse.ArgumentParser().add_argument("--parser", help=parser_usage(remarks=True)).help
    assert all(kind in help_text for kind in PARSERS)


@pytest.mark.parametrize("name", ["spacy", "spacy:", "conllu:", "none:x", "udpipe:en", ""])
def test_names_that_are_none(name):
    for function in (make_parser, describe_parser, check_predicts):
        with pytest.raises(
            InputError, match=f"^--parser {name}: must be spacy:MODEL, stanza:LANGUAGE, conllu or none$"
        ):
            function(name)


def test_those_that_predict_nothing():
    for kind in ("conllu", "none"):
        assert describe_parser(kind) == {"name": kind}
        with pytest.raises(InputError, match="makes no parses of its own; give spacy:MODEL or stanza:LANGUAGE"):
            check_predicts(kind)
