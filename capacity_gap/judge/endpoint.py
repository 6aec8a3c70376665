"""A judge behind an OpenAI-compatible endpoint. The key is read from the environment and goes nowhere but there."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from capacity_gap.settings.errors import UserError

MAX_TOKENS = 512  # of a judgement
SHOWN = 300  # characters of what an endpoint says when it refuses


@dataclass(frozen=True)
class Reply:
    """What a judge said; `whole`: it said something, and ended by itself."""

    text: str
    tokens_in: int
    tokens_out: int
    whole: bool = True


Ask = Callable[[list[dict[str, str]]], Reply]  # of chat messages


def endpoint(url: str, model: str, key_env: str, *, max_tokens: int = MAX_TOKENS) -> Ask:
    """A function that asks the judge; greedy where the endpoint allows it, so that it says the same again.

    Raises:
        UserError: the client is not installed.
    """
    try:
        import openai
    except ImportError as error:
        raise UserError("judging needs the openai client: pip install 'capacity_gap[judge]'.") from error
    key = os.environ.get(key_env) or ""
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
                        f"the judge {model} at {url} does not answer: {_said(error, key)} What it has said so far is "
                        f"kept; check --endpoint, --model and the key in ${key_env}, and start the same command again."
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


def _said(error: Exception, key: str) -> str:
    """Kind, status and words of an error, without the key."""
    words = " ".join(str(error).split())
    words = words.replace(key, "[key]") if key else words
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
        raise ValueError(f"the reply is no chat completion ({said})")
    content, used = getattr(message, "content", None), getattr(said, "usage", None)
    text = content if isinstance(content, str) else ""
    return Reply(
        text,
        getattr(used, "prompt_tokens", None) or 0,
        getattr(used, "completion_tokens", None) or 0,
        whole=bool(text.strip()) and getattr(choice, "finish_reason", None) not in ("length", "content_filter"),
    )
