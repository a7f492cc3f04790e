"""The judge, against a server in a thread: replies, key, time-out, retries, refusal, concurrency."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.helpers.rewards import answered, group, sample, values
from vlmr1.errors import RewardError, SettingError
from vlmr1.rewards import Judge, RewardSettings, get_reward, score, score_groups
from vlmr1.rewards.judge import JudgeError


@contextmanager
def serving(reply):
    """A server whose `reply(body, number of the request)` gives an HTTP status and the judge's words."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers.get("Authorization"), body))
            status, words = reply(body, len(requests))
            data = words if isinstance(words, bytes) else chat(words)
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *arguments: None  # a client that has gone
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def chat(words):
    return json.dumps({"choices": [{"message": {"content": words}}]}).encode()


def knows(body, number):
    """A judge to whom only a cat is right."""
    return 200, "1" if body["messages"][-1]["content"].endswith("response: a cat") else "0.0"


def judge_at(url, **options):
    return Judge(url, "tiny", **{"backoff": 0.001, "timeout": 60.0} | options)


def test_replies_and_request(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(knows) as (url, requests):
        settings = RewardSettings(accu_reward_method="llm", judge=judge_at(url))
        groups = [
            group(sample(1, "<answer>cat</answer>"), answered("a cat"), answered("a dog"), "no answer"),
            group(sample(2, "A", accu_reward_method="mcq"), answered("A")),
        ]
        assert values(score_groups(groups, [get_reward("accuracy", settings)])) == [[[1], [0], [0]], [[1]]]
    assert len(requests) == 2  # what has no answer is not asked
    path, key, body = min(requests, key=str)
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert body["model"] == "tiny" and body["temperature"] == 0
    assert body["messages"][-1]["content"] == "Correct answer: cat\nStudent's response: a cat"


def test_one_completion_without_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(knows) as (url, requests):
        for mode in ("strict", "vlm_r1"):
            options = {"accu_reward_method": "llm", "judge": judge_at(url), "mode": mode}
            assert score("accuracy", answered("a cat"), "cat", **options) == 1
    assert [key for _, key, _ in requests] == [None, None]


@pytest.mark.parametrize(
    "failure",
    [(503, "1"), (429, "1"), (200, "maybe"), (200, b"{"), (200, b'{"choices": []}'), (200, b"")],
    ids=["unavailable", "too-many", "words", "not-json", "no-choice", "empty"],
)
def test_a_failure_is_asked_again(failure):
    with serving(lambda body, number: failure if number < 3 else (200, "1")) as (url, requests):
        assert judge_at(url, retries=2).scores([("a", "b")]) == [1]
    assert len(requests) == 3


@pytest.mark.parametrize(
    "reply, attempts, message",
    [
        ((503, "1"), 3, "HTTP 503 Service Unavailable, 3 times"),
        ((200, "maybe"), 3, "the judge replied 'maybe', not 0 or 1, 3 times"),
        ((401, "1"), 1, "HTTP 401 Unauthorized"),
    ],
    ids=["unavailable", "words", "refused"],
)
def test_a_judge_that_keeps_failing_is_an_error_that_names_the_row(reply, attempts, message):
    def mostly(body, number):
        return reply if body["messages"][-1]["content"].endswith("a dog") else (200, "1")

    with serving(mostly) as (url, requests):
        settings = RewardSettings(accu_reward_method="llm", judge=judge_at(url, retries=2, concurrency=1))
        choice = group(sample(3, "A", accu_reward_method="mcq"), answered("A"))  # which is not asked
        groups = [group(sample(1, "cat"), answered("a cat"), "none"), group(sample(2, "cat"), answered("a dog"))]
        groups.insert(0, choice)
        with pytest.raises(RewardError) as caught:
            score_groups(groups, [get_reward("accuracy", settings)])
    text = str(caught.value)
    assert message in text and text.endswith(f"for the row data.jsonl:2 and the completion {answered('a dog')!r}")
    assert isinstance(caught.value.__cause__, JudgeError)
    assert len(requests) == 1 + attempts


def test_a_slow_judge_times_out():
    release, asked = threading.Event(), threading.Semaphore(0)

    def late(body, number):
        asked.release()
        release.wait(60)
        return 200, "1"

    with serving(late) as (url, requests):
        with pytest.raises(JudgeError, match=r"no reply in 0\.1 s, 2 times"):
            judge_at(url, timeout=0.1, retries=1).scores([("a", "b")])
        assert all(asked.acquire(timeout=60) for _ in range(2))
        release.set()
    assert len(requests) == 2


def test_no_judge_there():
    with pytest.raises(JudgeError, match="refused, 2 times"):
        judge_at("http://127.0.0.1:9", retries=1).scores([("a", "b")])


@pytest.mark.parametrize("concurrency", [1, 3])
def test_requests_run_at_once_and_keep_their_order(concurrency):
    together, lock, running, most = threading.Barrier(concurrency), threading.Lock(), 0, 0

    def slowly(body, number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(60)  # as many must be here at once
        with lock:
            running -= 1
        return 200, body["messages"][-1]["content"][-1]

    answers = [str(i % 2) for i in range(9)]
    with serving(slowly) as (url, _):
        scores = judge_at(url, concurrency=concurrency).scores([(answer, "x") for answer in answers])
    assert scores == [float(answer) for answer in answers] and most == concurrency


def test_no_judge_is_set():
    with pytest.raises(SettingError, match="llm needs a judge: set judge_url and judge_model"):
        score("accuracy", answered("a"), "b", accu_reward_method="llm")
