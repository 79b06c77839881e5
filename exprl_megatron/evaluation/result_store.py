"""Store of an evaluation's finished problems; a stored problem is not sampled again.

DIR/evaluation.json           identity of the evaluation: model, sampling, prompt, seed
DIR/results/<problem>.json    counts of one problem; the file exists if the problem is finished
DIR/traces/<problem>.jsonl.gz its samples with their judgements
DIR/logs/                     logs of the servers
"""

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from exprl_megatron.errors import UserError
from exprl_megatron.evaluation.sample_counts import SampleCounts, count_samples
from exprl_megatron.judging.judgement import judgement_to_dict
from exprl_megatron.rollout.group import GradedTrace
from exprl_megatron.utils.files import Claim, keep_private, write_atomically


@dataclass(frozen=True)
class ProblemResult:
    """The result of one problem whose samples are all graded."""

    problem_id: str
    question: str
    """Hash of the question and of everything with which answers were compared."""
    counts: SampleCounts
    """Its key in the file is `tally`."""
    overlong: int
    """Number of samples that the length limit ended."""
    tokens: int
    """Number of tokens of all samples together."""


class ResultStore:
    """The results in one directory, which this process locks until `release`.

    Args:
        directory: the directory; it is created if it does not exist.
        identity: the identity of the evaluation (see EvalConfig.identity).

    Raises:
        UserError: the directory has another evaluation or other files, or another process has locked it.
    """

    def __init__(self, directory: Path, identity: dict):
        self.logs = directory / "logs"
        self._directory = directory
        file = directory / "evaluation.json"
        if directory.exists() and not file.is_file() and (not directory.is_dir() or any(directory.iterdir())):
            raise UserError(f"The directory {directory} holds other files; choose a new or empty directory with --out.")
        # Samples may be of an unpublished model, and the logs contain hidden answers.
        keep_private(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._claim = Claim(directory)
        try:
            if file.is_file():
                _refuse_another(json.loads(file.read_text()), identity, directory)
            write_atomically(file, json.dumps(identity, indent=1).encode())
        except BaseException:
            self._claim.release()
            raise

    def find(self, problem_id: str, question: str) -> ProblemResult | None:
        """Return the result of a finished problem; None where it is not finished.

        Args:
            problem_id: id of the problem.
            question: the hash of the question (see `question_key`).

        Raises:
            UserError: the stored result is of another question with this id, or its file is damaged.
        """
        path = self._result(problem_id)
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text())
            result = ProblemResult(counts=SampleCounts(**record.pop("tally")), **record)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"The result {path} is damaged ({error!r}); delete it to measure it again.") from error
        if result.question != question:
            raise UserError(
                f"The problem {problem_id} has changed since {self._directory} was written (its text, its answer or "
                "the prompt); choose another directory with --out."
            )
        return result

    def save(self, problem_id: str, question: str, samples: Sequence[GradedTrace]) -> ProblemResult:
        """Write all graded samples of a problem to disk, and then their counts."""
        result = ProblemResult(
            problem_id=problem_id,
            question=question,
            counts=count_samples(sample.judgement for sample in samples),
            overlong=sum(sample.trace.overlong for sample in samples),
            tokens=sum(len(sample.trace.token_ids) for sample in samples),
        )
        lines = "".join(json.dumps(_sample(sample)) + "\n" for sample in samples)
        write_atomically(self.traces(problem_id), gzip.compress(lines.encode(), compresslevel=6, mtime=0))
        write_atomically(self._result(problem_id), json.dumps(_to_record(result)).encode())
        return result

    def traces(self, problem_id: str) -> Path:
        """Return the file of a problem's samples."""
        return self._directory / "traces" / f"{_name(problem_id)}.jsonl.gz"

    def release(self) -> None:
        """Unlock the directory."""
        self._claim.release()

    def _result(self, problem_id: str) -> Path:
        return self._directory / "results" / f"{_name(problem_id)}.json"


def question_key(*parts: object) -> str:
    """Hash the JSON of a problem's parts (SHA-256, hex)."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _to_record(result: ProblemResult) -> dict:
    record = asdict(result)
    record["tally"] = record.pop("counts")
    return record


def _sample(sample: GradedTrace) -> dict:
    trace = sample.trace
    return {
        "problem_id": trace.problem_id,
        "sample": trace.sample,
        "text": trace.text,
        "tokens": len(trace.token_ids),
        "finish_reason": trace.finish_reason,
        "judgement": judgement_to_dict(sample.judgement),
    }


def _name(problem_id: str) -> str:
    """Make a file name of a problem's id, which may have any characters."""
    return hashlib.sha256(problem_id.encode()).hexdigest()[:32]


def _refuse_another(old: dict, new: dict, directory: Path) -> None:
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if changed:
        raise UserError(
            f"The directory {directory} has an evaluation with another {' and another '.join(changed)}; use the same, "
            "or choose another directory with --out."
        )
