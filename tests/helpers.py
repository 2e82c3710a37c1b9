"""What several test files need: scripts as modules, and a model small enough to compile fast."""

import contextlib
import importlib.util
import pathlib
import resource
import types
from collections.abc import Iterator

import jax
import numpy as np
from jax.extend import core
from ml_collections import ConfigDict

from opsdc_jax.models import qwen3
from opsdc_jax.models.layers import Qwen3Config
from opsdc_jax.models.qwen3 import Params

ROOT = pathlib.Path(__file__).parent.parent

SMALL = Qwen3Config(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=10_000.0,
    tie_word_embeddings=True,
)


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Inside, the system lets no file of this process grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def load_config(name: str) -> ConfigDict:
    """What configs/NAME.py configures."""
    return load_module(ROOT / "configs" / f"{name}.py").get_config()


def load_script(name: str) -> types.ModuleType:
    """scripts/NAME.py as a module, without running its main."""
    return load_module(ROOT / "scripts" / f"{name}.py")


def load_module(path: pathlib.Path) -> types.ModuleType:
    """A file that is no part of the package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_params(config: Qwen3Config, seed: int, scale: float = 10.0) -> Params:
    """Parameters `scale` times the initialiser's, so that distributions are far from uniform."""
    params = qwen3.init_params(config, jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf * scale if leaf.ndim > 2 else leaf, params) | {
        "embedding": params["embedding"] * scale
    }


def shapes_within(jaxpr: core.Jaxpr) -> Iterator[tuple[int, ...]]:
    """The shape of every array a traced program forms, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in core.jaxprs_in_params(equation.params):
            yield from shapes_within(inner)


def relative_error(got: object, expected: object) -> float:
    """L2 norm of the difference of two trees over the norm of the expected one, in float64."""
    flat = [
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (got, expected)
    ]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))
