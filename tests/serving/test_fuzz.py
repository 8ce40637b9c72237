"""Schemathesis against the server's own OpenAPI document: legal and illegal requests, none of which breaks it."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from served import KEYS, MODEL, served
from tiny import random_embedder, tiny_llm

from extemb_core import ExtensibleLM

pytest.importorskip("faiss")
schemathesis = pytest.importorskip("schemathesis")
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    llm = tiny_llm()
    lm = ExtensibleLM(llm, random_embedder(llm))
    with served(lm, tmp_path_factory.mktemp("data"), keys=KEYS, max_new_tokens=2) as one:
        yield one


def fuzz(server, mode, examples):
    from schemathesis import checks as known

    known.load_all_checks()
    checks = known.CHECKS.get_by_names([*CHECKS, *(["negative_data_rejection"] if mode == "negative" else [])])
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=headers)
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) == 9
    for operation in operations:
        if mode == "negative" and not operation.body:  # any name is one
            continue

        @settings(max_examples=examples, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        def run(case):
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = MODEL  # else nothing is ever answered
            case.call_and_validate(headers=headers, checks=checks)

        run()


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_breaks_the_server(server, mode):
    fuzz(server, mode, 10)
    assert server.http(KEYS[0]).get("/v1/models").status_code == 200
    assert not [line for line in server.lines if line["message"] == "failed"]


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_many_requests_do_not_break_the_server(server, mode):
    fuzz(server, mode, int(os.environ.get("EXTEMB_SOAK", "50")))
    assert not [line for line in server.lines if line["message"] == "failed"]
