"""The exception class that the SDK makes of each of the proxy's errors."""

import asyncio
import threading

import openai
import pytest
import servers

HELLO = [{"role": "user", "content": "Hello"}]
JSON = {"headers": {"Content-Type": "application/json"}}


def chat(client, model):
    return client.chat.completions.create(model=model, messages=HELLO)


def raises(kind, status, code, kind_of_error=None):
    """Expects exactly that class, with the status and the code, and a message for people."""
    return Raises(kind, status, code, kind_of_error)


class Raises:
    def __init__(self, kind, status, code, kind_of_error):
        self.kind, self.status, self.code, self.kind_of_error = kind, status, code, kind_of_error
        self.error = None

    def __enter__(self):
        return self

    def __exit__(self, found_class, error, _traceback):
        assert error is not None, f"{self.kind.__name__} was not raised"
        if not isinstance(error, openai.APIError):
            return False
        self.error = error
        assert found_class is self.kind, repr(error)
        assert error.status_code == self.status
        assert error.code == self.code
        assert error.code is None or isinstance(error.code, str)
        assert error.body["message"]
        if self.kind_of_error:
            assert error.type == self.kind_of_error
        assert error.request_id
        return True


def test_wrong_key(proxy, connect):
    client = connect(proxy, api_key="sk-wrong")
    with raises(openai.AuthenticationError, 401, "invalid_api_key", "invalid_request_error") as raised:
        chat(client, "gpt-mapped")
    assert "sk-wrong" not in str(raised.error)
    with raises(openai.AuthenticationError, 401, "invalid_api_key"):
        client.models.list()


def test_missing_key(proxy, connect):
    without = {"Authorization": openai.Omit()}
    with raises(openai.AuthenticationError, 401, "invalid_api_key") as raised:
        connect(proxy).chat.completions.create(model="gpt-mapped", messages=HELLO, extra_headers=without)
    assert "No API key" in str(raised.error)


def test_endpoints_key_opens_nothing(proxy, connect):
    with raises(openai.AuthenticationError, 401, "invalid_api_key"):
        chat(connect(proxy, api_key="sk-endpoint"), "gpt-mapped")


def test_guessing_is_slowed_and_a_caller_is_not(strict_proxy, connect):
    # From here on this address is known as a caller's.
    assert connect(strict_proxy).models.list().data
    for number in range(3):
        # The same wrong key again is no guess.
        for _ in range(2):
            with raises(openai.AuthenticationError, 401, "invalid_api_key"):
                connect(strict_proxy, api_key=f"sk-wrong{number}").models.list()
    with raises(openai.RateLimitError, 429, "rate_limit_exceeded") as raised:
        connect(strict_proxy, api_key="sk-wrong3").models.list()
    assert int(raised.error.response.headers["retry-after"]) > 0
    assert connect(strict_proxy).models.list().data


def test_unknown_model(client):
    with raises(openai.NotFoundError, 404, "model_not_found", "invalid_request_error") as raised:
        chat(client, "no-such-model")
    assert raised.error.param == "model"
    assert "no-such-model" in str(raised.error)


def test_unknown_model_streamed(client):
    with raises(openai.NotFoundError, 404, "model_not_found"):
        client.chat.completions.create(model="no-such-model", messages=HELLO, stream=True)


def test_unknown_model_async(async_client):
    async def ask():
        async with async_client as client:
            await client.chat.completions.create(model="no-such-model", messages=HELLO)

    with raises(openai.NotFoundError, 404, "model_not_found"):
        asyncio.run(ask())


def test_unknown_model_retrieved(client):
    with raises(openai.NotFoundError, 404, "model_not_found"):
        client.models.retrieve("no-such-model")


def test_base_url_with_another_path(proxy, connect):
    with raises(openai.NotFoundError, 404, "unknown_url") as raised:
        chat(connect(proxy, base_url=f"{proxy.found}/api"), "gpt-mapped")
    assert "/v1" in str(raised.error)


@pytest.mark.parametrize(
    "body",
    [b'{"model":"gpt-mapped","messages":[', b'["gpt-mapped"]', b'{"model":1}', b'{"model":"a","model":"b"}'],
    ids=["broken", "not an object", "model no string", "two models"],
)
def test_broken_request(client, body):
    with raises(openai.BadRequestError, 400, None, "invalid_request_error"):
        client.post("/chat/completions", cast_to=object, content=body, options=JSON)


def test_endpoints_own_400_is_shown_as_it_came(client):
    with pytest.raises(openai.BadRequestError) as raised:
        chat(client, "sim:status=400")
    assert raised.value.response.headers["x-api-together-attempts"] == "1"


def test_body_too_large(client):
    with raises(openai.APIStatusError, 413, "request_too_large") as raised:
        client.chat.completions.create(model="gpt-mapped", messages=[{"role": "user", "content": "x" * 70_000}])
    assert "65536" in str(raised.error)


def test_all_resting(client):
    # The first answer is the endpoint's own; from then on it is left alone, and the proxy answers.
    with pytest.raises(openai.RateLimitError):
        chat(client, "only-rests")
    with raises(openai.RateLimitError, 429, "rate_limit_exceeded", "requests") as raised:
        chat(client, "only-rests")
    headers = raised.error.response.headers
    assert 25 <= int(headers["retry-after"]) <= 30
    assert 25_000 <= int(headers["retry-after-ms"]) <= 30_000
    assert "x-api-together-attempts" not in headers


def test_no_endpoint_enabled(disabled_proxy, connect):
    with raises(openai.InternalServerError, 503, "no_endpoint", "server_error"):
        connect(disabled_proxy).files.list()


def test_last_endpoint_is_asked_although_it_cools_down(strict_proxy, connect):
    client = connect(strict_proxy)

    def endpoint():
        return client.get("/status", cast_to=object)["apis"][0]

    # One failure starts the cool-down.
    with pytest.raises(openai.InternalServerError):
        chat(client, "slow-to-fail")
    assert endpoint()["temporarilyDisabled"]
    # With nobody else to ask, it gets as many requests as come, and what the clients see is its own answer.
    errors = []

    def ask():
        try:
            chat(client, "slow-to-fail")
        except openai.APIError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert servers.wait_until(lambda: endpoint()["inFlight"] == 3)
    for thread in threads:
        thread.join(10)
    assert [error.status_code for error in errors] == [500, 500, 500]
    assert {error.response.headers["x-api-together-endpoint"] for error in errors} == {"slow-to-fail"}


def test_unreachable(client):
    with raises(openai.InternalServerError, 502, "endpoint_unreachable", "server_error"):
        chat(client, "only-refuses")


def test_unreachable_streamed(client):
    with raises(openai.InternalServerError, 502, "endpoint_unreachable"):
        client.chat.completions.create(model="only-refuses", messages=HELLO, stream=True)


@pytest.mark.parametrize("stream", [False, True])
def test_timeout(client, stream):
    with raises(openai.InternalServerError, 504, "endpoint_timeout", "server_error"):
        client.chat.completions.create(model="only-stalls", messages=HELLO, stream=stream)


def check_broken_off(seen, error):
    """A part has come, and the end is an error that says what happened, not a quiet end."""
    assert type(error) is openai.APIError, repr(error)
    assert "broke off" in error.message
    assert error.code == "stream_broken"
    assert 0 < len(seen) < 50


def test_stream_that_breaks(client):
    seen = []
    with pytest.raises(openai.APIError) as raised:
        for chunk in client.chat.completions.create(model="breaks-midway", messages=HELLO, stream=True):
            seen.append(chunk)
    check_broken_off(seen, raised.value)


def test_async_stream_that_breaks(async_client):
    seen = []

    async def read():
        async with async_client as client:
            async for chunk in await client.chat.completions.create(model="breaks-midway", messages=HELLO, stream=True):
                seen.append(chunk)

    with pytest.raises(openai.APIError) as raised:
        asyncio.run(read())
    check_broken_off(seen, raised.value)


def test_responses_stream_that_breaks(client):
    seen = []
    with pytest.raises(openai.APIError) as raised:
        for event in client.responses.create(model="breaks-midway", input="Hello", stream=True):
            seen.append(event)
    check_broken_off(seen, raised.value)


def test_json_answer_that_breaks_is_no_answer(client):
    """With nobody else to ask, half a JSON answer must not look like a whole one."""
    with raises(openai.InternalServerError, 502, "endpoint_unreachable"):
        chat(client, "sim:events=50,reset=1")


def test_long_json_answer_that_breaks_is_no_answer(client):
    """More of it has come than is held back until the answer is whole, so the client has seen its beginning."""
    with pytest.raises(openai.APIConnectionError):
        chat(client, "sim:events=50,eventBytes=4000,reset=1")
