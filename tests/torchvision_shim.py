"""Lets transformers' Qwen3-VL processors load where torchvision's compiled operators do not.

torchvision's wheel is built for a CUDA torch. Beside a CPU torch its operators do not load, and its
import then fails on registering shapes for operators that nobody declared. Declaring their names
first is enough, since no test calls them. Import this module before transformers.
"""

import contextlib

import torch

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# Beside a CUDA torch the compiled operators load, and declare themselves.
if torch.version.cuda is None:
    # Kept alive: its end takes them away.
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        # Another import may have declared it.
        with contextlib.suppress(RuntimeError):
            _library.define(_name + _NMS)
