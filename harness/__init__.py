"""ssodbench: which semi-supervised object detector gives how much mAP, at which label ratio, for how much compute."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ssodbench")
except PackageNotFoundError:  # imported from a folder that was never installed
    __version__ = "unknown"
