#!/usr/bin/env python3
"""Puts api-together under those who have no key: thousands of connections that say nothing, or begin a header, and slowhttptest's
slow headers, bodies, reads and ranges, beside callers.

With --check BINARY (make test) it sees that callers are answered, that memory stays within its bound, and that everything is closed
afterwards. Without (make bench-strangers) it measures other callers' latencies with and without strangers, in turns.
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import re
import resource
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEY = "sk-bench-3f9c1e7a52d8"
PORT = 9161
ENDPOINT_PORT = 9160
STRANGERS = 5000
# Of one address there are fewer than it has places for.
PER_ADDRESS = 60
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]})
HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
# Resident memory beyond that at rest: strangers' 64 MiB, and what an allocator keeps.
MEMORY_BYTES_MAX = 160 * 1024 * 1024
ATTACKS = {"headers": "-H", "bodies": "-B", "reads": "-X", "ranges": "-R"}


class Strangers:
    """Keeps this many connections open from many addresses of this machine; those that are closed are opened again."""

    def __init__(self, count):
        self.count = count
        self.sockets = {}
        self.opened = 0
        self.poll = select.poll()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        deadline = time.monotonic() + 60
        while self.opened < self.count:
            if time.monotonic() > deadline:
                raise SystemExit(f"only {self.opened} of {self.count} strangers could connect")
            time.sleep(0.05)
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()
        for one in self.sockets.values():
            one.close()

    def run(self):
        while not self.stopped.is_set():
            for number in range(min(100, self.count - len(self.sockets))):
                self.open()
            for descriptor, _ in self.poll.poll(20):
                self.poll.unregister(descriptor)
                self.sockets.pop(descriptor).close()

    def open(self):
        address = self.opened // PER_ADDRESS % 200
        with contextlib.suppress(OSError):
            one = socket.socket()
            one.bind((f"127.0.7.{address + 1}", 0))
            one.settimeout(5)
            one.connect(("127.0.0.1", PORT))
            # Some say nothing, some begin.
            one.sendall([b"", b"G", b"GET /v1/models HTTP/1.1\r\nhost: a\r\n"][self.opened % 3])
            self.sockets[one.fileno()] = one
            self.poll.register(one, select.POLLHUP | select.POLLERR | select.POLLIN)
        self.opened += 1


@contextlib.contextmanager
def running(binary, endpoint, bounds):
    """Starts an endpoint and api-together before it."""
    with tempfile.TemporaryDirectory(prefix="api-together-strangers-") as folder:
        config = {
            "server": {"host": "127.0.0.1", "port": PORT, "apiKey": KEY, "connections": bounds, "memoryBytesMax": 67108864},
            "apis": [{"id": "a", "baseUrl": f"http://127.0.0.1:{ENDPOINT_PORT}/v1", "apiKey": "none-needed", "models": ["*"]}],
        }
        path = pathlib.Path(folder) / "apis.json"
        path.write_text(json.dumps(config))
        with (pathlib.Path(folder) / "log").open("wb") as log:
            commands = [[endpoint, str(ENDPOINT_PORT)], [binary, "--config", path]]
            processes = [subprocess.Popen(command, stdout=log, stderr=log) for command in commands]
            try:
                wait_until("it answers", lambda: ask() == 200, 60)
                yield processes[1]
            finally:
                for process in processes:
                    process.terminate()
                for process in processes:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(10)
                    process.kill()


def wait_until(what, holds, seconds):
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if holds():
                return
        if time.monotonic() > deadline:
            raise SystemExit(f"this never came: {what}")
        time.sleep(0.1)


def ask(connection=None):
    """One request of a caller, on a connection of its own if none is given. Returns the status."""
    own = connection or http.client.HTTPConnection("127.0.0.1", PORT, timeout=20)
    own.request("POST", "/v1/chat/completions", BODY, HEADERS)
    answer = own.getresponse()
    answer.read()
    if not connection:
        own.close()
    return answer.status


def metrics():
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=20)
    connection.request("GET", "/metrics", headers=HEADERS)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def metric(name):
    return int(float(re.search(rf"^{re.escape(name)} (\S+)$", metrics(), re.M)[1]))


def resident(process):
    line = next(line for line in pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def slowhttptest(kind, connections, seconds):
    command = ["slowhttptest", ATTACKS[kind], "-c", connections, "-r", 500, "-l", seconds, "-i", 1, "-p", 2]
    command += ["-w", 10, "-y", 20, "-n", 1, "-z", 32, "-k", 3] if kind == "reads" else []
    command += ["-u", f"http://127.0.0.1:{PORT}/v1/models"]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def call_for(seconds, interval=0.02):
    """Calls one after the other, on a kept connection and on fresh ones in turns. Returns the number, and the longest time."""
    kept, longest, count = http.client.HTTPConnection("127.0.0.1", PORT, timeout=20), 0, 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        begun = time.monotonic()
        status = ask(kept if count % 2 else None)
        longest = max(longest, time.monotonic() - begun)
        assert status == 200, f"a caller is answered {status}"
        count += 1
        time.sleep(interval)
    return count, longest


def check(binary, endpoint):
    """What holds whatever strangers do."""
    bounds = {"max": 8000, "firstByteSeconds": 4, "headerSeconds": 4, "keepAliveSeconds": 4}
    with running(binary, endpoint, bounds) as process:
        rest, most = resident(process), 0
        with Strangers(STRANGERS) as strangers:
            count, longest = call_for(6)
            most = max(most, resident(process))
            held = metric("api_together_stranger_bytes")
            print(f"{len(strangers.sockets)} strangers of {strangers.opened} so far: {count} calls, {longest:.2f} s at most; {held >> 20} MiB held")
        for kind in ATTACKS:
            attack = slowhttptest(kind, 1000, 6)
            count, longest = call_for(6)
            most = max(most, resident(process))
            attack.wait(60)
            print(f"slow {kind}: {count} calls, {longest:.2f} s at most")
        print(f"memory: {rest >> 20} MiB at rest, {most >> 20} MiB at most")
        if most - rest > MEMORY_BYTES_MAX:
            raise SystemExit(f"{most - rest} bytes more than at rest, and {MEMORY_BYTES_MAX} are the bound")
        wait_until("strangers are closed", lambda: metric('api_together_connections{kind="stranger"}') <= 1, 20)
        wait_until("what they held is given back", lambda: metric("api_together_stranger_bytes") < 200_000, 20)
        wait_until("no request is open", lambda: metric("api_together_open_requests") <= 1, 20)
        descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
        if descriptors > 200:
            raise SystemExit(f"{descriptors} descriptors are still open")
        print("everything is closed")


def latencies(rate, seconds):
    """The p50 and p99 of callers, in microseconds."""
    command = ["oha", "--no-tui", "--output-format", "json", "-z", f"{seconds}s", "-q", rate, "-c", 50, "--latency-correction"]
    command += ["-m", "POST", "-d", BODY, *(part for item in HEADERS.items() for part in ("-H", ": ".join(item)))]
    command.append(f"http://127.0.0.1:{PORT}/v1/chat/completions")
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    failed = {status: count for status, count in told["statusCodeDistribution"].items() if status != "200"}
    if failed or told["errorDistribution"].keys() - {"aborted due to deadline"}:
        raise SystemExit(f"callers failed: {failed} {told['errorDistribution']}")
    return told["latencyPercentiles"]["p50"] * 1e6, told["latencyPercentiles"]["p99"] * 1e6


def bench(rounds, rate, seconds):
    release = ROOT / "target/release"
    runs = {"alone": [], "beside strangers": []}
    with running(release / "api-together", release / "examples/endpoint", {"max": 8000}) as process:
        latencies(rate, 2)
        for number in range(rounds):
            for name in runs if number % 2 else reversed(runs):
                with contextlib.ExitStack() as stack:
                    if name != "alone":
                        stack.enter_context(Strangers(STRANGERS))
                        attacks = [slowhttptest(kind, 200, seconds + 1) for kind in ATTACKS]
                    runs[name].append(latencies(rate, seconds))
                    if name != "alone":
                        for attack in attacks:
                            attack.wait(60)
                # What was closed is gone before the next one.
                wait_until("strangers are closed", lambda: metric('api_together_connections{kind="stranger"}') <= 1, 40)
        print(f"resident memory at the end: {resident(process) >> 20} MiB")
    for name, told in runs.items():
        p50, p99 = (statistics.median(values) for values in zip(*told))
        print(f"{name:17} p50 {p50:7,.0f} µs   p99 {p99:7,.0f} µs")
    ratios = sorted(beside[1] / alone[1] for alone, beside in zip(runs["alone"], runs["beside strangers"]))
    print(f"p99 beside {STRANGERS:,} strangers and slowhttptest, over p99 alone, by round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}; median {statistics.median(ratios):.2f}")


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", metavar="BINARY", type=pathlib.Path)
    arguments.add_argument("--endpoint", type=pathlib.Path, default=ROOT / "target/debug/examples/simulator")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--rate", type=int, default=1000)
    arguments.add_argument("--seconds", type=int, default=8)
    options = arguments.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if not shutil.which("slowhttptest"):
        raise SystemExit("slowhttptest is missing; on Debian: apt-get install slowhttptest")
    if options.check:
        check(options.check.resolve(), options.endpoint.resolve())
    else:
        bench(options.rounds, options.rate, options.seconds)


if __name__ == "__main__":
    main()
