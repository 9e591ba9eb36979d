"""Arcs as text and SVG: heights that never collide, and pictures checked line by line."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from megatron_sas.corpus.inspect.drawing import Segment, as_html, as_svg, as_text, levels

EDGES = [(0, 1, "det"), (1, 4, "nsubj"), (2, 1, "a<b"), (5, 4, "punct")]
SEGMENT = Segment(7, ["the", "cats", "<&>", "##s", "sat", "."], [True, True, True, False, True, True], EDGES)
PICTURE = """\
    7   ┌─▸ the                det
    8 ┌─┼─▸ cats               nsubj
    9 │ └─▸ <&>                a<b
   10 │       ##s
   11 └─┬── sat
   12   └─▸ .                  punct"""


def test_text():
    assert as_text(SEGMENT) == PICTURE
    chain = Segment(1, ["a", "b", "c", "d"], [True] * 4, [(0, 1, "x"), (1, 2, "y"), (3, 2, "z")])
    assert [line[6:13].rstrip() for line in as_text(chain).split("\n")] == ["  ┌─▸ a", "┌─┴─▸ b", "└─┬── c", "  └─▸ d"]
    assert as_text(Segment(1, ["a"], [True], [])) == "    1   a"


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda e: e[0] != e[1]), max_size=12))
def test_arcs_of_one_height_never_overlap(pairs):
    edges = [(dependent, head, "x") for dependent, head in dict(pairs).items()]
    height = levels(edges)
    for number, (first, level) in enumerate(zip(edges, height, strict=True)):
        assert 1 <= level <= len(edges)
        for second, other in list(zip(edges, height, strict=True))[number + 1 :]:
            (low, high), (a, b) = sorted(first[:2]), sorted(second[:2])
            if level == other:
                assert high <= a or b <= low
                assert high != a or first[1] == second[1] == a
                assert low != b or first[1] == second[1] == b


def test_svg_has_every_piece_arc_and_label():
    root = ElementTree.fromstring(as_svg(SEGMENT))
    texts = [(node.get("class"), node.text, float(node.get("x"))) for node in root.iter("text")]
    assert [text for kind, text, _ in texts if kind == "label"] == ["det", "nsubj", "a<b", "punct"]
    tokens = [(kind, text) for kind, text, _ in texts if kind != "label"]
    assert tokens == [("word", t) if not t.startswith("##") else ("more", t) for t in SEGMENT.tokens]
    place = {text: x for kind, text, x in texts if kind != "label"}
    arcs = [re.findall(r"[-0-9.]+", node.get("d")) for node in root.iter("path") if node.get("class") == "arc"]
    for (dependent, head, _), numbers in zip(EDGES, arcs, strict=True):
        begin, end = float(numbers[0]), float(numbers[-3])
        assert abs(begin - place[SEGMENT.tokens[head]]) < 5 and abs(end - place[SEGMENT.tokens[dependent]]) < 5


def test_page_is_self_contained():
    page = as_html("a <title>", {"Table": {"x<y": "1 & 2"}}, {3: [SEGMENT]})
    assert "<h2>Sequence 3</h2>" in page and "x&lt;y" in page and "1 &amp; 2" in page and "a &lt;title&gt;" in page
    assert not re.search(r"(src|href)=|url\(|@import|<script", page)
