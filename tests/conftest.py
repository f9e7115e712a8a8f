"""Compiles what numba compiles, once and before any test's timeout runs; lets processes hear that a terminal closed."""

import signal

import pipelines.dali.operators  # noqa: F401

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, here and in every process that a test starts
