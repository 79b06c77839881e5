"""Placeholders for the second form of the transforms."""

from exprl_placeholder import placeholders

__getattr__ = placeholders("torchvision.transforms.v2")
