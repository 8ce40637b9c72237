"""A log line is JSON with the fields of its request, and quotes nothing."""

from __future__ import annotations

import json
import logging
import traceback
from functools import partial

import pytest

from extemb_core.serving.logs import JsonLines, logger


def line(error=None, message="request", **fields):
    exc_info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("extemb_core.serving", logging.INFO, __file__, 1, message, (), exc_info)
    record.fields = fields
    return json.loads(JsonLines().format(record))


def test_a_line_has_the_fields_of_its_request():
    told = line(id="abc", status=200)
    assert told.pop("time").endswith("+00:00")
    assert told == {"level": "info", "logger": "extemb_core.serving", "message": "request", "id": "abc", "status": 200}


@pytest.mark.parametrize("debug", [False, True])
def test_what_an_error_quotes_is_told_when_debugging_only(request, debug):
    request.addfinalizer(partial(logger.setLevel, logger.level))
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        raise ValueError("the safe opens with 4711")
    except ValueError as raised:
        error = raised
    told = line(error)
    assert told["error"] == "ValueError"
    assert told["where"][0].startswith(__file__)
    assert ("4711" in json.dumps(told)) == debug
    told = line(message="".join(traceback.format_exception(error)))  # as uvicorn logs some, its text for a message
    assert ("4711" in told["message"]) == ("Traceback" in told["message"]) == debug
