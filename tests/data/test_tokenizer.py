"""Tokenizers from vocabulary files and directories: lower-casing with offsets into the original, and identity."""

from __future__ import annotations

import json
import resource
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from megatron_sas.core.cli import InputError
from megatron_sas.data.packed import TokenizerIdentity
from megatron_sas.data.tokenizer import (
    SPECIAL_TOKENS,
    encode_texts,
    knows_words,
    load_tokenizer,
    plain_text_tokenizer,
    save_tokenizer,
    tokenizer_digest,
    tokenizer_hash,
    tokenizer_identity,
    tokenizer_info,
    vocab_size,
)


def test_uncased_with_offsets_into_the_original(vocab_file):
    tokenizer = load_tokenizer(vocab_file)
    text = "  The CAFÉ, cafe\u0301 can't"
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    assert encoding.tokens == ["the", "cafe", ",", "cafe", "can", "'", "t"]
    assert [text[a:b] for a, b in encoding.offsets][:3] == ["The", "CAFÉ", ","]
    # A combining accent after the last letter is stripped; whether the span covers it does not matter for alignment.
    assert text[slice(*encoding.offsets[3])].startswith("cafe") and encoding.offsets[3][0] == 12


def test_real_vocabulary(data_dir):
    tokenizer = load_tokenizer(data_dir / "bert_vocab" / "vocab.txt")
    info = tokenizer_info(tokenizer, data_dir / "bert_vocab" / "vocab.txt")
    assert (info.pad_id, info.unk_id, info.cls_id, info.sep_id, info.mask_id) == (0, 100, 101, 102, 103)
    assert info.vocab_size == len(tokenizer) == 30522
    assert tokenizer("DÉJÀ vu isn't")["input_ids"] == tokenizer("deja vu isn't")["input_ids"]
    assert tokenizer_hash(load_tokenizer(data_dir / "bert_vocab")) == info.hash


def test_hash_knows_content_and_survives_saving(vocab_file, tmp_path):
    tokenizer = load_tokenizer(vocab_file)
    before = tokenizer_hash(tokenizer)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert tokenizer_hash(again) == before
    again("the cat", truncation=True, max_length=3, padding="max_length")
    assert tokenizer_hash(again) == before
    again.add_tokens(["extra"])
    assert tokenizer_hash(again) != before and vocab_size(again) == vocab_size(tokenizer) + 1
    entries = vocab_file.read_text().split("\n")
    entries[5], entries[6] = entries[6], entries[5]
    vocab_file.write_text("\n".join(entries))
    assert tokenizer_hash(load_tokenizer(vocab_file)) != before


def test_special_tokens_in_text_are_text(vocab_file):
    tokenizer = plain_text_tokenizer(load_tokenizer(vocab_file).backend_tokenizer.to_str())
    assert tokenizer.encode("the [SEP] cat", add_special_tokens=False).tokens == ["the", "[", "sep", "]", "cat"]


def numbered(*entries):
    """A vocabulary that begins with the special tokens."""
    return {entry: number for number, entry in enumerate([*SPECIAL_TOKENS, *entries])}


@pytest.mark.parametrize(
    "model",
    [
        models.WordPiece(numbered("the", "[", "]"), unk_token="[UNK]"),
        models.WordLevel(numbered("the", "[", "]"), unk_token="[UNK]"),
        models.BPE(numbered("the", *"[]MASK"), [], unk_token="[UNK]", ignore_merges=True),
        models.Unigram([(entry, 0.0) for entry in SPECIAL_TOKENS] + [("the", -1.0), ("[", -2.0)], unk_id=1),
    ],
    ids=lambda model: type(model).__name__,
)
def test_special_tokens_in_text_are_text_for_models_that_see_them_whole(model):
    """Where text is cut at spaces only, "[MASK]" reaches the model, which has it among its entries."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    names = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL_TOKENS}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    assert set(SPECIAL_TOKENS) <= set(tokenizer.convert_ids_to_tokens(tokenizer(" ".join(SPECIAL_TOKENS))["input_ids"]))
    (encoding,) = encode_texts(["the [MASK] [SEP] [CLS] [PAD] x"], tokenizer)
    assert not {0, 2, 3, 4} & set(encoding.ids)
    assert encoding.ids[0] == 5 and encoding.ids[-1] == 1


BERT = json.dumps({"tokenizer_class": "BertTokenizer"})


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": BERT},
        {"tokenizer_config.json": json.dumps({"tokenizer_class": "AlbertTokenizer"})},
        {"tokenizer_config.json": BERT, "vocab.txt": ""},
        {"tokenizer_config.json": BERT, "vocab.txt": "\n".join(SPECIAL_TOKENS)},
        {"vocab.txt": "\n".join(SPECIAL_TOKENS)},
    ],
)
def test_a_tokenizer_without_words_is_refused(files, tmp_path):
    """transformers makes one of special tokens alone where the vocabulary is missing."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    message = r"no word is among the tokenizer's \d entries; put the model's tokenizer.json or vocab.txt there$"
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def bpe(directory, pre_tokenizer, **options):
    """A directory with a BPE of single letters."""
    vocabulary = numbered(*pre_tokenizers.ByteLevel.alphabet(), *"naive")
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], **options))
    backend.pre_tokenizer = pre_tokenizer
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(directory)
    return directory


def test_a_bpe_that_drops_what_it_does_not_know_is_refused(tmp_path):
    spaces = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(InputError, match="its BPE has no unknown token, so it drops characters that it lacks; name"):
        load_tokenizer(bpe(tmp_path / "drops", spaces))
    known = load_tokenizer(bpe(tmp_path / "unknown", spaces, unk_token="[UNK]"))
    (encoding,) = encode_texts(["na中ve"], known)
    assert encoding.ids.count(known.unk_token_id) == 1
    load_tokenizer(bpe(tmp_path / "bytes", pre_tokenizers.ByteLevel(add_prefix_space=False)))


def test_truncation_and_padding_of_whoever_saved_a_tokenizer_are_not_handed_on(tmp_path):
    """transformers 5 writes those of the last call into tokenizer.json."""
    tokenizer = BertTokenizerFast(vocab=numbered("the", "cat"))
    tokenizer("the cat the cat the cat", truncation=True, max_length=4, padding="max_length")
    tokenizer.save_pretrained(tmp_path / "cut")
    assert Tokenizer.from_file(str(tmp_path / "cut" / "tokenizer.json")).truncation is not None
    save_tokenizer(load_tokenizer(tmp_path / "cut"), tmp_path / "whole", None)
    whole = Tokenizer.from_file(str(tmp_path / "whole" / "tokenizer.json"))
    assert whole.truncation is None and whole.padding is None


def test_a_tokenizer_read_with_another_normalisation_is_told_and_recognised(tmp_path, capsys):
    """transformers 5 lower-cases a BERT tokenizer unless tokenizer_config.json says otherwise."""
    words = numbered("the", "The", "cat")
    BertTokenizerFast(vocab=words, do_lower_case=False).save_pretrained(tmp_path / "cased")
    shutil.copytree(tmp_path / "cased", tmp_path / "silent")
    (tmp_path / "silent" / "tokenizer_config.json").write_text(BERT)
    cased = load_tokenizer(tmp_path / "cased")
    assert capsys.readouterr().err == ""
    silent = load_tokenizer(tmp_path / "silent")
    load_tokenizer(tmp_path / "silent")
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {tmp_path}/silent/tokenizer.json: transformers reads it with another")
    assert warning.count("\n") == 1
    assert silent("The")["input_ids"] != cased("The")["input_ids"]
    assert not tokenizer_identity(silent).matches(tokenizer_identity(cased))
    assert tokenizer_digest(silent) != tokenizer_digest(cased)


def test_digest_is_of_what_a_tokenizer_does(vocab_file, tmp_path):
    tokenizer = load_tokenizer(vocab_file)
    before = tokenizer_identity(tokenizer)
    save_tokenizer(tokenizer, tmp_path / "saved", 128)
    assert tokenizer_identity(load_tokenizer(tmp_path / "saved")) == before
    assert before.matches(TokenizerIdentity(before.hash)), "older data say nothing of it"
    assert not before.matches(TokenizerIdentity("0" * 64))
    assert not before.matches(TokenizerIdentity(before.hash, "0" * 64))
    entries = vocab_file.read_text().split("\n")
    entries[5], entries[6] = entries[6], entries[5]
    vocab_file.write_text("\n".join(entries))
    assert tokenizer_digest(load_tokenizer(vocab_file)) != before.digest


def test_digest_stays_what_headers_and_checkpoints_hold(data_dir):
    assert tokenizer_digest(load_tokenizer(data_dir / "bert_vocab" / "vocab.txt")).startswith("0dba21284a451f55")


def test_whether_a_tokenizer_knows_words(vocab_file, wordless_tokenizer):
    assert knows_words(load_tokenizer(vocab_file))
    tokenizer = load_tokenizer(wordless_tokenizer)
    assert not knows_words(tokenizer)
    for pre_tokenizer, expected in [
        (None, False),
        (pre_tokenizers.ByteLevel(use_regex=False), False),
        (pre_tokenizers.ByteLevel(), True),
        (pre_tokenizers.Metaspace(), True),
    ]:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
        assert knows_words(tokenizer) == expected


def test_a_byte_order_mark_is_no_part_of_the_vocabulary(vocab_file):
    expected = load_tokenizer(vocab_file).get_vocab()
    vocab_file.write_bytes(b"\xef\xbb\xbf" + vocab_file.read_bytes())
    assert load_tokenizer(vocab_file).get_vocab() == expected


def test_a_file_that_cannot_be_written_is_an_os_error(data_dir, tmp_path):
    tokenizer = load_tokenizer(data_dir / "bert_vocab" / "vocab.txt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # like a full disk, but for large files only
    try:
        with pytest.raises(OSError, match="File too large") as error:
            save_tokenizer(tokenizer, tmp_path / "saved", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("[MASK]\n", ""), r"\[MASK\] missing"),
        (lambda text: text + "the\n", r"vocab.txt:33: entry 'the' occurs twice|vocab.txt:34: entry 'the' occurs twice"),
        (lambda text: text.replace("cat", "Cat"), "'Cat' has capitals"),
    ],
)
def test_bad_vocabularies(vocab_file, change, message):
    vocab_file.write_text(change(vocab_file.read_text()))
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(vocab_file)
    assert str(vocab_file) in str(error.value)


def test_bad_paths(tmp_path, vocab_file):
    with pytest.raises(InputError, match="no such vocabulary"):
        load_tokenizer(tmp_path / "none.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: has no tokenizer \(tokenizer.json or vocab.txt\); save it there"):
        load_tokenizer(tmp_path / "empty")
    vocab_file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        load_tokenizer(vocab_file)
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text("{\n},\n},\n")
        with pytest.raises(InputError, match=rf"{name}: is no vocabulary .*; give the directory it is in, {tmp_path}$"):
            load_tokenizer(tmp_path / name)
    (tmp_path / "empty" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match="not a usable tokenizer directory"):
        load_tokenizer(tmp_path / "empty")
