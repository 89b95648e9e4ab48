"""Starts and stops the programs that the tests talk to: the proxy, the simulated endpoint, a third party's server, and the
scripted one."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
BINARY = os.environ.get("API_TOGETHER_BIN") or str(HERE / "../../target/debug/api-together")
START_SECONDS_MAX = 10
STOP_SECONDS_MAX = 5
CLIENT_KEY = "sk-client"
THIRD_PARTY_KEY = "sk-third-party"
SCRIPTED_KEY = "sk-scripted"


class Program:
    """A running program. It has started once a line it prints matches `ready`."""

    def __init__(self, arguments, ready, folder, environment=None):
        inherited = {name: value for name, value in os.environ.items() if name not in ("PORT", "RUST_LOG")}
        self._lines = []
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [str(argument) for argument in arguments],
            cwd=folder,
            env=inherited | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.found = self.wait_for_line(ready)
        except BaseException:
            self.stop()
            raise

    def _read(self):
        for line in self._process.stdout:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()

    def text(self):
        """All that it has printed, errors and log included."""
        with self._changed:
            return "".join(self._lines)

    def wait_for_line(self, pattern):
        """What the pattern's group found, as soon as a printed line matches."""

        def match():
            return next((found for line in self._lines if (found := re.search(pattern, line))), None)

        with self._changed:
            if not self._changed.wait_for(match, START_SECONDS_MAX):
                raise AssertionError(f"no line matches {pattern!r} in:\n{''.join(self._lines)}")
            return match().group(1)

    def stop(self):
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(STOP_SECONDS_MAX)
        self._process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def simulator(folder):
    """The demo's first endpoint, which can be told by the model's name how to answer."""
    return Program([BINARY, "demo"], r"^\s+steady\s.*?(http://\S+)", folder, {"PORT": "0"})


def third_party(folder):
    """`aimock`, which has no code in common with the proxy. It refuses every key but the one of the config."""
    command = HERE / "node_modules/@copilotkit/aimock/dist/cli.js"
    arguments = ["node", command, "--port", "0", "--fixtures", HERE / "third-party.json", "--chunk-size", "8", "--strict"]
    return Program(arguments, r"listening on (http://\S+)", folder, {"AIMOCK_API_KEYS": THIRD_PARTY_KEY})


def keeping(folder, key):
    """An endpoint that keeps what its clients make."""
    return Program(["node", HERE / "keeping.mjs", key], r"listening on (http://\S+)", folder)


def described(folder, letter):
    """Prism, which nobody here wrote, as an endpoint that answers each call of resources.json and knows its own ids alone."""
    return Program(["node", HERE / "described.mjs", letter], r"listening on (http://\S+)", folder)


def sockets(folder):
    """An endpoint that takes responses over WebSockets; what it says stands in sockets.py."""
    return Program([sys.executable, HERE / "sockets.py"], r"listening on (http://\S+)", folder)


class Scripted(Program):
    """An endpoint in the dialects of coding agents and of Anthropic; what it says stands in scripted.mjs."""

    TEXT = "Hello from the scripted endpoint, grüß dich."
    INPUT_TOKENS = 11
    OUTPUT_TOKENS = 7

    def __init__(self, folder):
        super().__init__(["node", HERE / "scripted.mjs"], r"listening on (http://\S+)", folder)

    def requests(self):
        """What has arrived since it was told to forget."""
        return self._control("GET")

    def forget(self):
        self._control("DELETE")

    def _control(self, method):
        request = urllib.request.Request(f"{self.found}/control/requests", method=method)
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)


def proxy(folder, config, **environment):
    """The proxy under test, on a copy of one of the config files beside these tests."""
    path = Path(folder) / config
    shutil.copy(HERE / config, path)
    running = Program([BINARY, "--config", path], r"^listening\s+(http://\S+)", folder, environment)
    # The address is printed just before connections are taken.
    if not wait_until(lambda: is_healthy(running.found)):
        running.stop()
        raise AssertionError(f"{running.found}/health does not answer:\n{running.text()}")
    return running


def is_healthy(url):
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return answer.status == 200
    except urllib.error.URLError:
        return False


def wait_until(condition, seconds=2.0):
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
