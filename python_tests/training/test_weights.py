from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

from pyaccel.training import load_weights, save_weights
from pyaccel.training.weights import named_tensors


class Awkward(nn.Module):
    """Tied, overlapping, transposed, channels-last, empty, scalar, integer and half precision tensors."""

    def __init__(self, tied=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        if tied:
            self.b.weight = self.a.weight
        base = torch.randn(10)
        self.register_buffer("head", base[:6])
        self.register_buffer("tail", base[4:])
        self.register_buffer("turned", torch.randn(3, 5).t())
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("scalar", torch.tensor(7))
        self.register_buffer("brief", torch.randn(3).bfloat16())
        self.register_buffer("passing", torch.randn(2), persistent=False)


def equal(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_awkward_tensors_round_trip(tmp_path):
    model, other = Awkward(), Awkward()
    save_weights(model, tmp_path / "w.safetensors")
    assert not equal(model, other)
    load_weights(other, tmp_path / "w.safetensors")
    assert equal(model, other)
    assert other.b.weight is other.a.weight
    assert other.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_ties_are_stored_once_and_recorded(tmp_path):
    tensors, ties = named_tensors(Awkward())
    assert ties == {"b.weight": "a.weight"} and "b.weight" not in tensors and "passing" not in tensors
    save_weights(Awkward(), tmp_path / "w")
    untied = Awkward(tied=False)
    load_weights(untied, tmp_path / "w")
    assert torch.equal(untied.a.weight, untied.b.weight)
    assert "b.weight" not in safetensors.torch.load_file(tmp_path / "w")  # Control: readable by the library alone.


def test_equal_weights_are_equal_files(tmp_path):
    """Also in many tries: the format's own metadata comes in an order that changes from call to call."""
    model = Awkward()
    for _ in range(20):
        save_weights(model, tmp_path / "w")
        save_weights(model, tmp_path / "v")
        assert (tmp_path / "v").read_bytes() == (tmp_path / "w").read_bytes()


def test_every_flipped_bit_of_the_content_is_seen(tmp_path):
    file = tmp_path / "w"
    model = nn.Linear(3, 2)
    save_weights(model, file)
    content = file.read_bytes()
    for position in (len(content) - 1, len(content) - 32):
        changed = bytearray(content)
        changed[position] ^= 16
        file.write_bytes(changed)
        safetensors.torch.load_file(file)  # Control: the format itself does not notice.
        with pytest.raises(ValueError, match="differs from the SHA-256 that was written with it"):
            load_weights(model, file)
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="not a sound safetensors file"):
        load_weights(model, file)
    with pytest.raises(FileNotFoundError, match="no such file of weights"):
        load_weights(model, tmp_path / "absent")


def test_files_of_other_programs(tmp_path):
    model = nn.Linear(3, 2)
    tensors = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    safetensors.torch.save_file(tensors, tmp_path / "w")
    load_weights(model, tmp_path / "w")
    assert torch.equal(model.weight, tensors["weight"])
    safetensors.torch.save_file({"weight": torch.ones(2, 3).half(), "biases": torch.zeros(2)}, tmp_path / "w")
    with pytest.raises(ValueError, match=(r"does not fit Linear: not in the file: bias; not in the model: biases; "
                                          r"different: weight \(file float16 \[2, 3\], model float32 \[2, 3\]\)")):
        load_weights(model, tmp_path / "w")


def test_wrappers_are_looked_through(tmp_path):
    class Compiled(nn.Module):  # What torch.compile returns looks so.
        def __init__(self, module):
            super().__init__()
            self._orig_mod = module

    model = nn.Linear(3, 2)
    save_weights(Compiled(model), tmp_path / "w")
    other = nn.Linear(3, 2)
    load_weights(other, tmp_path / "w")
    assert equal(model, other)
    load_weights(Compiled(nn.Linear(3, 2)), tmp_path / "w")


def test_torch_compile_really_looks_so():
    assert torch.compile(nn.Linear(1, 1), backend="eager")._orig_mod is not None


def test_extra_state_is_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(TypeError, match="_extra_state: safetensors holds tensors only, got dict"):
        save_weights(Extra(1, 1), tmp_path / "w")
    assert list(tmp_path.iterdir()) == []
