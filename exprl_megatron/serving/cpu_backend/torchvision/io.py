"""Placeholders for image input."""

from exprl_placeholder import placeholders

__getattr__ = placeholders("torchvision.io")
