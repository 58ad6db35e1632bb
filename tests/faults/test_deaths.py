"""Processes that die or hang in the middle of streams: the clients hear the same text as on a quiet day."""

from __future__ import annotations

import json
import random
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager

import psutil
import pytest

from tests.e2e.serving import Server, wait_ready
from tests.faults.load import Load, check_undisturbed, requests

Serve = Callable[..., AbstractContextManager[Server]]
NULL = ("--device", "null", "--null-step-ms", "15")
CPU = ("--device", "cpu")


def find(server: Server, role: str) -> psutil.Process:
    """A process by its role, also while it is being started again."""
    deadline = time.monotonic() + 30
    while (child := server.children().get(role)) is None:
        assert time.monotonic() < deadline, role
        time.sleep(0.02)
    return child


def kill_at(load: Load, server: Server, role: str, draw: random.Random, most: int) -> None:
    load.wait_chunks(draw.randint(most // 10, most))
    victim = find(server, role)
    victim.kill()
    psutil.wait_procs([victim], timeout=10)


def health(server: Server, path: str) -> int:
    try:
        with urllib.request.urlopen(server.url + path, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


@pytest.mark.parametrize("role", ["tokenizer 0", "scheduler", "worker 0"])
def test_a_death_changes_no_text_on_cpu(serve: Serve, draw: random.Random, role: str) -> None:
    asked = requests(12, 60)
    with serve(*CPU) as server:
        worker = find(server, "worker 0").pid
        check_undisturbed(server, asked, lambda load: kill_at(load, server, role, draw, 300))
        if role != "worker 0":
            assert find(server, "worker 0").pid == worker, "the weights had to be loaded again"


@pytest.mark.parametrize("role", ["tokenizer 1", "scheduler", "worker 0"])
def test_a_death_in_the_middle_of_many_streams(serve: Serve, draw: random.Random, role: str) -> None:
    asked = requests(96, 60)
    with serve(*NULL, "--tokenizer-workers", "2") as server:
        check_undisturbed(server, asked, lambda load: kill_at(load, server, role, draw, 3000))


def test_two_deaths_in_one_life_of_a_stream(serve: Serve, draw: random.Random) -> None:
    roles = draw.sample(["tokenizer 0", "scheduler", "worker 0"], 2)
    print(f"killed in this order: {roles}")
    with serve(*NULL) as server:

        def disturb(load: Load) -> None:
            kill_at(load, server, roles[0], draw, 300)
            wait_ready(server)
            kill_at(load, server, roles[1], draw, 600)

        check_undisturbed(server, requests(24, 120), disturb)


@pytest.mark.parametrize("role", ["tokenizer 0", "scheduler", "worker 0"])
def test_a_process_that_hangs_is_replaced(serve: Serve, draw: random.Random, role: str) -> None:
    with serve(*NULL, "--hang-timeout-s", "2", "--worker-hang-timeout-s", "2") as server:
        hung = find(server, role)

        def disturb(load: Load) -> None:
            load.wait_chunks(draw.randint(1, 400))
            hung.send_signal(signal.SIGSTOP)

        check_undisturbed(server, requests(24, 60), disturb)
        assert find(server, role).pid != hung.pid
        assert "is killed" in server.log.read_text()


def test_a_long_step_is_no_false_alarm(serve: Serve) -> None:
    options = ("--device", "null", "--null-step-ms", "4000", "--hang-timeout-s", "2")
    with serve(*options) as server:
        told = Load(server, requests(1, 2)).start().join()
        assert told[0].outcome == "finished"
        assert "silent" not in server.log.read_text()


@pytest.mark.parametrize("role", ["scheduler", "worker 0", "tokenizer 0"])
def test_no_crash_loop(serve: Serve, draw: random.Random, role: str) -> None:
    with serve(*NULL, "--max-restarts", "1") as server:
        load = Load(server, requests(12, 2000)).start()
        kill_at(load, server, role, draw, 200)
        wait_ready(server)
        load.wait_chunks(load.num_chunks + 50)
        find(server, role).kill()
        load.join()
        assert load.outcomes() == {"engine_failed": 12}
        assert (health(server, "/health/live"), health(server, "/health/ready")) == (200, 503)
        late = Load(server, requests(1, 5)).start()
        late.join()
        assert late.outcomes() == {"engine_failed": 1}
        assert "the server is not ready until restarted" in server.log.read_text()
        assert server.stop() == 1


def test_an_api_process_takes_only_its_own_connections(serve: Serve, draw: random.Random) -> None:
    with serve(*NULL, "--api-workers", "2") as server:
        load = Load(server, requests(32, 200)).start()
        kill_at(load, server, "api 1", draw, 500)
        load.join()
        outcomes = load.outcomes()
        cut = {
            name: pid
            for name, pid in outcomes.items()
            if name in ("RemoteProtocolError", "APIConnectionError", "ReadError")
        }
        assert outcomes["finished"] + sum(cut.values()) == 32, outcomes
        assert outcomes["finished"] > 0
        wait_ready(server)
        assert find(server, "api 1").is_running()


def test_requests_of_a_dead_api_process_are_aborted(serve: Serve, draw: random.Random) -> None:
    with serve(*NULL) as server:
        load = Load(server, requests(16, 1900)).start()
        kill_at(load, server, "api 0", draw, 500)
        load.join()
        assert load.outcomes()["finished"] == 0
        wait_ready(server)
        deadline = time.monotonic() + 5  # statistics come once a second, and the streams would run for half a minute
        engine = {"running": -1, "waiting": -1}
        while any(engine[key] for key in ("running", "waiting")) and time.monotonic() < deadline:
            with urllib.request.urlopen(server.url + "/stats", timeout=10) as answer:
                engine = json.load(answer)["engine"]
            time.sleep(0.1)
        assert (engine["running"], engine["waiting"]) == (0, 0)


def test_comments_keep_the_connection_open_during_a_pause(serve: Serve) -> None:
    body = {"model": "tiny-chat", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 300}
    with serve(*NULL) as server:
        request = urllib.request.Request(
            server.url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            lines = [answer.readline() for _ in range(20)]
            find(server, "scheduler").kill()
            lines += answer.readlines()
    assert b": keep-alive\n" in lines
    assert b"data: [DONE]\n" in lines
