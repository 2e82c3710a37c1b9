"""Answer extraction."""

import pytest

from opsdc_jax.grading import committed_answer, grade


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think> 1 + 1 = 2 . </think> Answer : 2", "2"),
        ("<think> x </think> Answer: 7\n", "7"),
        ("<think> Answer : 3 </think> Answer : 4", "4"),
        ("<think> a </think> Answer : 4\nAnswer : 5", "5"),
        ("<think> Answer : 3 </think> no idea", None),
        ("<think> Answer : 3", None),
        ("Answer : 9", "9"),
        ("", None),
        ("</think> Answer : ", None),
    ],
)
def test_committed_answer(response, expected):
    assert committed_answer(response) == expected


def test_only_the_right_answer_of_a_finished_response_is_correct():
    response = "<think> </think> Answer : 42"
    assert grade(response, "42")["committed"]
    assert not grade(response, "4")["committed"]
    assert not grade(response, "42", truncated=True)["committed"]
    assert not grade("<think> </think> 42", "42")["committed"]
