"""An optimizer's state in a checkpoint, whether the layout spreads experts over ranks or not.

Where it does (ep above 1), Megatron gives the experts an optimizer of their own, chained behind that of everything
else, and a checkpoint has two parts instead of one. Tensors are found by their names in either. What is not a tensor
(parameter groups with rates, the step) is stored by part, and is the same in both but for a flag.
"""

from copy import deepcopy

from megatron.core.optimizer.optimizer import param_group_identifier_keys

EXPERT = "is_expert_parallel"


def parts(state: dict) -> list[dict]:
    """Return the state of each chained optimizer; Megatron numbers them where there are several."""
    return [state[number] for number in range(len(state))] if 0 in state else [state]


def repartitioned(described: dict, saved: dict) -> dict:
    """Return the non-tensor state of a checkpoint in the parts of another optimizer, `described`.

    `described` is an optimizer's sharded state dict, `saved` what is not a tensor in a checkpoint's.
    """
    dense = parts(saved)[0]
    made = [_for_part(part, dense) for part in parts(described)]
    return made[0] if len(made) == 1 else dict(enumerate(made))


def _for_part(part: dict, dense: dict) -> dict:
    made = deepcopy(dense)
    saved = {_identity(group): group for group in _holder(dense)["param_groups"]}
    groups = _holder(part)["param_groups"]
    _holder(made)["param_groups"] = [{**saved[_identity(group)], EXPERT: group[EXPERT]} for group in groups]
    return made


def _holder(part: dict) -> dict:
    """Return the object with the groups: Megatron's plain fp32 optimizer has torch's state, others have it inside."""
    return part.get("optimizer", part)


def _identity(group: dict) -> tuple:
    """Return the values by which Megatron distinguishes groups, except for the flag of experts."""
    return tuple(group.get(key) for key in param_group_identifier_keys if key != EXPERT)
