"""Every call of the SDK over three endpoints is answered as by one endpoint asked directly.

Each endpoint refuses the others' ids. The calls stand in resources.json; the endpoints are Prism, which goes by a
description made of the same file (described.mjs)."""

import inspect
import json
import re
import uuid
from collections import namedtuple
from functools import cached_property
from operator import attrgetter

import pytest
import servers
from openai import APIStatusError, BaseModel, OpenAI, Stream
from openai._resource import SyncAPIResource

ENDPOINTS = ("a", "b", "c")
# One is chosen at random each time: this many times miss one of three once in ten thousand million.
SPREAD_TIMES_MAX = 60
# Whoever goes to any endpoint finds all three right by chance once in 27 rounds.
ROUNDS = 2
ROUNDS_OF_FAULTS = 6

# The SDK takes nothing but a file there.
NOT_IN_PYTHON = {"videos.create input_reference=file-", "videos.edit video=video_", "videos.extend video=video_"}
# The gateway answers them itself; test_calls.py has them.
ANSWERED_BY_GATEWAY = {"models.list", "models.retrieve"}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Call:
    def __init__(self, resource, method, call, args=None, answer=None):
        self.name = f"{resource}.{method}"
        self.verb, self.path = call.split()
        self.answer = answer
        self._args = args or {}
        # Some methods stand in several rows, that differ in what their bodies name.
        named = [f"{name}={kind}" for name, value in self._args.items() for kind in sorted(kinds_in(value))]
        self.label = " ".join([self.name, *named])
        # Path parameters with the kinds of their ids, and the few that are no ids.
        self._ids = dict(re.findall(r"{(\w+):([^}]+)}", self.path))
        self._constants = dict(re.findall(r"{(\w+)=(\w+)}", self.path))
        self.kinds = set(self._ids.values()) | kinds_in(args)
        self.made = kinds_in(answer) or ({answer} if isinstance(answer, str) else set())
        self.retrieves = self.verb == "GET" and bool(re.fullmatch(r"[^{]*{[^}]*}", self.path))
        # Its answer is put together from those of all endpoints.
        self.is_merged = not self.kinds and isinstance(answer, list) and isinstance(answer[0], str)

    def arguments(self, letter):
        """The arguments with the ids of one endpoint."""
        text = re.sub(r"{([^{}\":]+)}", rf"\g<1>{letter}123", json.dumps(self._args))
        args = {name: ("f.txt", b"hello") if value == "@" else value for name, value in json.loads(text).items()}
        return args | self._constants | {name: f"{kind}{letter}123" for name, kind in self._ids.items()}


def kinds_in(value):
    """The kinds of the ids in a body, where `{file-}` stands for a file's."""
    return set(re.findall(r"{([^{}\":]+)}", json.dumps(value)))


def read_json(name):
    return json.loads((servers.HERE / name).read_text())


TABLE = [Call(resource, *row) for resource, rows in read_json("resources.json").items() for row in rows]
CALLS = [call for call in TABLE if call.label not in NOT_IN_PYTHON]
# The first call that makes an object of a kind.
MAKERS = {kind: call for call in reversed(CALLS) if call.verb == "POST" for kind in call.made if "create" in call.name}
# Calls that are known to be answered otherwise than by one endpoint, by how their labels or paths begin, and why.
FAULTS = read_json("faults.json")


def fault_of(call):
    """Why a call is known to be answered otherwise than by one endpoint."""
    # Of the calls below a path, those that name no object, or a file, go right.
    is_bound = "file-" not in call.kinds and (call.kinds or call.is_merged)
    for start, why in FAULTS.items():
        if call.label.startswith(start) or is_bound and call.path.startswith(start):
            return why
    return None


def row(call):
    why = fault_of(call)
    raises = (RefusedError, AssertionError)
    marks = [pytest.mark.xfail(reason=why, raises=raises, strict=True)] if why else []
    return pytest.param(call, id=call.label, marks=marks)


@pytest.fixture(scope="module")
def endpoints(tmp_path_factory):
    running = {}
    try:
        for letter in ENDPOINTS:
            running[letter] = servers.described(tmp_path_factory.mktemp(letter), letter)
        yield running
    finally:
        for server in running.values():
            server.stop()


class RefusedError(Exception):
    """What the SDK raised, without the way through its code: to print that takes longer than the call."""

    def __init__(self, error):
        super().__init__(f"{error.status_code}: {error.response.text}")
        self.status_code = error.status_code


ASKED_HEADERS = ("x-api-together-endpoint", "x-api-together-attempts")
Asked = namedtuple("Asked", "endpoint attempts answer")


class Client:
    """Makes the calls of the table."""

    def __init__(self, url, key):
        self.openai = OpenAI(base_url=f"{url}/v1", api_key=key, admin_api_key=key, max_retries=0, timeout=10)
        self._known = set()

    def ask(self, call, letter):
        """Who answers, and after how many attempts, if that is told; and the answer."""
        resource, method = call.name.rsplit(".", 1)
        # Calls of one session would prefer one endpoint.
        headers = {"x-session-id": uuid.uuid4().hex}
        raw = getattr(attrgetter(resource)(self.openai).with_raw_response, method)
        try:
            answer = raw(**call.arguments(letter), extra_headers=headers)
        except APIStatusError as error:
            raise RefusedError(error) from None
        return Asked(*map(answer.headers.get, ASKED_HEADERS), plain(answer.parse()))

    def make(self, kinds):
        """Makes an object of each kind at each endpoint, if it can be made."""
        for kind in kinds - self._known:
            self._known.add(kind)
            if maker := MAKERS.get(kind):
                self.make(maker.kinds)
                if maker.kinds:
                    for letter in ENDPOINTS:
                        self.ask(maker, letter)
                else:
                    self._make_at_all(maker)

    def _make_at_all(self, maker):
        missing = set(ENDPOINTS)
        for _ in range(SPREAD_TIMES_MAX):
            missing.discard(self.ask(maker, "a").endpoint)
            if not missing:
                return
        raise AssertionError(f"{maker.label} is never asked of {missing}")

    def forget(self, kinds):
        self._known -= kinds

    def close(self):
        self.openai.close()


def plain(answer):
    """An answer as plain values, whatever the SDK makes of it."""
    if isinstance(answer, Stream):
        return [plain(event) for event in answer]
    if isinstance(answer, BaseModel):
        return answer.model_dump(mode="json", warnings=False)
    return answer.text if hasattr(answer, "text") else answer


def at(letter, answer):
    """An answer of the first endpoint as another one would give it."""
    return json.loads(json.dumps(answer).replace("a123", f"{letter}123"))


@pytest.fixture(scope="module")
def directly(endpoints):
    client = Client(endpoints["a"].found, "sk-a")
    yield client
    client.close()


@pytest.fixture(scope="module")
def start_gateway(endpoints, tmp_path_factory):
    urls = {f"{letter.upper()}_URL": server.found for letter, server in endpoints.items()}
    return lambda: servers.proxy(tmp_path_factory.mktemp("gateway"), "keeping.json", **urls)


@pytest.fixture(scope="module")
def over_three(start_gateway):
    with start_gateway() as running:
        client = Client(running.found, servers.CLIENT_KEY)
        yield client
        client.close()


@pytest.fixture(scope="module")
def unlearned(start_gateway):
    """A gateway that has seen no object being made."""
    with start_gateway() as running:
        client = Client(running.found, servers.CLIENT_KEY)
        yield client
        client.close()


@pytest.fixture
def rounds(request):
    """How often all three are asked: a fault has to show itself each time that the tests run."""
    return ROUNDS_OF_FAULTS if request.node.get_closest_marker("xfail") else ROUNDS


@pytest.mark.parametrize("call", [row(call) for call in CALLS])
def test_answers_are_those_of_one_endpoint(call, rounds, directly, over_three):
    expected = directly.ask(call, "a").answer
    over_three.make(call.kinds)
    if call.is_merged:
        over_three.make({call.answer[0]})
        listed = sorted(over_three.ask(call, "a").answer["data"], key=lambda one: one["id"])
        assert listed == [one for letter in ENDPOINTS for one in at(letter, expected["data"])]
    elif call.kinds:
        for letter in ENDPOINTS * rounds:
            asked = over_three.ask(call, letter)
            assert (asked.endpoint, asked.answer) == (letter, at(letter, expected))
            # With three endpoints even one that looks for what it has seen being made would come by in the end.
            assert asked.attempts == "1" or call.kinds.isdisjoint(MAKERS)
    else:
        asked = over_three.ask(call, "a")
        assert asked.answer == at(asked.endpoint, expected)
    if call.verb == "DELETE":
        over_three.forget(call.kinds)


@pytest.mark.parametrize("call", [row(call) for call in CALLS if call.retrieves])
def test_an_object_made_elsewhere_is_found(call, rounds, directly, unlearned):
    expected = directly.ask(call, "a").answer
    for letter in ENDPOINTS * rounds:
        asked = unlearned.ask(call, letter)
        assert (asked.endpoint, asked.answer) == (letter, at(letter, expected))


@pytest.mark.parametrize("call", [pytest.param(call, id=call.label) for call in CALLS])
def test_an_endpoint_knows_its_own_ids_alone(call, directly):
    directly.ask(call, "a")
    if call.kinds:
        with pytest.raises(RefusedError) as refused:
            directly.ask(call, "b")
        assert refused.value.status_code in (400, 404)


# How a method of the SDK reads that sends a request.
SENDS = re.compile(r"self\._(get|post|put|patch|delete|get_api_list)\(")


def calls_of(resource, name):
    """The names of all methods below a resource that send a request."""
    for member in dir(type(resource)):
        value = inspect.getattr_static(type(resource), member)
        if inspect.isfunction(value) and SENDS.search(inspect.getsource(inspect.unwrap(value))):
            yield f"{name}{member}"
        # `beta.chat` is `chat` once more.
        if isinstance(value, cached_property) and not member.startswith("with_") and f"{name}{member}" != "beta.chat":
            inner = getattr(resource, member)
            if isinstance(inner, SyncAPIResource):
                yield from calls_of(inner, f"{name}{member}.")


def test_no_call_is_left_out(directly):
    in_table = {call.name for call in CALLS}
    assert set(calls_of(directly.openai, "")) == in_table | ANSWERED_BY_GATEWAY
