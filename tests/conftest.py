"""Settings shared by all tests; importing this file touches no device."""

import jax
import pytest

jax.config.update("jax_legacy_prng_key", "error")


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache_of_the_session(tmp_path_factory):
    """Programs that several tests compile are compiled once, and the user's cache is left alone."""
    cache = tmp_path_factory.mktemp("compilation_cache")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
        yield
