"""Fixtures that every test may use: threads, poisoned memory, a tiny model, real speech.

Heavy imports happen inside the fixtures: collecting the tests loads neither torch nor a model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from sparqle_stream.torch_model import SparqleModel

REPO = Path(__file__).resolve().parent.parent
ASSETS = REPO / "sparqle_stream" / "assets"
SAMPLE_RATE_HZ = 16_000
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".webm"}

# Nothing in the tests may look for weights on the network; what is pulled is pulled before.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests skip with a reason where there is no GPU; they never pass silently."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    """Two threads at most: figures and races do not depend on the size of the machine."""
    import torch

    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written reads as NaN (integers: their maximum).

    Freed memory often still holds the right answer of the last test; with this a kernel or a
    ring that reads what was never written fails every time.
    """
    import torch

    deterministic = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all(), "poisoning does not work with this torch"
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def tiny() -> SparqleModel:
    """A whole model with random weights and a byte tokenizer; shared, so do not change it."""
    from sparqle_stream import testing

    return testing.tiny_model(seed=0)


def decode(path: Path) -> NDArray[np.float32]:
    """Any audio file -> (S,) float32 at 16 kHz; independent of `sparqle_stream.audio`."""
    import av
    import numpy as np

    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_HZ)
    parts = []
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            parts += [out.to_ndarray()[0] for out in resampler.resample(frame)]
    parts += [out.to_ndarray()[0] for out in resampler.resample(None)]
    return np.concatenate(parts).astype(np.float32)


@pytest.fixture(scope="session")
def clip_path() -> Path:
    """The bundled recording of real speech."""
    found = [path for path in sorted(ASSETS.glob("demo.*")) if path.suffix in AUDIO_SUFFIXES]
    assert found, f"the demo clip is missing from {ASSETS}"
    return found[0]


@pytest.fixture(scope="session")
def decoded_clip(clip_path: Path) -> NDArray[np.float32]:
    return decode(clip_path)


@pytest.fixture
def clip(decoded_clip: NDArray[np.float32]) -> NDArray[np.float32]:
    """The bundled recording, (S,) float32 at 16 kHz; a copy for each test."""
    return decoded_clip.copy()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The corpora beside the checkout, where there are any."""
    path = REPO.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return path


@pytest.fixture(scope="session")
def llm_pulled() -> str:
    """The name of the default model, where its LLM is here (`sparqle-stream models pull`).

    An LLM that is missing skips, with what the user would be told; a damaged one fails.
    """
    from sparqle_stream import artifacts
    from sparqle_stream.errors import ModelError

    try:
        artifacts.path(artifacts.DEFAULT_LLM)
    except ModelError as err:
        pytest.skip(f"the LLM is not here: {err}")
    artifacts.verify(artifacts.DEFAULT_LLM)
    return artifacts.DEFAULT_MODEL
