"""The tokenizer of the tiny world: one token per word, one per number 0..99.

It has the shape of Qwen3's: the same special tokens with the same roles, and a chat template that
renders a conversation the same way. Whitespace only separates words: `decode(encode(text))` gives
the words joined by single spaces, so line breaks of the chat template become nothing.
"""

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opsdc_jax.measures import END_THINK, THINK
from opsdc_jax.prompts import TEMPLATES
from opsdc_jax.tiny import task

PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
UNKNOWN = "<unk>"
MAX_LENGTH = 512
"""Tokens of prompt and response together; the model is trained on fewer than half of them."""

_ROLES = ("user", "assistant", "system")
# For instructions of the user's own wording, and for a round number of tokens.
_SPARE_WORDS = (
    *("answer", "brief", "concise", "correct", "extra", "few", "long", "more"),
    *("not", "quick", "repeat", "short", "skip", "solve", "without", "words"),
)

# Renders what Qwen3's template renders for plain conversations: no tools, and the thoughts of
# earlier turns are dropped, as Qwen3 drops them.
CHAT_TEMPLATE = """\
{%- set ns = namespace(last_user=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set content = message.content -%}
    {%- if message.role == 'assistant' and loop.index0 < ns.last_user -%}
        {%- set content = content.split('</think>')[-1].lstrip() -%}
    {%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- '<think>\\n\\n</think>\\n\\n' -}}
    {%- endif -%}
{%- endif -%}
"""


def vocabulary() -> tuple[str, ...]:
    """All tokens in the order of their ids: special ones, numbers, words."""
    special = (PAD, IM_START, IM_END, THINK, END_THINK, UNKNOWN)
    words = dict.fromkeys(task.vocabulary())  # a dict keeps the order, a set would not
    for text in TEMPLATES["tiny"].instructions.values():
        words.update(dict.fromkeys(text.split()))
    words.update(dict.fromkeys(_ROLES + _SPARE_WORDS))
    return special + tuple(words)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A new tokenizer, the same on every call; `save_pretrained` writes the usual files.

    An unknown word becomes `unk_token_id`, which no text of this world contains.
    """
    ids = {token: index for index, token in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # As in Qwen3, the marks of thinking survive skip_special_tokens.
    backend.add_tokens([AddedToken(token, normalized=False) for token in (THINK, END_THINK)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=IM_END,
        unk_token=UNKNOWN,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
