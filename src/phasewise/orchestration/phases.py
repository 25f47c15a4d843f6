"""Run phases: trigger their steps, wait for all of them, pass failures up and cancellations down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from phasewise.errors import FlowRunsFailed
from phasewise.orchestration.flow_runs import FlowRuns, RunRequest, current_logger
from phasewise.orchestration.prefect_runs import current_flow_runs
from phasewise.outcomes import PhaseOutcome, RunOutcome, StepOutcome
from phasewise.project.pipeline import BATCH, FanOut, Phase, Step, validate_phases


async def trigger_subflow(
    deployment: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    key: str | None = None,
    flow_runs: FlowRuns | None = None,
) -> str:
    """Start one flow run of *deployment* (``flow name/deployment name``) and return its id without waiting.

    Called inside a flow, the run becomes a child of it. With a *key* a second call returns the same run; one that
    did not complete is scheduled again.

    Raises:
        DeploymentMissing: there is no such deployment.
    """
    request = RunRequest(deployment=deployment, parameters=parameters or {}, name=name, key=key)
    [run_id] = await (flow_runs or current_flow_runs()).submit([request])
    current_logger().info("Triggered subflow %s (run_id: %s)", deployment, run_id)
    return run_id


async def wait_for_flow_runs(
    run_ids: Sequence[str],
    *,
    timeout: float | None = None,
    on_failure: Literal["wait", "cancel"] = "wait",
    crash_retries: int = 0,
    flow_runs: FlowRuns | None = None,
) -> list[StepOutcome]:
    """Wait until every run is final; return their outcomes in the order of *run_ids*.

    ``on_failure="cancel"`` cancels the others as soon as one did not complete. A run that crashed is run again up to
    *crash_retries* times before it counts. *timeout* is in seconds.

    Raises:
        FlowRunsFailed: at least one did not complete; it names each with its state, message and id.
        TimeoutError: not all of them were final in time; they keep running.
    """
    runs = flow_runs or current_flow_runs()
    outcomes: dict[str, StepOutcome] = {}
    is_cancelled = False
    async with asyncio.timeout(timeout):
        async for outcome in _watch(runs, run_ids, crash_retries):
            outcomes[outcome.run_id] = outcome
            if on_failure == "cancel" and not outcome.is_completed and not is_cancelled:
                is_cancelled = True
                await runs.cancel([run_id for run_id in run_ids if run_id not in outcomes])
    in_order = [outcomes[run_id] for run_id in run_ids]
    failed = [outcome for outcome in in_order if not outcome.is_completed]
    if failed:
        raise FlowRunsFailed(failed)
    return in_order


async def run_phases(
    phases: Sequence[Phase],
    *,
    batch: str,
    timeout: float | None = None,
    crash_retries: int = 1,
    flow_runs: FlowRuns | None = None,
) -> RunOutcome:
    """Run *phases* one after another; a phase starts only when every step of the one before has completed.

    *timeout* (seconds) bounds all phases together: steps that are still on their way then are cancelled and count
    as TimedOut.

    Raises:
        PipelineInvalid: the phases cannot run as declared; nothing was started.
        FlowRunsFailed: steps did not complete; no later phase was started.
    """
    validate_phases(phases)
    logger = current_logger()
    deadline = None if timeout is None else Deadline(timeout=timeout, at=time.monotonic() + timeout)
    done: list[PhaseOutcome] = []
    for number, phase in enumerate(_name_phases(phases), start=1):
        names = _join_names([step.name for step in phase.steps])
        logger.info("Phase %d: Starting %s%s...", number, names, " in parallel" if len(phase.steps) > 1 else "")
        started = await start_phase(
            phase, batch=batch, crash_retries=crash_retries, flow_runs=flow_runs, deadline=deadline
        )
        done.append(await started.wait())
        logger.info("Phase %d completed: %s finished", number, names)
    return RunOutcome(batch=batch, phases=done)


@dataclass(frozen=True, kw_only=True)
class Deadline:
    """When all phases of a pipeline together must have ended."""

    #: The pipeline's own timeout, in seconds.
    timeout: float
    #: The end of it, on the clock of ``time.monotonic``.
    at: float


async def start_phase(
    phase: Phase,
    *,
    batch: str,
    crash_retries: int = 1,
    flow_runs: FlowRuns | None = None,
    deadline: Deadline | None = None,
) -> StartedPhase:
    """Trigger the steps of one phase and return at once; ``await started.wait()`` waits for them."""
    runs = flow_runs or current_flow_runs()
    requests = [
        replace(one, phase=phase.name or None) for step in phase.steps for one in plan_requests(step, batch=batch)
    ]
    origins = dict(zip(await runs.submit(requests), requests, strict=True))
    for run_id, request in origins.items():
        current_logger().info("Triggered subflow %s (run_id: %s)", request.deployment, run_id)
    return StartedPhase(phase=phase, origins=origins, crash_retries=crash_retries, flow_runs=runs, deadline=deadline)


@dataclass(kw_only=True)
class StartedPhase:
    """A phase whose flow runs are on their way."""

    phase: Phase
    #: Run id → what it was triggered with; in the order of triggering.
    origins: Mapping[str, RunRequest]
    flow_runs: FlowRuns
    crash_retries: int = 1
    deadline: Deadline | None = None
    #: Run id → which timeout it was that ended it.
    _timed_out: dict[str, str] = field(default_factory=dict)

    async def wait(self) -> PhaseOutcome:
        """Wait until all steps are final.

        When this is interrupted (the parent is cancelled, or fails for a reason of its own) the steps that are
        still on their way are cancelled too, so that nothing outlives its parent.

        Raises:
            FlowRunsFailed: more steps did not complete than the phase allows.
        """
        pending = set(self.origins)
        asked: set[str] = set()
        outcomes: dict[str, StepOutcome] = {}
        async with self._cancelling(pending), self._enforcing_timeouts(pending):
            async for final in _watch(self.flow_runs, list(self.origins), self.crash_retries):
                pending.discard(final.run_id)
                outcomes[final.run_id] = outcome = self._name(final)
                if self.phase.on_failure == "cancel" and self._is_over_budget(outcomes.values(), outcome.step):
                    # Each once: those that end because of it pass through here too.
                    if new := [run_id for run_id in pending if run_id not in asked]:
                        await self.flow_runs.cancel(new)
                    asked |= pending
        return self._conclude([outcomes[run_id] for run_id in self.origins])

    @asynccontextmanager
    async def _cancelling(self, pending: set[str]) -> AsyncIterator[None]:
        try:
            yield
        except BaseException:
            await asyncio.shield(self.flow_runs.cancel(list(pending)))
            raise

    @asynccontextmanager
    async def _enforcing_timeouts(self, pending: set[str]) -> AsyncIterator[None]:
        clocks = [
            asyncio.create_task(self._enforce(step.timeout, [step], f"its timeout of {step.timeout:g} s", pending))
            for step in self.phase.steps
            if step.timeout is not None
        ]
        if self.deadline is not None:
            left = max(self.deadline.at - time.monotonic(), 0)
            name = f"the timeout of {self.deadline.timeout:g} s that the whole pipeline has"
            clocks.append(asyncio.create_task(self._enforce(left, self.phase.steps, name, pending)))
        try:
            yield
        finally:
            for clock in clocks:
                clock.cancel()
                with suppress(asyncio.CancelledError):
                    await clock

    async def _enforce(self, seconds: float, steps: Sequence[Step], name: str, pending: set[str]) -> None:
        await asyncio.sleep(seconds)
        names = {step.name for step in steps}
        late = [run_id for run_id in pending if self.origins[run_id].step in names]
        self._timed_out = dict.fromkeys(late, name) | self._timed_out  # the first one is what ended it
        await self.flow_runs.cancel(late)

    def _name(self, final: StepOutcome) -> StepOutcome:
        """Say whether it was its timeout that ended *final*, and of which step it is: a lost run does not know."""
        origin = self.origins[final.run_id]
        outcome = replace(final, phase=origin.phase, step=origin.step, item=origin.item)
        timeout = self._timed_out.get(final.run_id)
        if timeout is None or outcome.is_completed:
            return outcome
        message = f"It exceeded {timeout} and was cancelled."
        return replace(outcome, state_type="FAILED", state_name="TimedOut", message=message)

    def _is_over_budget(self, outcomes: Iterable[StepOutcome], name: str | None) -> bool:
        step = next(step for step in self.phase.steps if step.name == name)
        failed = [outcome for outcome in outcomes if outcome.step == name and not outcome.is_completed]
        if not isinstance(step, FanOut):
            return bool(failed)
        return len({step.find_whole(outcome.item) for outcome in failed if outcome.item}) > step.count_allowed()

    def _conclude(self, outcomes: list[StepOutcome]) -> PhaseOutcome:
        over = {step.name for step in self.phase.steps if self._is_over_budget(outcomes, step.name)}
        failed = [outcome for outcome in outcomes if not outcome.is_completed]
        if over:
            raise FlowRunsFailed([outcome for outcome in failed if outcome.step in over])
        for outcome in failed:
            current_logger().warning("Within the failure budget: %s", outcome.describe())
        settled = [outcome if outcome.is_completed else replace(outcome, is_tolerated=True) for outcome in outcomes]
        return PhaseOutcome(name=self.phase.name, steps=settled)


def plan_requests(step: Step, *, batch: str) -> list[RunRequest]:
    """Return the flow runs of *step*: one, or one per item of a fan-out, each with its own key."""
    prefix = f"{batch}/{step.name}"
    parameters = {key: batch if value == BATCH else value for key, value in step.parameters.items()}
    whole = RunRequest(deployment=step.deployment, name=step.flow_name, key=prefix, group=prefix, step=step.name)
    if not isinstance(step, FanOut):
        return [replace(whole, parameters=parameters)]
    return [
        replace(
            whole,
            name=f"{step.flow_name}/{item}",
            parameters={**parameters, **step.find_parameters(item)},
            key=f"{prefix}/{item}",
            item=item,
        )
        for item in step.items
    ]


def _name_phases(phases: Sequence[Phase]) -> list[Phase]:
    """Return *phases* with a name each: the number tells those apart that have none or share one."""
    names = [phase.name for phase in phases]
    return [
        replace(phase, name=f"{phase.name or 'Phase'} {number}")
        if names.count(phase.name) > 1 or not phase.name
        else phase
        for number, phase in enumerate(phases, start=1)
    ]


async def _watch(runs: FlowRuns, run_ids: Sequence[str], crash_retries: int) -> AsyncIterator[StepOutcome]:
    """Yield the outcome of each run once; one that crashed is run again first, *crash_retries* times."""
    retries: dict[str, int] = {}
    pending = list(dict.fromkeys(run_ids))
    while pending:
        again: list[str] = []
        async for outcome in runs.watch(pending):
            run_id = outcome.run_id
            if outcome.state_type == "CRASHED" and retries.get(run_id, 0) < crash_retries:
                retries[run_id] = retries.get(run_id, 0) + 1
                current_logger().warning("Running it again: %s", outcome.describe())
                await runs.restart([run_id])
                again.append(run_id)
            else:
                _log_outcome(outcome)
                yield outcome
        pending = again


def _log_outcome(outcome: StepOutcome) -> None:
    if outcome.is_completed:
        current_logger().info("Flow run %s completed successfully", outcome.run_id)
    else:
        current_logger().error("Flow run %s did not complete: %s", outcome.run_id, outcome.describe())


def _join_names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def describe_failures(fan_out: FanOut, failed: Sequence[StepOutcome]) -> dict[str, str]:
    """Return why each whole thing failed that an item in *failed* is, or is a part of: a part gives up the whole."""
    reasons: dict[str, list[str]] = {}
    for run in failed:
        reasons.setdefault(fan_out.find_whole(run.item or ""), []).append(run.describe())
    return {whole: "; ".join(lines) for whole, lines in reasons.items()}
