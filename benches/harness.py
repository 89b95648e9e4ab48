"""Common parts of the benchmarks: the programs that are compared, the machine, and the place of the figures."""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
RELEASE = ROOT / "target/release"
TOOLS = ROOT / "target/bench"
ENDPOINT_PORT = 9100
LOG_OFF = "api-together, request log off"
PAGE_OPEN = "api-together, page open"
KEY = "sk-bench-client-key"
ADMIN_KEY = "sk-bench-admin-key"
MODEL = "bench"
START_SECONDS = 60
TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# The most that this process may have: each stream takes two in a proxy.
DESCRIPTORS = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def json_body(size, stream=False, model=MODEL):
    """Returns a chat request of about this size, with the model where SDKs put it: behind the messages."""
    begin = '{"stream":true,' if stream else "{"
    frame = f'{begin}"messages":[{{"role":"user","content":""}}],"temperature":0.7,"model":"{model}"}}'
    content = "All work and no play makes Jack a dull boy. "
    content = (content * (size // len(content) + 1))[: max(0, size - len(frame))]
    return frame.replace('"content":""', f'"content":"{content}"').encode()


@dataclasses.dataclass
class Contender:
    """A program between the load generator and the endpoint; without a command, the endpoint itself."""

    name: str
    port: int
    command: list = dataclasses.field(default_factory=list)
    headers: dict = dataclasses.field(default_factory=dict)
    environment: dict = dataclasses.field(default_factory=dict)
    # Other gateways are so much slower that only their throughput is measured.
    is_gateway: bool = False
    # A file that has to exist; otherwise the contender is left out.
    needs: pathlib.Path = None
    # True if it measures its own share of a request's time.
    tells_own: bool = False
    model: str = MODEL
    # True if its page is kept up to date all the time, as where somebody looks at it.
    is_watched: bool = False
    process: subprocess.Popen = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1/chat/completions"

    def all_headers(self):
        return {"authorization": f"Bearer {KEY}", "content-type": "application/json"} | self.headers

    def start(self, cores, folder):
        """Starts it on these cores, and waits until a chat request goes through it."""
        if not self.command:
            return
        if self.answers():
            raise SystemExit(f"something else answers on port {self.port} already; end it first")
        path = folder / f"{self.name}.log"
        environment = os.environ | {"PATH": f"{TOOLS}/litellm/bin:{os.environ['PATH']}"} | self.environment
        with path.open("wb") as log:
            command = ["taskset", "-c", cores, *map(str, self.command)]
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                last_words = "\n".join(path.read_text(errors="replace").splitlines()[-15:])
                raise SystemExit(f"{self.name} does not start; its last words:\n{last_words}")
            time.sleep(0.1)
        if self.is_watched:
            threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        """Reads the changes of the page's first view, as a browser does."""
        url = f"http://127.0.0.1:{self.port}/v1/admin/live?view=now"
        request = urllib.request.Request(url, headers={"authorization": f"Bearer {ADMIN_KEY}"})
        with contextlib.suppress(OSError), urllib.request.urlopen(request) as changes:
            for _ in changes:
                pass

    def logged(self):
        """Returns how many requests were written to its request log, and how many were dropped."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/metrics", headers=self.all_headers())
        with urllib.request.urlopen(request, timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        count = lambda name: sum(int(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))
        return tuple(count(f"api_together_request_log_{name}_total") for name in ("written", "dropped"))

    def answers(self):
        body = json_body(1024, model=self.model)
        request = urllib.request.Request(self.url, data=body, headers=self.all_headers())
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return b"All work and no play" in answer.read()
        except OSError:
            return False

    def stop(self):
        if not self.process:
            return
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal_number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        self.process = None

    def processes(self):
        """Yields, for its process and all children, the fields of the `stat` file that follow the name."""
        for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                if self.process and int(fields[3]) == self.process.pid:
                    yield fields

    def cpu_seconds(self):
        """Returns user and system time."""
        return sum(int(fields[11]) + int(fields[12]) for fields in self.processes()) / TICKS

    def own_seconds(self):
        """Returns its own share of all requests so far, as it reports it, and their number."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/metrics", headers=self.all_headers())
        with urllib.request.urlopen(request, timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        told = dict(line.rsplit(" ", 1) for line in lines if line.startswith("api_together_own_seconds_"))
        return float(told["api_together_own_seconds_sum"]), int(told["api_together_own_seconds_count"])

    def memory_bytes(self):
        """Returns resident memory."""
        return sum(int(fields[21]) for fields in self.processes()) * PAGE_BYTES


class Bench:
    """The running endpoint and contenders, each on its own cores."""

    def __init__(self, names=None):
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        cores = sorted(os.sched_getaffinity(0))
        half = len(cores) // 2
        if not half:
            raise SystemExit("two processor cores are needed at least: one for the proxies, one for the load")
        self.proxy_cores = ",".join(map(str, cores[:half]))
        self.load_cores = ",".join(map(str, cores[half:]))
        self.names = names
        self.contenders = []

    def __enter__(self):
        self.folder_guard = tempfile.TemporaryDirectory(prefix="api-together-bench-")
        self.folder = pathlib.Path(self.folder_guard.name)
        command = ["taskset", "-c", self.load_cores, str(RELEASE / "examples/endpoint"), str(ENDPOINT_PORT)]
        self.endpoint = subprocess.Popen(command)
        try:
            wait_for_port(ENDPOINT_PORT)
            for contender in all_contenders(self.folder):
                if self.names and contender.name not in self.names:
                    continue
                if contender.needs and not contender.needs.exists():
                    print(f"{contender.name} is not installed and is left out", file=sys.stderr)
                    continue
                self.contenders.append(contender)
                if not contender.is_gateway:
                    contender.start(self.proxy_cores, self.folder)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for contender in self.contenders:
            contender.stop()
        self.endpoint.terminate()
        self.endpoint.wait()
        self.folder_guard.cleanup()

    def start_gateways(self):
        """Starts the other gateways, and returns those that run. They come last, so that their background work disturbs no other run."""
        running = []
        for gateway in (one for one in self.contenders if one.is_gateway):
            try:
                gateway.start(self.proxy_cores, self.folder)
                running.append(gateway)
            except SystemExit as error:
                # The figures measured so far must not be lost.
                gateway.stop()
                print(f"{error}\n{gateway.name} is left out", file=sys.stderr)
        return running

    def on_load_cores(self, command, seconds_max):
        """Runs a load generator that prints JSON."""
        command = ["taskset", "-c", self.load_cores, *map(str, command)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds_max, check=False)
        if done.returncode:
            raise SystemExit(f"{command[3]}: {done.stderr}")
        return json.loads(done.stdout)

    def preface(self, command):
        """Returns the date, the commit and the machine."""
        commit = first_line(["git", "-C", ROOT, "rev-parse", "--short=10", "HEAD"])
        changed = first_line(["git", "-C", ROOT, "status", "--porcelain", "--untracked-files=no", "src", "benches", "Cargo.toml"])
        model = next((line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
        gib = PAGE_BYTES * os.sysconf("SC_PHYS_PAGES") / 2**30
        return (
            f"{datetime.date.today()}, commit {commit}{' and changes on top of it' if changed else ''}; {model}, "
            f"{os.cpu_count()} cores, {gib:.0f} GiB, Linux {platform.release()}. The proxies had core {self.proxy_cores}, the load and "
            f"the endpoint core {self.load_cores}. Command: `{command}`."
        )


def wait_for_port(port):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port}")


def first_line(command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0] if lines else ""


def all_contenders(folder):
    """Returns all contenders, with their configs written into a folder."""
    (folder / "apis.json").write_text(json.dumps(api_together_config()))
    for name, port, more in (("log-off", 9106, {"requestLog": {"enabled": False}}), ("page-open", 9107, {"adminKey": ADMIN_KEY})):
        config = api_together_config(port)
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "apis.json").write_text(json.dumps(config | {"server": config["server"] | more}))
    (folder / "nginx.conf").write_text(nginx_config(folder))
    (folder / "litellm.yaml").write_text(LITELLM_CONFIG)
    portkey = TOOLS / "portkey/node_modules/@portkey-ai/gateway/build/start-server.js"
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") or "/usr/sbin/nginx"
    litellm = TOOLS / "litellm/bin/litellm"
    return [
        Contender("direct", ENDPOINT_PORT),
        Contender("nginx", 9101, [nginx, "-p", folder, "-c", folder / "nginx.conf", "-e", "stderr"], needs=pathlib.Path(nginx)),
        Contender("bare Pingora", 9102, [RELEASE / "examples/bare", 9102, ENDPOINT_PORT]),
        Contender("api-together", 9103, [RELEASE / "api-together", "--config", folder / "apis.json"], tells_own=True),
        Contender(LOG_OFF, 9106, [RELEASE / "api-together", "--config", folder / "log-off/apis.json"], tells_own=True),
        Contender(
            PAGE_OPEN,
            9107,
            [RELEASE / "api-together", "--config", folder / "page-open/apis.json"],
            tells_own=True,
            is_watched=True,
        ),
        Contender(
            "LiteLLM",
            9104,
            [litellm, "--config", folder / "litellm.yaml", "--host", "127.0.0.1", "--port", 9104, "--num_workers", 1],
            environment={"LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
            is_gateway=True,
            needs=litellm,
        ),
        Contender(
            "Portkey",
            9105,
            ["node", portkey, "--port=9105", "--headless"],
            headers={"x-portkey-provider": "openai", "x-portkey-custom-host": f"http://127.0.0.1:{ENDPOINT_PORT}/v1"},
            environment={"NODE_ENV": "production", "TRUSTED_CUSTOM_HOSTS": "127.0.0.1"},
            is_gateway=True,
            needs=portkey,
        ),
    ]


def api_together_config(port=9103):
    """Returns a config with all defaults, and with limits on every endpoint that are never reached."""
    endpoint = {
        "baseUrl": f"http://127.0.0.1:{ENDPOINT_PORT}/v1",
        "apiKey": "sk-bench-endpoint-key",
        "models": ["bench-*"],
        "modelMapping": {MODEL: "bench-large"},
        "rpm": 100_000_000,
        "rpd": 1_000_000_000,
    }
    return {
        # By these headers the load says how the endpoint is to answer.
        "server": {"host": "127.0.0.1", "port": port, "apiKey": KEY, "forwardHeaders": ["x-pace-ms", "x-events"]},
        "apis": [endpoint | {"id": f"endpoint-{number}"} for number in range(1, 6)],
    }


def nginx_config(folder):
    """Returns a usual config for a proxy: keep-alive, no buffering, an access log."""
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    return f"""
worker_processes {len(os.sched_getaffinity(0)) // 2};
daemon off;
pid {folder}/nginx.pid;
worker_rlimit_nofile {DESCRIPTORS};
events {{ worker_connections 30000; }}
http {{
  {temporary}
  access_log {folder}/nginx-access.log;
  client_max_body_size 64m; client_body_buffer_size 128k; keepalive_requests 1000000000;
  upstream endpoint {{ server 127.0.0.1:{ENDPOINT_PORT}; keepalive 256; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:9101 backlog=16384;
    location / {{
      proxy_pass http://endpoint; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_request_buffering off;
    }}
  }}
}}
"""


LITELLM_CONFIG = f"""
model_list:
  - model_name: {MODEL}
    litellm_params: {{model: openai/bench-large, api_base: "http://127.0.0.1:{ENDPOINT_PORT}/v1", api_key: sk-bench-endpoint-key}}
general_settings: {{master_key: {KEY}}}
"""


def cell(value, form):
    return "" if value is None else form.format(value)


def table(head, rows):
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(row):
        return "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def write(command, text):
    """Writes figures into BENCHMARKS.md, between the markers of this command."""
    path = ROOT / "BENCHMARKS.md"
    begin, end = f"<!-- written by {command} -->", f"<!-- end of {command} -->"
    before, _, rest = path.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path} has no place for the figures: {begin} … {end}")
    path.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")
