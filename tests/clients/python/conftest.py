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
def scripted_server(tmp_path_factory):
    with servers.Scripted(tmp_path_factory.mktemp("scripted")) as running:
        yield running


@pytest.fixture
def scripted(scripted_server):
    """The scripted endpoint, which has seen nothing yet."""
    scripted_server.forget()
    return scripted_server


@pytest.fixture(scope="session")
def start_proxy(simulator, third_party, scripted_server, tmp_path_factory):
    """Starts a proxy on one of the config files; it is for the caller to stop."""

    def start(config):
        folder = tmp_path_factory.mktemp("proxy")
        urls = {"SIMULATOR_URL": simulator, "THIRD_PARTY_URL": third_party, "SCRIPTED_URL": scripted_server}
        return servers.proxy(folder, config, **{name: server.found for name, server in urls.items()})

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
def scripted_proxy(start_proxy):
    """A proxy of the test's own, as an endpoint whose key is refused is left alone for minutes, and counts begin at 0."""
    with start_proxy("scripted.json") as running:
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
def check_counts(scripted_proxy, connect):
    """Checks that exactly so many answers of the scripted endpoint were counted, each with its reported tokens."""
    client = connect(scripted_proxy)

    def check(endpoint, answers):
        def counted():
            stats = client.get("/token/stats", cast_to=object)["detailedStats"]
            assert set(stats) <= {endpoint}, stats
            models = stats.get(endpoint, {"models": {}})["models"]
            fields = ("requests", "promptTokens", "completionTokens")
            return {
                model: [*(one[field] for field in fields), one["estimated"]["requests"]] for model, one in models.items()
            }

        expected = {
            model: [number, number * servers.Scripted.INPUT_TOKENS, number * servers.Scripted.OUTPUT_TOKENS, 0]
            for model, number in answers.items()
        }
        assert servers.wait_until(lambda: counted() == expected), counted()

    return check


@pytest.fixture
def status(proxy, connect):
    """Reads `GET /v1/status`."""
    client = connect(proxy)
    return lambda: client.get("/status", cast_to=object)
