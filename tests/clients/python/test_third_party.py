"""A server that shares no code with the proxy as the endpoint. It takes only the key that the config names for it."""

MODEL = "gpt-4o-mini"
HELLO = [{"role": "user", "content": "hello"}]
TEXT = "Hello from a third party, in several pieces."


def test_chat(client):
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO)
    assert raw.headers["x-api-together-endpoint"] == "third-party"
    assert raw.parse().choices[0].message.content == TEXT


def test_stream(client):
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 3
    assert "".join(pieces) == TEXT


def test_stream_of_a_tool_call(client):
    with client.chat.completions.stream(model=MODEL, messages=[{"role": "user", "content": "weather"}]) as stream:
        stream.until_done()
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.name == "get_weather"
    assert message.tool_calls[0].function.arguments == '{"city":"Paris"}'


def test_responses(client):
    assert client.responses.create(model=MODEL, input="hello").output_text == TEXT


def test_responses_stream(client):
    with client.responses.stream(model=MODEL, input="hello") as stream:
        stream.until_done()
        assert stream.get_final_response().output_text == TEXT


def test_embeddings(client):
    assert client.embeddings.create(model=MODEL, input="hello").data[0].embedding == [0.25, -0.5, 0.75, 1.0]
