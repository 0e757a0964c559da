"""A process that asks questions through a pooler and compares each answer with the expected one.

Its arguments are the URL, the number of calls, and a seed. Its standard input holds the questions
as JSON. It prints "open" once its client is open, and an ``Outcome`` as JSON at its end.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from random import Random
from typing import Any

from attrs import asdict, define, field

from incidentkit import IncidentClient, IncidentKitError

CALLERS = 8
"""Concurrent calls of a process."""

TRIES = 20
"""How often a process tries to open its client."""


@define
class Outcome:
    """The result of a process.

    Attributes:
        calls: Answers and failures.
        wrong: Answers to another question.
        failures: Number of failures by their message.
    """

    calls: int = 0
    wrong: int = 0
    failures: Counter[str] = field(factory=Counter)


@define
class Question:
    """A call that only reads, and its answer.

    Attributes:
        verb: The method of the client.
        arguments: Its arguments.
        answer: The ids of the incidents, or the cursors of the events, that it returns.
    """

    verb: str
    arguments: dict[str, Any]
    answer: list[int | str] = field(factory=list)


async def ask(client: IncidentClient, question: Question) -> list[int | str]:
    """Return the ids or cursors in the answer of a client."""
    answer: Any = await getattr(client, question.verb)(**question.arguments)
    match question.verb:
        case "search":
            return [incident.incident_id for incident in answer.incidents]
        case "history":
            return [event.cursor for event in answer]
        case _:
            incidents = answer if question.verb == "list" else [answer]
            return [incident.incident_id for incident in incidents]


async def run(url: str, calls: int, seed: int, questions: list[Question]) -> Outcome:
    """Ask questions in an order of the process's own, and write an incident between them."""
    outcome = Outcome()
    random = Random(seed)
    random.shuffle(questions)  # each process numbers its statements differently
    left = iter(range(calls))
    for _ in range(TRIES):
        outcome.calls += 1
        try:
            async with IncidentClient.open(url) as client:
                print("open", flush=True)  # noqa: T201
                await asyncio.gather(
                    *(_call(client, left, questions, seed, outcome) for _ in range(CALLERS))
                )
                break
        except IncidentKitError as error:
            outcome.failures[_named(error)] += 1
    return outcome


async def _call(
    client: IncidentClient, left: Any, questions: list[Question], seed: int, outcome: Outcome
) -> None:
    for number in left:
        question = questions[number % len(questions)]
        outcome.calls += 1
        try:
            if number % 10:
                outcome.wrong += await ask(client, question) != question.answer
            else:
                outcome.wrong += not await _writes(client, f"process {seed} writes {number}")
        except IncidentKitError as error:
            outcome.failures[_named(error)] += 1


async def _writes(client: IncidentClient, message: str) -> bool:
    """Return whether an incident that is created and changed keeps what this process gave it."""
    created = await client.create(message, source="partner", incident_type="completed")
    changed = await client.update_status(created.incident_id, "failed")
    found = await client.get(created.incident_id)
    return created.incident_message == message and found == changed


def _named(error: IncidentKitError) -> str:
    cause = error.__cause__
    return f"{error}" if cause is None else f"{error}: {type(cause).__name__}"


if __name__ == "__main__":
    asked = [Question(**question) for question in json.load(sys.stdin)]
    result = asyncio.run(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), asked))
    print(json.dumps(asdict(result)))  # noqa: T201
