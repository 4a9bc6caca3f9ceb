"""Captions of a LiveKit room: LiveKit's own OpenAI plugin with another address.

    pip install livekit-agents livekit-plugins-openai
    python -m examples.livekit_agent dev             # LIVEKIT_URL, LIVEKIT_API_KEY, ..._SECRET
    python -m examples.livekit_agent try talk.wav    # the plugin alone, without a room

CAPTIONS_URL is the server (http://127.0.0.1:8765), CAPTIONS_KEY its key where it asks for one.
"""

from __future__ import annotations

import asyncio
import os
import sys
import wave
from typing import TYPE_CHECKING

from livekit import rtc
from livekit.agents import (
    Agent,
    AgentServer,
    AgentSession,
    JobContext,
    StopResponse,
    UserInputTranscribedEvent,
    cli,
    stt,
)
from livekit.agents.utils import http_context
from livekit.plugins import openai

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

BLOCK_S = 0.05
SILENCE_S = 1.0  # after a file, so that its last utterance ends
QUIET_S = 5.0  # without a word, after which a file is over


def captions() -> openai.STT:
    """The plugin as it is; without `base_url` it would be OpenAI's service."""
    url = os.environ.get("CAPTIONS_URL", "http://127.0.0.1:8765")
    key = os.environ.get("CAPTIONS_KEY", "none")
    return openai.STT(base_url=f"{url}/v1", api_key=key, use_realtime=True)


class Captioner(Agent):
    """Listens and never answers."""

    def __init__(self) -> None:
        super().__init__(instructions="captions only", stt=captions())

    async def on_user_turn_completed(self, turn_ctx: object, new_message: object) -> None:
        raise StopResponse


async def entrypoint(job: JobContext) -> None:
    """One room."""
    session = AgentSession()

    @session.on("user_input_transcribed")
    def on_words(event: UserInputTranscribedEvent) -> None:
        if event.is_final:
            print(event.transcript, flush=True)

    await session.start(agent=Captioner(), room=job.room)
    await job.connect()


async def try_file(name: str) -> None:
    """A wav file of 16 bits through the plugin at the pace of speech; prints what is final."""
    async with http_context.open(), captions() as plugin, plugin.stream() as stream:
        sender = asyncio.create_task(_send(stream, name))
        async for text in _finals(stream, sender):
            print(text, flush=True)
        await sender


async def _send(stream: stt.RecognizeStream, name: str) -> None:
    with wave.open(name) as sound:
        rate, channels = sound.getframerate(), sound.getnchannels()
        n_block = int(rate * BLOCK_S)
        n_silent = int(SILENCE_S / BLOCK_S)
        while (data := sound.readframes(n_block)) or n_silent > 0:
            if not data:
                n_silent -= 1
                data = bytes(2 * channels * n_block)
            n = len(data) // (2 * channels)
            stream.push_frame(rtc.AudioFrame(data, rate, channels, n))
            await asyncio.sleep(n / rate)
    stream.flush()


async def _finals(stream: stt.RecognizeStream, sender: asyncio.Task[None]) -> AsyncIterator[str]:
    """Until nothing comes any more after the last audio: the plugin keeps its connection."""
    pending = asyncio.ensure_future(anext(stream))
    while True:
        done, _ = await asyncio.wait({pending}, timeout=QUIET_S)
        if not done:
            if sender.done():
                pending.cancel()
                return
            continue
        try:
            event = pending.result()
        except StopAsyncIteration:
            return
        if event.type == stt.SpeechEventType.FINAL_TRANSCRIPT:
            yield event.alternatives[0].text
        pending = asyncio.ensure_future(anext(stream))


def main() -> None:
    if sys.argv[1:2] == ["try"]:
        if len(sys.argv) != 3:
            raise SystemExit("usage: python -m examples.livekit_agent try FILE.wav")
        asyncio.run(try_file(sys.argv[2]))
        return
    server = AgentServer()
    server.rtc_session(entrypoint)
    cli.run_app(server)


if __name__ == "__main__":
    main()
