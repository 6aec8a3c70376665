"""A judge behind an OpenAI-compatible endpoint. The key is read from the environment and goes nowhere but there."""

import ipaddress
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from capacity_gap.settings.errors import UserError

MAX_TOKENS = 512  # of a judgement
SHOWN = 300  # characters of what an endpoint says when it refuses


@dataclass(frozen=True)
class Reply:
    """A judge's reply; `whole`: it is not empty and not cut off."""

    text: str
    tokens_in: int
    tokens_out: int
    whole: bool = True


Ask = Callable[[list[dict[str, str]]], Reply]  # of chat messages


def endpoint(url: str, model: str, key_env: str, *, max_tokens: int = MAX_TOKENS) -> Ask:
    """A function that calls the judge; greedy where the endpoint allows it, so that replies repeat.

    Raises:
        UserError: the client is not installed, or the URL is none.
    """
    try:
        import openai
    except ImportError as error:
        raise UserError("judging needs the openai client: pip install 'capacity_gap[judge]'.") from error
    key = os.environ.get(key_env) or ""
    check_url(url)
    if key and is_open(url):
        print(
            f"note: the key in ${key_env} goes to {redacted(url)} over http, unencrypted. Use https.", file=sys.stderr
        )
    client: Any = openai.OpenAI(base_url=url, api_key=key or "none", max_retries=3, timeout=120.0)
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens}

    def ask(messages: list[dict[str, str]]) -> Reply:
        nonlocal options
        while True:
            try:
                return _reply(client.chat.completions.create(model=model, messages=messages, **options))
            except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON, or no completion
                other = _accepted(options, error)
                if other is None:
                    raise UserError(
                        f"the judge {model} at {redacted(url)} does not answer: {_said(error, key, url)} Its replies "
                        f"so far are kept; check --endpoint, --model and the key in ${key_env}, and run the same "
                        "command again."
                    ) from None  # the client's own traceback may quote the key
                options = other

    return ask


def _accepted(options: dict[str, Any], error: Exception) -> dict[str, Any] | None:
    """Options without the one that the endpoint refuses, if it is one that models which reason are known to refuse."""
    if getattr(error, "status_code", None) not in (400, 422):
        return None
    said = str(error)
    if "max_tokens" in options and "max_completion_tokens" in said:
        rest = {name: value for name, value in options.items() if name != "max_tokens"}
        return rest | {"max_completion_tokens": options["max_tokens"]}
    if "temperature" in options and "temperature" in said:
        return {name: value for name, value in options.items() if name != "temperature"}
    return None


def check_url(url: str) -> None:
    """Raises `UserError` unless a URL can be asked."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        # What was given is not repeated: where a password stands in it cannot be told.
        raise UserError("--endpoint is not a URL. Write one such as http://localhost:8000/v1.")


def redacted(url: str) -> str:
    """A URL without the name, the password and the query in it."""
    return re.sub(r"//[^/?#]*@", "//[redacted]@", re.sub(r"[?#].*", "", url, flags=re.DOTALL))


def is_open(url: str) -> bool:
    """Whether what is sent can be read on its way: plain http to another machine."""
    parts = urlsplit(url)
    if parts.scheme != "http":
        return False
    try:
        return not ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname != "localhost"


def _said(error: Exception, key: str, url: str) -> str:
    """Kind, status and words of an error, without the key and what is secret in the URL."""
    words = " ".join(str(error).split()).replace(url, redacted(url))
    words = words.replace(key, "[key]") if key else words
    if password := urlsplit(url).password:
        words = words.replace(password, "[redacted]")
    return f"{type(error).__name__}: {words[:SHOWN].rstrip('.')}."


def _reply(said: Any) -> Reply:
    """Reads a completion; servers that are only nearly compatible send anything.

    Raises:
        ValueError: it is none.
    """
    choices = getattr(said, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    if message is None:
        raise ValueError(f"the reply is not a chat completion ({said})")
    content, used = getattr(message, "content", None), getattr(said, "usage", None)
    text = content if isinstance(content, str) else ""
    return Reply(
        text,
        getattr(used, "prompt_tokens", None) or 0,
        getattr(used, "completion_tokens", None) or 0,
        whole=bool(text.strip()) and getattr(choice, "finish_reason", None) not in ("length", "content_filter"),
    )
