"""DIRAC's door: its dictionaries, its words, its way of returning errors, its synchronous coordinators.

Nothing of DIRAC is imported. Its words stay in this package; the rest of the house knows only our own types.
"""

from loadmaster.dirac.dictionaries import environment, from_dirac, job_info, split_wrapper_file, to_dirac
from loadmaster.dirac.extensions import extensions, find_coordinator
from loadmaster.dirac.jdl import is_jdl, job_from_jdl, job_to_jdl, read_jdl
from loadmaster.dirac.legacy import EWMSRESC, DiracCoordinator, adapt, is_synchronous
from loadmaster.dirac.parameters import Parameters, node_parameters
from loadmaster.dirac.report import ExitCode, accounting, exit_code, heartbeat
from loadmaster.dirac.requests import failover_operations, request_json
from loadmaster.dirac.status import Statuses, statuses
from loadmaster.dirac.words import MAY_FOLLOW, JobStatus, Major, Minor

__all__ = [
    "EWMSRESC",
    "MAY_FOLLOW",
    "DiracCoordinator",
    "ExitCode",
    "JobStatus",
    "Major",
    "Minor",
    "Parameters",
    "Statuses",
    "accounting",
    "adapt",
    "environment",
    "exit_code",
    "extensions",
    "failover_operations",
    "find_coordinator",
    "from_dirac",
    "heartbeat",
    "is_jdl",
    "is_synchronous",
    "job_from_jdl",
    "job_info",
    "job_to_jdl",
    "node_parameters",
    "read_jdl",
    "request_json",
    "split_wrapper_file",
    "statuses",
    "to_dirac",
]
