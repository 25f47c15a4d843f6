"""What the embedded server does once for an event, not for each of its services. Runs in the server's process.

The server hands each event, as JSON, to those who write it down, match it with automations, record task runs and
stream it to subscribers. Each of them copies and parses it; here the first does, and the others get what it made.
None of them changes an event.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from phasewise.patches import entries
from phasewise.patches.registry import apply

if TYPE_CHECKING:
    from prefect.server.events.schemas.events import ReceivedEvent

#: Events that are remembered for the services that have not come to them yet, which parse them again after that.
_REMEMBERED = 256
#: Bytes of JSON from which an event is parsed for each service: an event may have 1.5 MB, and Prefect's own have 2 kB.
_LARGE = 32_768


def share_events() -> None:
    """Make the services of this server share the events that they parse; before it starts."""
    apply(entries.PARSE_EVENTS_ONCE, _sharing)


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
