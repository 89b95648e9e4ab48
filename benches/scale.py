#!/usr/bin/env python3
"""Measures api-together with thousands of open streams, with hundreds of endpoints, and with many large bodies at once.

Prints tables, and writes them into BENCHMARKS.md with --write. `make bench-scale` builds and installs everything that is
needed.
"""

import argparse
import concurrent.futures
import http.client
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import threading
import time

from harness import DESCRIPTORS, ENDPOINT_PORT, KEY, RELEASE, Bench, Contender, api_together_config, json_body, table, write

MIB = 1024 * 1024
SYSTEM = "bare, system's allocator"
# Time between two events of a stream.
PACE_MS = 1000


def streams(bench, contender, count, seconds):
    """Holds this many streams open, one event a second each, and measures delay, CPU time and memory."""
    before = contender.memory_bytes()
    command = ["taskset", "-c", bench.load_cores, RELEASE / "examples/streams", contender.port, count, seconds, PACE_MS, KEY]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "open", f"{contender.name}: not all streams were opened"
    cpu, begun = contender.cpu_seconds(), time.monotonic()
    # While all are open.
    time.sleep(max(1, seconds * PACE_MS / 1000 - count / 2000 - 5))
    cpu, wall = contender.cpu_seconds() - cpu, time.monotonic() - begun
    memory = contender.memory_bytes()
    told = json.loads(process.stdout.readline())
    process.wait()
    return told | {"cpu": cpu / wall, "memory": (memory - before) / count / 1024, "rest": before / MIB}


def streams_table(bench, count, seconds, rounds):
    names = ["direct", "nginx", SYSTEM, "bare Pingora", "api-together"]
    system = Contender(SYSTEM, 9108, [RELEASE / "examples/bare_system", 9108, ENDPOINT_PORT])
    racers = [one for name in names for one in [*bench.contenders, system] if one.name == name]
    results = {one.name: [] for one in racers}
    try:
        for number in range(rounds):
            for contender in racers:
                print(f"{count:,} streams, round {number + 1} of {rounds}: {contender.name}", file=sys.stderr)
                # A fresh process each time, since a process keeps the memory that it has taken.
                contender.stop()
                contender.start(bench.proxy_cores, bench.folder)
                results[contender.name].append(streams(bench, contender, count, seconds))
    finally:
        system.stop()
    median = lambda name, key: statistics.median(run[key] for run in results[name])
    rows = []
    for name in (one.name for one in racers):
        proxied = name != "direct"
        rows.append([
            name,
            f"{median(name, 'rest'):.0f}" if proxied else "",
            f"{median(name, 'memory'):.1f}" if proxied else "",
            f"{median(name, 'memory') - median('bare Pingora', 'memory'):+.1f}" if proxied else "",
            f"{median(name, 'cpu'):.2f}" if proxied else "",
            f"{median(name, 'p50_us'):,.0f}",
            f"{median(name, 'p99_us'):,.0f}",
            f"{median(name, 'p99_us') - median('direct', 'p99_us'):+,.0f}",
            f"{sum(run['cut'] for run in results[name])}",
        ])
    head = ["", "MiB at rest", "KiB a stream", "over bare", "cores used", "an event's p50 µs", "p99 µs", "p99 over direct", "streams cut"]
    note = "" if count == 10_000 else f" (of the 10,000 asked for: a process may have {DESCRIPTORS:,} descriptors here, and a stream takes two)"
    measured = "one round" if rounds == 1 else f"{rounds} rounds, medians"
    title = f"**{count:,} streams{note}**, an event a second each, {seconds} s, {measured}"
    return f"{title}\n\n{table(head, rows)}"


def many_endpoints(folder, port):
    """Writes a config of 200 endpoints, 2,000 names and 100 patterns, each name served by two endpoints."""
    config = api_together_config(port)
    [endpoint, *_] = config["apis"]
    config["apis"] = [
        {key: value for key, value in endpoint.items() if key != "modelMapping"}
        | {
            "id": f"endpoint-{number}",
            "models": [f"model-{(number * 10 + nth) % 2000}" for nth in range(20)] + ([f"family-{number}-*"] if number < 100 else []),
        }
        for number in range(200)
    ]
    path = folder / "many.json"
    path.write_text(json.dumps(config))
    return path


def rate_table(bench, options, rate):
    """Measures the same load through five endpoints and through two hundred."""
    [few] = [one for one in bench.contenders if one.name == "api-together"]
    many = Contender("200 endpoints", 9106, [RELEASE / "api-together", "--config", many_endpoints(bench.folder, 9106)], model="model-1234")
    many.start(bench.proxy_cores, bench.folder)
    rows = []
    try:
        for name, contender, model in [("5 endpoints, mapped", few, few.model), ("200, exact name", many, "model-1234"), ("200, pattern", many, "family-57-x")]:
            body = bench.folder / "many-body.json"
            body.write_bytes(json_body(1024, model=model))
            runs = []
            for _ in range(options.rounds):
                cpu = contender.cpu_seconds()
                command = [options.oha, "--no-tui", "--output-format", "json", "-z", "4s", "-w", "-c", 64, "-q", rate, "--latency-correction", "-m", "POST", "-D", body]
                for header, value in contender.all_headers().items():
                    command += ["-H", f"{header}: {value}"]
                told = bench.on_load_cores([*command, contender.url], 120)
                answered = told["statusCodeDistribution"].get("200", 0)
                runs.append((answered / told["summary"]["total"], told["latencyPercentiles"]["p50"] * 1e6, told["latencyPercentiles"]["p99"] * 1e6, (contender.cpu_seconds() - cpu) / answered * 1e6))
            figures = [f"{statistics.median(run[field] for run in runs):,.0f}" for field in range(4)]
            rows.append([name, *figures, f"{contender.memory_bytes() / MIB:.0f}"])
    finally:
        many.stop()
    head = ["", "requests/s", "p50 µs", "p99 µs", "CPU µs a request", "MiB afterwards"]
    return f"**200 endpoints, 2,000 names, 100 patterns** at {rate:,} requests a second, 64 connections\n\n{table(head, rows)}"


def bodies_table(bench, count=500, size=20 * MIB, bound=512 * MIB):
    """Sends many large bodies at once, with a memory bound that a few of them fill."""
    config = api_together_config(9107)
    config["server"]["memoryBytesMax"] = bound
    path = bench.folder / "bodies.json"
    path.write_text(json.dumps(config))
    contender = Contender("bodies", 9107, [RELEASE / "api-together", "--config", path])
    contender.start(bench.proxy_cores, bench.folder)
    body, idle, peak, statuses, done = json_body(size), contender.memory_bytes(), 0, {}, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, contender.memory_bytes())

    def post(_):
        connection = http.client.HTTPConnection("127.0.0.1", contender.port, timeout=120)
        try:
            connection.request("POST", "/v1/chat/completions", body, contender.all_headers())
            answer = connection.getresponse()
            answer.read()
            return answer.status
        except OSError as error:
            return type(error).__name__
        finally:
            connection.close()

    try:
        watcher = threading.Thread(target=watch)
        watcher.start()
        begun = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(count) as crowd:
            for status in crowd.map(post, range(count)):
                statuses[status] = statuses.get(status, 0) + 1
        seconds = time.monotonic() - begun
        done.set()
        watcher.join()
        alive = contender.answers()
    finally:
        done.set()
        contender.stop()
    told = ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items(), key=str))
    rows = [[f"{bound // MIB} MiB", told, f"{seconds:.1f} s", f"{idle / MIB:.0f} MiB", f"{peak / MIB:.0f} MiB", "yes" if alive else "NO"]]
    head = ["memoryBytesMax", "answers", "in", "memory before", "at most", "serves afterwards"]
    return f"**{count} bodies of {size // MIB} MiB at once**, {count * size / 2**30:.1f} GiB in all\n\n{table(head, rows)}"


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--seconds", type=int, default=30, help="that streams are held open")
    arguments.add_argument("--streams", type=int, default=10_000)
    arguments.add_argument("--rate", type=int, default=10_000, help="requests a second through 200 endpoints")
    arguments.add_argument("--only", nargs="*", choices=["streams", "endpoints", "bodies"])
    arguments.add_argument("--write", action="store_true", help="write the figures into BENCHMARKS.md")
    arguments.add_argument("--oha", default=shutil.which("oha") or pathlib.Path.home() / ".cargo/bin/oha")
    options = arguments.parse_args()
    wanted = lambda name: not options.only or name in options.only
    count = min(options.streams, (DESCRIPTORS - 200) // 2)
    with Bench(["direct", "nginx", "bare Pingora", "api-together"]) as bench:
        parts = [bench.preface("make bench-scale")]
        if wanted("endpoints"):
            parts.append(rate_table(bench, options, options.rate))
        if wanted("bodies"):
            parts.append(bodies_table(bench))
        if wanted("streams"):
            parts.append(streams_table(bench, count, options.seconds, options.rounds))
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.write:
        write("make bench-scale", text)


if __name__ == "__main__":
    main()
