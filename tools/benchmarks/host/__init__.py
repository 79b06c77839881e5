"""The host's share of a step, station by station; each module with a STATION is one (see tools/bench_host.py)."""
