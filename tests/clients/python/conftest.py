import signal

import pytest
import servers
from openai import AsyncOpenAI, OpenAI

# A terminated run stops its servers too, as an interrupted one does.
signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def simulator(tmp_path_factory):
    with servers.simulator(tmp_path_factory.mktemp("simulator")) as running:
        yield running


@pytest.fixture(scope="session")
def third_party(tmp_path_factory):
    with servers.third_party(tmp_path_factory.mktemp("third-party")) as running:
        yield running


@pytest.fixture(scope="session")
def start_proxy(simulator, third_party, tmp_path_factory):
    """Starts a proxy on one of the config files; it is for the caller to stop."""

    def start(config):
        folder = tmp_path_factory.mktemp("proxy")
        return servers.proxy(folder, config, SIMULATOR_URL=simulator.found, THIRD_PARTY_URL=third_party.found)

    return start


@pytest.fixture(scope="session")
def proxy(start_proxy):
    with start_proxy("apis.json") as running:
        yield running


@pytest.fixture
def strict_proxy(start_proxy):
    with start_proxy("strict.json") as running:
        yield running


@pytest.fixture
def disabled_proxy(start_proxy):
    with start_proxy("disabled.json") as running:
        yield running


@pytest.fixture
def connect():
    """Makes a client of a proxy. It never tries again by itself, so that each answer is the proxy's first."""
    clients = []

    def make(proxy, **options):
        clients.append(OpenAI(**{**client_options(proxy), **options}))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(proxy, connect):
    return connect(proxy)


@pytest.fixture
def async_client(proxy):
    """To be used in an `async with`, which closes it within its own event loop."""
    return AsyncOpenAI(**client_options(proxy))


def client_options(proxy):
    return {"base_url": f"{proxy.found}/v1", "api_key": servers.CLIENT_KEY, "max_retries": 0, "timeout": 10}


@pytest.fixture
def status(proxy, connect):
    """Reads `GET /v1/status`."""
    client = connect(proxy)
    return lambda: client.get("/status", cast_to=object)
