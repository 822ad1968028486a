"""Questions for one server, and what came back. Talks to the server through the `openai` client only."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_ext.serving import Server

ANSWER_TOKENS = 24
CHAT_QUESTION = "What is the capital of France?"
CHAT_ANSWER = "Paris"
METRICS = ("attention_density", "keys_read_total", "pages_read_total", "sparse_steps_total", "dense_steps_total")


@dataclass(frozen=True)
class Plan:
    """What one demo asks.

    Attributes:
        needles: number of needle prompts, at depths spread evenly over the text.
        length: tokens of each needle prompt.
        required: needles that must be found with the plugin.
        options: options of the plugin `quest`; defaults where nothing is given.
    """

    needles: int
    length: int
    required: int
    options: dict[str, int] = field(default_factory=dict)

    def plugin_args(self) -> list[str]:
        """Arguments of `vllm serve` that switch Quest on."""
        args = ["--plugins", "quest"]
        for name, value in self.options.items():
            args += [f"--additional-config.vllm_ext.quest.{name}", str(value)]
        return args


FULL = Plan(needles=5, length=3000, required=4, options={"page_size": 32, "budget": 1536, "dense_below": 1536})
"""Half of the keys, in small pages: Quest's bound gets loose with the page, and this model is small."""
SHORT = Plan(needles=2, length=1500, required=2, options={"budget": 768, "dense_below": 1024})
"""Small, and still with sparse steps: requests of more than `dense_below` tokens read a selection."""


@dataclass(frozen=True)
class Question:
    """One request: a tokenized prompt, or a chat turn where `prompt` is empty."""

    label: str
    text: str
    expected: str
    prompt: tuple[int, ...] = ()


@dataclass
class Answer:
    """What a server said, and how long it took (seconds)."""

    text: str
    right: bool
    first_token_seconds: float
    tokens: int
    tokens_per_second: float
    """Of the tokens after the first, so that reading the prompt does not count."""


@dataclass
class Result:
    """One server's run of all questions."""

    label: str
    command: list[str]
    startup_seconds: float = float("nan")
    answers: list[Answer] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    banner: list[str] = field(default_factory=list)
    log: str = ""

    def found(self, questions: Sequence[Question]) -> int:
        """How many needles were found."""
        return sum(a.right for a, q in zip(self.answers, questions) if q.prompt)

    def metric(self, name: str) -> float | None:
        """A metric of the plugin by its name without `vllm_ext:`, or None where the server has none."""
        return self.metrics.get(f"vllm_ext:{name}")

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return asdict(self)


def make_questions(model: Path, plan: Plan) -> list[Question]:
    """The needle prompts of a plan and one chat turn, the same for every server."""
    from transformers import AutoTokenizer

    from vllm_ext.evaluation.niah import make_niah

    tokenizer = AutoTokenizer.from_pretrained(model)
    questions = []
    for i in range(plan.needles):
        depth = (i + 0.5) / plan.needles
        sample = make_niah(tokenizer, plan.length, depth, seed=i)
        text = f"{sample.prefix} ... ({plan.length:,} tokens, number at {sample.depth:.0%})"
        ids = tuple(sample.prompt_token_ids)
        questions.append(Question(f"needle {i + 1}", text, sample.answers[0], ids))
    questions.append(Question("chat", CHAT_QUESTION, CHAT_ANSWER))
    return questions


def is_right(text: str, expected: str) -> bool:
    """Whether the expected word or number stands in the text by itself."""
    return re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", text) is not None


def _stream(client: Any, model: str, question: Question) -> Any:
    common = {
        "model": model,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if question.prompt:
        return client.completions.create(prompt=list(question.prompt), **common)
    return client.chat.completions.create(messages=[{"role": "user", "content": question.text}], **common)


def ask(client: Any, model: str, question: Question) -> Answer:
    """Send one question and time its stream."""
    begun = time.monotonic()
    first = last = begun
    text, tokens = "", 0
    for chunk in _stream(client, model, question):
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        if not chunk.choices:
            continue
        choice = chunk.choices[0]
        piece = choice.text if question.prompt else choice.delta.content
        if piece:
            last = time.monotonic()
            first = last if not text else first
            text += piece
    spent = last - first
    rate = (tokens - 1) / spent if tokens > 1 and spent > 0 else float("nan")
    return Answer(text.strip(), is_right(text, question.expected), first - begun, tokens, rate)


def message(line: str) -> str:
    """A line of vLLM's log without its head (process, level, time, place)."""
    return re.sub(r"^(\(.*?\) )?[A-Z]+ \d\d-\d\d [\d:]+ \[\S+\] ", "", line)


def banner(log: str) -> list[str]:
    """The plugin's start-up banner out of a server's log, without the log's own line heads."""
    lines: list[str] = []
    for line in log.splitlines():
        bare = message(line)
        if re.match(r"  " if lines else r"vllm-ext \d", bare):
            lines.append(bare)
        elif lines:
            break
    return lines


def run(server: Server, label: str, questions: Sequence[Question], on_answer: Callable[[Question], None]) -> Result:
    """Start `server`, ask everything, read its metrics, stop it.

    Raises:
        vllm_ext.serving.ServerError: the server did not start.
        openai.OpenAIError: a request failed.
    """
    from openai import OpenAI

    result = Result(label, server.command(), log=str(server.log_path))
    with server:
        result.startup_seconds = server.startup_seconds
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300.0, max_retries=0) as client:
            # the first request of a server pays for lazy initialization; it is asked once before the clock counts
            ask(client, server.model, questions[-1])
            for question in questions:
                on_answer(question)
                result.answers.append(ask(client, server.model, question))
        result.metrics = {k: v for k, v in server.metrics().items() if k.startswith("vllm_ext:")}
        result.banner = banner(server.log())
    return result
