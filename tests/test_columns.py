"""A raw row becomes one example or one reason: no guess, no cleaning, no doubled wrapping."""

import pytest

from opsdc_jax.data.columns import BadRowError, Columns, Example, to_example
from opsdc_jax.prompts import TEMPLATES

WRAPPING = TEMPLATES["dapo"].student
PREFIX, REMINDER = WRAPPING.split("{problem}")
USER = {"role": "user", "content": "What is 1+1?"}


def wrapped(problem):
    return WRAPPING.replace("{problem}", problem)


def parsed(row, **names):
    return to_example(row, Columns(**names))


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"problem": "p", "answer": "a", "level": 5}, ("p", "a", "5")),
        ({"question": "q", "answer": 70}, ("q", "70", "")),
        ({"prompt": "t", "ground_truth": "a"}, ("t", "a", "")),
        ({"prompt": [USER], "reward_model": {"ground_truth": "2"}}, ("What is 1+1?", "2", "")),
        ({"problem": "p", "label": 3.0, "level": "Level 2"}, ("p", "3", "Level 2")),
        ({"problem": "p", "label": 0.25}, ("p", "0.25", "")),
        ({"problem": "p"}, ("p", "", "")),
        ({"problem": "p", "answer": None, "level": None}, ("p", "", "")),
        ({"problem": b"p \xc3\xa9", "answer": b" a "}, ("p é", "a", "")),
        ({"problem": "p", "reward_model": None}, ("p", "", "")),
        ({"problem": "p", "reward_model": {"style": "rule"}}, ("p", "", "")),
    ],
)
def test_columns_are_found(row, example):
    assert parsed(row) == Example(*example)


def test_candidates_count_in_order_and_null_does_not_count():
    row = {"label": 1, "ground_truth": "2", "answer": "3", "prompt": "c", "question": "b"}
    assert parsed(row | {"problem": "a"}) == ("a", "3", "")
    assert parsed(row | {"problem": None}) == ("b", "3", "")
    assert parsed(row | {"answer": None}) == ("b", "2", "")
    nested = {"reward_model": {"ground_truth": "4"}, "label": 1, "prompt": "c"}
    assert parsed(nested) == ("c", "4", "")


def test_a_named_column_is_the_only_candidate():
    row = {"problem": "p", "answer": "a", "Problem": "P", "x": {"y": "1"}, "x.z": "2", "stars": 4}
    assert parsed(row, problem="Problem", answer="x.y", level="stars") == ("P", "1", "4")
    assert parsed(row, answer="x.z").answer == "2"
    for name in ("problem", "answer", "level"):
        with pytest.raises(BadRowError, match=r"has no column nope, only problem, answer, Problem"):
            parsed(row, **{name: "nope"})
    with pytest.raises(BadRowError, match="Question is null"):
        parsed({"problem": "p", "Question": None}, problem="Question")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (None, "is null, not an object"),
        (["problem"], "of type list, not an object"),
        ({"id": 1, "text": "p"}, "has no column problem or question or prompt, only id, text"),
        ({}, "only none"),
        ({"problem": None}, "problem is null"),
        ({"problem": " \n"}, "problem is empty"),
        ({"problem": 7}, "problem is of type int, not a text"),
        ({"problem": b"\xff"}, "problem is not valid Unicode"),
        ({"problem": "half \ud800"}, "problem is not valid Unicode"),
        ({"problem": "p", "answer": True}, "answer is of type bool"),
        ({"problem": "p", "answer": ["1"]}, "answer is of type list"),
        ({"problem": "p", "answer": float("nan")}, "answer is not a finite number"),
        ({"problem": "p", "reward_model": {"ground_truth": {}}}, "ground_truth is of type dict"),
        ({"problem": "p", "level": [1]}, "level is of type list"),
        ({"prompt": []}, "prompt is a chat of none"),
        ({"prompt": [{"role": "system", "content": "s"}, USER]}, "a chat of system, user: only"),
        ({"prompt": [USER, USER]}, "a chat of user, user: only one"),
        ({"prompt": [USER, {"role": "assistant", "content": "2"}]}, "a chat of user, assistant"),
        ({"prompt": [{"role": "assistant", "content": "2"}]}, "a chat of assistant"),
        ({"prompt": ["What is 1+1?"]}, "a list of something else than chat messages"),
        ({"prompt": [{"role": "user"}]}, "a list of something else than chat messages"),
        ({"prompt": [{"role": "user", "content": None}]}, "the message in prompt is null"),
        ({"prompt": [{"role": "user", "content": " "}]}, "the message in prompt is empty"),
        ({"prompt": [{"role": 1, "content": "x"}]}, "a role in prompt is of type int"),
        ({"prompt": {"text": "x"}}, "prompt is of type dict, not a text"),
        ({"prompt": {"role": ["user"], "content": []}}, "unequal numbers of roles and contents"),
    ],
)
def test_bad_rows_have_a_reason(row, reason):
    with pytest.raises(BadRowError, match=reason):
        parsed(row)


def test_a_chat_may_be_stored_as_a_mapping_of_lists():
    assert parsed({"prompt": {"role": ["user"], "content": ["x"]}}).problem == "x"
    with pytest.raises(BadRowError, match="a chat of system, user"):
        parsed({"prompt": {"role": ["system", "user"], "content": ["s", "x"]}})


@pytest.mark.parametrize(
    "problem",
    ["What is 1+1?", " spaces stay \n", "{problem}", "two\n\nparagraphs", r"\frac{1}{2}"],
)
def test_the_dapo_wrapping_goes_at_both_ends_and_nothing_else(problem):
    for text in (wrapped(problem), f"\n{wrapped(problem)} ", problem):
        assert parsed({"prompt": text}).problem == problem
        assert parsed({"prompt": [{"role": "user", "content": text}]}).problem == problem


@pytest.mark.parametrize("text", [PREFIX + "x", "x" + REMINDER, f" {PREFIX}x\n"])
def test_half_a_wrapping_goes_too(text):
    assert parsed({"prompt": text}).problem == "x"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (wrapped(wrapped("x")), "part of the DAPO wrapping stands inside"),
        (wrapped("x") + "\n\nThink.", "part of the DAPO wrapping stands inside"),
        (wrapped("x").replace(REMINDER, "\n" + REMINDER.strip()), "part of the DAPO wrapping"),
        (wrapped(""), "nothing but the DAPO wrapping"),
    ],
)
def test_a_wrapping_that_would_be_doubled_is_refused(text, reason):
    with pytest.raises(BadRowError, match=reason):
        parsed({"prompt": text})


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("She has 2 + 2 = <<2+2=4>>4.\n#### 4", "4"),
        ("#### 1,450", "1,450"),
        ("one\n####-3 \n", "-3"),
        ("#### Step 1\nthen 5", "#### Step 1\nthen 5"),
        ("5 #### 6", "5 #### 6"),
    ],
)
def test_gsm8k_answers(answer, final):
    assert parsed({"question": "q", "answer": answer}).answer == final


def test_a_gsm8k_solution_without_an_answer_is_bad():
    with pytest.raises(BadRowError, match='nothing follows "####"'):
        parsed({"question": "q", "answer": "so\n####  "})


@pytest.mark.parametrize("answer", [1, "B", b"B"])
def test_choices_become_lettered_options(answer):
    row = {"question": "Which?", "choices": ["one", 2, b"three"], "answer": answer}
    assert parsed(row) == ("Which?\n\nA. one\nB. 2\nC. three", "B", "")
    assert parsed(row | {"answer": None}).answer == ""
    assert parsed(row | {"choices": [], "answer": "x"}) == ("Which?", "x", "")


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"answer": 3}, "answer=3 is neither an index from 0 nor a letter"),
        ({"answer": -1}, "answer=-1 is neither"),
        ({"answer": True}, "answer=True is neither"),
        ({"answer": "D"}, "answer='D' is neither"),
        ({"answer": "one"}, "answer='one' is neither"),
        ({"choices": ["one"]}, "choices is not a list of 2 to 26 texts"),
        ({"choices": {"text": ["a", "b"]}}, "choices is not a list"),
        ({"choices": ["one", None]}, "an option of choices is null"),
    ],
)
def test_bad_choices(columns, reason):
    with pytest.raises(BadRowError, match=reason):
        parsed({"question": "q", "choices": ["a", "b", "c"], "answer": 0} | columns)
