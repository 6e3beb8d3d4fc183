"""Lets transformers' Qwen3-VL processors load where torchvision's compiled operators do not.

torchvision's wheel is built for a CUDA torch. Beside a CPU torch its operators do not load, and its
import then fails on registering shapes for operators that nobody declared. Declaring their names
first is enough, since no test calls them. Import this module before transformers.
"""

import contextlib

import torch

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

if (
    torch.version.cuda is None
):  # beside a CUDA torch the compiled operators load, and declare themselves
    _library = torch.library.Library(
        "torchvision", "FRAGMENT"
    )  # kept alive: its end takes them away
    for _name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # declared already
            _library.define(_name + _NMS)
