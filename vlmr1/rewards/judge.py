"""A language model as a judge, behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from vlmr1.errors import SettingError

TASK = (
    "You grade answers. You get a question's correct answer and a student's response. Reply with 1 if the response's "
    "final answer means the same as the correct answer, with 0 if it does not or if there is none. Reply with the "
    "number only."
)
ANSWERS = {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0}
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP statuses worth a retry


class JudgeError(Exception):
    """The judge failed, also after retries. `index` is the place of the completion in the call."""

    def __init__(self, message: str, index: int = 0):
        super().__init__(message)
        self.index = index


class _Failure(Exception):
    """One request failed in a way that a retry may mend."""


@dataclass(frozen=True)
class Judge:
    """Endpoint and request settings of the judge. The API key is read from the environment variable `key_variable`.

    SettingError for a value out of range."""

    url: str  # base URL of the API, such as http://localhost:8000/v1
    model: str
    timeout: float = 60.0  # seconds a request
    retries: int = 3
    concurrency: int = 8
    backoff: float = 0.5  # seconds before the first retry; doubled for each further one
    key_variable: str = "OPENAI_API_KEY"

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise SettingError(f"judge_url is {self.url!r}: it must begin with http:// or https://")
        if not self.model:
            raise SettingError("judge_model is not set: judge_url needs the name of its model")
        if not self.timeout > 0:
            raise SettingError(f"judge_timeout is {self.timeout}: it must be above 0")
        if self.retries < 0:
            raise SettingError(f"judge_retries is {self.retries}: it must not be negative")
        if self.concurrency < 1:
            raise SettingError(f"judge_concurrency is {self.concurrency}: it must be at least 1")

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return 0 or 1 for each (answer, correct answer), in order, with `concurrency` requests at a time.

        JudgeError where a request was refused, or failed 1 + `retries` times.
        """
        if not pairs:
            return []
        with ThreadPoolExecutor(min(self.concurrency, len(pairs))) as executor:
            futures = [executor.submit(self._score, pair, index) for index, pair in enumerate(pairs)]
            try:
                return [future.result() for future in futures]
            except JudgeError:
                for future in futures:
                    future.cancel()
                raise

    def _score(self, pair: tuple[str, str], index: int) -> float:
        for attempt in range(self.retries + 1):
            try:
                return self._ask(pair)
            except _Failure as failure:
                if attempt == self.retries:
                    raise JudgeError(f"{self.url}: {failure}, {attempt + 1} times", index) from failure
                time.sleep(self.backoff * 2**attempt)
            except urllib.error.HTTPError as error:
                raise JudgeError(f"{self.url}: HTTP {error.code} {error.reason}", index) from error
        raise AssertionError("unreachable")

    def _ask(self, pair: tuple[str, str]) -> float:
        answer, expected = pair
        messages = [
            {"role": "system", "content": TASK},
            {"role": "user", "content": f"Correct answer: {expected}\nStudent's response: {answer}"},
        ]
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                reply = json.load(response)["choices"][0]["message"]["content"].strip()
        except urllib.error.HTTPError as error:
            if error.code not in RETRIED:
                raise
            raise _Failure(f"HTTP {error.code} {error.reason}") from error
        except TimeoutError as error:
            raise _Failure(f"no reply in {self.timeout:g} s") from error
        except urllib.error.URLError as error:
            timed_out = isinstance(error.reason, TimeoutError)
            raise _Failure(f"no reply in {self.timeout:g} s" if timed_out else str(error.reason)) from error
        except (HTTPException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise _Failure(f"not a chat completion: {error!r}") from error
        value = ANSWERS.get(reply, math.nan)
        if math.isnan(value):
            raise _Failure(f"the judge replied {reply[:80]!r}, not 0 or 1")
        return value


def judge_of(settings: Any) -> Judge | None:
    """Return the judge of settings that have `judge_url`, `judge_model`, ...; SettingError for a value out of range."""
    if settings.judge_url is not None:
        options = {name: getattr(settings, f"judge_{name}") for name in ("timeout", "retries", "concurrency")}
        return Judge(settings.judge_url, settings.judge_model or "", **options)
    if settings.judge_model is not None:
        raise SettingError("judge_model needs judge_url")
    return None
