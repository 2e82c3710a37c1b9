"""The final tables in the terminal."""

import pytest

from opsdc_jax import report


def estimate(value, half):
    return {"value": value, "low": value - half, "high": value + half}


def statistics(accuracy, tokens):
    return {
        "scores": {"committed": estimate(accuracy, 0.02), "boxed": estimate(0.0, 0.0)},
        "tokens": {"mean": estimate(tokens, 1.0), "median": tokens, "p90": tokens},
    }


def system(accuracy, tokens):
    return {
        "overall": statistics(accuracy, tokens),
        "by_level": {"easy": statistics(accuracy, tokens), "hard": statistics(0.5, 2 * tokens)},
    }


def comparison(name, gain, reduction, easy, hard):
    def differences(value):
        return {
            "scores": {"committed": estimate(gain, 0.03)},
            "token_reduction": {"overall": estimate(value, 0.01)},
        }

    return {
        "system": name,
        "against": "base",
        "overall": differences(reduction),
        "by_level": {"easy": differences(easy), "hard": differences(hard)},
    }


def benchmark(gain=0.05, reduction=0.55, easy=0.5, hard=0.6):
    return {
        "systems": {
            "base": system(0.7, 90.0),
            "concise_prompt": system(0.8, 60.0),
            "student": system(0.7 + gain, 40.5),
        },
        "comparisons": [
            comparison("concise_prompt", 0.1, 1 / 3, 1 / 3, 1 / 3),
            comparison("student", gain, reduction, easy, hard),
        ],
        "curve": [
            {"step": 0, "statistics": statistics(0.7, 90.0)},
            {"step": 4, "statistics": statistics(0.75, 40.5)},
        ],
        "warnings": [],
    }


def test_table_shows_three_systems_with_intervals_and_the_change_in_length():
    lines = report.table(benchmark()).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1, "columns line up"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["accuracy % / tokens", "easy", "hard", "all (95%)", "length (95%)"]
    assert cells[2] == [
        "base, plain prompt", "70.0 / 90.0", "50.0 / 180.0", "70.0 ± 2.0 / 90.0 ± 1.0", ""
    ]  # fmt: skip
    assert cells[4][0] == "student, plain prompt"
    assert cells[4][-1] == "-55.0 ± 1.0%"


def test_a_table_needs_no_levels_no_intervals_and_no_base():
    alone = benchmark() | {"comparisons": []}
    alone["systems"] = {"student": system(0.7, 90.0) | {"by_level": {}}}
    alone["systems"]["student"]["overall"]["tokens"]["mean"] |= {"low": None, "high": None}
    header, _, row = report.table(alone).splitlines()
    assert [cell.strip() for cell in header.split("|")[2:-1]] == ["all (95%)", "length (95%)"]
    assert "70.0 ± 2.0 / 90.0 ± 0.0" in row
    assert report.claims(alone) == []


@pytest.mark.parametrize(
    ("measured", "failing"),
    [
        ({}, {"easy_first"}),
        ({"easy": 0.6, "hard": 0.5}, set()),
        ({"reduction": 0.49, "easy": 0.6, "hard": 0.5}, {"compression"}),
        # The interval of the difference is +-3 points.
        ({"gain": -0.029, "easy": 0.6, "hard": 0.5}, set()),
        ({"gain": -0.031, "easy": 0.6, "hard": 0.5}, {"accuracy_held"}),
    ],
)
def test_claims_hold_where_they_do(measured, failing):
    found = report.claims(benchmark(**measured))
    assert {claim.name for claim in found if not claim.held} == failing
    assert ("DOES NOT HOLD" in report.verdict(benchmark(**measured))) == bool(failing)


def test_every_benchmark_has_its_table_and_its_warnings():
    warned = benchmark() | {"warnings": ["too few samples"]}
    printed = report.tables({"benchmarks": {"first": benchmark(), "second": warned}})
    assert printed.count("| base, plain prompt") == 2
    assert printed.count("claim of the paper") == 2
    assert printed.index("\nsecond\n") < printed.index("warning: too few samples")
    assert "no evaluation" in report.tables({"benchmarks": {}})
