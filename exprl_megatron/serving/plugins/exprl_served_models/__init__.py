"""Models that this project trains and SGLang 0.5.23 has no class for, for SGLANG_EXTERNAL_MODEL_PACKAGE.

SGLang imports its own models where an architecture is not among these.
"""
