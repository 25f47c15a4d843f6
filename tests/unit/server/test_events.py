from __future__ import annotations

import subprocess
import sys

from prefect.server.events.schemas.events import ReceivedEvent

from phasewise.server.events import _LARGE, _REMEMBERED, _sharing

PUBLISH_TO_TWO_SERVICES = """
import asyncio

from phasewise.server.events import share_events

share_events()

from uuid import uuid4
from prefect.server.events.messaging import EventPublisher
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.server.utilities.messaging.memory import Cache, Consumer, Publisher, Topic
from prefect.types._datetime import now


async def main():
    got = {"a": [], "b": []}

    def service(name):
        async def handle(message):
            got[name].append((ReceivedEvent.model_validate_json(message.data), message))
            if name == "a" and len(got["a"]) == 1:
                raise RuntimeError("again")

        return handle

    consumers = [asyncio.create_task(Consumer("events").run(service(name))) for name in got]
    event = ReceivedEvent(
        occurred=now("UTC"), event="something", resource={"prefect.resource.id": "x"}, payload={"a": [1]}, id=uuid4()
    )
    await EventPublisher(Publisher("events", Cache())).publish_event(event)
    while len(got["a"]) < 2 or not got["b"]:
        await asyncio.sleep(0.01)
    (first, _), (again, _) = got["a"]
    [(other, message)] = got["b"]
    print(first == event, first is again is other, message.retry_count)
    for consumer in consumers:
        consumer.cancel()


asyncio.run(main())
"""


def test_services_get_one_event_and_each_its_own_message() -> None:
    # In a process of its own: it changes how the server of its process hands out events.
    done = subprocess.run([sys.executable, "-c", PUBLISH_TO_TWO_SERVICES], capture_output=True, text=True, check=False)

    assert done.stdout.split() == ["True", "True", "0"], done.stderr


def test_only_the_latest_events_that_are_not_large_are_remembered() -> None:
    parsed = []

    def parse(data: str | bytes) -> ReceivedEvent:
        parsed.append(data)
        return ReceivedEvent.model_construct(event=str(data))

    share = _sharing(parse)
    texts = [str(number) for number in range(_REMEMBERED + 1)]
    assert [share(text).event for text in texts] == texts
    assert share(texts[-1]) is share(texts[-1])
    assert parsed == texts
    share(texts[0])

    assert parsed == [*texts, texts[0]]

    large = "x" * _LARGE
    assert share(large) is not share(large)
