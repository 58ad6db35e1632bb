"""Deadlines through the whole server: 504 or an error event, and everything of the request is free at once."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from tests.e2e.serving import Server
from tests.faults.flood import Flood, client, stats, wait_stats

Serve = Callable[..., AbstractContextManager[Server]]
LONG: dict[str, Any] = {"prompt": "x", "max_tokens": 1900, "ignore_eos": True}  # 38 s


async def test_waiting_running_and_streaming_requests_end_at_their_deadline(serve: Serve) -> None:
    with serve("--device", "null", "--null-step-ms", "20", "--max-num-seqs", "2") as server:
        async with client(server) as http:
            flood = Flood()
            running = [asyncio.create_task(flood.post(http, {**LONG, "timeout": 3})) for _ in range(2)]
            while stats(server, "engine")["running"] < 2:
                await asyncio.sleep(0.05)
            await flood.post(http, {**LONG, "timeout": 0.3})  # while both rows are taken
            assert not any(task.done() for task in running)
            answer = await http.post("/v1/completions", json=LONG, headers={"x-request-timeout-s": "0.2"})
            assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout_error")
            await asyncio.gather(*running)
            assert flood.outcomes == {"deadline_exceeded": 3}

            answer = await http.post("/v1/completions", json={**LONG, "stream": True, "timeout": 1})
            assert answer.status_code == 200
            *chunks, last = [part.removeprefix("data: ") for part in answer.text.split("\n\n") if part]
            assert 2 < len(chunks) < 200
            assert all(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
            error = json.loads(last)["error"]
            assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")

            # One that is in time notices nothing.
            await flood.post(http, {**LONG, "max_tokens": 5, "timeout": 60})
            assert flood.outcomes["finished"] == 1
        wait_stats(server, "engine", lambda found: found["expired"] == {"waiting": 2, "running": 3})
        wait_stats(server, "engine", lambda found: not (found["running"] or found["waiting"]))
        found = stats(server, "engine")
        assert (found["kv_blocks_used"], found["queued_tokens"]) == (0, 0)
        # The api process tells its own figures once a second.
        wait_stats(server, "api", lambda found: found["errors"].get("deadline_exceeded") == 5)


async def test_a_deadline_is_kept_while_the_scheduler_hangs(serve: Serve) -> None:
    """Neither tokenizer nor scheduler can end it: the api process does, and what comes back is freed."""
    with serve("--device", "null", "--null-step-ms", "20", "--hang-timeout-s", "60") as server:
        scheduler = server.children()["scheduler"]
        async with client(server) as http:
            flood = Flood()
            running = asyncio.create_task(flood.post(http, {**LONG, "timeout": 2}))
            while stats(server, "engine")["running"] < 1:
                await asyncio.sleep(0.05)
            scheduler.send_signal(signal.SIGSTOP)
            await asyncio.gather(running, flood.post(http, {**LONG, "timeout": 0.5}))
            assert flood.outcomes == {"deadline_exceeded": 2}
            scheduler.send_signal(signal.SIGCONT)
            await flood.post(http, {**LONG, "max_tokens": 5})
            assert flood.outcomes["finished"] == 1
        wait_stats(server, "api", lambda found: found["expired"] == 2)
        wait_stats(server, "engine", lambda found: not (found["running"] or found["waiting"]))
