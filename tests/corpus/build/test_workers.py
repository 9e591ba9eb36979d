"""What the workers find wrong with a text is counted, and costs no other text."""

from __future__ import annotations

import json

import pytest
from preprocessing import contents, row, run
from tool_calls import run_tool

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.parsers.given import ConlluParser, NoParser
from megatron_sas.corpus.parsers.registry import PARSERS
from megatron_sas.data.packed import PackedData
from megatron_sas.data.tokenizer import load_tokenizer

GOOD = "\n".join([row(1, "the", 2), row(2, "cats", 0, "root")] * 1) + "\n\n"


@pytest.mark.parametrize("count", [1, 2])
def test_words_longer_than_a_sequence(vocab_file, tmp_path, count):
    source = tmp_path / "a.conllu"
    source.write_text(GOOD * 3 + row(1, "-" * 7, 0) + "\n\n" + GOOD * 3)
    with pytest.raises(InputError, match=r"a.conllu:10: a word longer than a sequence \(7 pieces; 6 fit\)"):
        run(source, vocab_file, "conllu", tmp_path / "out", seq_length=8, workers=count)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.conllu", "vocab.txt"]
    header = run(
        source, vocab_file, "conllu", tmp_path / "out", seq_length=8, workers=count, on_error="skip", max_skipped=0.2
    )
    assert header["counts"]["skipped"] == 1 and header["counts"]["pieces"] == 18
    assert header["report"]["a word longer than a sequence"]["examples"][0]["where"] == f"{source}:10"
    with pytest.raises(InputError, match=r"1 of 7 paragraphs left out, mostly for 'a word longer"):
        run(source, vocab_file, "conllu", tmp_path / "more", seq_length=8, workers=count, on_error="skip")


class _Delicate(NoParser):
    """A parser that cannot bear some texts."""

    def parse(self, contents, encodings, names):
        if any("dog" in content for content in contents):
            raise RuntimeError("no dogs\nplease")
        return super().parse(contents, encodings, names)


def test_a_text_that_the_parser_cannot_bear(vocab_file, tmp_path, monkeypatch):
    monkeypatch.setitem(PARSERS, "none", _Delicate)
    source = tmp_path / "a.txt"
    source.write_text("the cat sat\n" * 9 + "a dog\n" + "the cat ran\n" * 9)
    with pytest.raises(InputError, match=r"a.txt:10: the parser fails \(RuntimeError: no dogs\)"):
        run(source, vocab_file, "none", tmp_path / "out", seq_length=8)
    header = run(source, vocab_file, "none", tmp_path / "out", seq_length=8, on_error="skip", max_skipped=0.1)
    assert header["report"]["the parser fails"]["count"] == 1
    assert header["counts"]["words"] == 54


class _Small(ConlluParser):
    """A parser that has memory for three sentences at a time, and for none that holds "dog"."""

    def parse(self, contents, encodings, names):
        if len(contents) > 3 or any("dog" in content.words for content in contents):
            raise RuntimeError("out of memory")
        return super().parse(contents, encodings, names)


def test_a_chunk_that_the_parser_cannot_bear_as_a_whole(vocab_file, tmp_path, monkeypatch):
    """It is done in parts, and the bytes are those of one that can: relations, documents, edges."""
    words = "the cat sat run can not cafe".split()  # noqa: SIM905
    blocks = []
    for number in range(40):
        rows = [row(n + 1, words[(number + n) % 7], n, f"r{(3 * number + n) % 11}") for n in range(1 + number % 4)]
        blocks.append(("# newdoc\n" if number % 5 == 0 else "") + "\n".join(rows) + "\n\n")
    source = tmp_path / "a.conllu"
    source.write_text("".join(blocks))
    run(source, vocab_file, "conllu", tmp_path / "whole", seq_length=8)
    monkeypatch.setitem(PARSERS, "conllu", _Small)
    run(source, vocab_file, "conllu", tmp_path / "parts", seq_length=8)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert len(PackedData(tmp_path / "parts").relations) == 12
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.conllu").write_text("".join([*blocks[:13], row(1, "dog", 0) + "\n\n", *blocks[13:]]))
    options = {"seq_length": 8, "on_error": "skip"}
    header = run(tmp_path / "b" / "a.conllu", vocab_file, "conllu", tmp_path / "without", **options)
    assert contents(tmp_path / "without")["bin"] == contents(tmp_path / "whole")["bin"]
    assert [e["where"].rpartition("/")[2] for e in header["report"]["the parser fails"]["examples"]] == [
        f"a.conllu:{''.join(blocks[:13]).count(chr(10)) + 1}"
    ]


def test_long_words_and_unknown_pieces_are_reported(vocab_file, tmp_path, capsys):
    """A word of 101 characters is [UNK] for its length alone, one of 100 because nothing of it is in the vocabulary."""
    (tmp_path / "a.txt").write_text("the cat sat " * 20 + "q" * 100 + " " + "a" * 101 + " zebra\n")
    arguments = ["--tokenizer", vocab_file, "--parser", "none", "--seq-length", "16"]
    done = run_tool(capsys, "preprocess_data", "--input", tmp_path / "a.txt", *arguments, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "out.json").read_text())["counts"]
    assert (counts["pieces"], counts["pieces_unknown"], counts["words_too_long"]) == (63, 3, 1)
    assert "\n3 of 63 pieces of the input are [UNK] (4.76%)\n" in done.stdout
    assert f"now one [UNK]: 1, the first at {tmp_path}/a.txt:1: {'a' * 40}… (101 characters)\n" in done.stdout
    (tmp_path / "b.txt").write_text("the cat sat " * 9 + "zebra " * 3 + "\n")
    arguments = ("--input", tmp_path / "b.txt", *arguments, "--output-dir", tmp_path / "shards")
    done = run_tool(capsys, "preprocess_data", *arguments)
    assert f"{tmp_path}/shards/b: warning: 3 of 30 pieces of the input are [UNK] (10.00%)" in done.stdout


def test_losses_of_reading_and_of_parsing_do_not_depend_on_the_workers(vocab_file, tmp_path):
    """40 documents lose two of their three paragraphs to the parser, and after each comes a line that is no JSON."""
    source = tmp_path / "a.jsonl"
    document = json.dumps({"text": "aaaaaaaa\nthe cat sat\nbbbbbbbb"})
    source.write_text(f"{document}\nno JSON\n" * 40 + '{"text": "the cat"}\n' * 80)
    for number in (1, 2):
        options = {"seq_length": 8, "on_error": "skip", "max_skipped": 0.55, "workers": number, "chunk_characters": 200}
        header = run(source, vocab_file, "none", tmp_path / f"out{number}", **options)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    kinds = [(kind, entry["count"]) for kind, entry in header["report"].items()]
    assert kinds == [("a word longer than a sequence", 80), ("invalid JSON", 40)]
    # Three quarters of the records are kept, and of these three fifths of the paragraphs
    with pytest.raises(InputError, match="40 of 160 records left out and 80 of 200 paragraphs left out, mostly for 'a"):
        run(source, vocab_file, "none", tmp_path / "out", **{**options, "max_skipped": 0.54, "workers": 1})


def test_foreign_text(data_dir, tmp_path):
    text = {
        "en": "The quick brown fox jumps over the lazy dog, as it has always done.",
        "de": "Der schnelle braune Fuchs springt über den faulen Hund, wie er es immer getan hat.",
        "ru": "Быстрая коричневая лиса перепрыгивает через ленивую собаку, как всегда.",
        "zh": "敏捷的棕色狐狸像往常一样跳过了那只懒惰的狗，然后又跳了回来，再也没有人看见过它。敏捷的棕色狐狸。",
    }
    source = tmp_path / "a.txt"
    source.write_text("\n\n".join(text.values()) + "\n\nДа.\n")
    vocab = data_dir / "bert_vocab" / "vocab.txt"
    header = run(source, vocab, "none", tmp_path / "all", seq_length=16)
    found = header["report"]["foreign to the tokenizer"]
    assert header["counts"]["paragraphs_foreign"] == found["count"] == 2
    assert [example["text"][:2] for example in found["examples"]] == ["Бы", "敏捷"]
    options = {"seq_length": 16, "drop_foreign": True}
    dropped = run(source, vocab, "none", tmp_path / "english", **options, max_skipped=0.4)
    words = sum(len(load_tokenizer(vocab).tokenize(text[name])) for name in ("en", "de"))
    assert words < dropped["counts"]["pieces"] < words + 6 < header["counts"]["pieces"]
    assert dropped["counts"]["paragraphs_foreign"] == dropped["counts"]["skipped"] == 2
    assert dropped["report"] == header["report"]
    with pytest.raises(InputError, match=r"a.txt: 2 of 5 paragraphs left out, mostly for 'foreign to the tokenizer';"):
        run(source, vocab, "none", tmp_path / "less", **options, max_skipped=0.39)
