"""Collectives in the text of an optimised program: how many of each kind, and their bytes."""

import math
import re

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# From one head to the next: the text of a kernel may hold braces of its own.
_HEAD = re.compile(r"^(?:ENTRY )?%([\w.-]+) \([^\n]*\{$", re.M)
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_KINDS)})(-start)?\(")
_CHANNEL = re.compile(r"channel_id=\d+")
_WHILE = re.compile(r" while\(.*?condition=%?([\w.-]+), body=%?([\w.-]+)([^\n]*)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r"known_trip_count[^\d]*(\d+)")
_CONSTANT = re.compile(r"s32\[\][^=]* constant\((\d+)\)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Collectives of a program by kind: `count` and `bytes`.

    Args:
      text: optimised HLO. Shapes in it are those of one device.

    Returns:
      kind -> count and bytes of results on each device. A loop's body counts as often as the loop
      runs where its length can be read from the text, else once.
    """
    heads = [*_HEAD.finditer(text)]
    ends = [*(head.start() for head in heads[1:]), len(text)]
    bodies = {head[1]: text[head.end() : end] for head, end in zip(heads, ends, strict=False)}
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.M)
    totals: dict[str, dict[str, int]] = {}
    for kind, times, moved in (_inside(entry[1], bodies, {}) if entry else {}).values():
        total = totals.setdefault(kind, {"count": 0, "bytes": 0})
        total["count"] += times
        total["bytes"] += times * moved
    return totals


# Channel (or the instruction's own line) -> kind, how often it runs, bytes of one result.
_Found = dict[str, tuple[str, int, int]]


def _inside(name: str, bodies: dict[str, str], known: dict[str, _Found]) -> _Found:
    """The collectives in a computation and all it calls; `known` remembers.

    A TPU program shows an asynchronous collective in several fusions, all with its channel: it is
    counted once.
    """
    if name in known:
        return known[name]
    found: _Found = {}
    for line in bodies.get(name, "").splitlines():
        collective = _COLLECTIVE.search(line)
        if collective:
            channel = _CHANNEL.search(line)
            size = _result_bytes(collective[1], started=bool(collective[3]))
            found[channel[0] if channel else line] = (collective[2], 1, size)
            continue
        loop = _WHILE.search(line)
        called = [loop[2]] if loop else _CALLED.findall(line)
        branches = _BRANCHES.search(line)
        called += [part.strip().lstrip("%") for part in branches[1].split(",")] if branches else []
        runs = _trips(loop, bodies) if loop else 1
        for inner in called:
            for key, (kind, times, size) in _inside(inner, bodies, known).items():
                found[key] = (kind, times * runs, size)
    known[name] = found
    return found


def _trips(loop: re.Match[str], bodies: dict[str, str]) -> int:
    known = _TRIPS.search(loop[3])
    if known:
        return int(known[1])
    # A scan's condition compares its counter with one constant.
    constants = _CONSTANT.findall(bodies.get(loop[1], ""))
    return int(constants[0]) if len(constants) == 1 else 1


def _result_bytes(shape: str, *, started: bool) -> int:
    sizes = [
        math.prod(int(size) for size in dims.split(",") if size) * _width(dtype)
        for dtype, dims in _ARRAY.findall(shape)
    ]
    if started and len(sizes) > 1:
        return max(sizes)  # an asynchronous start returns its operands beside its results
    return sum(sizes)


def _width(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return max(int(bits[0]) // 8, 1) if bits else 1
