"""What docs/clients.md says of the versions that are tried here."""

import json
import re

import servers


def test_versions_are_those_that_are_run():
    text = (servers.HERE / "../../docs/clients.md").read_text()
    tried = set(re.findall(r"`(\S+)` (\d+\.\d+\.\d+)", text))
    node = json.loads((servers.HERE / "package.json").read_text())["devDependencies"]
    python = dict(re.findall(r"^(\w+)==(\S+)$", (servers.HERE / "requirements.txt").read_text(), re.MULTILINE))
    clients = ["@anthropic-ai/sdk", "@openai/codex", "openai", "opencode-ai"]
    assert tried == {(name, node[name]) for name in clients} | {(name, python[name]) for name in ("anthropic", "openai")}
