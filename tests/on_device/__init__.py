"""What tests do on any device: tests/gpu calls these functions on CUDA, test_on_cpu.py calls the same on a CPU."""
