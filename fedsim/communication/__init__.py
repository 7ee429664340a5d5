"""Upload schedules, DynamicFL's group search, and cost in bytes."""

from fedsim.communication.compression import Compression, ErrorFeedback, Quantised, Sign, TopK
from fedsim.communication.cost import Payload, Traffic, summary_bytes, traffic
from fedsim.communication.dynamic import Bytes, DynamicFL, FastestGroup, RandomGroup, TwoLevel
from fedsim.communication.groups import Candidates, DynaComm, Exact, Search, choose_group, group_distance
from fedsim.communication.schedules import Cohort, FedSGD, Intervals, Schedule, Uniform, UploadSchedule, sync_points

__all__ = [
    "Bytes",
    "Candidates",
    "Cohort",
    "Compression",
    "DynaComm",
    "DynamicFL",
    "ErrorFeedback",
    "Exact",
    "FastestGroup",
    "FedSGD",
    "Intervals",
    "Payload",
    "Quantised",
    "RandomGroup",
    "Schedule",
    "Search",
    "Sign",
    "TopK",
    "Traffic",
    "TwoLevel",
    "Uniform",
    "UploadSchedule",
    "choose_group",
    "group_distance",
    "summary_bytes",
    "sync_points",
    "traffic",
]
