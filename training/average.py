"""Averages weights: several ends of runs, or the two ends of one -> one file.

Weights that came from the same start lie in one basin, and their mean is often better than each of
them, most of all on strangers (model soups, Wortsman et al., 2022; RESULTS.md has our own figures).

`python -m training.average OUT.safetensors FILE FILE... [--weights 0.7 0.3]`
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from sparqle_stream.errors import ModelError
from sparqle_stream.weights import expanded, read_safetensors
from training.errors import reported

if TYPE_CHECKING:
    from torch import Tensor


def average(files: list[Path], weights: list[float]) -> dict[str, Tensor]:
    """sum_i weights_i * file_i / sum_i weights_i, summed in float32, in the first file's dtypes.

    What is stored in int8 comes out in float32.

    Raises ModelError when the files do not hold the same tensors, or the weights sum to nothing.
    """
    if len(files) != len(weights) or not sum(weights) > 0:
        raise ModelError(
            f"{len(weights)} weights that sum to {sum(weights):g} for {len(files)} files",
            hint="one weight a file, with a sum above 0",
        )
    first = expanded(read_safetensors(files[0]))
    total = {name: tensor.float() * (weights[0] / sum(weights)) for name, tensor in first.items()}
    for file, weight in zip(files[1:], weights[1:], strict=True):
        other = expanded(read_safetensors(file))
        for name in sorted(first.keys() | other.keys()):
            if name not in first or name not in other or first[name].shape != other[name].shape:
                raise ModelError(
                    f"{files[0]} and {file} differ in {name}",
                    hint="average weights of the same architecture",
                )
            total[name].add_(other[name].float(), alpha=weight / sum(weights))
    return {name: tensor.to(first[name].dtype) for name, tensor in total.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.average", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--weights", type=float, nargs="+", help="one a file (default: equal)")
    args = parser.parse_args()
    with reported():
        mean = average(args.files, args.weights or [1.0] * len(args.files))
    save_file(mean, args.out)
    print(f"{len(mean)} tensors, the mean of {len(args.files)} files -> {args.out}")


if __name__ == "__main__":
    main()
