"""What the SDK makes of the answers to callers' own keys, and that it does not try again what will fail again."""

import openai
import pytest
import servers
from openai import OpenAI

HELLO = [{"role": "user", "content": "Hello"}]

# Key, call, class of the error, status, code, and the fault in the proxy's log.
REFUSALS = [
    ("sk-small-budget-1f93a8", "priced", openai.RateLimitError, 429, "insufficient_quota", "budget_exhausted"),
    ("sk-small-budget-1f93a8", "unpriced", openai.PermissionDeniedError, 403, "model_has_no_price", "model_without_price"),
    ("sk-some-models-a8c05e", "unpriced", openai.NotFoundError, 404, "model_not_found", "model_not_allowed"),
    ("sk-expired-c05e42", "priced", openai.AuthenticationError, 401, "invalid_api_key", "key_ended"),
    ("sk-elsewhere-5e42b6", "priced", openai.PermissionDeniedError, 403, "address_not_allowed", "address_not_allowed"),
]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("callers")
    with servers.simulator(folder) as simulator:
        with servers.proxy(folder, "callers.json", SIMULATOR_URL=simulator.found) as running:
            yield running


def connect(proxy, key):
    """A client that tries again as often as it does by itself."""
    return OpenAI(base_url=f"{proxy.found}/v1", api_key=key, timeout=10)


def refused(proxy, fault, ask):
    """The error of a call, after which the proxy's log has one request more with this fault."""
    before = proxy.text().count(f"fault={fault}")
    with pytest.raises(openai.APIStatusError) as raised:
        ask()
    assert servers.wait_until(lambda: proxy.text().count(f"fault={fault}") > before)
    assert proxy.text().count(f"fault={fault}") == before + 1, "it was tried again"
    return raised.value


@pytest.mark.parametrize("key, model, kind, status, code, fault", REFUSALS)
def test_refusals(proxy, key, model, kind, status, code, fault):
    with connect(proxy, key) as client:
        ask = lambda: client.chat.completions.create(model=model, messages=HELLO)  # noqa: E731
        error = refused(proxy, fault, ask)
        assert (type(error), error.status_code, error.code) == (kind, status, code)
        assert key not in str(error)


def test_a_call_that_is_not_the_keys(proxy):
    with connect(proxy, "sk-some-models-a8c05e") as client:
        error = refused(proxy, "call_not_allowed", lambda: client.embeddings.create(model="priced", input="x"))
        assert (type(error), error.code) == (openai.PermissionDeniedError, "call_not_allowed")


def test_a_limit_of_the_day_is_not_waited_for(proxy):
    with connect(proxy, "sk-one-a-day-93a8c0") as client:
        client.chat.completions.create(model="unpriced", messages=HELLO)
        ask = lambda: client.chat.completions.create(model="unpriced", messages=HELLO)  # noqa: E731
        error = refused(proxy, "key_limits_reached", ask)
        assert (type(error), error.code) == (openai.RateLimitError, "key_rate_limited")


def test_a_small_request_fits_a_small_budget(proxy):
    with connect(proxy, "sk-small-budget-1f93a8") as client:
        answer = client.chat.completions.create(model="priced", messages=HELLO, max_tokens=3)
        assert answer.choices[0].message.content
        spend = client.get("/key", cast_to=object)["budget"][0]
        assert 0 < spend["spent"] <= 0.02 and spend["left"] < 0.02


def test_models_are_those_of_the_key(proxy):
    with connect(proxy, "sk-some-models-a8c05e") as client:
        assert [model.id for model in client.models.list()] == ["priced"]
