"""Where a response commits itself to an answer: its "Answer: X" lines and its \\boxed{X}.

Everything here is linear in the length of the response.
"""

import re
from typing import NamedTuple

_OPEN, _CLOSE = "<think>", "</think>"

# "Answer:", "Final answer :", "**Answer**:", "\\textbf{Answer:}"; what follows, at least one
# visible character, stands on the same line or on the next that is not empty.
_ANSWER_LINE = re.compile(
    r"(?<![A-Za-z])answer[*_}]{0,4}\s*[:：][*_}\"']{0,4}\s*(\S[^\n]*)", re.IGNORECASE
)
_DISPLAY = {"\\[": "\\]", "$$": "$$"}  # an answer that starts so ends where the display ends
_NOTHING = frozenset(" \t*_`\"'.,:;!$\\[](){}“”’")  # an "answer" of only these is none

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
# Boxes with only this between them are one answer: "\\boxed{3} and \\boxed{5}".
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;]|\\[()\[\],;! ]|\\quad|\band\b|\bor\b|\\text\s*\{\s*(?:,?\s*(?:and|or))?\s*\})*"
)
# What follows a box and takes it back: "\\boxed{10} or 12".
_ALTERNATIVE = re.compile(r"[\s$]*(?:\\\)|\\\])?[\s,]*(?:or\b|\\text\s*\{\s*or\s*\})[^\n.]*")
_LONGEST_SEPARATOR = 40


class Answers(NamedTuple):
    """The answers of a response, as written; None where there is none.

    Attributes:
      answer_line: what follows the last "Answer:" after the thought.
      boxed: content of the last \\boxed{} after the thought; of nested ones the outermost.
      committed: whichever of the two comes last, with the alternatives it offers.
      any_answer_line, any_boxed: the same as the first two, of the whole response.
    """

    answer_line: str | None
    boxed: str | None
    committed: str | None
    any_answer_line: str | None
    any_boxed: str | None


class _Span(NamedTuple):
    start: int
    end: int
    text: str


def after_thought(response: str) -> str:
    """The part of a response that counts: what follows the last `</think>`.

    Where no thought was opened or closed it is the whole response. A thought that was opened and
    not closed leaves nothing. A prompt may have opened the thought: `</think>` alone is enough.
    """
    answer = response.rpartition(_CLOSE)[2]
    return "" if _OPEN in answer else answer


def extract(response: str) -> Answers:
    """All answers of a response; see `Answers`."""
    text = after_thought(response)
    line, boxes = _last_answer_line(text), _boxes(text)
    whole = response.replace(_CLOSE, "\n").replace(_OPEN, "\n")  # no answer spans a tag
    if whole == text:
        any_line, any_boxes = line, boxes
    else:
        any_line, any_boxes = _last_answer_line(whole), _boxes(whole)
    return Answers(
        answer_line=line.text if line else None,
        boxed=boxes[-1].text if boxes else None,
        committed=_committed(text, line, boxes),
        any_answer_line=any_line.text if any_line else None,
        any_boxed=any_boxes[-1].text if any_boxes else None,
    )


def committed_answer(response: str) -> str | None:
    """The answer a response ends up with after its thought, as written, or None.

    The last "Answer: X" or \\boxed{X}, whichever comes last. Boxes joined by "and", "or" or a
    comma are one answer, and so is a box followed by "or ...".
    """
    return extract(response).committed


def unbox(text: str) -> str:
    """A text with its outermost boxes replaced by what they hold, until none is left."""
    while boxes := _boxes(text):
        pieces, end = [], 0
        for box in boxes:
            pieces += [text[end : box.start], box.text]
            end = box.end
        text = "".join(pieces) + text[end:]
    return text


def _last_answer_line(text: str) -> _Span | None:
    last = None
    for match in _ANSWER_LINE.finditer(text):
        answer, end = match[1].strip(), match.end()
        if closing := _DISPLAY.get(answer[:2]):
            stop = text.find(closing, match.start(1) + 2)
            if stop >= 0:
                end = max(end, stop + 2)
                answer = text[match.start(1) : end].strip()
        if not _NOTHING.issuperset(answer):
            last = _Span(match.start(), end, answer)
    return last


def _boxes(text: str) -> list[_Span]:
    """The closed boxes that hold something and stand in no other closed box, in order."""
    if "\\boxed" not in text and "\\fbox" not in text:
        return []
    found: list[tuple[int, int, int]] = []  # start, start and end of the content
    opened: list[tuple[int, int, bool]] = []  # start, start of the content, is a box
    for match in _BRACES.finditer(text):
        token = match[0]
        if token[-1] == "{" and token != "\\{":
            opened.append((match.start(), match.end(), token != "{"))
        elif token == "}" and opened:
            start, inside, is_box = opened.pop()
            if is_box:
                while found and found[-1][0] > start:
                    found.pop()
                found.append((start, inside, match.start()))
    spans = [_Span(start, end + 1, text[inside:end].strip()) for start, inside, end in found]
    return [span for span in spans if span.text]


def _committed(text: str, line: _Span | None, boxes: list[_Span]) -> str | None:
    if not boxes or (line and line.start > boxes[-1].start):
        return line.text if line else None
    group = _joined(text, boxes)
    if line and line.start < group.start and group.end <= line.end:
        # A box in an answer line: the line, if it offers alternatives around the box.
        return line.text if re.search(r"\bor\b", line.text) else group.text
    return group.text


def _joined(text: str, boxes: list[_Span]) -> _Span:
    """The last box with the boxes it is joined to and the alternative that follows it."""
    first = len(boxes) - 1
    while first > 0:
        between = text[boxes[first - 1].end : boxes[first].start]
        if len(between) > _LONGEST_SEPARATOR or not _BETWEEN_BOXES.fullmatch(between):
            break
        if boxes[first - 1].text == boxes[first].text or not re.search(r"and|or|[,;]", between):
            break  # the same answer again, or a new one: not a list
        first -= 1
    start, end = boxes[first].start, boxes[-1].end
    if alternative := _ALTERNATIVE.match(text, end):
        end = alternative.end()
    if first == len(boxes) - 1 and end == boxes[-1].end:
        return boxes[-1]
    return _Span(start, end, text[start:end])
