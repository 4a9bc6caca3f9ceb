"""average.py: the mean by hand, and files that cannot be averaged."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparqle_stream.errors import ModelError
from sparqle_stream.weights import in_eight_bits
from training import average


@pytest.fixture
def files(tmp_path):
    """Three files with one matrix and one halved vector each."""
    paths = []
    for i in range(3):
        weights = {"a": torch.full((2, 3), 1.0 + i), "b": torch.full((2,), 2.0 * i).bfloat16()}
        save_file(weights, tmp_path / f"{i}.safetensors")
        paths.append(tmp_path / f"{i}.safetensors")
    return paths


def test_weights_are_shares_of_their_sum(files):
    mean = average.average(files, [1.0, 1.0, 2.0])
    assert torch.equal(mean["a"], torch.full((2, 3), (1 + 2 + 2 * 3) / 4))
    assert torch.equal(mean["b"], torch.full((2,), (0 + 2 + 2 * 4) / 4).bfloat16())


def test_one_file_is_its_own_mean(files):
    mean, own = average.average(files[2:], [0.3]), load_file(files[2])
    assert all(torch.equal(mean[name], own[name]) for name in own)


def test_what_is_stored_in_eight_bits_is_expanded_first(tmp_path):
    """The ear of a model folder beside one of a run."""
    own, run = {"a": torch.randn(4, 9)}, {"a": torch.randn(4, 9)}
    save_file(in_eight_bits(own), tmp_path / "own.safetensors")
    save_file(run, tmp_path / "run.safetensors")
    for names in (("own", "run"), ("run", "own")):
        mean = average.average([tmp_path / f"{name}.safetensors" for name in names], [1.0, 1.0])
        assert mean.keys() == {"a"}
        assert torch.allclose(mean["a"], (own["a"] + run["a"]) / 2, atol=0.02)


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [1.0, -1.0]])
def test_weights_must_make_a_mean(files, weights):
    with pytest.raises(ModelError, match="weights that sum to"):
        average.average(files[:2], weights)


@pytest.mark.parametrize("other", [{"a": torch.ones(2, 3)}, {"a": torch.ones(3), "b": 0}])
def test_files_that_differ_are_named(files, tmp_path, other):
    odd = {k: v if isinstance(v, torch.Tensor) else torch.ones(2) for k, v in other.items()}
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match="differ in (a|b)"):
        average.average([files[0], tmp_path / "odd.safetensors"], [1.0, 1.0])


def test_the_command(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "mean.safetensors"
    argv = ["average", str(out), *map(str, files[:2]), "--weights", "0.7", "0.3"]
    monkeypatch.setattr(sys, "argv", argv)
    average.main()
    torch.testing.assert_close(load_file(out)["a"], torch.full((2, 3), 0.7 + 0.3 * 2))
    monkeypatch.setattr(sys, "argv", [*argv[:3], str(tmp_path / "none.safetensors")])
    with pytest.raises(SystemExit) as exit_:
        average.main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("error: cannot read")
