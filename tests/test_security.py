"""Nothing that is read is run: no pickle, no code of others, no evaluation of text; no leaks."""

import ast
import pathlib

import pytest
from helpers import ROOT

from opsdc_jax import grading
from opsdc_jax.models import hf

SOURCES = sorted([*(ROOT / "opsdc_jax").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
# What runs what it is given. `compile` is Python's only by itself: re's and XLA's are methods.
CALLS = {"eval", "exec", "__import__", "system", "popen", "parse_expr", "sympify"}
IMPORTS = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "torch",
    "yaml",
}
SWITCHES = {"trust_remote_code": False, "shell": False, "allow_pickle": False}
# What benchmarks measure against.
ALLOWED = {(f"scripts/{name}.py", "torch") for name in ("bench_train", "bench_sampler")}


def used(tree):
    """Names of what a module calls and imports, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            # Without an argument nothing is run: torch's `.eval()` switches a module's mode.
            if node.args and (name in CALLS or getattr(called, "id", "") == "compile"):
                yield name, node.lineno
            for keyword in node.keywords:
                if keyword.arg in SWITCHES:
                    value = keyword.value
                    if not isinstance(value, ast.Constant) or value.value != SWITCHES[keyword.arg]:
                        yield f"{keyword.arg}={ast.unparse(value)}", node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in IMPORTS:
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in IMPORTS:
            yield node.module, node.lineno


def test_nothing_in_the_source_runs_what_it_reads():
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in SOURCES
        for name, line in used(ast.parse(path.read_text()))
        if (str(path.relative_to(ROOT)), name) not in ALLOWED
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "eval('1')",
        "compile(text, 'x', 'exec')",
        "builtins.exec(text)",
        "np.load(path, allow_pickle=True)",
        "run(command, shell=True)",
        "from_pretrained(path, trust_remote_code=flag)",
    ],
)
def test_the_search_finds(source):
    assert list(used(ast.parse(source)))


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os').system('touch {marker}')",
        r"\operatorname{{__import__}}('os').system('touch {marker}')",
        "open('{marker}', 'w')",
        r"\text{{open('{marker}', 'w').write('x')}} + 1",
        r"\frac{{open('{marker}', 'w')}}{{2}}",
        "(lambda: open('{marker}', 'w'))()",
        "x.__class__.__base__.__subclasses__()",
    ],
)
def test_an_answer_is_never_run(answer, tmp_path):
    """sympy can evaluate text as Python; answers get there as LaTeX only."""
    marker = tmp_path / "executed"
    text = answer.format(marker=marker)
    for response, gold in ((rf"\boxed{{{text}}}", "x^2 + 1"), (r"\boxed{x^2 + 1}", text)):
        assert not grading.grade(response, gold)["committed"]
    assert not marker.exists()


def test_the_hub_is_asked_for_no_code_and_no_pickle():
    for name in ("modeling_x.py", "pytorch_model.bin", "model.pt", "x.pkl", "tf_model.h5"):
        assert not any(pathlib.PurePath(name).match(pattern) for pattern in hf._HUB_FILES)
