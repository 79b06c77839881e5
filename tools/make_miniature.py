"""Makes the miniature: all that a complete experiment needs on two CPU cores, from nothing but a seed.

    <out>/policy/, <out>/judge/   the base policy and the judge (1.1 M parameters each) in Hugging Face form
    <out>/losses-*.json           the loss of every step of their training, in nats a token
    <out>/train.jsonl             {"id", "domain", "problem", "reference", "answer"}: long chains to learn from
    <out>/heldout.jsonl           the same for evaluation
    <out>/judged.jsonl            {"problem_id", "problem", "reference", "answer", "trace", "correct"}: traces of
                                  held-out problems, right, slipped and unfinished, for `exprl judge-bench`
    <build>/*-sft.jsonl           {"id", "prompt", "completion"}: what the two models learn from, in this order
    <out>/hard-*.jsonl            train and heldout of the study, all of them of the longest chains

No problem to train on or held out is in another file. Training takes minutes and is the project's own SFT
stage (recipes/configs/miniature-*.yaml); interrupted, it continues from its checkpoint when called again.
The texts and the rules are those of `tools/chains.py`.
"""

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

import chains
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config

from exprl_megatron.config.load import load_config
from exprl_megatron.launch.launcher import launch
from exprl_megatron.reporting.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "recipes" / "configs"
MODELS = ("policy", "judge")

CONTEXT = 512
PAD, EOS, UNK = chains.SPECIAL_WORDS
# Messages are joined by blanks: the miniature's models know no turns.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"


def write_tokenizer(directory: Path) -> None:
    words = list(chains.VOCABULARY)
    # FilledBucket up to a multiple of 32, so that the embedding splits over tensor-parallel ranks and every id that
    # a model can sample is a word.
    words += [f"<unused{i}>" for i in range(-len(words) % 32)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)


def model_config() -> Qwen3Config:
    """Return the shape of both models: they differ only in what they are taught."""
    size = len(chains.VOCABULARY)
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=size + -size % 32,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=576,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        initializer_range=0.02,
        tie_word_embeddings=True,
        pad_token_id=chains.VOCABULARY.index(PAD),
        eos_token_id=chains.VOCABULARY.index(EOS),
        bos_token_id=None,
        dtype="float32",
    )


def distinct_chains(
    rng: Random, count: int, taken: set[str], lengths: Sequence[int] = chains.LONG
) -> list[chains.Chain]:
    """`count` chains of these lengths whose problem texts are not in `taken`; theirs are added to it."""
    found = []
    while len(found) < count:
        chain = chains.chain_problem(rng, rng.choice(lengths))
        text = chains.problem_text(chain)
        if text not in taken:
            taken.add(text)
            found.append(chain)
    return found


def problem_rows(name: str, problems: Iterable[chains.Chain]) -> Iterator[dict]:
    for i, chain in enumerate(problems):
        yield {
            "id": f"{name}-{i}",
            "domain": "math",
            "problem": chains.problem_text(chain),
            "reference": chains.reference_text(chain),
            "answer": chains.answer_text(chain),
        }


def judged_rows(rng: Random, problems: list[chains.Chain]) -> Iterator[dict]:
    """120 worked traces, 90 with a slip that is carried on, and 90 left early as the base policy leaves them (with
    a hint, so that not all end after one step)."""
    for i, chain in enumerate(problems[:120]):
        steps, found = len(chain.operations), chains.values(chain)
        traces = [chains.worked_text(chain)]
        if i < 90:
            slipped = chains.values(chain, {rng.randrange(steps): rng.randrange(1, chains.MODULUS)})
            left_after = min(steps - 1, chains.steps_before_stopping(rng, steps, chains.HINTED_GOES_ON))
            traces.append(chains.solution_text(chain, slipped, slipped[-1]))
            traces.append(chains.solution_text(chain, found[:left_after], None))
        answer = chains.answer_text(chain)
        for trace in traces:
            yield {
                "problem_id": f"heldout-{i}",
                "problem": chains.problem_text(chain),
                "reference": chains.reference_text(chain),
                "answer": answer,
                "trace": trace,
                "correct": chains.stated_answer(trace) == answer,
            }


def lesson_rows(name: str, pairs: Iterable[tuple[str, str]]) -> Iterator[dict]:
    for i, (prompt, completion) in enumerate(pairs):
        yield {"id": f"{name}-{i}", "prompt": prompt, "completion": completion}


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_data(made: Path, out: Path, args: argparse.Namespace) -> None:
    taken: set[str] = set()
    heldout = distinct_chains(Random(f"heldout {args.seed}"), args.heldout, taken)
    train = distinct_chains(Random(f"train {args.seed}"), args.train, taken)
    write_rows(out / "heldout.jsonl", problem_rows("heldout", heldout))
    write_rows(out / "train.jsonl", problem_rows("train", train))
    hardest = (chains.LONGEST,)
    hard_heldout = distinct_chains(Random(f"hard heldout {args.seed}"), args.heldout, taken, hardest)
    hard_train = distinct_chains(Random(f"hard train {args.seed}"), args.hard, taken, hardest)
    write_rows(out / "hard-heldout.jsonl", problem_rows("hard-heldout", hard_heldout))
    write_rows(out / "hard-train.jsonl", problem_rows("hard-train", hard_train))
    write_rows(out / "judged.jsonl", judged_rows(Random(f"judged {args.seed}"), heldout))
    policy = chains.base_sft_pairs(Random(f"base {args.seed}"), args.policy_rows, taken)
    write_rows(made / "policy-sft.jsonl", lesson_rows("policy", policy))
    judge = chains.judge_sft_pairs(Random(f"judge {args.seed}"), args.judge_rows, taken)
    write_rows(made / "judge-sft.jsonl", lesson_rows("judge", judge))


def train(name: str, made: Path, out: Path) -> None:
    """Trains `name` (policy or judge) by the project's own SFT stage and puts the model into `out`."""
    config = load_config(
        CONFIGS / f"miniature-{name}.yaml",
        [
            f"directory={made / f'{name}-run'}",
            f"policy.model={made / name}",
            f"stages.0.examples={made / f'{name}-sft.jsonl'}",
        ],
    )
    launch(config, resume=(made / f"{name}-run" / "config.yaml").is_file())
    losses = [round(record["metrics"]["loss"], 4) for record in read_metrics(made / f"{name}-run" / "metrics.jsonl")]
    (out / f"losses-{name}.json").write_text(json.dumps(losses) + "\n")
    shutil.rmtree(out / name, ignore_errors=True)
    shutil.copytree(made / f"{name}-run" / "models" / name, out / name)


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "recipes" / "miniature", metavar="DIR")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "miniature", metavar="DIR", help="working files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy-rows", type=int, default=600 * 96, help="steps times batch of the policy's SFT")
    parser.add_argument("--judge-rows", type=int, default=900 * 64, help="steps times batch of the judge's SFT")
    parser.add_argument("--train", type=int, default=4096, help="training problems")
    parser.add_argument("--hard", type=int, default=1024, help="training problems of the study, all of them longest")
    parser.add_argument("--heldout", type=int, default=128, help="held-out problems")
    parser.add_argument("--only", choices=MODELS, action="append", help="train only this model")
    return parser.parse_args()


def main() -> None:
    args = parsed_arguments()
    args.build.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        write_tokenizer(args.build / name)
        model_config().save_pretrained(args.build / name)
    write_data(args.build, args.out, args)
    for name in args.only or MODELS:
        train(name, args.build, args.out)


if __name__ == "__main__":
    main()
