"""Websocket server over one engine: OpenAI's realtime transcription and our own /v1/stream."""

from sparqle_stream.server.app import address_of, background, check, create_app, serve
from sparqle_stream.server.settings import ServerConfig, keys_of

__all__ = ["ServerConfig", "address_of", "background", "check", "create_app", "keys_of", "serve"]
