"""Compiles what numba compiles, once and before any test's timeout runs."""

import pipelines.dali.operators  # noqa: F401
