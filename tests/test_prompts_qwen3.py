"""Prompts through the real Qwen3 tokenizer and template, where they are at hand."""

import json

import pytest
from helpers import ROOT

from opsdc_jax.config import InputError
from opsdc_jax.models import hf
from opsdc_jax.prompts import Prompts

SHARED = ROOT.parent / "shared"
TOKENIZER = SHARED / "qwen3-tokenizer"
GOLDEN = json.loads((ROOT / "tests" / "golden" / "prompts.json").read_text(encoding="utf-8"))

pytestmark = pytest.mark.skipif(
    not TOKENIZER.is_dir(), reason=f"needs a Qwen3 tokenizer in {TOKENIZER.name} beside the project"
)


@pytest.fixture(scope="module")
def tokenizer():
    return hf.load_tokenizer(TOKENIZER)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_renderings_that_were_read_by_eye(tokenizer, case):
    prompts = Prompts(
        tokenizer,
        template=case["template"],
        instruction=case["instruction"],
        student_thinking=case["thinking"],
        teacher_thinking=case["thinking"],
    )
    ids = getattr(prompts, case["side"])(case["problem"])
    assert tokenizer.decode(ids) == case["text"]
    assert len(ids) == case["tokens"]


@pytest.mark.parametrize("thinking", [True, False])
def test_tokens_are_those_of_transformers_on_all_of_math500(tokenizer, thinking):
    path = SHARED / "data" / "math500.jsonl"
    if not path.exists():
        pytest.skip("needs math500.jsonl beside the project")
    problems = [json.loads(line)["problem"] for line in path.read_text().splitlines()]
    assert len(problems) == 500
    prompts = Prompts(
        tokenizer,
        template="dapo",
        instruction="v2",
        student_thinking=thinking,
        teacher_thinking=thinking,
    )
    for problem in problems:
        for ids, opening in (
            (prompts.student(problem), "Solve the following math problem step by step. "),
            (prompts.teacher(problem), "Solve the following math problem concisely and correctly."),
        ):
            message = tokenizer.decode(ids).partition("<|im_start|>user\n")[2]
            message = message.partition("<|im_end|>")[0]
            assert message.startswith(opening)
            assert problem in message
            expected = tokenizer.apply_chat_template(
                [{"role": "user", "content": message}],
                add_generation_prompt=True,
                enable_thinking=thinking,
                tokenize=True,
                return_dict=True,
            )
            assert ids == expected["input_ids"]


def test_the_end_of_an_answer_is_among_qwen3s_stop_ids(tokenizer):
    prompts = Prompts(tokenizer, template="dapo", instruction="v1")
    end_of_turn, end_of_text = 151645, 151643
    prompts.check_stop_ids([end_of_turn, end_of_text])
    with pytest.raises(InputError, match=r"with 151645 \(<\|im_end\|>\), .* \[151643\]"):
        prompts.check_stop_ids([end_of_text])
