"""Trained tokenizers: special tokens, saving, SentencePiece's own segmentation, and edges through alignment."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sentencepiece
from engine_runs import launch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.build.workers import Worker, WorkerSettings
from megatron_sas.corpus.readers.conllu import read_conllu
from megatron_sas.corpus.train_tokenizer import (
    KINDS,
    from_sentencepiece,
    train_sentencepiece,
    train_tokenizer,
)
from megatron_sas.data.tokenizer import (
    SPECIAL_TOKENS,
    load_tokenizer,
    plain_text_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    tokenizer_info,
)

STEMS = "walk talk jump paint visit help look open play watch".split()  # noqa: SIM905
ENDINGS = ["", "s", "ed", "ing", "er", "ers"]
ODD = ["Ｆｕｌｌ width", "two  spaces", " before and after ", "a\tb", "can't walk.", "Walking", "\u00a0jumps", "", "▁x"]


def paragraphs(count=400, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        words = [f"{STEMS[rng.integers(10)]}{ENDINGS[rng.integers(6)]}" for _ in range(rng.integers(3, 12))]
        yield " ".join(words).capitalize() + "." + " It can't be Café (or 1999)." * int(rng.integers(2))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def trained(kind):
    return train_tokenizer(list(paragraphs()), kind, 90)


def test_special_tokens_come_first_and_the_size_is_kept(trained):
    info = tokenizer_info(trained, "x")
    assert (info.pad_id, info.unk_id, info.cls_id, info.sep_id, info.mask_id) == (0, 1, 2, 3, 4)
    assert trained.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS)
    assert info.vocab_size == 90 and sorted(trained.get_vocab().values()) == list(range(90))
    assert trained("walk").tokens()[0] == "[CLS]" and trained("walk").tokens()[-1] == "[SEP]"
    assert trained("walk [MASK].")["input_ids"].count(4) == 1


def test_training_again_gives_the_same(kind, trained):
    assert tokenizer_hash(train_tokenizer(list(paragraphs()), kind, 90)) == tokenizer_hash(trained)


OTHER_PROCESS = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from tests.corpus.test_train_tokenizer import KINDS, paragraphs, tokenizer_hash, train_tokenizer
for kind in KINDS:
    print(kind, tokenizer_hash(train_tokenizer(list(paragraphs()), kind, 90)))
"""


def test_another_process_with_other_threads_and_hashes_trains_the_same():
    """Hash maps have another order there, and libraries find one core."""
    printed = launch("-c", OTHER_PROCESS, PYTHONHASHSEED="3", RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    expected = [f"{kind} {tokenizer_hash(train_tokenizer(list(paragraphs()), kind, 90))}" for kind in KINDS]
    assert printed.split("\n")[:-1] == expected


def test_saved_files_read_back_everywhere(kind, trained, tmp_path):
    save_tokenizer(trained, tmp_path, None)
    readers = [load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)]
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*paragraphs(20, seed=1), *ODD, "walk [MASK]."]:
        expected = trained(text)["input_ids"]
        assert [reader(text)["input_ids"] for reader in readers] == [expected, expected]
        assert plain.encode(text).ids == expected
    # These two names exist in transformers 4 and 5.
    name = json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert name == ("BertTokenizer" if kind == "wordpiece" else "PreTrainedTokenizerFast")


def test_texts_round_trip(kind, trained):
    text = "walking it can't be café (or 1999)." if kind != "wordpiece" else "walking it can be cafe or 1999"
    assert trained.decode(trained(text)["input_ids"], skip_special_tokens=True).replace(" .", ".") == text


def test_cased_and_uncased(kind):
    cased = train_tokenizer(list(paragraphs()), kind, 90, cased=True)
    uncased = train_tokenizer(list(paragraphs()), kind, 90)
    assert uncased("It CAN")["input_ids"] == uncased("it can")["input_ids"]
    assert cased("It can")["input_ids"] != cased("it can")["input_ids"]


@pytest.mark.parametrize("cased", [False, True])
@pytest.mark.parametrize("brackets", [False, True], ids=["unknown brackets", "known brackets"])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_pieces_equal_those_of_sentencepiece(kind, brackets, cased):
    """Also where a text holds "[SEP]", as a text: whether the tokenizer knows its characters, or has no other piece."""
    texts = [*paragraphs(), *(["A [B] c [D] PADS SEPS"] * 20 if brackets else [])]
    model = train_sentencepiece(texts, kind, 90, cased)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = plain_text_tokenizer(from_sentencepiece(model).to_str())
    odd = ["[MASK]", "walk [SEP] and [PAD]s", "[UNK][CLS]", "▁[SEP]", "unseen: Ж and 漢字 walk"]
    # With the longer alphabet "9" + "99" and "99" + "9" are equally good.
    plain = [text for text in paragraphs(200, seed=1) if not (brackets and "1999" in text)]
    for text in [*plain, *ODD, *odd]:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text), text
        assert not {0, 2, 3, 4} & set(ids), text


def test_pieces_equal_those_of_sentencepiece_on_wikipedia(data_dir):
    import lzma

    with lzma.open(data_dir / "enwiki" / "enwiki-validation.jsonl.xz", "rt") as file:
        texts = [line for _ in range(60) for line in json.loads(next(file))["text"].split("\n") if line.strip()]
    for kind in ("unigram", "bpe"):
        model = train_sentencepiece(texts[:600], kind, 3000)
        theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
        ours = plain_text_tokenizer(from_sentencepiece(model).to_str())
        differ = [t for t in texts[600:] if ours.encode(t, add_special_tokens=False).ids != theirs.encode(t)]
        # Equally good segmentations, and a few characters with combining marks, may come out differently.
        assert len(texts) > 1000 and len(differ) <= 0.005 * len(texts), differ[:3]


CONLLU = """\
# "▁" stands alone before "Ж", which the tokenizer does not know
1\tThey\t_\t_\t_\t_\t2\tnsubj\t_\t_
2\thelp\t_\t_\t_\t_\t0\troot\t_\t_
3\tЖ\t_\t_\t_\t_\t2\tobj\t_\tSpaceAfter=No
4\t.\t_\t_\t_\t_\t2\tpunct\t_\t_

1-2\tcan't\t_\t_\t_\t_\t_\t_\t_\t_
1\tca\t_\t_\t_\t_\t3\taux\t_\t_
2\tn't\t_\t_\t_\t_\t3\tadvmod\t_\t_
3\tpaint\t_\t_\t_\t_\t0\troot\t_\t_
"""


def test_edges_join_the_first_pieces_of_words(kind, trained, tmp_path):
    """Offsets of every piece, without and with the space before the word, lead to the word that the eye sees."""
    (tmp_path / "s.conllu").write_text(CONLLU)
    sentences = list(read_conllu(tmp_path / "s.conllu"))
    result = Worker(WorkerSettings(trained.backend_tokenizer.to_str(), "conllu", 100, trained.unk_token_id))(sentences)
    tokens, offsets, boundaries, _ = result.streams
    assert result.counts["words"] == 7
    for sentence, start, end in zip(sentences, result.cuts[:-1], result.cuts[1:], strict=True):
        encoding = trained.backend_tokenizer.encode(sentence.text, add_special_tokens=False)
        assert encoding.ids == tokens[start:end].tolist()
        owner = []  # by a reader's eye: the first visible character of the piece, or after it, and the word there
        for begin, stop in encoding.offsets:
            place = next(p for p in range(begin, stop + 1) if not sentence.text[p].isspace())
            owner.append(next(w for w, (a, b) in enumerate(sentence.spans) if a <= place < b))
        first = {word: owner.index(word) for word in set(owner)}
        assert kind == "wordpiece" or "Ж" not in sentence.text or "▁" in encoding.tokens
        edges = {(d, h) for d, h in enumerate(sentence.heads) if h >= 0 and d in first and h in first}
        found = {(p, p + o) for p, o in enumerate(offsets[start:end].tolist()) if o}
        assert len(found) >= 2
        assert found == {(first[d], first[h]) for d, h in edges}
        assert [p for p, mark in enumerate(boundaries[start:end]) if mark] == sorted(first.values())


class _Broken:
    """Text whose reading fails on the way."""

    def __init__(self, fault):
        self.fault = fault

    def __iter__(self):
        yield from paragraphs(50)
        raise self.fault


@pytest.mark.parametrize(
    "fault", [InputError("a.txt:51: invalid UTF-8"), OSError(5, "Input/output error"), KeyboardInterrupt()]
)
def test_what_is_wrong_with_the_text_is_said(kind, fault):
    with pytest.raises(type(fault)) as error:
        train_tokenizer(_Broken(fault), kind, 90)
    assert error.value is fault


def test_bad_requests(kind):
    with pytest.raises(InputError, match="special tokens"):
        train_tokenizer(list(paragraphs()), kind, 5)
    with pytest.raises(InputError, match="--vocab-size 20: "):
        train_tokenizer(list(paragraphs()), kind, 20)
    with pytest.raises(InputError, match="no text"):
        train_tokenizer([], kind, 100)
    if kind == "wordpiece":
        assert len(train_tokenizer(["walk walk"], kind, 5000)) < 20
    else:
        with pytest.raises(InputError, match=r"--vocab-size 5000: .*too high") as error:
            train_tokenizer(list(paragraphs()), kind, 5000)
        assert "\n" not in str(error.value)
