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
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEY = "sk-bench-3f9c1e7a52d8"
PORT = 9161
ENDPOINT_PORT = 9160
STRANGERS = 5000
# Opened again each twentieth of a second: they are idle, not a flood.
REOPENED = 25
# Of one address there are fewer than it has places for.
PER_ADDRESS = 60
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]})
HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
# Resident memory beyond that at rest, with what an allocator keeps. (A build without optimisation takes more for each.)
MEMORY_BYTES_MAX = 512 * 1024 * 1024
ATTACKS = {"headers": "-H", "bodies": "-B", "reads": "-X", "ranges": "-R"}


# Strangers and slowhttptest are to take no time from the load generator, which would be measured instead.
IDLE = ["chrt", "--idle", "0"]


@contextlib.contextmanager
def strangers(count, port=PORT):
    """Has a process of its own keep this many connections open."""
    command = [*IDLE, sys.executable, __file__, "--hold", str(count), "--port", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout.readline().strip() != "open":
            raise SystemExit("the strangers could not connect")
        yield
    finally:
        process.stdin.close()
        opened = process.stdout.read().strip()
        process.wait(10)
    print(opened, file=sys.stderr)


def hold(count, port):
    """Keeps connections open, from many addresses of this machine, until the standard input ends; those that are closed are opened again."""
    sockets, opened, begun = {}, 0, time.monotonic()
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLHUP)
    while True:
        # All at once at first, and then as many as are closed by their time.
        for _ in range(min(100 if opened < count else REOPENED, count - len(sockets))):
            with contextlib.suppress(OSError):
                one = socket.socket()
                one.bind((f"127.0.7.{opened // PER_ADDRESS % 200 + 1}", 0))
                one.settimeout(5)
                one.connect(("127.0.0.1", port))
                # Some say nothing, some begin.
                one.sendall([b"", b"G", b"GET /v1/models HTTP/1.1\r\nhost: a\r\n"][opened % 3])
                sockets[one.fileno()] = one
                poll.register(one, select.POLLHUP | select.POLLERR | select.POLLIN)
            opened += 1
            if opened == count:
                print("open", flush=True)
        for descriptor, _ in poll.poll(20):
            if descriptor == sys.stdin.fileno():
                print(f"{len(sockets)} strangers at the end, {opened} in {time.monotonic() - begun:.0f} s")
                return
            poll.unregister(descriptor)
            sockets.pop(descriptor).close()
        time.sleep(0.05 if opened >= count else 0)


@contextlib.contextmanager
def running(binary, endpoint, bounds):
    """Starts an endpoint and api-together before it."""
    with tempfile.TemporaryDirectory(prefix="api-together-strangers-") as folder:
        config = {
            "server": {"host": "127.0.0.1", "port": PORT, "apiKey": KEY, "connections": bounds},
            "apis": [{"id": "a", "baseUrl": f"http://127.0.0.1:{ENDPOINT_PORT}/v1", "apiKey": "none-needed", "models": ["*"]}],
        }
        path = pathlib.Path(folder) / "apis.json"
        path.write_text(json.dumps(config))
        with (pathlib.Path(folder) / "log").open("wb") as log:
            first, *_, last = map(str, sorted(os.sched_getaffinity(0)))
            commands = [["taskset", "-c", last, endpoint, str(ENDPOINT_PORT)], ["taskset", "-c", first, binary, "--config", path]]
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


def slowhttptest(kind, connections, seconds, port=PORT, rate=50):
    """`rate`: connections a second; 50 is its own default."""
    command = [*IDLE, "slowhttptest", ATTACKS[kind], "-c", connections, "-r", rate, "-l", seconds, "-i", 1, "-p", 2]
    command += ["-w", 10, "-y", 20, "-n", 1, "-z", 32, "-k", 3] if kind == "reads" else []
    command += ["-u", f"http://127.0.0.1:{port}/v1/models"]
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
        with strangers(STRANGERS):
            count, longest = call_for(6)
            most = max(most, resident(process))
            held = metric("api_together_stranger_bytes")
            print(f"{STRANGERS} strangers: {count} calls, {longest:.2f} s at most; {held >> 20} MiB held")
        for kind in ATTACKS:
            attack = slowhttptest(kind, 1000, 6, rate=500)
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
    """Callers alone, beside the same strangers at another program (the endpoint), and beside strangers at ours. The second shows what the
    strangers' own processes take from the load generator, which has their core."""
    release = ROOT / "target/release"
    runs = {"alone": [], "strangers elsewhere": [], "strangers here": []}
    with running(release / "api-together", release / "examples/endpoint", {"max": 8000}) as process:
        # The load has the other cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[1:])
        latencies(rate, 2)
        for number in range(rounds):
            for name in runs if number % 2 else reversed(runs):
                port = ENDPOINT_PORT if name == "strangers elsewhere" else PORT
                with contextlib.ExitStack() as stack:
                    attacks = []
                    if name != "alone":
                        stack.enter_context(strangers(STRANGERS, port))
                        attacks = [slowhttptest(kind, 200, seconds + 1, port) for kind in ATTACKS]
                    runs[name].append(latencies(rate, seconds))
                    for attack in attacks:
                        attack.wait(60)
                # What was closed is gone before the next one.
                wait_until("strangers are closed", lambda: metric('api_together_connections{kind="stranger"}') <= 1, 40)
        print(f"resident memory at the end: {resident(process) >> 20} MiB")
    print(f"{rounds} rounds in turns, {rate} requests a second for {seconds} s each; {STRANGERS} strangers and slowhttptest")
    for name, told in runs.items():
        p50, p99 = (statistics.median(values) for values in zip(*told))
        ratios = sorted(one[1] / alone[1] for one, alone in zip(told, runs["alone"]))
        print(f"{name:20} p50 {p50:7,.0f} µs   p99 {p99:7,.0f} µs   p99 over alone {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", metavar="BINARY", type=pathlib.Path)
    arguments.add_argument("--endpoint", type=pathlib.Path, default=ROOT / "target/debug/examples/simulator")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--rate", type=int, default=1000)
    arguments.add_argument("--seconds", type=int, default=8)
    arguments.add_argument("--hold", metavar="COUNT", type=int, help=argparse.SUPPRESS)
    arguments.add_argument("--port", type=int, default=PORT, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if options.hold:
        hold(options.hold, options.port)
        return
    if not shutil.which("slowhttptest"):
        raise SystemExit("slowhttptest is missing; on Debian: apt-get install slowhttptest")
    if options.check:
        check(options.check.resolve(), options.endpoint.resolve())
    else:
        bench(options.rounds, options.rate, options.seconds)


if __name__ == "__main__":
    main()
