"""An endpoint that takes responses over WebSockets only, by the package `websockets`, which shares no code with the proxy. It prints what
it is asked, a line of JSON each."""

import asyncio
import json

from websockets.asyncio.server import serve

KEY = "sk-sockets"
TEXT = "Hello over a socket, grüß dich."
USAGE = {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18}


async def answer(socket):
    async for text in socket:
        asked = json.loads(text)
        print(json.dumps({"path": socket.request.path, "model": asked.get("model"), "bytes": len(text)}), flush=True)

        async def say(kind, **members):
            await socket.send(json.dumps({"type": kind, **members}))

        base = {"id": "resp_1", "object": "response", "created_at": 1, "model": asked["model"], "output": []}
        await say("response.created", response=base | {"status": "in_progress"})
        # Codex opens a conversation with a response that generates nothing.
        message = {"id": "msg_1", "type": "message", "role": "assistant"}
        content = [{"type": "output_text", "text": TEXT, "annotations": []}]
        if asked.get("generate", True):
            item = message | {"status": "in_progress", "content": []}
            await say("response.output_item.added", output_index=0, item=item)
            await say("response.output_text.delta", output_index=0, content_index=0, item_id="msg_1", delta=TEXT)
            await say("response.output_item.done", output_index=0, item=message | {"status": "completed", "content": content})
        await say("response.completed", response=base | {"status": "completed", "usage": USAGE})


async def main():
    def check(connection, request):
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return connection.respond(401, "a wrong key\n")

    async with serve(answer, "127.0.0.1", 0, process_request=check) as server:
        print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()


asyncio.run(main())
