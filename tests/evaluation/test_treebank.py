import json

import pytest
from blanked_treebank import BLANKED, ORDINARY
from byte_level import BYTE_LEVEL, WORDS, words_by_hand

from megatron_sas.core.cli import InputError
from megatron_sas.data.tokenizer import encode_texts, load_tokenizer
from megatron_sas.evaluation.treebank import Sentence, load_treebank, tokenize_words

GOOD = {"words": ["Dogs", "bark", "."], "heads": [2, 0, 2], "relns": ["nsubj", "root", "punct"]}


def write_lines(path, *values):
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values), "utf-8")
    return path


def test_json_heads_count_from_one_and_become_indices(tmp_path):
    expected = [Sentence(GOOD["words"], [1, -1, 1], GOOD["relns"])] * 2
    assert load_treebank(write_lines(tmp_path / "lines.jsonl", GOOD, "", GOOD)) == expected
    array = tmp_path / "dev.json"  # Clark et al. write one array; its "possessive" and the like stay as they are
    array.write_text(json.dumps([GOOD, GOOD], indent=1), "utf-8")
    assert load_treebank(array) == expected


def test_conllu_and_json_forms_of_real_data_agree(data_dir, tmp_path):
    from_conllu = load_treebank(data_dir / "ud_ewt" / "en_ewt-ud-test.conllu")
    assert len(from_conllu) == 2077
    as_json = [{"words": s.words, "heads": [h + 1 for h in s.heads], "relns": s.deprels} for s in from_conllu]
    assert load_treebank(write_lines(tmp_path / "test.jsonl", *as_json)) == from_conllu


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", r":2: not JSON \(.* at character 1\)"),
        (["words"], ":2: expected an object with words, heads and relns, found list"),
        ({**GOOD, "heads": ["2", 0, 2]}, ":2: field 'heads' must be a list of integers"),
        ({**GOOD, "heads": [True, 0, 2]}, ":2: field 'heads' must be a list of integers"),
        ({"words": ["a"], "heads": [0]}, ":2: field 'relns' must be a list of strings"),
        ("[" * 100_000, r"bad\.jsonl:2: not JSON \(maximum recursion"),
        ({**GOOD, "words": ["Dogs", "\ud83d", "."]}, ":2: half of a surrogate pair in field 'words'"),
        ({**GOOD, "heads": [2, 0]}, ":2: words, heads and relns must be of one length, at least 1; found 3, 2 and 3"),
        ({"words": [], "heads": [], "relns": []}, ":2: words, heads and relns must be of one length, at least 1"),
        ({**GOOD, "heads": [2, 0, 4]}, r":2: field 'heads': word 3 \('\.'\) has head 4, outside 0\.\.3"),
        ({**GOOD, "heads": [2, 0, -1]}, r":2: field 'heads': word 3 \('\.'\) has head -1"),
        ({**GOOD, "heads": [1, 0, 2]}, r":2: field 'heads': word 1 \('Dogs'\) is its own head"),
        ({**GOOD, "heads": [2, 3, 1]}, r":2: field 'heads': word 1 \('Dogs'\) is on a cycle: .*; 0 marks a root"),
        ({**GOOD, "heads": [3, 0, 1]}, r":2: field 'heads': word 1 \('Dogs'\) is on a cycle"),
    ],
)
def test_broken_lines_name_file_line_and_field(tmp_path, bad, message):
    path = write_lines(tmp_path / "bad.jsonl", GOOD, bad)
    with pytest.raises(InputError, match=message) as error:
        load_treebank(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_broken_elements_of_an_array_are_counted(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([GOOD, {**GOOD, "heads": 3}]), "utf-8")
    with pytest.raises(InputError, match=r"bad\.json: element 1: field 'heads'"):
        load_treebank(path)


def test_a_deeply_nested_array_is_one_line(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"deep\.json: not JSON \(maximum recursion"):
        load_treebank(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.conllu"])
def test_a_byte_order_mark_is_dropped(tmp_path, name):
    content = {"a.jsonl": json.dumps(GOOD), "a.json": json.dumps([GOOD])}.get(
        name, "1\ta" + "\t_" * 4 + "\t0\troot\t_\t_\n"
    )
    (tmp_path / name).write_text(content, "utf-8-sig")
    assert len(load_treebank(tmp_path / name)) == 1


def as_json(conllu):
    """The sentences of a CoNLL-U text as JSON lines."""
    for block in conllu.strip().split("\n\n"):
        rows = [line.split("\t") for line in block.split("\n") if line.split("\t")[0].isdigit()]
        yield {"words": [r[1] for r in rows], "heads": [int(r[6]) for r in rows], "relns": [r[7] for r in rows]}


@pytest.mark.parametrize("suffix", ["conllu", "jsonl"])
def test_sentences_without_words_are_left_out_and_counted(tmp_path, suffix):
    """And do not count among the first sentences; one with a real "_" stays."""
    for name, content in (("mixed", BLANKED + ORDINARY * 3), ("blanked", BLANKED)):
        text = content if suffix == "conllu" else "".join(json.dumps(value) + "\n" for value in as_json(content))
        (tmp_path / f"{name}.{suffix}").write_text(text)
    treebank = load_treebank(tmp_path / f"mixed.{suffix}", 2)
    assert [s.words for s in treebank] == [["the", "dog", "saw", "_", "."]] * 2
    assert treebank.num_blanked == 3
    with pytest.raises(InputError, match=rf"blanked\.{suffix}: has no words: in all 3 sentences .* script") as error:
        load_treebank(tmp_path / f"blanked.{suffix}")
    assert "\n" not in str(error.value)


def test_unusable_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_treebank(tmp_path / "none.conllu")
    with pytest.raises(InputError, match=r"unknown kind of treebank '\.txt'"):
        load_treebank(write_lines(tmp_path / "a.txt", GOOD))
    with pytest.raises(InputError, match="no sentences"):
        load_treebank(write_lines(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"words": ["caf\xe9"]}')
    with pytest.raises(InputError, match=r"latin\.jsonl: not UTF-8 at byte 15"):
        load_treebank(tmp_path / "latin.jsonl")
    cycle = "1\ta\t_\t_\t_\t_\t2\tdep\t_\t_\n2\tb\t_\t_\t_\t_\t1\tdep\t_\t_\n\n"
    with pytest.raises(InputError, match=r"cycle\.conllu:1: column HEAD is 2: word 1 is on a cycle.*; correct it$"):
        load_treebank(write_lines(tmp_path / "cycle.conllu", cycle))


def test_special_tokens_among_the_words_are_words(tokenizer):
    names = ["[MASK]", "[SEP]", "[UNK]", "[mask]"]
    (tokenized,) = tokenize_words([Sentence(names, [-1, 0, 0, 0], ["root", "dep", "dep", "dep"])], tokenizer)
    expected = "[CLS] [ mask ] [ sep ] [ un ##k ] [ mask ] [SEP]".split()  # noqa: SIM905
    assert tokenizer.convert_ids_to_tokens(tokenized.ids) == expected


def test_words_are_tokenised_one_by_one(tokenizer):
    sentences = [Sentence(["can't", "un", "##believe"], [-1, 0, 0], ["root", "dep", "dep"])]
    (tokenized,) = tokenize_words(sentences, tokenizer)
    pieces = [tokenizer.tokenize(word) for word in sentences[0].words]
    expected = ["[CLS]", *(piece for of_word in pieces for piece in of_word), "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(tokenized.ids) == expected
    assert tokenized.words.tolist() == [-1, *(w for w, of_word in enumerate(pieces) for _ in of_word), -1]
    assert tokenized.num_words == 3


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_tokens_include_the_space_before_their_word(kind, tmp_path):
    BYTE_LEVEL[kind]().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    (sentence,) = tokenize_words([Sentence(WORDS, [-1] * 9, [""] * 9)], tokenizer)
    (whole,) = encode_texts([" ".join(WORDS)], tokenizer)
    assert sentence.ids.tolist() == [tokenizer.cls_token_id, *whole.ids, tokenizer.sep_token_id]
    assert sentence.words.tolist() == [-1, *words_by_hand(whole.tokens), -1]
    if tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space:  # without it transformers joins the words
        theirs = tokenizer(WORDS, is_split_into_words=True)
        assert theirs.input_ids == sentence.ids.tolist()
        assert [-1 if word is None else word for word in theirs.word_ids()] == sentence.words.tolist()
