"""What is measured on one response besides its answer."""

import pytest

from opsdc_jax import measures

OPEN, CLOSE = 1, 2


@pytest.mark.parametrize(
    ("ids", "thought_open", "expected"),
    [
        ([OPEN, 5, 6, CLOSE, 7, 8], False, 4),
        ([5, 6, CLOSE, 7, 8], True, 3),
        ([OPEN, 5, CLOSE, 6, OPEN, 7, CLOSE, 8], False, 7),  # the last thought counts
        ([OPEN, 5, 6], False, 3),  # never closed
        ([5, 6], True, 2),
        ([5, 6], False, 0),  # none opened: all is answer
        ([], False, 0),
    ],
)
def test_the_thought_ends_with_its_mark(ids, thought_open, expected):
    assert measures.thinking_tokens(ids, OPEN, CLOSE, thought_open=thought_open) == expected


def test_a_tokenizer_without_marks_has_no_thoughts():
    assert measures.thinking_tokens([OPEN, 5, CLOSE], None, None) == 0


def test_a_prompt_can_end_inside_a_thought():
    assert measures.is_thought_open([9, OPEN], OPEN, CLOSE)
    assert not measures.is_thought_open([9, OPEN, CLOSE], OPEN, CLOSE)
    assert not measures.is_thought_open([9], OPEN, CLOSE)
    assert not measures.is_thought_open([9], None, None)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([*range(50), *[7] * 48], True),
        ([*range(50), *[7] * 40], False),  # a row of zeros in a number
        ([*range(50), *list(range(100, 120)) * 4], True),
        ([*range(50), *list(range(100, 120)) * 3], False),
        ([*list(range(100, 120)) * 9, *range(30)], False),  # it found its way out
        ([*list(range(100, 120)) * 4, *range(100, 110)], True),  # cut within a copy
        ([*list(range(200)) * 8], False),  # longer than any block
        (list(range(1000)), False),
        ([], False),
    ],
)
def test_a_loop_at_the_end_is_found(ids, expected):
    assert measures.is_repetitive(ids) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Wait, let me check. Hmm... But no: 3.", 4),
        ("wait wait WAIT", 3),
        ("The waiter rebuts the butler.", 0),
        ("let  me\ncheck", 1),
        ("Alternatively, on second thought, I'm not sure.", 3),
        ("", 0),
    ],
)
def test_words_of_doubt_are_whole_words(text, expected):
    assert measures.doubt_words(text) == expected
