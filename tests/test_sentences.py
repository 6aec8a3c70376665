"""No sentence of a page is too long to be read once."""

import pytest

from tests.sentences import long_sentences, pages, sentences, words

MOST = 40


@pytest.mark.parametrize("name", sorted(pages()))
def test_no_sentence_is_longer_than_forty_words(name):
    assert long_sentences(pages()[name], MOST) == [], "write two, the claim first"


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ("# A title\nOne two. Three four.\n", ["A title", "One two.", "Three four."]),
        ("A line\nthat goes on.\n- An item\n- another\n", ["A line that goes on.", "An item", "another"]),
        ("Of et al. 2020, e.g. This.\n", ["Of et al. 2020, e.g. This."]),
        ("| a b | c |\n|---|---|\n", ["a b", "c", "---", "---"]),
        ("Before.\n```\nno prose here. At all.\n```\nAfter.\n", ["Before.", "After."]),
        ("A [link of words](x.md) and `some code with words`.\n", ["A link of words and `code`."]),
    ],
)
def test_what_a_sentence_is(page, found):
    assert [s for s in sentences(page) if s] == found


def test_signs_are_no_words():
    assert words("a – b + `code` = 3") == 4
