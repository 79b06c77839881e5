"""Checkpoints of a stage in progress: written and loaded in any layout, and never incomplete.

A checkpoint is a directory `checkpoint-NUMBER` with Megatron's torch_dist files (weights, optimizer state,
random states, the stage's starting weights where they are kept) and `state.json` (schedule, layout, checksums, the
caller's own record). It is written under another name, `state.json` last, and renamed when complete.
"""

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from exprl_megatron.errors import UserError
from exprl_megatron.models.name_map import hf_shapes
from exprl_megatron.models.recorded import differing_fields
from exprl_megatron.policy import checkpoint_files as files
from exprl_megatron.policy.gloo_group import broadcast_from_rank, gather_from_all_ranks
from exprl_megatron.policy.optimizer import separate_step_counters
from exprl_megatron.policy.optimizer_state import parts, repartitioned
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.sharded_state import load_strategy, save_strategy, sharded_state
from exprl_megatron.utils.files import sync_directory
from exprl_megatron.utils.required import required

_STAGE = "the stage that begin_stage starts"


def save_checkpoint(root: str | Path, policy: Policy, extra: dict, keep: int) -> Path:
    """Write the policy's state as the newest checkpoint in `root`, and delete all but the newest `keep`.

    A collective. `extra` is a JSON-able dict; rank 0's counts. Raises UserError where it cannot be written;
    the checkpoints that were there before are then untouched.
    """
    root = Path(root)
    policy.gather_weights()
    target, partial = _shared(lambda: _prepare(root, policy), policy, root)
    try:
        dist_checkpointing.save(sharded_state(policy, loading=False), str(partial), save_strategy())
        own = files.checksums(partial, policy.world.rank, dist.get_world_size())
    except (Exception, CheckpointException) as error:
        # Every rank comes here with its own view of the failure; torch's error is not a subclass of Exception.
        failure = _unwritten(root, error)
        if policy.world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise failure from error
    record = _record(policy, extra) | {"files": _merged(own)}
    _shared(lambda: _complete(root, partial, target, record, keep), policy, root)
    return target


def intact_checkpoint(root: str | Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint in `root` whose files all hold what was written, and a sentence on each newer one.

    The newer ones are renamed; None where there was no checkpoint. Between them the ranks read every byte; a
    collective.

    Raises:
        UserError: there are checkpoints and none is intact.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sentences: list[str] = []
    for path in reversed(_from_rank_0(lambda: files.checkpoints(root))):
        record, wrong = _from_rank_0(functools.partial(_record_or_fault, path))
        if record is not None:
            wrong = [
                fault
                for found in gather_from_all_ranks(files.faults(path, record["files"], rank, ranks))
                for fault in found
            ]
        if not wrong:
            return path, sentences
        sentences.append(_from_rank_0(functools.partial(_set_aside, path, wrong)))
    if sentences:
        raise UserError(
            "\n".join([*sentences, f"No other checkpoint is left in {root}; restore one, or start a new run."])
        )
    return None, []


def read_extra(path: str | Path) -> dict:
    """Return the caller's own record in the checkpoint `path`."""
    return _read_record(path)["extra"]


def load_checkpoint(path: str | Path, policy: Policy) -> dict:
    """Restore `policy`, in any layout, from the checkpoint `path`; returns the caller's record (every rank).

    The policy must have started the same stage (begin_stage with the same config). Random states are restored where the
    layout is the checkpoint's.

    Raises:
        UserError: the checkpoint does not fit the policy.
    """
    record = _read_record(path)
    stage = policy.stage
    if stage is None:
        raise RuntimeError("a checkpoint is loaded into a stage; call begin_stage first")
    _check_fit(path, record, policy)
    state = sharded_state(policy, loading=True, same_layout=record["layout"] == policy.config.layout.model_dump())
    try:
        loaded = _load(state, str(path))
    except (OSError, EOFError, CheckpointException) as error:
        raise UserError(
            f"The checkpoint {path} cannot be read ({_one_line(error)}); make its files readable, and resume again."
        ) from error
    for index, chunk in enumerate(policy.chunks):
        chunk.load_state_dict(loaded[f"model{index}"])
        if stage.ref_weights is not None:
            values = loaded[f"start{index}"]
            for name, kept in stage.ref_weights[index].items():
                kept.copy_(values[name])
    stage.optimizer.load_state_dict(loaded["optimizer"])
    separate_step_counters(stage.optimizer)
    stage.updates, stage.total_steps = record["updates"], record["total_steps"]
    if "random" in loaded:
        torch.set_rng_state(loaded["random"]["torch"])
        get_cuda_rng_tracker().set_states(loaded["random"]["tracker"])
    return record["extra"]


def _load(state: dict, path: str) -> dict:
    """Load what `state` describes from the checkpoint's files."""
    saved = dist_checkpointing.load_common_state_dict(path)["optimizer"]
    if len(parts(saved)) == len(parts(state["optimizer"])):
        return dist_checkpointing.load(state, path, load_strategy())
    plain = repartitioned(state["optimizer"], saved)
    # Under a name at which the files have nothing that is divided otherwise.
    state["divided"] = state.pop("optimizer")
    loaded = dist_checkpointing.load(state, path, load_strategy())
    loaded["optimizer"] = merge(plain, loaded.pop("divided"))
    return loaded


def _record(policy: Policy, extra: dict) -> dict:
    stage = required(policy.stage, _STAGE)
    return {
        "architecture": asdict(policy.architecture),
        "layout": policy.config.layout.model_dump(),
        "precision": policy.config.precision.model_dump(),
        "distributed": stage.config.distributed,
        "start_kept": stage.ref_weights is not None,
        "updates": stage.updates,
        "total_steps": stage.total_steps,
        "extra": extra,
    }


def _read_record(path: str | Path) -> dict:
    try:
        return files.read_record(path)
    except files.DamagedCheckpoint as error:
        raise UserError(f"{path} is not a complete checkpoint ({error}); choose another.") from error


def _record_or_fault(path: Path) -> tuple[dict | None, list[str]]:
    try:
        return files.read_record(path), []
    except files.DamagedCheckpoint as error:
        return None, [str(error)]


def _set_aside(path: Path, wrong: list[str]) -> str:
    """Rename a damaged checkpoint; returns a sentence about it."""
    shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    return f"The checkpoint {path} is damaged ({shown}); it is not loaded and is now {files.set_aside(path).name}."


def _check_fit(path: str | Path, record: dict, policy: Policy) -> None:
    mine = json.loads(json.dumps(_record(policy, {})))
    names = {
        "architecture": "policy.model",
        "precision": "policy.precision",
        "distributed": "the stage's optimizer.distributed",
        "start_kept": "the stage's loss.kl_coefficient (zero or not) and policy.ref_policy",
    }
    for key, setting in names.items():
        if differing_fields(record[key], policy.architecture) if key == "architecture" else record[key] != mine[key]:
            raise UserError(f"{path} was written with another {key} than this run has; set {setting} as it was then.")


def _prepare(root: Path, policy: Policy) -> tuple[Path, Path]:
    """Return an empty directory to write to, and the name it will get."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob("checkpoint-*.tmp"):
        shutil.rmtree(leftover)
    target = root / f"checkpoint-{max(map(files.number_of, files.checkpoints(root)), default=0) + 1:08d}"
    needed, free = _bytes_needed(policy), shutil.disk_usage(root).free
    if free < needed:
        raise OSError(f"it needs {needed / 1e6:,.1f} MB")
    partial = target.with_name(target.name + ".tmp")
    partial.mkdir()
    return target, partial


def _bytes_needed(policy: Policy) -> int:
    """Return the size of the smallest checkpoint: the weights, AdamW's two moments in fp32, the reference policy's
    weights.
    """
    numbers = sum(torch.Size(shape).numel() for shape in hf_shapes(policy.architecture).values())
    itemsize = next(policy.chunks[0].parameters()).dtype.itemsize
    copies = 2 if required(policy.stage, _STAGE).ref_weights is not None else 1
    return numbers * (copies * itemsize + 2 * 4)


def _complete(root: Path, partial: Path, target: Path, record: dict, keep: int) -> None:
    """Mark the written checkpoint complete, give it its name, and delete the oldest."""
    files.write_record(partial, record)
    partial.rename(target)
    sync_directory(root)
    for old in files.checkpoints(root)[:-keep]:
        shutil.rmtree(old)


def _shared(action, policy: Policy, root: Path):
    """Return rank 0's result of `action` on every rank; every rank raises its failure to write."""
    message: list = [None, None]
    if policy.world.rank == 0:
        try:
            message[0] = action()
        except OSError as error:
            message[1] = error
    result, failure = broadcast_from_rank(0, message)
    if failure is not None:
        raise _unwritten(root, failure) from failure
    return result


def _from_rank_0[T](action: Callable[[], T]) -> T:
    """Return rank 0's result of `action`, which must not fail, on every rank."""
    return broadcast_from_rank(0, action() if dist.get_rank() == 0 else None)


def _merged(mine: dict[str, str]) -> dict[str, str]:
    """Return the checksums of all ranks."""
    return {name: value for found in gather_from_all_ranks(mine) for name, value in sorted(found.items())}


def _one_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def _unwritten(root: Path, error: BaseException) -> UserError:
    free = shutil.disk_usage(root).free if root.is_dir() else 0
    reason = "a rank could not write its part" if isinstance(error, CheckpointException) else str(error)
    return UserError(
        f"A checkpoint cannot be written to {root} ({reason}; {free / 1e6:,.1f} MB are free); "
        f"make room there and continue with --resume, the last complete checkpoint is intact."
    )
