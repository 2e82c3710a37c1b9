"""The final table and the plots."""

from opsdc_jax import report


def statistics(accuracy, tokens):
    return {
        "samples": 100,
        "accuracy": accuracy,
        "accuracy_se": 0.01,
        "tokens": tokens,
        "tokens_se": 0.5,
        "truncated": 0.0,
    }


def system(accuracy, tokens):
    return {
        "overall": statistics(accuracy, tokens),
        "by_level": {"easy": statistics(accuracy, tokens), "hard": statistics(0.5, 2 * tokens)},
    }


SUMMARY = {
    "base": system(0.7, 90.0),
    "concise_prompt": system(0.8, 60.0),
    "student": system(0.75, 40.5),
}


def test_table_shows_three_systems_with_intervals_and_the_change_in_length():
    lines = report.table(SUMMARY).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1, "columns line up"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["accuracy % / tokens", "easy", "hard", "all (95%)", "length"]
    assert cells[2] == [
        "base, plain prompt", "70.0 / 90.0", "50.0 / 180.0", "70.0 ± 2.0 / 90.0 ± 1.0", ""
    ]  # fmt: skip
    assert cells[4][0] == "student, plain prompt"
    assert cells[4][-1] == "-55.0%"


def test_claims_hold_where_they_do():
    held = {claim.name: claim.held for claim in report.claims(SUMMARY)}
    assert held == {"compression": True, "accuracy_held": True, "easy_first": False}
    assert "DOES NOT HOLD" in report.verdict(SUMMARY)
    # Base 0.7 and student 0.67, each with a standard error of 0.01: inside 1.96 * 0.0141 = 0.0277?
    for accuracy, expected in ((0.673, True), (0.672, False)):
        student = system(accuracy, 46.0)
        student["by_level"]["hard"]["tokens"] = 170.0
        held = {c.name: c.held for c in report.claims(SUMMARY | {"student": student})}
        assert held == {"compression": False, "accuracy_held": expected, "easy_first": True}


def test_levels_are_ordered_and_unnamed_ones_left_out():
    base = system(0.7, 90.0)
    base["by_level"] = {level: statistics(0.5, 100.0) for level in ("5", "1", "hard", "easy", "")}
    header = report.table({"base": base}).splitlines()[0]
    assert [cell.strip() for cell in header.split("|")[2:-3]] == ["easy", "hard", "1", "5"]


def test_plots_are_pictures(tmp_path):
    metrics = [
        {
            "step": step,
            "loss": 1 / step,
            "response_tokens": 90 - step,
            "student_entropy": 0.3,
            "teacher_entropy": 0.2,
        }
        for step in (1, 2, 3, 4)
    ]
    evaluations = [(0, SUMMARY["base"]), (4, SUMMARY["student"])]
    report.plot(tmp_path, metrics, evaluations, SUMMARY["concise_prompt"], teacher_every=2)
    for name in ("loss", "length", "entropy", "accuracy", "overview"):
        content = (tmp_path / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000
