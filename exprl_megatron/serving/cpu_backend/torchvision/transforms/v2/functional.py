"""Placeholders for functions on images."""

from exprl_placeholder import placeholders

from torchvision.transforms import InterpolationMode as InterpolationMode

__getattr__ = placeholders("torchvision.transforms.v2.functional")
