"""What the checksums of a checkpoint cost: GB/s of one rank over files that its node has just written.

    tools/bench_checksums.py [--gigabytes 2] [--files 4] [--directory /scratch]

A rank of a 70B policy on 128 GPUs writes about 8 GB (weights, fp32 weights and two moments: 14 bytes for each of
70 billion parameters, by 128).
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from exprl_megatron.policy.checkpoint_files import checksums, faults

_BYTES_70B_RANK = 70e9 * 14 / 128


def main() -> None:
    """Write the files, then read them as save and resume do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--directory", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory, size = Path(name), int(arguments.gigabytes * 1e9 / arguments.files)
        block = os.urandom(min(size, 2**26))
        for i in range(arguments.files):
            with open(directory / f"__0_{i}.distcp", "wb") as file:
                for _ in range(max(1, size // len(block))):
                    file.write(block)
        written = sum(path.stat().st_size for path in directory.iterdir())
        found = checksums(directory, 0, 1)
        for what, work in (
            ("save", lambda: checksums(directory, 0, 1)),
            ("resume", lambda: faults(directory, found, 0, 1)),
        ):
            started, cpu = time.perf_counter(), time.process_time()
            work()
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            print(
                f"{what}: {written / 1e9:.1f} GB in {seconds:.2f} s, {written / seconds / 1e9:.1f} GB/s "
                f"({cpu:.2f} s of CPU); a rank of 70B on 128: {_BYTES_70B_RANK / written * seconds:.1f} s"
            )


if __name__ == "__main__":
    main()
