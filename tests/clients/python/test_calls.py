"""What clients call, and what the SDK makes of the answers."""

import asyncio
import json
import re
import threading
import time
import urllib.request

import pytest
import servers

HELLO = [{"role": "user", "content": "Hello"}]


def text_of(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_chat(client):
    answer = client.chat.completions.create(model="sim:events=4", messages=HELLO)
    assert answer.model == "sim:events=4"
    assert len(answer.choices[0].message.content.split()) == 4
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 4


def test_mapped_model_is_renamed_for_the_endpoint(client):
    answer = client.chat.completions.create(model="gpt-mapped", messages=HELLO)
    assert answer.model == "sim:events=7"
    assert answer.usage.completion_tokens == 7


def arrived(simulator, path):
    """The requests for a path that have reached the simulator, in their order."""
    with urllib.request.urlopen(f"{simulator.found}/control/requests", timeout=5) as answer:
        return [request for request in json.load(answer) if request["path"] == path]


@pytest.mark.parametrize("path", ["", "/v1/v1"])
def test_base_url_without_v1_or_with_two_is_served_as_meant(proxy, connect, path):
    client = connect(proxy, base_url=f"{proxy.found}{path}")
    answer = client.chat.completions.create(model="gpt-mapped", messages=HELLO)
    assert answer.model == "sim:events=7"


def test_endpoint_gets_its_own_key_and_the_body_as_sent(client, simulator):
    # Key order, spaces and number forms that no JSON library would write like this.
    body = b'{ "top_p":1.0,"messages" : [],\n"model":"sim:events=1", "x":1e2 }'
    client.post("/chat/completions", cast_to=object, content=body, options=json_header())
    request = arrived(simulator, "/v1/chat/completions")[-1]
    assert request["headers"]["authorization"] == "Bearer sk-endpoint"
    assert request["body"] == body.decode()
    assert servers.CLIENT_KEY not in json.dumps(request)


def json_header():
    return {"headers": {"Content-Type": "application/json"}}


def test_legacy_completion(client):
    answer = client.completions.create(model="sim:events=3", prompt="Hello")
    assert len(answer.choices[0].text.split()) == 3


def test_stream(client):
    stream = client.chat.completions.create(
        model="sim:events=6", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len(text_of(chunks).split()) == 6
    assert chunks[-1].usage.completion_tokens == 6
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"


def test_stream_without_usage_gets_none(client):
    chunks = list(client.chat.completions.create(model="sim:events=6", messages=HELLO, stream=True))
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_arrives_piece_by_piece(client):
    """The text must come while the endpoint still writes, not at its end (which is 2 s away)."""
    begun = time.monotonic()
    stream = client.chat.completions.create(model="sim:events=20,chunkDelayMs=100", messages=HELLO, stream=True)
    first = next(chunk for chunk in stream if text_of([chunk]))
    assert text_of([first])
    assert time.monotonic() - begun < 1
    stream.close()


def test_async_stream(async_client):
    async def ask():
        async with async_client as client:
            stream = await client.chat.completions.create(model="sim:events=6", messages=HELLO, stream=True)
            return [chunk async for chunk in stream]

    assert len(text_of(asyncio.run(ask())).split()) == 6


def test_many_async_streams_at_once_do_not_mix(async_client):
    lengths = list(range(5, 25))

    async def ask(length):
        model = f"sim:events={length},chunkDelayMs=5"
        stream = await async_client.chat.completions.create(model=model, messages=HELLO, stream=True)
        chunks = [chunk async for chunk in stream]
        assert {chunk.model for chunk in chunks} == {model}
        assert len({chunk.id for chunk in chunks}) == 1
        return sum(1 for chunk in chunks if text_of([chunk]))

    async def ask_all():
        async with async_client:
            return await asyncio.gather(*map(ask, lengths))

    assert asyncio.run(ask_all()) == lengths


def test_closing_a_stream_early_ends_the_endpoints_work(client, status):
    """Left alone, the endpoint would stream for 50 s."""

    def in_flight():
        return next(api["inFlight"] for api in status()["apis"] if api["id"] == "simulated")

    stream = client.chat.completions.create(model="sim:events=1000,chunkDelayMs=50", messages=HELLO, stream=True)
    read = [next(stream) for _ in range(3)]
    assert text_of(read)
    assert in_flight() == 1
    stream.close()
    assert servers.wait_until(lambda: in_flight() == 0), status()
    assert client.chat.completions.create(model="sim:events=2", messages=HELLO).usage.completion_tokens == 2


def test_embeddings_as_the_sdk_asks_by_default(client, simulator):
    """The SDK asks for base64 by itself and decodes it."""
    model = "text-embedding-3-small"
    decoded = client.embeddings.create(model=model, input=["one", "two"])
    plain = client.embeddings.create(model=model, input=["one", "two"], encoding_format="float")
    assert [len(item.embedding) for item in decoded.data] == [8, 8]
    assert decoded.data[0].embedding != decoded.data[1].embedding
    for ours, theirs in zip(decoded.data, plain.data, strict=True):
        assert ours.embedding == pytest.approx(theirs.embedding)
    sent = arrived(simulator, "/v1/embeddings")[-2:]
    assert [json.loads(request["body"])["encoding_format"] for request in sent] == ["base64", "float"]


def test_async_embeddings(async_client):
    async def ask():
        async with async_client as client:
            return await client.embeddings.create(model="text-embedding-3-small", input="one")

    assert len(asyncio.run(ask()).data[0].embedding) == 8


def test_models_list(client):
    models = client.models.list().data
    names = [model.id for model in models]
    assert len(names) == len(set(names))
    assert {"text-embedding-3-small", "gpt-mapped", "gpt-4o-mini", "only-rests"} <= set(names)
    assert not any("*" in name for name in names)
    assert {model.object for model in models} == {"model"}


def test_models_retrieve(client):
    assert client.models.retrieve("gpt-mapped").id == "gpt-mapped"
    # A name that a pattern covers is served, so it exists.
    assert client.models.retrieve("sim:events=9").id == "sim:events=9"


def test_raw_response_headers(client):
    raw = client.chat.completions.with_raw_response.create(model="sim:events=1", messages=HELLO)
    assert re.fullmatch(r"[\w.:-]{8,}", raw.headers["x-request-id"])
    assert raw.headers["x-api-together-endpoint"] == "simulated"
    assert raw.headers["x-api-together-attempts"] == "1"
    assert raw.parse()._request_id == raw.headers["x-request-id"]
    again = client.chat.completions.with_raw_response.create(model="sim:events=1", messages=HELLO)
    assert again.headers["x-request-id"] != raw.headers["x-request-id"]


def test_raw_response_headers_of_a_stream(client):
    with client.chat.completions.with_streaming_response.create(
        model="sim:events=2", messages=HELLO, stream=True
    ) as raw:
        assert raw.headers["content-type"].startswith("text/event-stream")
        assert raw.headers["x-api-together-endpoint"] == "simulated"
        lines = [line for line in raw.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


def test_own_request_id_is_kept(client):
    raw = client.chat.completions.with_raw_response.create(
        model="sim:events=1", messages=HELLO, extra_headers={"x-request-id": "mine-42"}
    )
    assert raw.headers["x-request-id"] == "mine-42"


def test_responses_create(client):
    answer = client.responses.create(model="sim:events=5", input="Hello")
    assert answer.status == "completed"
    assert len(answer.output_text.split()) == 5
    assert answer.usage.output_tokens == 5


def test_responses_stream(client):
    with client.responses.stream(model="sim:events=5", input="Hello") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.type for event in events][0] == "response.created"
    assert [event.type for event in events][-1] == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) == 5
    assert "".join(deltas) == final.output_text


def test_concurrent_threads_share_one_client(client):
    answers = {}

    def ask(length):
        answer = client.chat.completions.create(model=f"sim:events={length}", messages=HELLO)
        answers[length] = answer.usage.completion_tokens

    threads = [threading.Thread(target=ask, args=(length,)) for length in range(1, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert answers == {length: length for length in range(1, 17)}


def test_keys_are_never_printed(client, proxy):
    raw = client.chat.completions.with_raw_response.create(model="sim:events=1", messages=HELLO)
    assert servers.wait_until(lambda: raw.headers["x-request-id"] in proxy.text()), "the request is not in the log"
    for key in (servers.CLIENT_KEY, "sk-endpoint", servers.THIRD_PARTY_KEY):
        assert key not in proxy.text()
