#!/usr/bin/env python3
"""A thousand realtime sessions of openai-python's client, and in their midst an upgrade of the binary that cuts none.

Two scripted endpoints speak the realtime API's events over WebSockets. Each session says some turns, goes on to speak
while the running proxy is replaced as docs/operations.md describes, says some turns more and closes by itself; further
sessions are opened meanwhile. Every answer is checked, and the tokens that the proxy has counted have to be what the
endpoints have reported.

    tests/clients/.venv/bin/python tests/clients/realtime_soak.py --binary target/release/api-together

It exits with 1 if anything was lost. With --kill-old it shows that it can: the old process is killed while it holds its
sessions.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections import Counter
from http import HTTPStatus
from pathlib import Path

from openai import AsyncOpenAI
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK

sys.path.insert(0, str(Path(__file__).resolve().parent / "python"))
from servers import Program, is_healthy, wait_until  # noqa: E402

# One that nobody guesses: of another the proxy warns, and a warning is a fault here.
CLIENT_KEY = "sk-soak-5b0d8e2f71c94a36"
ENDPOINTS = ("first", "second")
MODEL = "talk"
ENDPOINT_MODEL = "gpt-realtime-scripted"
# Characters of the answers, by turns: frames whose lengths stand in 7, 16 and 64 bits, some longer than one read.
LENGTHS = (30, 700, 60, 9_000, 300, 70_000)
DELTAS = 4
# Far above what a loaded machine takes: a session that says nothing for so long hangs.
TURN_SECONDS_MAX = 60
# The old process accepts beside the new one for five seconds.
HANDOVER_SECONDS_MAX = 30
# It leaves when its last session has ended.
LEAVE_SECONDS_MAX = 10
# What the proxy, the endpoints and this program open besides the sessions.
DESCRIPTORS_SPARE = 400
LOSSES_SHOWN = 10
# What would send calls elsewhere, or the proxy's files and signals.
FOREIGN_SETTINGS = (
    "API_TOGETHER_",
    "OPENAI_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "RUNTIME_DIRECTORY",
    "STATE_DIRECTORY",
    "NOTIFY_SOCKET",
    "LOG_LEVEL",
)


# What both sides know: the endpoint says it, and the client checks it.


def answer_to(said):
    """The answer to a session's last text. It depends on all of them, so that a session begun anew is noticed."""
    digest = hashlib.sha256("\n".join(said).encode()).hexdigest()
    length = LENGTHS[(len(said) - 1) % len(LENGTHS)]
    return f"Grüß dich, {said[-1]}: " + (digest * (length // len(digest) + 1))[:length]


def usage_of(said, answer):
    """Tokens that differ from turn to turn, so that one counted twice does not make up for one that is missing."""
    tokens_in, tokens_out = sum(map(len, said)), len(answer) // 3
    heard, spoken = tokens_in // 8, tokens_out // 5
    details_in = {"text_tokens": tokens_in - heard, "audio_tokens": heard, "cached_tokens": tokens_in // 4}
    return {
        "total_tokens": tokens_in + tokens_out,
        "input_tokens": tokens_in,
        "output_tokens": tokens_out,
        "input_token_details": details_in,
        "output_token_details": {"text_tokens": tokens_out - spoken, "audio_tokens": spoken},
    }


def add_usage(tally, usage):
    """Adds a response to a tally, by the names of `GET /v1/token/stats`."""
    details_in, details_out = usage["input_token_details"], usage["output_token_details"]
    tally.update(
        requests=1,
        promptTokens=usage["input_tokens"],
        completionTokens=usage["output_tokens"],
        totalTokens=usage["total_tokens"],
        cachedTokens=details_in["cached_tokens"],
        audioTokens=details_in["audio_tokens"] + details_out["audio_tokens"],
    )


def endpoint_key(name):
    return f"sk-{name}-endpoint"


# The scripted endpoint: a process of its own, since all of them together keep more than one core busy.


class Endpoint:
    """The realtime API as far as it is needed here. `GET /control` tells what it has seen."""

    def __init__(self, name):
        self._name = name
        self._opened = 0
        # Sessions that have ended, by the code of their end: 1000 if the client closed it, 1006 if it was cut.
        self._ended = Counter()
        self._reported = Counter()

    def admit(self, connection, request):
        if request.path == "/control":
            told = {"opened": self._opened, "ended": self._ended, "reported": self._reported}
            return connection.respond(HTTPStatus.OK, json.dumps(told))
        url = urllib.parse.urlsplit(request.path)
        asked = (url.path, url.query, request.headers.get("authorization"))
        if asked != ("/v1/realtime", f"model={ENDPOINT_MODEL}", f"Bearer {endpoint_key(self._name)}"):
            return connection.respond(HTTPStatus.BAD_REQUEST, f"not asked as configured: {request.path}\n")
        return None

    async def talk(self, connection):
        self._opened += 1
        session = {"type": "realtime", "id": f"{self._name}:{self._opened}", "model": ENDPOINT_MODEL}
        said = []
        try:
            await self._say(connection, "session.created", session=session)
            async for message in connection:
                event = json.loads(message)
                if event["type"] == "conversation.item.create":
                    said.append(event["item"]["content"][0]["text"])
                elif event["type"] == "response.create":
                    await self._respond(connection, said)
        except ConnectionClosed:
            pass
        finally:
            await connection.wait_closed()
            self._ended[connection.close_code] += 1

    async def _respond(self, connection, said):
        answer = answer_to(said)
        response = {"object": "realtime.response", "id": f"resp_{len(said)}", "output": []}
        await self._say(connection, "response.created", response=response | {"status": "in_progress"})
        place = {"response_id": response["id"], "item_id": "item_1", "output_index": 0, "content_index": 0}
        step = -(-len(answer) // DELTAS)
        for begin in range(0, len(answer), step):
            await self._say(connection, "response.output_text.delta", delta=answer[begin : begin + step], **place)
        usage = usage_of(said, answer)
        # As the API does, it repeats the whole answer beside the usage.
        content = [{"type": "output_text", "text": answer}]
        item = {"id": "item_1", "type": "message", "role": "assistant", "status": "completed", "content": content}
        done = response | {"status": "completed", "output": [item], "usage": usage}
        await self._say(connection, "response.done", response=done)
        # Behind it: what could not be sent was not reported.
        add_usage(self._reported, usage)

    async def _say(self, connection, kind, **members):
        event = {"type": kind, "event_id": f"event_{kind}", **members}
        await connection.send(json.dumps(event, ensure_ascii=False))


async def serve_endpoint(name):
    endpoint = Endpoint(name)
    async with serve(endpoint.talk, "127.0.0.1", 0, process_request=endpoint.admit, backlog=1024) as server:
        print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()


# The proxy.


class Proxy(Program):
    """The proxy under test, in a folder of its own, and after an upgrade its successor, which is not our child."""

    def __init__(self, binary, folder, endpoints):
        self._source, self._folder = binary, folder
        self._binary, self._config = folder / "api-together", folder / "apis.json"
        self._config.write_text(json.dumps(config_over(endpoints)))
        self._install()
        super().__init__([self._binary, "--config", self._config], r"^listening\s+(http://\S+)", folder)
        self.pid = self._process.pid

    def _install(self):
        """Puts the program into its place by a rename, as package managers do."""
        fresh = self._folder / "fresh"
        shutil.copy2(self._source, fresh)
        fresh.rename(self._binary)

    def upgrade(self):
        """What the command says. It returns when the successor serves."""
        self._install()
        command = [self._binary, "upgrade", "--config", self._config]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        said = (done.stdout + done.stderr).strip()
        if done.returncode != 0 or f"has taken over from {self.pid}" not in said:
            raise Failed(f"the upgrade failed with {done.returncode}: {said}")
        return said

    def handed_over(self):
        """How many requests the old process has open at the moment from which on only the new one accepts."""
        pattern = r"shutting down gracefully: (\d+) requests are open"
        if not wait_until(lambda: "shutting down gracefully" in self.text(), HANDOVER_SECONDS_MAX):
            raise Failed(f"the old process still accepts after {HANDOVER_SECONDS_MAX} s")
        return int(self.wait_for_line(pattern))

    def kill_old(self):
        self._process.kill()

    def old_exit_code(self):
        """The first process's exit code, or None if it does not leave although all its sessions have ended."""
        try:
            return self._process.wait(LEAVE_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            return None

    def ask(self, path):
        request = urllib.request.Request(f"{self.found}{path}", headers={"authorization": f"Bearer {CLIENT_KEY}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def serving_pid(self):
        return json.loads((self._folder / "run/running.json").read_text())["pid"]

    def complaints(self):
        return [line.strip() for line in self.text().splitlines() if " WARN " in line or " ERROR " in line]

    def stop(self):
        with contextlib.suppress(OSError, ValueError):
            pid = self.serving_pid()
            # The number may be another process's by now.
            if os.readlink(f"/proc/{pid}/exe").startswith(str(self._folder)):
                os.kill(pid, signal.SIGKILL)
        super().stop()


def config_over(endpoints):
    """Limits that are never reached: only endpoints that have some count their attempts."""
    return {
        # A port that is known before: a successor's has to be the same.
        "server": {"host": "127.0.0.1", "port": free_port(), "apiKey": CLIENT_KEY, "strategy": "round_robin"},
        "apis": [
            {"id": name, "baseUrl": endpoint.found, "apiKey": endpoint_key(name), "rpd": 100_000_000,
             "modelMapping": {MODEL: ENDPOINT_MODEL}}
            for name, endpoint in endpoints.items()
        ],
    }


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# The clients.


class Failed(Exception):
    """Something that ends the run, as nothing after it would mean anything."""


class Wrong(Exception):
    """An answer that is not what the endpoint says."""


class Session:
    """A session from its opening to its end."""

    def __init__(self, crowd, number):
        self._crowd, self._number = crowd, number
        self._said = []
        self._connection = None
        self._endpoint = None
        self.has_begun = False

    async def live(self):
        try:
            await self._open()
            await self._say_turns()
            self.has_begun = True
            while not self._crowd.is_upgraded:
                await self._turn()
            await self._say_turns()
            await self._close()
            self._crowd.ended += 1
        except Exception as error:
            self._crowd.lose(f"session {self._number} at {self._endpoint}, turn {len(self._said)}", error)
            await self._give_up()

    async def _open(self):
        async with self._crowd.doors:
            begun = time.monotonic()
            # It is given no `on_reconnecting`, so that it never mends by itself what was cut.
            self._connection = await self._crowd.client.realtime.connect(model=MODEL).enter()
            created = await asyncio.wait_for(self._event("session.created"), TURN_SECONDS_MAX)
            self._crowd.openings.append(time.monotonic() - begun)
        self._endpoint = created.session.id.split(":")[0]

    async def _say_turns(self):
        for _ in range(self._crowd.turns_each):
            await self._turn()

    async def _turn(self):
        self._said.append(f"turn {len(self._said) + 1} of session {self._number}")
        begun = time.monotonic()
        await asyncio.wait_for(self._ask_and_check(), TURN_SECONDS_MAX)
        self._crowd.turns.append(time.monotonic() - begun)
        # At odd moments, so that some speak and others are silent whatever happens.
        await asyncio.sleep(random.uniform(0, 2) * self._crowd.pause)

    async def _ask_and_check(self):
        content = [{"type": "input_text", "text": self._said[-1]}]
        await self._connection.conversation.item.create(item={"type": "message", "role": "user", "content": content})
        await self._connection.response.create()
        await self._event("response.created")
        deltas = [(await self._event("response.output_text.delta")).delta for _ in range(DELTAS)]
        done = (await self._event("response.done")).response
        answer = answer_to(self._said)
        if "".join(deltas) != answer or done.output[0].content[0].text != answer:
            raise Wrong(f"another answer: {''.join(deltas)[:80]!r} and not {answer[:80]!r}")
        usage = done.usage.to_dict()
        if usage != usage_of(self._said, answer):
            raise Wrong(f"another usage: {usage}")
        add_usage(self._crowd.shown[self._endpoint], usage)

    async def _event(self, kind):
        event = await self._connection.recv()
        if event.type != kind:
            raise Wrong(f"{event.to_json(indent=None)[:300]} and not {kind}")
        return event

    async def _close(self):
        await self._connection.close()
        # The endpoint's own close frame has to have come back: without it, this is another exception.
        try:
            event = await self._connection.recv()
        except ConnectionClosedOK:
            return
        raise Wrong(f"{event} after the end")

    async def _give_up(self):
        if self._connection:
            with contextlib.suppress(Exception):
                await self._connection.close()


class Crowd:
    """All sessions, and what they have seen."""

    def __init__(self, url, arguments):
        self.client = AsyncOpenAI(api_key=CLIENT_KEY, base_url=f"{url}/v1", max_retries=0)
        self.turns_each, self.pause = arguments.turns, arguments.pause
        # Fewer at once than the 64 connections that the proxy lets an address have before they have shown a key.
        self.doors = asyncio.Semaphore(arguments.at_once)
        self.is_upgraded = False
        self.openings, self.turns, self.losses = [], [], []
        self.ended = 0
        self.shown = {name: Counter() for name in ENDPOINTS}
        self._tasks = []

    def open(self, count):
        """Opens more sessions; all of them have begun once the returned condition holds."""
        first = len(self._tasks)
        sessions = [Session(self, first + number) for number in range(count)]
        tasks = [asyncio.create_task(session.live()) for session in sessions]
        self._tasks += tasks
        return lambda: all(session.has_begun or task.done() for session, task in zip(sessions, tasks))

    def lose(self, who, error):
        kind = "cut" if isinstance(error, ConnectionClosed) else type(error).__name__
        self.losses.append((kind, f"{who}: {kind}: {error}"))

    async def end(self):
        await asyncio.gather(*self._tasks)
        await self.client.close()


# The run.


class Clock:
    """Says what happens, and when."""

    def __init__(self):
        self._begun = time.monotonic()

    def seconds(self):
        return time.monotonic() - self._begun

    def say(self, text):
        print(f"{self.seconds():7.1f} s  {text}", flush=True)


async def until(condition):
    # Each session's turn has a bound, and so has this.
    while not condition():
        await asyncio.sleep(0.05)


async def run(proxy, arguments, clock):
    """All of it but the count afterwards."""
    crowd = Crowd(proxy.found, arguments)
    await until(crowd.open(arguments.sessions))
    turns = len(crowd.turns)
    clock.say(f"{arguments.sessions} sessions are open and have said {turns} turns, {len(crowd.losses)} are lost")
    clock.say(await asyncio.to_thread(proxy.upgrade))
    clock.say(f"{len(crowd.turns) - turns} turns were said meanwhile")
    # Half of these come to either process, as both accept, and half to the new one.
    begun = crowd.open(arguments.more // 2)
    held = await asyncio.to_thread(proxy.handed_over)
    clock.say(f"process {proxy.pid} takes no more, and has {held} sessions open")
    check_old_holds(held, arguments, crowd)
    have_all_begun = crowd.open(arguments.more - arguments.more // 2)
    await until(lambda: begun() and have_all_begun())
    clock.say(f"process {proxy.serving_pid()} serves, {arguments.more} more sessions are open")
    if arguments.kill_old:
        proxy.kill_old()
        clock.say(f"process {proxy.pid} is killed")
    crowd.is_upgraded = True
    await crowd.end()
    clock.say(f"{crowd.ended} sessions have ended by themselves, {len(crowd.losses)} are lost")
    return crowd


def check_old_holds(held, arguments, crowd):
    """Otherwise the sessions would not be where the upgrade could cut them."""
    expected = arguments.sessions - len(crowd.losses)
    if held < expected:
        raise Failed(f"the old process holds {held} sessions, not {expected}")


def faults_of(proxy, endpoints, crowd, arguments):
    """Everything that is not as it should be, in words."""
    faults = [f"{count} sessions lost: {kind}" for kind, count in Counter(kind for kind, _ in crowd.losses).items()]
    code = proxy.old_exit_code()
    if code != 0:
        faults.append(f"the old process ended with {code}" if code is not None else "the old process does not leave")
    told = {name: endpoint_control(endpoint) for name, endpoint in endpoints.items()}
    faults += faults_of_ends(told, arguments.sessions + arguments.more)
    faults += faults_of_counts(proxy, told, crowd)
    complaints = proxy.complaints()
    if complaints:
        faults.append(f"{len(complaints)} warnings in the log, the first is: {complaints[0]}")
    return faults


def endpoint_control(endpoint):
    with urllib.request.urlopen(f"{endpoint.found}/control", timeout=30) as answer:
        return json.load(answer)


def faults_of_ends(told, sessions):
    """What is wrong with the sessions as the endpoints have seen them."""
    faults = []
    opened = sum(endpoint["opened"] for endpoint in told.values())
    if opened != sessions:
        faults.append(f"{opened} sessions came to the endpoints, not {sessions}")
    for name, endpoint in told.items():
        if endpoint["opened"] == 0:
            faults.append(f"{name} was never asked")
        if endpoint["ended"] != {"1000": endpoint["opened"]}:
            faults.append(f"{name}: {endpoint['opened']} sessions ended by codes {endpoint['ended']}")
    return faults


def faults_of_counts(proxy, told, crowd):
    """What is wrong with the counts of clients and of the proxy."""

    def find():
        stats = proxy.ask("/v1/token/stats")["detailedStats"]
        status = {api["id"]: api for api in proxy.ask("/v1/status")["apis"]}
        faults = []
        for name, endpoint in told.items():
            reported = endpoint["reported"]
            counted = {key: stats.get(name, {}).get(key) for key in reported}
            faults += differences(f"{name}: counted", counted, reported)
            faults += differences(f"{name}: shown to clients", crowd.shown[name], reported)
            state = {
                "attempts": status[name]["usage"]["rpd"],
                "inFlight": status[name]["inFlight"],
                "estimated": stats.get(name, {}).get("estimated", {}).get("requests"),
            }
            faults += differences(name, state, {"attempts": reported.get("requests"), "inFlight": 0, "estimated": 0})
        return faults

    # What a session has used is written a moment after its end.
    wait_until(lambda: not find(), 5)
    return find()


def differences(what, found, expected):
    return [f"{what} {key}: {found.get(key)}, not {here}" for key, here in expected.items() if found.get(key) != here]


def print_summary(crowd, faults, arguments, seconds):
    turns, openings = crowd.turns or [0], crowd.openings or [0]
    total = sum(crowd.shown.values(), Counter())
    for _, loss in crowd.losses[:LOSSES_SHOWN]:
        print(f"    {loss[:400]}")
    if len(crowd.losses) > LOSSES_SHOWN:
        print(f"    and {len(crowd.losses) - LOSSES_SHOWN} more")
    print(f"sessions  {arguments.sessions} before the upgrade, {arguments.more} behind it")
    print(f"turns     {len(crowd.turns)}, each right; {total['totalTokens']} tokens in {total['requests']} responses")
    print(f"opening   {statistics.median(openings):.3f} s in the median, {max(openings):.2f} s at most")
    print(f"turn      {statistics.median(turns):.3f} s in the median, {max(turns):.2f} s at most")
    print(f"lost      {len(crowd.losses)}")
    print(f"time      {seconds:.0f} s")
    for fault in faults:
        print(f"FAULT     {fault}")


def soak(arguments):
    clock = Clock()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="realtime-soak-")))
        endpoints = {
            name: stack.enter_context(
                Program([sys.executable, __file__, "--endpoint", name], r"listening on (http://\S+)", folder))
            for name in ENDPOINTS
        }
        proxy = stack.enter_context(Proxy(arguments.binary.resolve(), folder, endpoints))
        if not wait_until(lambda: is_healthy(proxy.found), 10):
            raise Failed(f"{proxy.found}/health does not answer:\n{proxy.text()}")
        clock.say(f"process {proxy.pid} serves {proxy.found}")
        crowd = asyncio.run(run(proxy, arguments, clock))
        faults = faults_of(proxy, endpoints, crowd, arguments)
        print_summary(crowd, faults, arguments, clock.seconds())
    return 1 if faults else 0


# The setting.


def raise_descriptors(sessions):
    """The proxy inherits the limit. A session takes two of it there, and one here."""
    needed = 2 * sessions + DESCRIPTORS_SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SystemExit(f"{needed} file descriptors are needed, and {hard} allowed: raise the limit (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def forget_foreign_settings():
    for name in list(os.environ):
        if name.upper().startswith(FOREIGN_SETTINGS):
            del os.environ[name]


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    built = Path(__file__).parent / "../../target/release/api-together"
    add("--binary", type=Path, default=built, help="the program (target/release/api-together)")
    add("--sessions", type=int, default=1000, help="sessions that are open when the binary is replaced")
    add("--more", type=int, help="sessions that are opened afterwards (a tenth of --sessions)")
    add("--at-once", type=int, default=50, help="sessions that are being opened at once")
    add("--turns", type=int, default=4, help="turns of each session before the upgrade, and again after it")
    add("--pause", type=float, default=5, help="mean silence of a session between two turns, in seconds")
    add("--kill-old", action="store_true", help="kill the old process with its sessions: the run has to fail")
    add("--endpoint", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.more is None:
        arguments.more = max(arguments.sessions // 10, 2)
    return arguments


def main():
    arguments = read_arguments()
    if arguments.endpoint:
        asyncio.run(serve_endpoint(arguments.endpoint))
        return 0
    # A run that is terminated stops its servers too, as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    forget_foreign_settings()
    raise_descriptors(arguments.sessions + arguments.more)
    try:
        return soak(arguments)
    except Failed as failed:
        print(f"FAULT     {failed}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
