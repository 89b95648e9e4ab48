"""What the SDK's stream helpers tell of a stream through the proxy, event by event, is what they tell of it directly."""

import asyncio

import pytest
import servers
from openai import AsyncOpenAI, OpenAI

HELLO = [{"role": "user", "content": "hello"}]
VOLATILE = ("id", "item_id", "created", "created_at", "completed_at")
USAGE = {"stream_options": {"include_usage": True}}


@pytest.fixture(params=["simulated", "third party"])
def ways(request, proxy, simulator, third_party):
    """The proxy and the endpoint behind it, as options of a client, and a model that both know."""
    direct, key, model = {
        "simulated": (simulator, "sk-endpoint", "sim:events=9"),
        "third party": (third_party, servers.THIRD_PARTY_KEY, "gpt-4o-mini"),
    }[request.param]
    common = {"max_retries": 0, "timeout": 10}
    through = {"base_url": f"{proxy.found}/v1", "api_key": servers.CLIENT_KEY, **common}
    return through, {"base_url": f"{direct.found}/v1", "api_key": key, **common}, model


def dumped(events):
    """The events as plain data, without what differs from one answer to the next."""

    def without(value):
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if key not in VOLATILE}
        return [without(item) for item in value] if isinstance(value, list) else value

    return [without(event.model_dump(warnings=False)) for event in events]


def chat_helper(client, model, options):
    with client.chat.completions.stream(model=model, messages=HELLO, **options) as stream:
        return list(stream)


def chat(client, model, options):
    return list(client.chat.completions.create(model=model, messages=HELLO, stream=True, **options))


def completion(client, model, options):
    return list(client.completions.create(model=model, prompt="hello", stream=True, **options))


def responses(client, model, options):
    assert options in ({}, USAGE)
    with client.responses.stream(model=model, input="hello") as stream:
        return list(stream)


@pytest.mark.parametrize("options", [{}, USAGE], ids=["unasked", "asked"])
@pytest.mark.parametrize("call", [chat_helper, chat, completion, responses])
def test_events_are_those_of_the_endpoint(ways, call, options):
    through, direct, model = ways
    if call is completion and not model.startswith("sim:"):
        pytest.skip("the third party has no such call")
    with OpenAI(**through) as proxied, OpenAI(**direct) as straight:
        expected = dumped(call(straight, model, options))
        assert len(expected) > 3
        assert dumped(call(proxied, model, options)) == expected


@pytest.mark.parametrize("options", [{}, USAGE], ids=["unasked", "asked"])
def test_async_events_are_those_of_the_endpoint(ways, options):
    through, direct, model = ways

    async def ask(settings):
        async with AsyncOpenAI(**settings) as client:
            async with client.chat.completions.stream(model=model, messages=HELLO, **options) as stream:
                return [event async for event in stream]

    assert dumped(asyncio.run(ask(through))) == dumped(asyncio.run(ask(direct)))


def test_every_stream_is_counted_although_the_sdk_closes_it_at_its_end(proxy, connect):
    """The synchronous SDK closes the connection once it has read `[DONE]`, whatever else may come."""
    client, model = connect(proxy), "sim:events=13,eventBytes=3"

    def stats():
        endpoint = client.get("/token/stats", cast_to=object)["detailedStats"].get("simulated", {"models": {}})
        return endpoint["models"].get(model, {})

    for _ in range(20):
        chunks = list(client.chat.completions.create(model=model, messages=HELLO, stream=True))
        assert all(chunk.usage is None for chunk in chunks)
    assert servers.wait_until(lambda: stats().get("requests") == 20), stats()
    assert stats()["completionTokens"] == 20 * 13
    assert stats()["estimated"]["requests"] == 0
    assert "fault=" not in "".join(line for line in proxy.text().splitlines() if model in line)


def test_tokens_and_times_are_in_the_log(proxy, connect):
    list(connect(proxy).chat.completions.create(model="sim:events=12,chunkDelayMs=5", messages=HELLO, stream=True))
    line = proxy.wait_for_line(r"(.*sim:events=12,chunkDelayMs=5.*)")
    for word in ("first_token_ms=", "completion_tokens=12", "cached_tokens=", "reasoning_tokens=", "tokens_per_second="):
        assert word in line
