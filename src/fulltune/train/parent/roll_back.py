"""Going back to the last healthy checkpoint when the training went wrong: a pure function.

The same rows from the same weights would spike again, or not: spikes come from weights and rows together (PaLM's
authors skipped 200 to 500 batches, and the same rows did no harm later). So the rows that follow come in another order.
Where the trouble comes again the rate is to blame, and is halved as well.
"""

from __future__ import annotations

from fulltune.records.plan import Plan
from fulltune.records.training import Outcome
from fulltune.train.loop.guards import rate_factor, without_cause
from fulltune.train.parent.next_attempt import NextAttempt


def roll_back(plan: Plan, most: int, outcome: Outcome, healthy_step: int) -> NextAttempt | None:
    """The attempt after one that spiked; None: going back does not help, or was done often enough.

    Args:
        plan: Of the attempt that spiked.
        most: Rollbacks allowed in all.
        outcome: The attempt's.
        healthy_step: Of the last checkpoint from before the trouble; 0: there is none, and the run begins anew.
    """
    since = outcome.trouble_since
    if outcome.status != "spiked" or since is None or len(plan.rollbacks) >= most:
        return None
    if since <= 1:  # nothing was ever well
        return None
    rollbacks = (*plan.rollbacks, healthy_step)
    lower = rate_factor(rollbacks)
    at = "at the same rate" if lower == 1 else f"at {lower:g} of the planned rate ({plan.learning_rate * lower:.3g})"
    going = f"back to the checkpoint of step {healthy_step:,}, on" if healthy_step else "starting over"
    said = (
        f"{without_cause(outcome.reason)}; {going} {at} with the rows in another order "
        f"(rollback {len(rollbacks)} of at most {most})"
    )
    return NextAttempt(plan.model_copy(update={"rollbacks": rollbacks}), resume=healthy_step > 0, reason=said)
