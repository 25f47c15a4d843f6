"""The flows by their reference name: ``from flows.prefect_flow_worker_flow_v2 import pre_etl``."""

from phasewise.flows import cleanup_flow1, cleanup_flow2, final_etl, main_etl, pre_etl, process_table_etl, sub_etl
from phasewise.orchestration.phases import trigger_subflow, wait_for_flow_runs

__all__ = [
    "cleanup_flow1",
    "cleanup_flow2",
    "final_etl",
    "main_etl",
    "pre_etl",
    "process_table_etl",
    "sub_etl",
    "trigger_subflow",
    "wait_for_flow_runs",
]
