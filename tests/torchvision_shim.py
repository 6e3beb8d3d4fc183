"""Lets transformers' Qwen3-VL processors load where torchvision's compiled operators do not.

torchvision's wheel is built for a CUDA torch. Beside a CPU torch its operators do not load, and its
import then fails on registering shapes for operators that nobody declared. Declaring their names
first is enough, since no test calls them. Import this module before transformers.
"""

import contextlib

import torch

_library = torch.library.Library(
    "torchvision", "FRAGMENT"
)  # kept alive: its end takes the names away
for _schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    with contextlib.suppress(RuntimeError):  # declared already, by operators that did load
        _library.define(_schema)
