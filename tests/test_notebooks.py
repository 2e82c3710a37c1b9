"""The notebooks run in a fresh kernel, and give the outputs that are committed.

Every cell must give outputs of the committed kinds. A cell tagged "checked" must also print the
committed text: words and whole numbers exactly, decimals to 1% or to one in their last place. Other
cells hold what depends on the machine: seconds, or what a student says after training.

    python scripts/run_notebooks.py     # after a change of the code, to commit its outputs
"""

import json
import re
from concurrent import futures
from decimal import Decimal

import nbformat
import pytest
from helpers import ROOT, load_script

from opsdc_jax.config import default_config, flatten

scripts = load_script("run_notebooks")

NOTEBOOKS = sorted(scripts.FOLDER.glob("*.ipynb"))
LARGEST = 150_000  # bytes
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def shown(cell):
    """The outputs of a cell, without what goes to standard error."""
    return [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]


def kinds(cell):
    return [sorted(output.get("data", [output.output_type])) for output in shown(cell)]


def text(cell):
    """All text of a cell's outputs."""
    return "\n".join(
        output.get("text") or output.get("data", {}).get("text/plain", "") for output in shown(cell)
    )


def agree(got, committed):
    """Whether two lines are the same: by the rule above, and whatever the space between words."""
    got, committed = (" ".join(line.split()) for line in (got, committed))
    if _NUMBER.sub("#", got) != _NUMBER.sub("#", committed):
        return False
    pairs = zip(_NUMBER.findall(got), _NUMBER.findall(committed), strict=True)
    return all(
        a == b or ("." in a and "." in b and close(Decimal(a), Decimal(b))) for a, b in pairs
    )


def close(got, committed):
    last_place = Decimal(1).scaleb(committed.as_tuple().exponent)
    return abs(got - committed) <= max(last_place, abs(committed) / 100)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """All notebooks, by path: the second trains a run and the third reads it, beside the first."""
    scratch = tmp_path_factory.mktemp("notebooks")
    with futures.ThreadPoolExecutor(max_workers=1) as pool:
        first = pool.submit(scripts.execute, NOTEBOOKS[0], scratch)
        others = [scripts.execute(path, scratch) for path in NOTEBOOKS[1:]]
    return dict(zip(NOTEBOOKS, [first.result(), *others], strict=True))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_what_the_code_gives(path, executed):
    committed = nbformat.read(path, as_version=4)
    for old, new in zip(committed.cells, executed[path].cells, strict=True):
        assert kinds(new) == kinds(old), f"cell {old.id}"
        if "checked" in old.metadata.get("tags", []):
            lines = zip(text(new).splitlines(), text(old).splitlines(), strict=True)
            assert [pair for pair in lines if not agree(*pair)] == [], f"cell {old.id}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_small_and_of_one_execution(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("checked" in cell.metadata.get("tags", []) for cell in code)
    assert all(cell.metadata.keys() <= {"tags"} for cell in notebook.cells), "no times"
    assert path.stat().st_size < LARGEST
    assert str(ROOT) not in json.dumps(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda path: path.stem)
def test_overrides_name_keys_of_the_configuration(path):
    """The third notebook does not train where the second one has."""
    cells = nbformat.read(path, as_version=4).cells
    named = {key for cell in cells for key in re.findall(r"--config\.([\w.]+)=", cell.source)}
    assert named
    assert named <= flatten(default_config()).keys()


@pytest.mark.parametrize(
    ("got", "committed", "expected"),
    [
        ("loss   0.0115", "loss 0.0116", True),
        ("loss 1.4390", "loss 1.4450", True),
        ("loss 0.0115", "loss 0.0118", False),
        ("rate 4.0e-05", "rate 4.1e-05", True),
        ("rate 4.0e-05", "rate 4.0e-04", False),
        ("125 tokens", "126 tokens", False),
        ("(1, 142, 224)", "(1, 142, 128)", False),
        ("KL 0.5", "kl 0.5", False),
        ("0.5 0.5", "0.5", False),
    ],
)
def test_the_rule_of_comparison(got, committed, expected):
    assert agree(got, committed) == expected
