"""Whether our HTTP client holds a server up: the same load through it and through SGLang's own bench_serving.

Starts one server with the miniature's policy, sends both the same prompts with the same sampling seed in turns, and
prints requests per second and their ratio (ours by the faster of bench_serving's two forms: streaming, its default,
and not). Then a fresh process has `--in-flight` requests in flight together, and its memory is measured.

    python tools/bench_client.py [--requests 512] [--input 64] [--output 64] [--rounds 3] [--in-flight 10000] [--json F]
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.client_load import (
    Load,
    Place,
    peak_of_in_flight,
    through_bench_serving,
    through_our_client,
)

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.serving.server_process import start_servers
from exprl_megatron.serving.server_spec import ServerSpec

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "recipes" / "miniature" / "policy"


def compare(server: Place, model: Path, load: Load, rounds: int, directory: Path) -> dict[str, float]:
    """Return medians over the rounds of requests per second, in each of which all three take their turn."""
    prompts = load.prompts(model)
    found: dict[str, list[float]] = {"ours": [], "stream": [], "no_stream": []}
    asyncio.run(through_our_client(server, prompts, load.sampling))  # warms the server up, and its prefix cache
    for _ in range(rounds):
        ours = asyncio.run(through_our_client(server, prompts, load.sampling))
        found["ours"].append(ours.requests_per_s)
        for name in ("stream", "no_stream"):
            served = through_bench_serving(server, model, load, name == "stream", directory)
            found[name].append(served.requests_per_s)
    ratios = [ours / max(pair) for ours, *pair in zip(*found.values(), strict=True)]
    medians = {name: median(values) for name, values in found.items()}
    return medians | {"ratio": median(ratios), "tokens_per_request": ours.output_tokens / ours.requests}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--input", type=int, default=64)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-flight", type=int, default=10_000, help="0: leave that part out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only-in-flight", nargs=3, metavar=("URL", "KEY_FILE", "PROMPTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    flight_load = Load(arguments.in_flight, 16, 8)
    if arguments.only_in_flight:
        url, key_file, file = arguments.only_in_flight
        print(
            json.dumps(
                peak_of_in_flight(Place(url, key_file), json.loads(Path(file).read_text()), flight_load.sampling)
            )
        )
        return
    with tempfile.TemporaryDirectory() as directory:
        config = ServerConfig(request_deadline_s=3600)
        with start_servers([ServerSpec("policy-0", MODEL, config, Path(directory))])[0] as server:
            load = Load(arguments.requests, arguments.input, arguments.output)
            found = compare(Place(server.url, str(server.key_file)), MODEL, load, arguments.rounds, Path(directory))
            print(
                f"requests/s: ours {found['ours']:.0f}, bench_serving {found['stream']:.0f} streaming and "
                f"{found['no_stream']:.0f} not; ours by the faster of them: {found['ratio']:.2f} "
                f"({found['tokens_per_request']:.0f} tokens an answer)"
            )
            if arguments.in_flight:
                file = Path(directory) / "prompts.json"
                file.write_text(json.dumps(flight_load.prompts(MODEL)))
                command = [sys.executable, __file__, "--only-in-flight", server.url, str(server.key_file), str(file)]
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                flight = json.loads(printed.splitlines()[-1])
                found |= {f"in_flight/{name}": value for name, value in flight.items()}
                print(
                    f"{flight['requests']} requests at once: the client grew by {flight['grown_mb']:.0f} MB to "
                    f"{flight['peak_mb']:.0f} MB, and was through after {flight['seconds']:.0f} s"
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
