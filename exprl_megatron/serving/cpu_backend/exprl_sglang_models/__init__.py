"""The models this project trains, for SGLANG_EXTERNAL_MODEL_PACKAGE.

SGLang then imports its other 250 model files only where an architecture is not among these.
"""
