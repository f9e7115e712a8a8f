"""Compiles what numba compiles, once and before any test's timeout runs."""

import pipelines.dali_kernels  # noqa: F401
