"""An answer as written -> one spelling of it: the same marks for the same things, no decoration."""

import re

from opsdc_jax.grading.extract import unbox

_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "‐": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
        "÷": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
        "°": r"^\circ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
        "≈": r"\approx ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "√": r"\sqrt ", "θ": r"\theta ",
        "α": r"\alpha ", "β": r"\beta ", "⁰": "^0", "¹": "^1", "²": "^2", "³": "^3", "⁴": "^4",
        "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}", "，": ",", "：": ":", "（": "(", "）": ")", "％": "%",
        "“": '"', "”": '"', "’": "'", "⟨": r"\langle ", "⟩": r"\rangle ",
    }
)  # fmt: skip
_FUNCTIONS = (
    "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|gcd|lcm|max|min|det"
)
FUNCTION_NAMES = frozenset(_FUNCTIONS.split("|"))

# In this order: (what, with what), applied once each.
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\$|[$£€]", ""),
        (r"(?<!\\)\\[()\[\]]", " "),
        (r",\s*\\!\s*", ","),  # 10,\!080
        (r"\{\s*,\s*\}", ","),  # 10{,}080
        (r"\\!|\\(?:displaystyle|textstyle|limits|left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?", ""),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\[lr]brack(?![A-Za-z])", ""),
        (r"\\l?vert(?![A-Za-z])|\\rvert(?![A-Za-z])", "|"),
        (r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|~|[\s\u200b\ufeff]+", " "),
        (r"\\(?:d|t|c)frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:text|mbox|hbox|math)(?:normal|rm|bf|it|sf|tt)?\s*\{([^{}]*)\}", r" \1 "),
        (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([0-9])\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*([0-9A-Za-z])", r"\1{\2}"),
        (r"\\frac\s*", r"\\frac"),
        (r"\^\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])", " degrees "),
        (r"\\%", "%"),
        (r"(?<=[\w)}])\*\*(?=[\w({])", "^"),
        (r"\\(?:leq|leqslant)(?![A-Za-z])|<=", r"\\le "),
        (r"\\(?:geq|geqslant)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
        (r"\\(?:simeq|sim)(?![A-Za-z])", r"\\approx "),
        (r"\+/-|\+-", r"\\pm "),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset "),
        (r"\\lor(?![A-Za-z])", " or "),
        (r"\\land(?![A-Za-z])", " and "),
        (rf"(?<![\\A-Za-z])({_FUNCTIONS}|pi)(?![A-Za-z])", r"\\\1 "),
        (r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
        (r"(?:\\sqrt|(?<![\\A-Za-z])sqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\s+", " "),
    )
)
_EDGES = " \t\n*_`\"'.,;:"
_EXPLANATION = re.compile(r"[,;.]?\s*\b(?:because|since|where)\b.*", re.IGNORECASE | re.DOTALL)


def clean(answer: str) -> str:
    """One spelling of an answer.

    Math delimiters, markdown, spacing commands, currency signs, boxes and \\text{} go; fractions
    get their braces; degree signs become a word; Unicode becomes LaTeX; an explanation that
    follows ("because ...") is cut off.
    """
    text = unbox(answer.translate(_CHARACTERS))
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _EXPLANATION.sub("", text)
    previous = None
    while text != previous:  # decoration may stand in any order: "**42**." and "42.**"
        previous, text = text, _trim(text)
    return text


def _trim(text: str) -> str:
    """Without punctuation at the end, quotes and emphasis at both ends, or a brace too many."""
    text = text.strip(" *_`\"'").rstrip(_EDGES)
    if text.endswith("}") and not text.endswith(r"\}") and text.count("}") > text.count("{"):
        text = text[:-1]  # the end of \textbf{Answer: 42}
    if re.fullmatch(r"\{[^{}]*\}", text):
        text = text[1:-1]
    return text
