"""DIRAC's door: its dictionaries, its words, its way of returning errors, its synchronous coordinators.

Nothing of DIRAC is imported. Its words stay in this package; the rest of the house knows only our own types.
"""

from loadmaster.dirac.dictionaries import environment, from_dirac, job_info, split_wrapper_file, to_dirac
from loadmaster.dirac.extensions import extensions, find_coordinator
from loadmaster.dirac.legacy import EWMSRESC, DiracCoordinator, adapt, is_synchronous
from loadmaster.dirac.status import Statuses, statuses
from loadmaster.dirac.words import MAY_FOLLOW, JobStatus, Major, Minor

__all__ = [
    "EWMSRESC",
    "MAY_FOLLOW",
    "DiracCoordinator",
    "JobStatus",
    "Major",
    "Minor",
    "Statuses",
    "adapt",
    "environment",
    "extensions",
    "find_coordinator",
    "from_dirac",
    "is_synchronous",
    "job_info",
    "split_wrapper_file",
    "statuses",
    "to_dirac",
]
