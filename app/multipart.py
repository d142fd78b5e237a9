"""multipart/form-data as a stream of events, without a spool: what to do with the bytes is the caller's choice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from artifacts.errors import MalformedRequest, UnsupportedMedia

MAX_PART_HEADERS = 8
MAX_HEADER_BYTES = 4096


@dataclass(frozen=True, slots=True)
class PartBegin:
    """A part begins: its field name and, for a file, the client's file name."""

    name: str
    file_name: str | None


@dataclass(frozen=True, slots=True)
class PartData:
    data: bytes


@dataclass(frozen=True, slots=True)
class PartEnd:
    pass


PartEvent = PartBegin | PartData | PartEnd


def boundary_of(content_type: str) -> bytes:
    """The boundary in a Content-Type header.

    Raises:
        UnsupportedMedia: not multipart/form-data.
        MalformedRequest: no boundary.
    """
    media_type, options = parse_options_header(content_type)
    if media_type != b"multipart/form-data":
        raise UnsupportedMedia(
            f"The body has content type {content_type[:80]!r}.", hint="Send the files as multipart/form-data."
        )
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise MalformedRequest("The Content-Type header has no multipart boundary.")
    return boundary


class _EventParser:
    """Turns the parser's callbacks into events; a part's headers become one event."""

    def __init__(self, boundary: bytes) -> None:
        self.finished = False
        self._events: list[PartEvent] = []
        self._headers: dict[bytes, bytes] = {}
        self._field = bytearray()
        self._value = bytearray()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._headers.clear,
                "on_header_begin": self._begin_header,
                "on_header_field": self._add_to_field,
                "on_header_value": self._add_to_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_part,
                "on_part_data": self._add_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
            max_header_count=MAX_PART_HEADERS,
            max_header_size=MAX_HEADER_BYTES,
        )

    def feed(self, chunk: bytes) -> Iterator[PartEvent]:
        self._parser.write(chunk)
        events, self._events = self._events, []
        return iter(events)

    def _begin_header(self) -> None:
        self._field.clear()
        self._value.clear()

    def _add_to_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[bytes(self._field).lower()] = bytes(self._value)

    def _begin_part(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name")
        if disposition != b"form-data" or not name:
            raise MalformedRequest("A part of the body has no Content-Disposition: form-data with a name.")
        file_name = options.get(b"filename")
        self._events.append(
            PartBegin(
                name.decode("utf-8", "replace"),
                None if file_name is None else file_name.decode("utf-8", "replace"),
            )
        )

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(PartData(data if end - start == len(data) else data[start:end]))

    def _end_part(self) -> None:
        self._events.append(PartEnd())

    def _end(self) -> None:
        self.finished = True


async def read_parts(content_type: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[PartEvent]:
    """The events of a multipart body, as its chunks come in.

    Raises:
        UnsupportedMedia, MalformedRequest: see `boundary_of`; also a body that breaks the format or stops early.
    """
    try:
        parser = _EventParser(boundary_of(content_type))
        async for chunk in chunks:
            for event in parser.feed(chunk):
                yield event
    except FormParserError as error:
        raise MalformedRequest(f"The multipart body is broken: {error}.") from error
    if not parser.finished:
        raise MalformedRequest("The multipart body stops before its closing boundary.")
