"""The description of the admin API is valid OpenAPI, and its answers are as it says."""

import json
import urllib.error
import urllib.request

import pytest
import servers
from jsonschema import Draft202012Validator
from openai import OpenAI
from openapi_spec_validator import validate

ADMIN_KEY = "sk-admin-9b1e7c40d2f8a653"


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("admin")
    with servers.simulator(folder) as simulator:
        with servers.proxy(folder, "admin.json", SIMULATOR_URL=simulator.found) as running:
            yield running


def call(proxy, method, path, body=None, key=ADMIN_KEY):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{proxy.found}/v1/admin{path}", data=data, method=method)
    request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def description(proxy):
    status, description = call(proxy, "GET", "/openapi.json")
    assert status == 200
    return description


def test_the_description_is_valid(description):
    validate(description)
    assert len(description["paths"]) > 20


def check(description, path, method, answer, status="200"):
    """Checks an answer against its schema."""
    responses = description["paths"][f"/v1/admin{path}"][method.lower()]["responses"]
    schema = dict(responses[status]["content"]["application/json"]["schema"])
    schema["components"] = description["components"]
    Draft202012Validator(schema).validate(answer)


def test_answers_are_as_described(proxy, description):
    client = OpenAI(base_url=f"{proxy.found}/v1", api_key="sk-ada-51c0f3d9a4b7e862", timeout=10)
    for _ in range(3):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hello"}])
    logged = servers.wait_until(lambda: len(call(proxy, "GET", "/requests")[1]["data"]) == 3)
    assert logged, call(proxy, "GET", "/requests")
    version = call(proxy, "GET", "/config/versions")[1]["data"][0]["name"]
    request = call(proxy, "GET", "/requests?key=ada")[1]["data"][0]["id"]
    names = {"/requests/{name}": request, "/config/versions/{name}": version}
    seen = 0
    for path, operations in description["paths"].items():
        path = path.removeprefix("/v1/admin")
        # A session is a browser's, and changes of a view are a stream.
        if "get" in operations and path not in ("/session", "/live"):
            status, answer = call(proxy, "GET", path.replace("{name}", names.get(path, "")))
            assert status == 200, (path, answer)
            check(description, path, "GET", answer)
            seen += 1
    assert seen == 11
    for path, name, body in [
        ("/session", "", {"key": ADMIN_KEY}),
        ("/endpoints/{name}/disable", "dead", {"until": "2999-01-01T00:00:00Z"}),
        ("/endpoints/{name}/enable", "dead", None),
        ("/endpoints/{name}/clear", "dead", {}),
        ("/endpoints/{name}/test", "simulated", None),
        ("/keys", "", {"name": "bob", "rpm": 5}),
        ("/keys/{name}/rotate", "bob", {"overlapHours": 1}),
        ("/config/check", "", {"text": "{}"}),
        ("/reload", "", None),
    ]:
        status, answer = call(proxy, "POST", path.replace("{name}", name), body)
        assert status == 200, (path, answer)
        check(description, path, "POST", answer)
    status, answer = call(proxy, "POST", "/endpoints/nothing/test")
    assert status == 404
    check(description, "/endpoints/{name}/test", "POST", answer, "default")
