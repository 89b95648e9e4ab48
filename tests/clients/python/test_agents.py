"""Coding agents, started as their users start them, with a scripted endpoint behind the proxy."""

import json
import os
import signal
import subprocess

import pytest
import servers
from openai import OpenAI

BIN = servers.HERE / "node_modules/.bin"
# Some agents try a failed request again for minutes.
AGENT_SECONDS_MAX = 30
# Whatever an agent asks of another machine (its news, its updates, its list of models) is refused at once.
NO_WAY_OUT = {name: "http://127.0.0.1:1" for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")} | {
    "NO_PROXY": "127.0.0.1"
}


@pytest.fixture
def run(tmp_path):
    """Runs a program that has a home of its own and inherits only the path; it is what it prints to standard output."""

    def run_agent(arguments, environment):
        own = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | NO_WAY_OUT
        work = tmp_path / "work"
        work.mkdir()
        # The agents are launchers of programs that outlive them, so they are a group that is ended as one.
        process = subprocess.Popen(
            [str(argument) for argument in arguments],
            cwd=work,
            env=own | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            printed, errors = process.communicate(timeout=AGENT_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            end_group(process)
            printed, errors = process.communicate()
            raise AssertionError(f"it has not ended in {AGENT_SECONDS_MAX} s:\n{printed}{errors}") from None
        finally:
            end_group(process)
        assert process.returncode == 0, printed + errors
        return printed

    return run_agent


def end_group(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


CODEX_BY_BASE_URL = """
openai_base_url = "{url}/v1"
"""
CODEX_BY_PROVIDER = """
model_provider = "gateway"
[model_providers.gateway]
name = "api-together"
base_url = "{url}/v1"
env_key = "GATEWAY_KEY"
"""


@pytest.fixture
def codex(run, tmp_path, scripted_proxy):
    """Runs Codex on one prompt; gives its events."""

    def ask(model, *options, config=CODEX_BY_BASE_URL, key="CODEX_API_KEY", proxy=scripted_proxy):
        home = tmp_path / "codex"
        home.mkdir()
        (home / "config.toml").write_text(config.format(url=proxy.found))
        arguments = [BIN / "codex", "exec", "--json", "--skip-git-repo-check", "--model", model, *options, "Say hello."]
        printed = run(arguments, {"CODEX_HOME": str(home), key: servers.CLIENT_KEY})
        return [json.loads(line) for line in printed.splitlines()]

    return ask


def texts_of(events):
    """What the agent tells its user, and its errors but for the one of every name that is none of OpenAI's."""
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    failures = [event for event in events if event["type"] in ("error", "turn.failed")]
    failures += [item for item in items if item["type"] == "error" and "Model metadata" not in item["message"]]
    assert failures == []
    return [item["text"] for item in items if item["type"] == "agent_message"]


def check_request(request, path, model):
    """The endpoint was asked for the mapped name, with its own key, and learned nothing of the client's."""
    assert (request["method"], request["path"]) == ("POST", path)
    assert request["headers"]["authorization"] == f"Bearer {servers.SCRIPTED_KEY}"
    assert json.loads(request["body"])["model"] == model
    assert servers.CLIENT_KEY not in json.dumps(request)


def check_passed_over(scripted, endpoint, path):
    """The first endpoint refused its key, and the second one answered."""
    refused, answered = scripted.requests()
    assert refused["headers"]["authorization"] == "Bearer sk-refused"
    assert refused["path"] == path
    check_request(answered, path, "scripted")


def test_codex(codex, scripted, scripted_proxy, check_counts):
    events = codex("asked")
    assert texts_of(events) == [scripted.TEXT]
    usage = next(event["usage"] for event in events if event["type"] == "turn.completed")
    assert (usage["input_tokens"], usage["output_tokens"]) == (scripted.INPUT_TOKENS, scripted.OUTPUT_TOKENS)
    (request,) = scripted.requests()
    check_request(request, "/v1/responses", "scripted")
    check_counts("scripted", {"scripted": 1})
    # It asks for a WebSocket first; told that there is none, it uses HTTP.
    assert "method=GET path=/v1/responses attempts=0 status=426" in scripted_proxy.text()


def test_codex_with_the_proxy_as_a_provider_of_its_own(codex, scripted, scripted_proxy, check_counts):
    events = codex("asked", config=CODEX_BY_PROVIDER, key="GATEWAY_KEY")
    assert texts_of(events) == [scripted.TEXT]
    (request,) = scripted.requests()
    check_request(request, "/v1/responses", "scripted")
    check_counts("scripted", {"scripted": 1})
    assert "status=426" not in scripted_proxy.text()


def test_codex_over_a_websocket(codex, tmp_path_factory):
    with servers.sockets(tmp_path_factory.mktemp("sockets")) as endpoint:
        with servers.proxy(tmp_path_factory.mktemp("proxy"), "sockets.json", SOCKETS_URL=endpoint.found) as proxy:
            events = codex("asked", proxy=proxy)
            assert texts_of(events) == ["Hello over a socket, grüß dich."]
            asked = [json.loads(line) for line in endpoint.text().splitlines() if line.startswith("{")]
            assert {(one["path"], one["model"]) for one in asked} == {("/v1/responses", "scripted")}
            assert max(one["bytes"] for one in asked) > 10_000, "the whole first message"
            usage = next(event["usage"] for event in events if event["type"] == "turn.completed")
            assert (usage["input_tokens"], usage["output_tokens"]) == (11, 7)
            assert servers.wait_until(lambda: "status=101" in proxy.text())
            line = next(line for line in proxy.text().splitlines() if "status=101" in line)
            assert f"prompt_tokens={11 * len(asked)} completion_tokens={7 * len(asked)}" in line, line
            with OpenAI(base_url=f"{proxy.found}/v1", api_key=servers.CLIENT_KEY) as client:
                status = client.get("/status", cast_to=object)["apis"][0]
            assert status["usage"]["rpm"] == len(asked), "each response took a permit"


def test_codex_runs_a_tool(codex, scripted, check_counts):
    events = codex("asked-for-tools", "--dangerously-bypass-approvals-and-sandbox")
    assert texts_of(events) == [scripted.TEXT]
    first, second = scripted.requests()
    for request in (first, second):
        check_request(request, "/v1/responses", "scripted-tool")
    outputs = [item for item in json.loads(second["body"])["input"] if item["type"] == "function_call_output"]
    assert [output["call_id"] for output in outputs] == ["call_scripted"]
    assert "42-from-the-agent" in outputs[0]["output"]
    check_counts("scripted", {"scripted-tool": 2})


def test_codex_does_not_see_an_endpoint_whose_key_is_refused(codex, scripted, check_counts):
    events = codex("asked-of-both")
    assert texts_of(events) == [scripted.TEXT]
    check_passed_over(scripted, "scripted", "/v1/responses")
    check_counts("scripted", {"scripted": 1})


@pytest.fixture
def opencode(run, tmp_path, scripted_proxy):
    """Runs opencode on one prompt; gives what it tells its user."""

    def ask(model):
        config = {
            "$schema": "https://opencode.ai/config.json",
            "model": f"gateway/{model}",
            "autoupdate": False,
            "provider": {
                "gateway": {
                    "npm": "@ai-sdk/openai-compatible",
                    "options": {"baseURL": f"{scripted_proxy.found}/v1", "apiKey": "{env:GATEWAY_KEY}"},
                    "models": {model: {}},
                }
            },
        }
        path = tmp_path / "opencode.json"
        path.write_text(json.dumps(config))
        # Without a title of ours it asks the model for one, at the same time.
        arguments = [BIN / "opencode", "run", "--format", "json", "--title", "hello", "Say hello."]
        own = {"OPENCODE_CONFIG": str(path), "OPENCODE_DISABLE_MODELS_FETCH": "1", "GATEWAY_KEY": servers.CLIENT_KEY}
        printed = run(arguments, own)
        events = [json.loads(line) for line in printed.splitlines()]
        assert not [event for event in events if event["type"] == "error"]
        return [event["part"]["text"] for event in events if event["type"] == "text"]

    return ask


def test_opencode(opencode, scripted, check_counts):
    assert opencode("asked") == [scripted.TEXT]
    (request,) = scripted.requests()
    check_request(request, "/v1/chat/completions", "scripted")
    check_counts("scripted", {"scripted": 1})


def test_opencode_runs_a_tool(opencode, scripted, check_counts):
    assert opencode("asked-for-tools") == [scripted.TEXT]
    first, second = scripted.requests()
    for request in (first, second):
        check_request(request, "/v1/chat/completions", "scripted-tool")
    outputs = [message for message in json.loads(second["body"])["messages"] if message["role"] == "tool"]
    assert [output["tool_call_id"] for output in outputs] == ["call_scripted"]
    assert "42-from-the-agent" in outputs[0]["content"]
    check_counts("scripted", {"scripted-tool": 2})


def test_opencode_does_not_see_an_endpoint_whose_key_is_refused(opencode, scripted, check_counts):
    assert opencode("asked-of-both") == [scripted.TEXT]
    check_passed_over(scripted, "scripted", "/v1/chat/completions")
    check_counts("scripted", {"scripted": 1})
