"""What a Prefect server in our hands does once for an event, and not once for each of its services.

The server hands each event, as JSON, to those who write it down, match it with automations, record task runs and
stream it to subscribers. Each of them copies and parses it; here the first does, and the others get what it made.
None of them changes an event.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from prefect.server.events.schemas.events import ReceivedEvent
from prefect.server.utilities.messaging.memory import MemoryMessage

#: Events that are remembered for the services that have not come to them yet, which parse them again after that.
_REMEMBERED = 256
#: Bytes of JSON from which an event is parsed for each service: an event may have 1.5 MB, and Prefect's own have 2 kB.
_LARGE = 32_768


def share_events() -> None:
    """Make the services of this server share the events that they parse; before it starts."""
    setattr(ReceivedEvent, "model_validate_json", _sharing(ReceivedEvent.model_validate_json))  # noqa: B010
    # Of a message that each service gets as its own, only the count of retries is changed.
    setattr(MemoryMessage, "__deepcopy__", lambda message, _: replace(message))  # noqa: B010


def _sharing(parse: Callable[[str | bytes], ReceivedEvent]) -> Callable[[str | bytes], ReceivedEvent]:
    """Return *parse* that returns the same event for the same JSON."""
    known: OrderedDict[str | bytes, ReceivedEvent] = OrderedDict()

    def parse_once(data: str | bytes) -> ReceivedEvent:
        event = known.get(data)
        if event is None:
            event = parse(data)
            if len(data) < _LARGE:
                known[data] = event
            if len(known) > _REMEMBERED:
                known.popitem(last=False)
        return event

    return parse_once
