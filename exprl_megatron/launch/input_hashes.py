"""Hashes of the inputs of a run besides its config: problems, examples, prompts, models.

`inputs.json` in the run's directory has a hash for each of them. Between stop and resume a path may change, but not the
content of its file.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import xxhash

from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import SftStage
from exprl_megatron.judging.judge_model import model_identity
from exprl_megatron.judging.prompt import load_prompt, prompt_set_hash
from exprl_megatron.launch.plugin_checks import plugin_hashes
from exprl_megatron.policy.megatron_files import MEGATRON
from exprl_megatron.problems.contents import hash_problems, hash_value
from exprl_megatron.problems.sources import load_problems
from exprl_megatron.training.examples import read_examples

_PIECES, _PIECE_BYTES = 64, 2**16


def hash_inputs(config: RunConfig) -> dict[str, str]:
    """Return a hash of the content of every file that `config` names, by its config key.

    For models see `model_identity`; the shipped prompts have the key `judge.shipped_prompts` where a judge may use
    them.

    Raises:
        UserError: an input cannot be read.
    """
    return dict(_contents(config))


def _contents(config: RunConfig) -> Iterator[tuple[str, str]]:
    yield "policy.model", _model(config.policy.model)
    yield from plugin_hashes(config).items()
    for number, stage in enumerate(config.stages):
        if isinstance(stage, SftStage) and stage.examples is not None:
            yield f"stages.{number}.examples", hash_value(read_examples(Path(stage.examples)))
        elif stage.problems is not None:
            yield f"stages.{number}.problems", _problems(stage.problems)
    if config.has_evaluation:
        yield "evaluation.problems", _problems(config.required_evaluation.problems)
    if config.needs_judge:
        judge = config.required_judge
        if judge.model is not None:
            yield "judge.model", _model(judge.model)
        named = {"prompt": judge.prompt, "prefix_prompt": judge.prefix_prompt, "segment_prompt": judge.segment_prompt}
        for key, name in named.items():
            if name is not None:
                yield f"judge.{key}", load_prompt(name, judge.prompt_order).version
        # A custom prompt is for one granularity and kind of judging; all others use the shipped prompts.
        yield "judge.shipped_prompts", prompt_set_hash(judge.prompt_order, judge.shipped_prompts)
        if judge.rubric.kind == "checkpoints":
            yield "judge.rubric.prompt", load_prompt(judge.rubric.prompt, shows="reference").version


def _model(directory: str) -> str:
    """Return `model_identity`; of weights in Megatron's format, together with a hash of pieces of these files."""
    converted = [(path.name, _sampled(path)) for path in sorted((Path(directory) / MEGATRON).glob("*.distcp"))]
    return hash_value([model_identity(directory), converted]) if converted else model_identity(directory)


def _sampled(path: Path) -> str:
    """Hash a file's size and evenly spaced pieces of it, all of which training changes."""
    size = path.stat().st_size
    digest = xxhash.xxh3_128(b"%d:" % size)
    with open(path, "rb") as file:
        for i in range(_PIECES):
            file.seek(max(0, size - _PIECE_BYTES) * i // (_PIECES - 1))
            digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


@cache
def _problems(config: ProblemsConfig) -> str:
    return hash_problems(load_problems(config))
