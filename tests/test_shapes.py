"""The named architectures are the published ones."""

import dataclasses
import math

import jax
import pytest

from opsdc_jax.models import qwen3
from opsdc_jax.models.shapes import SHAPES


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen3_0p6b", 0.596),
        ("qwen3_1p7b", 1.721),
        ("qwen3_4b", 4.022),
        ("qwen3_8b", 8.191),
        ("qwen3_14b", 14.768),
        ("qwen3_32b", 32.762),
    ],
)
def test_parameter_counts_are_the_published_ones(name, billions):
    leaves = jax.tree.leaves(qwen3.abstract_params(SHAPES[name]))
    assert sum(math.prod(leaf.shape) for leaf in leaves) / 1e9 == pytest.approx(billions, abs=6e-4)


def test_every_shape_has_one_tree():
    for config in SHAPES.values():
        untied = dataclasses.replace(config, tie_word_embeddings=False)
        trees = (qwen3.abstract_params(untied), qwen3.abstract_params(SHAPES["qwen3_8b"]))
        assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
