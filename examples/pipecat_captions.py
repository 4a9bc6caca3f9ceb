"""A Pipecat pipeline with captions: Pipecat's own OpenAI service with another address.

    pip install 'pipecat-ai[openai]'
    python -m examples.pipecat_captions talk.wav [ws://127.0.0.1:8765] [KEY]

A file stands for the transport here. In a bot put `transport.input()` before the service, and what
listens to its frames after it.
"""

from __future__ import annotations

import argparse
import asyncio
import wave
from typing import TYPE_CHECKING

from pipecat.frames.frames import EndFrame, InputAudioRawFrame, TranscriptionFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.openai.stt import OpenAIRealtimeSTTService
from pipecat.workers.runner import WorkerRunner

if TYPE_CHECKING:
    from pipecat.frames.frames import Frame
    from pipecat.processors.frame_processor import FrameDirection

BLOCK_S = 0.05
SILENCE_S = 1.0  # after the file, so that its last utterance ends
QUIET_S = 5.0  # without a frame, after which it is over


class Printer(FrameProcessor):
    """Prints what is final; `heard_at` is when the last frame of the service came."""

    def __init__(self) -> None:
        super().__init__()
        self.heard_at = 0.0

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, TranscriptionFrame):
            print(frame.text, flush=True)
        if not isinstance(frame, InputAudioRawFrame):
            self.heard_at = asyncio.get_running_loop().time()
        await self.push_frame(frame, direction)


def captions(url: str, key: str) -> OpenAIRealtimeSTTService:
    """The service with another address. The server says where utterances begin and end; without
    `turn_detection` a VADProcessor of the pipeline does, and the service commits them."""
    turns = {"type": "server_vad"}
    return OpenAIRealtimeSTTService(
        api_key=key, base_url=f"{url}/v1/realtime", turn_detection=turns
    )


async def caption(name: str, url: str, key: str) -> None:
    """A wav file of 16 bits, one channel, at the pace of speech."""
    printer = Printer()
    with wave.open(name) as sound:
        if (sound.getnchannels(), sound.getsampwidth()) != (1, 2):
            raise SystemExit(f"error: {name} is not of one channel and 16 bits")
        rate = sound.getframerate()
        params = PipelineParams(audio_in_sample_rate=rate)
        worker = PipelineWorker(Pipeline([captions(url, key), printer]), params=params)
        feeder = asyncio.create_task(_feed(worker, sound, printer))
        runner = WorkerRunner()
        await runner.add_workers(worker)
        await runner.run()
        await feeder


async def _feed(worker: PipelineWorker, sound: wave.Wave_read, printer: Printer) -> None:
    rate = sound.getframerate()
    n_block = int(rate * BLOCK_S)
    n_silent = int(SILENCE_S / BLOCK_S)
    while (data := sound.readframes(n_block)) or n_silent > 0:
        if not data:
            n_silent -= 1
            data = bytes(2 * n_block)
        await worker.queue_frame(InputAudioRawFrame(data, rate, 1))
        await asyncio.sleep(len(data) / 2 / rate)
    heard_at = -1.0
    while heard_at != printer.heard_at:
        heard_at = printer.heard_at
        await asyncio.sleep(QUIET_S)
    await worker.queue_frame(EndFrame())


def main() -> None:
    parser = argparse.ArgumentParser(description="captions of a wav file through Pipecat")
    parser.add_argument("name", metavar="FILE.wav")
    parser.add_argument("url", nargs="?", default="ws://127.0.0.1:8765")
    parser.add_argument("key", nargs="?", default="none")
    args = parser.parse_args()
    asyncio.run(caption(args.name, args.url, args.key))


if __name__ == "__main__":
    main()
