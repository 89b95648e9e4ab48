"""Anthropic's SDK, with an endpoint behind the proxy that speaks Anthropic's format."""

import asyncio
import json
import re

import anthropic
import pytest
import servers

ASK = {"max_tokens": 100, "messages": [{"role": "user", "content": "Hello"}]}


def client_options(proxy):
    return {"base_url": proxy.found, "api_key": servers.CLIENT_KEY, "max_retries": 0, "timeout": 10}


@pytest.fixture
def claude(scripted_proxy):
    with anthropic.Anthropic(**client_options(scripted_proxy)) as client:
        yield client


def check_request(scripted, path):
    """The endpoint was asked for the mapped name, with its own key, and learned nothing of the client's."""
    (request,) = scripted.requests()
    assert request["path"] == path
    assert request["headers"]["x-api-key"] == servers.SCRIPTED_KEY
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", request["headers"]["anthropic-version"])
    assert json.loads(request["body"])["model"] == "scripted"
    assert servers.CLIENT_KEY not in json.dumps(request)


def check_message(message, scripted):
    assert [block.text for block in message.content] == [scripted.TEXT]
    assert message.stop_reason == "end_turn"
    assert (message.usage.input_tokens, message.usage.output_tokens) == (scripted.INPUT_TOKENS, scripted.OUTPUT_TOKENS)


def check_body(raised, kind, code):
    """The error of the proxy has Anthropic's shape."""
    assert raised.body["type"] == "error"
    assert (raised.body["error"]["type"], raised.body["error"]["code"]) == (kind, code)


def test_create(claude, scripted, check_counts):
    check_message(claude.messages.create(model="claude-asked", **ASK), scripted)
    check_request(scripted, "/v1/messages")
    check_counts("messages", {"scripted": 1})


def test_stream(claude, scripted, check_counts):
    with claude.messages.stream(model="claude-asked", **ASK) as stream:
        pieces = list(stream.text_stream)
        check_message(stream.get_final_message(), scripted)
    assert len(pieces) == scripted.OUTPUT_TOKENS
    assert "".join(pieces) == scripted.TEXT
    check_request(scripted, "/v1/messages")
    check_counts("messages", {"scripted": 1})


def test_async_stream(scripted_proxy, scripted, check_counts):
    async def ask():
        async with anthropic.AsyncAnthropic(**client_options(scripted_proxy)) as client:
            async with client.messages.stream(model="claude-asked", **ASK) as stream:
                return await stream.get_final_message()

    check_message(asyncio.run(ask()), scripted)
    check_counts("messages", {"scripted": 1})


def test_key_as_a_bearer_token(scripted_proxy, scripted):
    """As ANTHROPIC_AUTH_TOKEN has it sent."""
    options = client_options(scripted_proxy)
    with anthropic.Anthropic(**options | {"api_key": None}, auth_token=options["api_key"]) as client:
        check_message(client.messages.create(model="claude-asked", **ASK), scripted)
    check_request(scripted, "/v1/messages")


def test_count_tokens(claude, scripted, check_counts):
    counted = claude.messages.count_tokens(model="claude-asked", messages=ASK["messages"])
    assert counted.input_tokens == scripted.INPUT_TOKENS
    check_request(scripted, "/v1/messages/count_tokens")
    # No model has read or written them. The count of an answer that follows shows that nothing else was counted.
    claude.messages.create(model="claude-asked", **ASK)
    check_counts("messages", {"scripted": 1})


@pytest.mark.parametrize("stream", [False, True])
def test_endpoint_whose_key_is_refused_is_passed_over(claude, scripted, check_counts, stream):
    if stream:
        with claude.messages.stream(model="claude-of-both", **ASK) as running:
            message = running.get_final_message()
    else:
        message = claude.messages.create(model="claude-of-both", **ASK)
    check_message(message, scripted)
    assert [request["headers"]["x-api-key"] for request in scripted.requests()] == ["sk-refused", servers.SCRIPTED_KEY]
    check_counts("messages", {"scripted": 1})


def test_wrong_key(scripted_proxy, scripted):
    with anthropic.Anthropic(**client_options(scripted_proxy) | {"api_key": "sk-wrong"}) as client:
        with pytest.raises(anthropic.AuthenticationError) as raised:
            client.messages.create(model="claude-asked", **ASK)
    assert raised.value.status_code == 401
    check_body(raised.value, "authentication_error", "invalid_api_key")
    assert scripted.requests() == []


def test_unknown_model(claude):
    with pytest.raises(anthropic.NotFoundError) as raised:
        claude.messages.create(model="no-such-model", **ASK)
    assert "no-such-model" in raised.value.body["error"]["message"]
    check_body(raised.value, "not_found_error", "model_not_found")
