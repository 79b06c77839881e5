"""What a run will need before it is submitted: memory per device and seconds per phase.

Arithmetic only: neither torch nor Megatron is imported.
"""
