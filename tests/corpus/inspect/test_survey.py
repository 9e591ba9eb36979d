"""A survey finds documents that occur twice and evaluation sentences, whatever the workers."""

from __future__ import annotations

import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from child_processes import children, is_alive, open_files
from tool_calls import run_tool

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.build.documents import Exclusions
from megatron_sas.corpus.inspect.survey import SentenceIndex, SurveySettings, survey, words_of
from megatron_sas.corpus.readers.registry import input_files


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text, "id": identity}) + "\n" for identity, text in texts))
    return str(path)


def read(path, inputs):
    return Exclusions.read(path, inputs, input_files(inputs))


def test_sentences_are_found_word_for_word():
    index = SentenceIndex(["The cat sat on the mat.", "It isn't so, he said!", "Too short.", "The cat sat on a"], 4)
    assert len(index) == 3
    for text, expected in (
        ('"the cat sat -- ON the mat"', [0]),
        ("The cat sat on the matter", []),
        ("The cat sat on a mat. It isn’t so he said", [1, 3]),
        ("xthe cat sat on the mat", []),
        ("the the cat sat on the mat it isn t so he said", [0, 1]),
        ("cat", []),
        ("", []),
    ):
        words = [word.strip("\"'.,!-") for word in text.lower().replace("’", " ").split()]
        assert index.find([word for word in words if word]) == expected


@pytest.mark.parametrize(
    ("penn", "text"),
    [
        ("They do n't know what you mean here .", "They don't know what you mean here."),
        ("They ca n’t and wo n't go there", "they can’t and won't go there"),
        ("It -LRB- the other one -RRB- is n't his", "It (the other one) isn't his."),
        ("I can not say that I 'm gon na go", "I cannot say that I'm gonna go!"),
        ("Lem me go or gim me what I wan na have", "lemme go or gimme what I wanna have"),
        ("We 've got ta go , she 'd said .", "We've gotta go, she'd said."),
    ],
)
def test_penn_tokens_are_found_in_text_and_text_in_penn_tokens(penn, text):
    for sentence, other in ((penn, text), (text, penn), (text, text), (penn, penn)):
        assert SentenceIndex([sentence], 4).find(words_of(f"Before. {other} After.")) == [0]


def test_words_that_only_look_like_penn_tokens():
    assert words_of("The problem met ta vatican noted wan nab-b Rb-r") == (
        ["the", "problem", "met", "ta", "vatican", "noted", "wan", "nab", "b", "rb", "r"]
    )
    assert words_of("I got tacos; he can nothing") == ["i", "got", "tacos", "he", "can", "nothing"]


@pytest.fixture
def corpus(tmp_path):
    """Two inputs: b repeats texts of a (in another case) and an id; both hold the evaluation sentence."""
    sentence = "A sentence that models are evaluated on."
    a = [(1, "one\ntwo"), (2, "three"), (3, ""), (4, f"Before. {sentence} After."), (5, "three ")]
    b = [(6, "ONE  two"), (7, "other"), (7, "more"), (8, ""), (9, f"{sentence[:-1]}, they say")]
    return [write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b)], sentence


@pytest.mark.parametrize("workers", [1, 2])
def test_survey(corpus, workers):
    inputs, sentence = corpus
    sets = {"one": ["Nothing of this kind occurs here", sentence], "two": ["Short one", sentence]}
    report = survey(SurveySettings(inputs, sets, workers=workers))
    a, b = (f"{name}: document" for name in inputs)
    assert report["documents"] == 10
    assert report["duplicates"] == {"count": 2, "examples": [f"{a} 4 repeats {a} 1", f"{b} 0 repeats {a} 0"]}
    assert report["duplicate_ids"] == {"count": 1, "examples": [f"{b} 2"]}
    found = {"looked_for": 1, "found": 1, "examples": [{"sentence": sentence, "where": f"{a} 3"}]}
    assert report["contamination"] == {
        "one": {"sentences": 2, **found, "looked_for": 2},
        "two": {"sentences": 2, **found},
    }
    assert [entry["exclude"] for entry in report["inputs"]] == [[3, 4], [0, 4]]
    assert survey(SurveySettings(inputs, sets, exclude=()))["inputs"][0]["exclude"] == []


def test_odd_ids(tmp_path):
    path = tmp_path / "a.jsonl"
    ids = ["null", "null", '"\\ud800"', '"\\ud800"', '"None"', "7", "0", "0"]
    path.write_text("".join(f'{{"text": "number {number}", "id": {id}}}\n' for number, id in enumerate(ids)))
    repeated = survey(SurveySettings([str(path)]))["duplicate_ids"]
    assert repeated == {"count": 2, "examples": [f"{path}: document 3", f"{path}: document 7"]}


@pytest.mark.parametrize("workers", [1, 2])
def test_inputs_that_fail_do_not_spoil_the_others(corpus, tmp_path, capsys, workers):
    inputs, sentence = corpus
    damaged, latin = str(tmp_path / "c.jsonl.xz"), str(tmp_path / "latin.txt")
    Path(latin).write_bytes("Süß\n".encode("latin-1"))
    Path(damaged).write_bytes(lzma.compress(Path(inputs[0]).read_bytes())[:-40])
    sets = {"one": [sentence]}
    given = [inputs[0], damaged, latin, inputs[1]]
    report = survey(SurveySettings(given, sets, workers=workers))
    failed = report.pop("failed")
    assert [entry["name"] for entry in failed] == [damaged, latin]
    assert (
        "c.jsonl.xz: damaged compressed file" in failed[0]["reason"]
        and "latin.txt:1: invalid UTF-8" in failed[1]["reason"]
    )
    assert report == {key: value for key, value in survey(SurveySettings(inputs, sets)).items() if key != "failed"}
    with pytest.raises(InputError, match=r"no input can be read: .*c.jsonl.xz: damaged"):
        survey(SurveySettings([damaged], workers=workers))
    with pytest.raises(InputError, match="--workers 0: must be at least 1"):
        survey(SurveySettings(inputs, workers=0))
    if workers == 2:
        output = str(tmp_path / "survey.json")
        done = run_tool(capsys, "survey_corpus", "--input", *given, "--output", output, "--workers", 2)
        assert done.returncode == 2 and "10 documents" in done.stdout and "Traceback" not in done.stderr
        assert f"error: 2 of 4 inputs failed, and {output} is of the others: {damaged}: damaged" in done.stderr
        assert read(output, inputs).documents == dict.fromkeys(inputs, 5)
        with pytest.raises(InputError, match=r"c.jsonl.xz: was surveyed in .*survey.json, but could not be read"):
            read(output, [damaged])


SURVEY = """
import sys
from megatron_sas.corpus.inspect.survey import SurveySettings, survey
if __name__ == "__main__":
    survey(SurveySettings(sys.argv[1:], workers=2))
"""


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_survey_leaves_no_workers(tmp_path, stop):
    inputs = [tmp_path / f"{name}.txt" for name in "ab"]
    for path in inputs:
        path.write_text("the cat sat on the mat\n" * 1_000_000)  # some seconds of work
    process = subprocess.Popen(
        [sys.executable, "-c", SURVEY, *map(str, inputs)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # a shell that runs the tests in the background makes their children ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    workers, deadline = [], time.time() + 60
    while len(workers) < 2:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
        workers = [pid for pid in children(process.pid) if any(str(path) in open_files(pid) for path in inputs)]
    if stop == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, stop)  # as a terminal does
    process.wait(timeout=60)
    deadline = time.time() + 20
    while time.time() < deadline and any(map(is_alive, workers)):
        time.sleep(0.05)
    assert not any(map(is_alive, workers))
