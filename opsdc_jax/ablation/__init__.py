"""Ablations: variants of a run over several seeds, and the paper's claims judged on them.

suites.py holds the variants and rules.py the claims, as data; measures.py reads finished runs,
runs.py makes them, and text.py shows what came out. scripts/ablate.py wires them.
"""
