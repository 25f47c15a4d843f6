"""Run phases: trigger their steps, wait for all of them, pass failures up."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from phasewise.errors import FlowRunsFailed
from phasewise.flow_runs import FlowRuns, PrefectFlowRuns, RunRequest, current_logger
from phasewise.outcomes import PhaseOutcome, RunOutcome, StepOutcome
from phasewise.pipeline import BATCH, FanOut, Phase, Step, validate_phases


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
    [run_id] = await (flow_runs or PrefectFlowRuns()).submit([request])
    current_logger().info("Triggered subflow %s (run_id: %s)", deployment, run_id)
    return run_id


async def wait_for_flow_runs(
    run_ids: Sequence[str],
    *,
    timeout: float | None = None,
    on_failure: Literal["wait", "cancel"] = "wait",
    flow_runs: FlowRuns | None = None,
) -> list[StepOutcome]:
    """Wait until every run is final; return their outcomes in the order of *run_ids*.

    ``on_failure="cancel"`` cancels the others as soon as one did not complete. *timeout* is in seconds.

    Raises:
        FlowRunsFailed: at least one did not complete; it names each with its state, message and id.
        TimeoutError: not all of them were final in time; they go on running.
    """
    runs = flow_runs or PrefectFlowRuns()
    outcomes: dict[str, StepOutcome] = {}
    async with asyncio.timeout(timeout):
        async for outcome in runs.watch(run_ids):
            outcomes[outcome.run_id] = outcome
            _log_outcome(outcome)
            if on_failure == "cancel" and not outcome.is_completed:
                await runs.cancel([run_id for run_id in run_ids if run_id not in outcomes])
    in_order = [outcomes[run_id] for run_id in run_ids]
    failed = [outcome for outcome in in_order if not outcome.is_completed]
    if failed:
        raise FlowRunsFailed(failed)
    return in_order


async def run_phases(
    phases: Sequence[Phase], *, batch: str, flow_runs: FlowRuns | None = None, first_number: int = 1
) -> RunOutcome:
    """Run *phases* one after another; a phase starts only when every step of the one before has completed.

    Raises:
        PipelineInvalid: the phases cannot run as declared; nothing was started.
        FlowRunsFailed: steps did not complete; no later phase was started.
    """
    validate_phases(phases)
    logger = current_logger()
    done: list[PhaseOutcome] = []
    for number, phase in enumerate(phases, start=first_number):
        names = _join_names([step.name for step in phase.steps])
        parallel = " in parallel" if len(phase.steps) > 1 else ""
        logger.info("Phase %d: Starting %s%s...", number, names, parallel)
        done.append(await run_phase(phase, batch=batch, flow_runs=flow_runs))
        logger.info("Phase %d completed: %s finished", number, names)
    return RunOutcome(batch=batch, phases=done)


async def run_phase(phase: Phase, *, batch: str, flow_runs: FlowRuns | None = None) -> PhaseOutcome:
    """Run the steps of one phase in parallel and wait for all of them.

    Raises:
        FlowRunsFailed: steps did not complete.
    """
    started = await start_phase(phase, batch=batch, flow_runs=flow_runs)
    return await started.wait()


async def start_phase(phase: Phase, *, batch: str, flow_runs: FlowRuns | None = None) -> StartedPhase:
    """Trigger the steps of one phase and return at once; ``await started.wait()`` waits for them."""
    runs = flow_runs or PrefectFlowRuns()
    planned = [(step, request) for step in phase.steps for request in plan_requests(step, batch=batch)]
    run_ids = await runs.submit([request for _, request in planned])
    for (_, request), run_id in zip(planned, run_ids, strict=True):
        current_logger().info("Triggered subflow %s (run_id: %s)", request.deployment, run_id)
    steps = {run_id: step.name for (step, _), run_id in zip(planned, run_ids, strict=True)}
    return StartedPhase(phase=phase, steps=steps, flow_runs=runs)


@dataclass(frozen=True, kw_only=True)
class StartedPhase:
    """A phase whose flow runs are on their way."""

    phase: Phase
    #: Run id → name of its step, in the order of their triggering.
    steps: Mapping[str, str]
    flow_runs: FlowRuns

    async def wait(self) -> PhaseOutcome:
        """Wait until all steps are final.

        When this is interrupted (the parent is cancelled, or fails for a reason of its own) the steps that are
        still on their way are cancelled too, so that nothing outlives its parent.

        Raises:
            FlowRunsFailed: steps did not complete.
        """
        run_ids = list(self.steps)
        try:
            outcomes = await wait_for_flow_runs(run_ids, on_failure=self.phase.on_failure, flow_runs=self.flow_runs)
        except FlowRunsFailed:
            raise
        except BaseException:
            await asyncio.shield(self.flow_runs.cancel(run_ids))
            raise
        named = [replace(outcome, step=self.steps[outcome.run_id]) for outcome in outcomes]
        return PhaseOutcome(name=self.phase.name, steps=named)


def plan_requests(step: Step, *, batch: str) -> list[RunRequest]:
    """Return the flow runs of *step*: one, or one per item of a fan-out, each with a key that is its own."""
    prefix = f"{batch}/{step.name}"
    parameters = {key: batch if value == BATCH else value for key, value in step.parameters.items()}
    if not isinstance(step, FanOut):
        return [
            RunRequest(deployment=step.deployment, name=step.flow_name, parameters=parameters, key=prefix, group=prefix)
        ]
    return [
        RunRequest(
            deployment=step.deployment,
            name=f"{step.flow_name}/{item}",
            parameters=parameters | {step.over: item},
            key=f"{prefix}/{item}",
            group=prefix,
        )
        for item in step.items
    ]


def _log_outcome(outcome: StepOutcome) -> None:
    if outcome.is_completed:
        current_logger().info("Flow run %s completed successfully", outcome.run_id)
    else:
        current_logger().error("Flow run %s did not complete: %s", outcome.run_id, outcome.describe())


def _join_names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
