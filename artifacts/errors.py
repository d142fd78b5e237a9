"""The one error tree of Rankwise. Every class has a stable code and the HTTP status that it becomes.

::

    RankwiseError                     500 internal_error
    ├── RequestInvalid                422 invalid_request        a field of the request is wrong
    │   ├── FileBroken                422 file_broken            a file is not what its format promises
    │   ├── ArchiveRefused            422 archive_refused        bomb, link, escape, nesting, too many entries
    │   ├── FormatUnknown             422 format_unknown         nothing that we recognise as an adapter
    │   ├── ConfigRefused             422 config_refused         adapter_config.json: missing, invalid or not honourable
    │   ├── MergeRefused              422 merge_refused          the adapters can not be merged this way
    │   │   ├── NotMergeable          422 not_mergeable          this adapter type has no exact factor form (DoRA …)
    │   │   ├── BaseMismatch          422 base_model_mismatch    adapters of different base models
    │   │   ├── ShapeMismatch         422 shape_mismatch         the same module with other dimensions
    │   │   └── RankOutOfRange        422 rank_out_of_range      below 1 or above the sum of the ranks
    │   ├── ComposeRefused            422 compose_refused        the image can not be composed this way
    │   ├── ImageFlagged              422 image_flagged          the safety checker took offence at the image
    │   ├── CompositionDiverged       422 composition_diverged   a gradient or a prediction became NaN or infinite
    │   ├── TrainingDiverged          422 training_diverged      the loss became NaN or infinite
    │   ├── TransferRefused           422 transfer_refused       the adapter can not be moved to that base model
    │   │   └── TransferStarved       422 transfer_starved       too few generated inputs were accepted
    │   └── IdempotencyKeyReused      422 idempotency_key_reused same key, other body
    ├── MalformedRequest              400 malformed_request      not parseable as HTTP, JSON or multipart
    ├── Unauthenticated               401 unauthenticated
    ├── ScopeMissing                  403 scope_missing
    ├── NotFound                      404 not_found
    ├── Conflict                      409 conflict
    │   ├── IdempotencyInFlight       409 idempotency_in_flight  the first request with this key still runs
    │   └── StateConflict             409 state_conflict         e.g. cancelling a job that has ended
    │       └── UploadOffsetMismatch  409 upload_offset_mismatch an append begins at another byte than the next one
    ├── Gone                          410 gone                   it has ended, and takes nothing any more
    ├── PreconditionFailed            412 precondition_failed    If-Match names another version than the present one
    ├── TooLarge                      413 too_large
    ├── UnsupportedMedia              415 unsupported_media
    │   └── PickleRefused             415 pickle_refused         a pickle is never loaded here
    ├── RangeInvalid                  416 range_invalid
    ├── QueueFull                     429 queue_full             too many jobs wait in the whole service
    ├── QuotaExceeded                 429 quota_exceeded         a limit of the caller's own key: jobs or stored bytes
    ├── BlobMissing                   500 blob_missing           a row names bytes that the blob store does not hold
    ├── BlobCorrupt                   500 blob_corrupt           the bytes do not have the digest that names them
    ├── ReloadMismatch                500 reload_mismatch        a written adapter did not read back as it was computed
    ├── DatabaseUnavailable           503 database_unavailable
    ├── BlobStoreUnavailable          503 blob_store_unavailable
    ├── RemoteUnavailable             503 remote_unavailable     a hub or another server that files come from or go to
    ├── DiskFull                      507 disk_full
    └── JobInterrupted                500 job_interrupted        raised inside an attempt that must stop
        ├── AttemptCancelled          500 job_cancelled          by the user
        └── AttemptStale              500 attempt_stale          a newer attempt owns the job (fencing)

Nothing else is raised across a room's border on purpose; anything else that is, is a bug and becomes 500.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class FieldError:
    """One thing that is wrong, and where: `pointer` is a JSON pointer, or a file name or tensor key."""

    pointer: str
    message: str


class RankwiseError(Exception):
    """Base of all errors.

    Args:
        detail: what was wrong, with the offending value; written for the person who sent it.
        hint: what to do about it.
        errors: the single findings, when there are several.
        retry_after: seconds after which the same request may succeed; becomes the `Retry-After` header.
    """

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"

    def __init__(
        self,
        detail: str,
        *,
        hint: str | None = None,
        errors: Iterable[FieldError] = (),
        retry_after: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.hint = hint
        self.errors = tuple(errors)
        self.retry_after = retry_after


class RequestInvalid(RankwiseError):
    code, status, title = "invalid_request", 422, "The request is not valid"


class FileBroken(RequestInvalid):
    code, title = "file_broken", "The file is broken"


class ArchiveRefused(RequestInvalid):
    code, title = "archive_refused", "The archive is refused"


class FormatUnknown(RequestInvalid):
    code, title = "format_unknown", "Not a known adapter format"


class ConfigRefused(RequestInvalid):
    code, title = "config_refused", "The adapter's configuration is refused"


class MergeRefused(RequestInvalid):
    code, title = "merge_refused", "These adapters can not be merged this way"


class NotMergeable(MergeRefused):
    code, title = "not_mergeable", "The adapter type can not be merged"


class BaseMismatch(MergeRefused):
    code, title = "base_model_mismatch", "The adapters belong to different base models"


class ShapeMismatch(MergeRefused):
    code, title = "shape_mismatch", "The adapters' shapes disagree"


class RankOutOfRange(MergeRefused):
    code, title = "rank_out_of_range", "The rank is out of range"


class ComposeRefused(RequestInvalid):
    code, title = "compose_refused", "The image can not be composed this way"


class ImageFlagged(RequestInvalid):
    code, title = "image_flagged", "The safety checker flagged the image"


class CompositionDiverged(RequestInvalid):
    code, title = "composition_diverged", "The composition diverged"


class TrainingDiverged(RequestInvalid):
    code, title = "training_diverged", "The training diverged"


class TransferRefused(RequestInvalid):
    code, title = "transfer_refused", "The adapter can not be transferred this way"


class TransferStarved(TransferRefused):
    code, title = "transfer_starved", "Too few generated inputs were accepted"


class IdempotencyKeyReused(RequestInvalid):
    code, title = "idempotency_key_reused", "The idempotency key was used for another request"


class MalformedRequest(RankwiseError):
    code, status, title = "malformed_request", 400, "The request could not be parsed"


class Unauthenticated(RankwiseError):
    code, status, title = "unauthenticated", 401, "An API key is needed"


class ScopeMissing(RankwiseError):
    code, status, title = "scope_missing", 403, "The API key does not allow this"


class NotFound(RankwiseError):
    code, status, title = "not_found", 404, "Not found"


class Conflict(RankwiseError):
    code, status, title = "conflict", 409, "Conflict"


class IdempotencyInFlight(Conflict):
    code, title = "idempotency_in_flight", "The first request with this idempotency key still runs"


class StateConflict(Conflict):
    code, title = "state_conflict", "Not possible in this state"


class UploadOffsetMismatch(StateConflict):
    """An append to an upload begins at byte `offset`; the next one is `expected`."""

    code, title = "upload_offset_mismatch", "The upload goes on at another byte"

    def __init__(self, expected: int, offset: int) -> None:
        super().__init__(
            f"the upload has {expected} bytes, and this append begins at byte {offset}",
            hint=f"Send the bytes from {expected} on, with Upload-Offset: {expected}.",
            errors=[FieldError("/header/Upload-Offset", f"must be {expected}")],
        )
        self.expected = expected


class Gone(RankwiseError):
    code, status, title = "gone", 410, "It has ended"


class PreconditionFailed(RankwiseError):
    code, status, title = "precondition_failed", 412, "The thing has changed meanwhile"


class TooLarge(RankwiseError):
    code, status, title = "too_large", 413, "Too large"


class UnsupportedMedia(RankwiseError):
    code, status, title = "unsupported_media", 415, "Unsupported media type"


class PickleRefused(UnsupportedMedia):
    code, title = "pickle_refused", "Pickles are refused"


class RangeInvalid(RankwiseError):
    code, status, title = "range_invalid", 416, "The range can not be satisfied"


class QueueFull(RankwiseError):
    code, status, title = "queue_full", 429, "The queue is full"


class QuotaExceeded(RankwiseError):
    code, status, title = "quota_exceeded", 429, "A limit of the API key is reached"


class BlobMissing(RankwiseError):
    code, title = "blob_missing", "Stored bytes are missing"


class BlobCorrupt(RankwiseError):
    code, title = "blob_corrupt", "Stored bytes are corrupt"


class ReloadMismatch(RankwiseError):
    code, title = "reload_mismatch", "The written adapter did not read back as computed"


class DatabaseUnavailable(RankwiseError):
    code, status, title = "database_unavailable", 503, "The database is not available"


class BlobStoreUnavailable(RankwiseError):
    code, status, title = "blob_store_unavailable", 503, "The blob store is not available"


class RemoteUnavailable(RankwiseError):
    code, status, title = "remote_unavailable", 503, "Another server is not available"


class DiskFull(RankwiseError):
    code, status, title = "disk_full", 507, "The disk is full"


class JobInterrupted(RankwiseError):
    code, title = "job_interrupted", "The attempt was interrupted"


class AttemptCancelled(JobInterrupted):
    code, title = "job_cancelled", "The job was cancelled"


class AttemptStale(JobInterrupted):
    code, title = "attempt_stale", "A newer attempt owns the job"
