"""What Home Assistant's Wyoming integration says to a server, for a wav file and without it.

    sparqle-stream serve --wyoming-port 10300 &
    pip install wyoming
    python -m examples.home_assistant command.wav [tcp://127.0.0.1:10300]

Prints what the server offers, words as they come, and the transcript. In Home Assistant itself:
Settings, Devices & services, Add integration, Wyoming Protocol, host and port of the server.
"""

from __future__ import annotations

import asyncio
import sys
import wave

from wyoming.asr import Transcribe, Transcript, TranscriptChunk
from wyoming.audio import AudioStop, wav_to_chunks
from wyoming.client import AsyncClient
from wyoming.error import Error
from wyoming.info import Describe, Info

BLOCK_SAMPLES = 1024


async def caption(name: str, uri: str) -> str:
    """The transcript of one voice command. Raises OSError when nobody is there."""
    async with AsyncClient.from_uri(uri) as client:
        await client.write_event(Describe().event())
        event = await client.read_event()
        if event is None or not Info.is_type(event.type):
            raise ConnectionError(f"{uri} does not speak Wyoming")
        model = Info.from_event(event).asr[0].models[0]
        print(f"{model.name}: {', '.join(model.languages)}", file=sys.stderr)
        await client.write_event(Transcribe(language=model.languages[0]).event())
        with wave.open(name) as sound:
            for part in wav_to_chunks(sound, BLOCK_SAMPLES, start_event=True, stop_event=False):
                await client.write_event(part.event())
        await client.write_event(AudioStop().event())
        return await _transcript(client)


async def _transcript(client: AsyncClient) -> str:
    while (event := await client.read_event()) is not None:
        if TranscriptChunk.is_type(event.type):
            print(TranscriptChunk.from_event(event).text, end="", file=sys.stderr, flush=True)
        elif Transcript.is_type(event.type):
            print(file=sys.stderr)
            return str(Transcript.from_event(event).text)
        elif Error.is_type(event.type):
            raise ConnectionError(Error.from_event(event).text)
    raise ConnectionError("the server hung up")


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit("usage: python -m examples.home_assistant FILE.wav [tcp://HOST:PORT]")
    uri = sys.argv[2] if len(sys.argv) == 3 else "tcp://127.0.0.1:10300"
    try:
        print(asyncio.run(caption(sys.argv[1], uri)))
    except ConnectionRefusedError:
        raise SystemExit(f"error: {uri} refused: is `serve --wyoming-port` running?") from None
    except (OSError, EOFError, wave.Error) as err:  # no file, no wav, no server
        raise SystemExit(f"error: {err}") from None


if __name__ == "__main__":
    main()
