"""OPSDC in JAX: a reasoning model distils its own concise behaviour into itself."""

__version__ = "0.1.0"
