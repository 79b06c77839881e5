"""Placeholders for image transforms, and the enumeration that is read while modules are imported."""

from enum import Enum

from exprl_placeholder import placeholders

__getattr__ = placeholders("torchvision.transforms")

InterpolationMode = Enum(
    "InterpolationMode",
    {
        name: name.lower().replace("_", "-")
        for name in ["NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS"]
    },
)
