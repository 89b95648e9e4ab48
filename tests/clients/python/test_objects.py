"""What is made through the proxy is found again, over three endpoints that each know nothing of the others', as it is at one
endpoint asked directly."""

import os

import pytest
import servers
from openai import BadRequestError, NotFoundError, OpenAI

ENDPOINTS = ("a", "b", "c")
TIMES = 7


@pytest.fixture(scope="module")
def keeping(tmp_path_factory):
    running = {}
    try:
        for name in ENDPOINTS:
            running[name] = servers.keeping(tmp_path_factory.mktemp(name), f"sk-{name}")
        yield running
    finally:
        for server in running.values():
            server.stop()


@pytest.fixture(scope="module")
def over_three(keeping, tmp_path_factory):
    urls = {f"{name.upper()}_URL": server.found for name, server in keeping.items()}
    with servers.proxy(tmp_path_factory.mktemp("proxy"), "keeping.json", **urls) as running:
        yield running


@pytest.fixture(params=["directly", "over three endpoints"])
def client(request, tmp_path):
    options = {"max_retries": 0, "timeout": 10}
    if request.param == "directly":
        with servers.keeping(tmp_path, "sk-one") as server:
            with OpenAI(base_url=f"{server.found}/v1", api_key="sk-one", **options) as client:
                yield client
    else:
        proxy = request.getfixturevalue("over_three")
        with OpenAI(base_url=f"{proxy.found}/v1", api_key=servers.CLIENT_KEY, **options) as client:
            yield client


def spread(raw):
    """Which endpoint answered, if it was one of several."""
    return raw.headers.get("x-api-together-endpoint")


def test_files(client):
    contents = [os.urandom(size) for size in (0, 1, 100, 70_000, 1_000_000, 3, 5)]
    before = {file.id for file in client.files.list()}
    made = [client.files.create(file=("f", content), purpose="batch") for content in contents]
    for file, content in zip(made, contents):
        assert file.bytes == len(content)
        assert client.files.retrieve(file.id) == file
        assert client.files.content(file.id).read() == content
    for limit in (1, 3, 100):
        listed = [file.id for file in client.files.list(limit=limit)]
        assert len(listed) == len(set(listed)), "none comes twice"
        assert set(listed) - before == {file.id for file in made}
    for file in made:
        assert client.files.delete(file.id).deleted
        with pytest.raises(NotFoundError):
            client.files.retrieve(file.id)
    assert {file.id for file in client.files.list()} == before


def test_batches_go_where_their_files_are(client):
    for _ in range(TIMES):
        file = client.files.create(file=("f", b"{}"), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        assert client.batches.retrieve(batch.id).input_file_id == file.id
        assert client.files.content(batch.output_file_id).text == "the batch's output"


def test_conversations_and_responses(client):
    for _ in range(TIMES):
        conversation = client.conversations.create()
        assert client.conversations.retrieve(conversation.id).id == conversation.id
        client.responses.create(model="m", input="hello", conversation=conversation.id)
        answer = client.responses.create(model="m", input="hello")
        for _ in range(4):
            before, answer = answer, client.responses.create(model="m", input="and?", previous_response_id=answer.id)
            assert answer.output_text == before.id
        assert client.responses.retrieve(answer.id).id == answer.id
        client.responses.delete(answer.id)
        with pytest.raises(BadRequestError):
            client.responses.create(model="m", input="and?", previous_response_id=answer.id)


def test_vector_stores_and_their_files(client):
    for _ in range(TIMES):
        # An empty store may be anywhere; a file goes into one beside it, so it is made there.
        store = client.vector_stores.create()
        file = client.files.create(file=("f", b"text"), purpose="assistants")
        for _ in range(20):
            if client.files.with_raw_response.retrieve(file.id).headers.get("x-api-together-endpoint") == spread(
                client.vector_stores.with_raw_response.retrieve(store.id)
            ):
                break
            file = client.files.create(file=("f", b"text"), purpose="assistants")
        attached = client.vector_stores.files.create(vector_store_id=store.id, file_id=file.id)
        assert attached.vector_store_id == store.id
        assert client.vector_stores.files.retrieve(file.id, vector_store_id=store.id).id == file.id
        assert client.vector_stores.files.delete(file.id, vector_store_id=store.id).deleted
        assert client.files.retrieve(file.id).id == file.id, "a file that is taken out of a store is still one"
        assert client.vector_stores.delete(store.id).deleted


def test_all_endpoints_are_used(keeping, over_three):
    with OpenAI(base_url=f"{over_three.found}/v1", api_key=servers.CLIENT_KEY, max_retries=0) as client:
        used = set()
        # One is chosen at random each time.
        for _ in range(60):
            used.add(spread(client.conversations.with_raw_response.create()))
            if used == set(ENDPOINTS):
                break
        assert used == set(ENDPOINTS), over_three.text()
        with pytest.raises(BadRequestError, match="made at different endpoints|different"):
            file = client.files.with_raw_response.create(file=("f", b"x"), purpose="assistants")
            while spread(raw := client.vector_stores.with_raw_response.create()) == spread(file):
                pass
            client.vector_stores.files.create(vector_store_id=raw.parse().id, file_id=file.parse().id)
