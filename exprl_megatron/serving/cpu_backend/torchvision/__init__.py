"""Stand-in for torchvision: SGLang and transformers import it for image models, which are not served here."""

from exprl_placeholder import placeholders

__version__ = "0.0.0"
__getattr__ = placeholders("torchvision")
