"""Write logs as lines of JSON, without any text of documents, questions or answers."""

from __future__ import annotations

import json
import logging
import traceback
from datetime import datetime, timezone

logger = logging.getLogger("extemb_core.serving")


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object, with the fields that it was given.

    An error is logged by its type and the place where it was raised; its message, which may quote a request, only when
    debugging.
    """

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if message.startswith("Traceback ") and not logger.isEnabledFor(logging.DEBUG):  # uvicorn's, when forced to end
            message = "an error ended this; extemb --debug serve shows where"
        fields = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
            **getattr(record, "fields", {}),
        }
        if record.exc_info and (error := record.exc_info[1]) is not None:
            frame = traceback.extract_tb(error.__traceback__)[-1:]
            fields |= {"error": type(error).__name__, "where": [f"{at.filename}:{at.lineno}" for at in frame]}
            if logger.isEnabledFor(logging.DEBUG):
                fields["traceback"] = "".join(traceback.format_exception(error))
        return json.dumps(fields)


def log_as_json() -> None:
    """Send the logs of this library and uvicorn to stderr, as lines of JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("extemb_core", "uvicorn"):
        of_name = logging.getLogger(name)
        of_name.handlers, of_name.propagate = [handler], False
    logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
