"""What a transfer costs before it runs: the most tokens, from its options; and seconds, from those that ran before."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.schemas.fleets import TransferCost
from storage.tables import JobRow, TransferRow
from transfer.options import DistilOptions, LorasuiteOptions, SeedsOnlyOptions, TransferOptions, TransLoraOptions

ARMS = 3
"""Source, untouched target and transferred adapter are measured."""
LATEST = 20


def cost_of(
    options: TransferOptions, *, inputs: int = 0, seeds: int = 0, holdout: int = 0, controls: int = 0
) -> TransferCost:
    """The most tokens that a transfer takes.

    Args:
        inputs: rows that were kept, for the methods that answer them.
        seeds: how many the method answers, if it answers those.
        holdout: rows that every arm answers.
        controls: arms beside the usual ones; their own making is not counted.
    """
    asking = options if isinstance(options, DistilOptions) else DistilOptions()
    items = holdout
    generated = scored = answered = trained = 0
    if isinstance(options, TransLoraOptions):
        items = holdout or options.held_out
        generated = options.candidates * options.input_tokens
        answers = options.ranked if options.filter == "excess" else options.rows
        if options.filter == "tuneshift_kd":
            answers = options.candidates  # each is answered before it is judged
        answered = answers * options.answer_tokens
        row = options.input_tokens + options.answer_tokens
        # excess and tuneshift_kd read every answer twice: with the adapter, and without
        scored = {"none": 0, "discriminator": generated}.get(options.filter, 2 * answers * row)
        trained = _trained(options, options.rows - options.held_out, row)
    elif isinstance(options, DistilOptions):
        rows = seeds if isinstance(options, SeedsOnlyOptions) else inputs or seeds
        if isinstance(options, LorasuiteOptions):
            rows = min(rows, options.samples)
        answered = rows * options.answer_tokens
        trained = _trained(options, rows, options.max_length)
    measured = items * asking.answer_tokens * (ARMS + controls) if items else 0
    return TransferCost(
        generated_tokens=generated,
        scored_tokens=scored,
        answered_tokens=answered,
        trained_tokens=trained,
        measured_tokens=measured,
    )


def total_cost(costs: list[TransferCost]) -> TransferCost:
    """All of them together."""
    return TransferCost(**{name: sum(getattr(cost, name) for cost in costs) for name in TransferCost.model_fields})


def mean_seconds(session: Session, source_model: str, target_model: str, method: str) -> tuple[float | None, int]:
    """How long the newest transfers between two base models by a method ran, and how many those are."""
    statement = (
        select(JobRow.started_at, JobRow.finished_at)
        .join(TransferRow, TransferRow.job_id == JobRow.id)
        .where(
            TransferRow.source_model == source_model,
            TransferRow.target_model == target_model,
            TransferRow.method == method,
            JobRow.state == "succeeded",
        )
        .order_by(TransferRow.created_at.desc())
        .limit(LATEST)
    )
    took = [(end - start).total_seconds() for start, end in session.execute(statement) if start and end]
    return (sum(took) / len(took) if took else None), len(took)


def _trained(options: DistilOptions, rows: int, longest: int) -> int:
    """Every row at its longest, as often as it is seen."""
    length = min(longest, options.max_length)
    training = options.training
    return training.steps_for(rows) * training.batch_size * training.gradient_accumulation * length
