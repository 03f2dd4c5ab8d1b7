"""Values reduced to types that load again without running code: for `torch.load(weights_only=True)` and for JSON."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor


def plain_state(value: Any, name: str) -> Any:
    """The value made of types that `torch.load(weights_only=True)` accepts, sharing no memory with the original.

    Numpy scalars become Python's, special dicts and tuples plain ones. TypeError names the entry that cannot be saved.
    """
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in (bool, int, float, complex, str, bytes, torch.dtype, torch.device):
        return value
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        plain = {key: plain_state(item, f"{name}.{key}") for key, item in value.items()}
        return Counter(plain) if isinstance(value, Counter) else plain  # MultiStepLR uses its milestones as a Counter.
    if isinstance(value, (list, tuple)):
        items = [plain_state(item, f"{name}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(f"{name}: a checkpoint holds numbers, strings, lists, dicts and tensors, "
                    f"got {type(value).__name__}")


def plain_config(config: Any) -> dict:
    """A dict or dataclass as JSON gives it back (tuples become lists); None is the empty dict. TypeError otherwise."""
    config = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config or {})
    try:
        return json.loads(json.dumps(config))
    except (TypeError, ValueError) as error:
        raise TypeError(f"config: expected numbers, strings, lists and dicts (write paths as str): {error}") from error
