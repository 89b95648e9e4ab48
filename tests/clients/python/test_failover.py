"""An endpoint that fails is passed over: the client sees a normal answer of the next one."""

import pytest

HELLO = [{"role": "user", "content": "Hello"}]

passed_over = pytest.mark.parametrize(
    "model", ["refuses-then-answers", "fails-then-answers", "stalls-then-answers", "empty-then-answers"]
)


@passed_over
def test_chat(client, model):
    raw = client.chat.completions.with_raw_response.create(model=model, messages=HELLO)
    assert raw.headers["x-api-together-endpoint"] == "spare"
    assert raw.headers["x-api-together-attempts"] == "2"
    answer = raw.parse()
    # The name is mapped afresh for the endpoint that answered.
    assert answer.model == "sim:events=5"
    assert answer.usage.completion_tokens == 5


@passed_over
def test_stream(client, model):
    with client.chat.completions.with_streaming_response.create(model=model, messages=HELLO, stream=True) as raw:
        assert raw.headers["x-api-together-endpoint"] == "spare"
        assert raw.headers["x-api-together-attempts"] == "2"
        texts = [
            chunk.choices[0].delta.content
            for chunk in raw.parse()
            if chunk.choices and chunk.choices[0].delta.content
        ]
    assert len(texts) == 5


def test_large_body_is_sent_again_whole(client):
    # The simulator counts a token a word, of what has arrived.
    message = {"role": "user", "content": "word " * 12_000}
    answer = client.chat.completions.create(model="fails-then-answers", messages=[message])
    assert answer.usage.prompt_tokens == 12_000


def test_demo_as_a_newcomer_meets_it(simulator, connect):
    """One of the demo's three endpoints fails more often than not, and no client sees it."""

    class Demo:
        found = simulator.wait_for_line(r"^listening\s+(http://\S+)")

    client = connect(Demo, api_key="sk-demo")
    for _ in range(6):
        assert client.chat.completions.create(model="gpt-4o-mini", messages=HELLO).choices[0].message.content
