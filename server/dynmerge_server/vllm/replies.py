"""Replies: what vLLM sends back, with the merge told in it: headers, and the `dynmerge` block.

A stream's events pass as they come. Only one that may be the last is held until the next is there,
for the block belongs into the last.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from dynmerge.errors import DynmergeError
from dynmerge_server.applied import Applied
from dynmerge_server.errors import LEFT, answer, status_of
from dynmerge_server.json_body import JSON
from dynmerge_server.openai.asked import REQUEST_ID_HEADER
from dynmerge_server.sse import DONE, EVENT_STREAM
from dynmerge_server.vllm.overheard import USAGE_ONLY, Overheard
from dynmerge_server.vllm.turn import Turn

_END = b"\n\n"
_NOTHING = b"null"  # what a handler of vLLM's answers when its client has left
# In vLLM's events, which have no blanks: the end of a sequence, and the chunk that counts tokens.
_MAY_BE_LAST = (b'"finish_reason":"', b'"choices":[]')


class Reply:
    """One reply on its way out. `complete` says that vLLM sent all of it.

    Without `applied` no more is told than the client's name for the model. What ran without the
    merge of its turn is not sent at all. `overheard` reads along, and `request_id` is what feedback
    may call the request; `counted` says that vLLM was asked for the chunk that counts tokens by us
    alone, so that it is not passed on.
    """

    def __init__(
        self,
        send: Send,
        turn: Turn,
        applied: Applied | None = None,
        timings: Mapping[str, float] = MappingProxyType({}),
        overheard: Overheard | None = None,
        counted: bool = False,
        request_id: str | None = None,
    ) -> None:
        self._send = send
        self._turn = turn
        self._applied = applied
        self._timings = timings
        self._overheard = overheard
        self._counted = counted
        self._request_id = request_id
        self._status = LEFT
        self._start: Message | None = None  # of a reply whose length is not known yet
        self._is_stream = False
        self._held = b""
        self._last: list[bytes] = []  # an event that may be the last
        self._refused = False
        self.complete = False

    async def send(self, message: Message) -> None:
        """Pass a message of vLLM's on, told."""
        if self._refused:
            return
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body":
            await self._continue(message)
        else:
            await self._send(message)

    def end(self, error: BaseException | None = None) -> None:
        """Tell Overheard how it ended: by vLLM's status, by `error`, or because its client left."""
        if self._overheard is not None:
            ended = LEFT if error is None else status_of(error)
            self._overheard.end(self._status if self.complete else ended)

    async def _begin(self, message: Message) -> None:
        headers = MutableHeaders(scope=message)
        self._status = message["status"]
        media = headers.get("content-type", "").split(";")[0].strip().lower()
        if message["status"] == 200:
            if not self._turn.served:
                return await self._refuse()
            if self._applied is not None:
                for name, value in self._applied.headers(self._timings).items():
                    headers.append(name, value)
            if self._request_id is not None:
                headers.setdefault(REQUEST_ID_HEADER, self._request_id)
            self._is_stream = media == EVENT_STREAM and self._applied is not None
            if media == JSON:
                self._start = message
                return None
        return await self._send(message)

    async def _refuse(self) -> None:
        self._refused = self.complete = True
        self._status = 500
        reply = answer(DynmergeError("vLLM answered without the merge it was given"))
        for message in (
            {
                "type": "http.response.start",
                "status": reply.status_code,
                "headers": reply.raw_headers,
            },
            {"type": "http.response.body", "body": reply.body},
        ):
            await self._send(message)

    async def _continue(self, message: Message) -> None:
        data, more = message.get("body", b""), message.get("more_body", False)
        if self._start is not None:
            self._held += data
            if more:
                return
            data = self._told(self._held)
            MutableHeaders(scope=self._start)["content-length"] = str(len(data))
            await self._send(self._start)
        elif self._is_stream:
            data = self._events(data, more)
        self.complete = not more and data != _NOTHING
        if data or not more:
            await self._send({**message, "body": data})

    def _told(self, data: bytes) -> bytes:
        """A whole reply under the client's name for the model, with the block."""
        content = json.loads(data)
        if self._overheard is not None:
            self._overheard.whole(content)
        for each in content if isinstance(content, list) else [content]:
            if isinstance(each, dict) and "model" in each:
                each["model"] = self._turn.model
        if isinstance(content, dict) and self._applied is not None:
            content["dynmerge"] = self._applied.block()
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()

    def _events(self, data: bytes, more: bool) -> bytes:
        """The events of what was held and `data`, but for one that may be the last."""
        *whole, self._held = (self._held + data).split(_END)
        events = self._last + self._read([each + _END for each in whole])
        self._last = []
        ready: list[bytes] = []
        for place, event in enumerate(events):
            following = events[place + 1 : place + 2]
            may_be_last = any(sign in event for sign in _MAY_BE_LAST)
            if may_be_last and not following and more:
                self._last = [event]
            else:
                told = may_be_last and following == [DONE]
                ready.append(self._with_block(event) if told else event)
        return b"".join(ready) + (b"" if more else self._held)

    def _read(self, events: list[bytes]) -> list[bytes]:
        """The same, told to Overheard, without the chunk that was asked for by us alone."""
        if self._overheard is None:
            return events
        for event in events:
            self._overheard.event(event)
        return [each for each in events if not (self._counted and USAGE_ONLY in each)]

    def _with_block(self, event: bytes) -> bytes:
        closing = b"}" + _END
        assert self._applied is not None
        if not event.endswith(closing):
            return event
        block = json.dumps(self._applied.block(), ensure_ascii=False).encode()
        return event.removesuffix(closing) + b',"dynmerge":' + block + closing
