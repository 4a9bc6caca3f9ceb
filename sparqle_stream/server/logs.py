"""Log records as JSON lines, for machines that collect them.

No text that was said and no audio is ever in a record of this package; what a record carries as
`extra` (stream, dialect, seconds) becomes a field.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

FIELDS = ("stream", "dialect", "audio_s", "open_s", "code", "reason")


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, and the fields that there are."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def use_json() -> None:
    """Handlers of the root logger write JSON; this package tells of every connection (INFO)."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter())
    package = logging.getLogger("sparqle_stream")
    package.setLevel(min(logging.INFO, package.level or logging.INFO))
