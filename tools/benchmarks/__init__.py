"""What the benchmarks in tools/ measure and compare with."""
